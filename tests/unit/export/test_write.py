"""The way out: what is refused before anything is written, and that a folder appears whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tiny_adapters import configs, snapshot, unchanged

import rankbits
from rankbits import BayesianLoraConfig, DyloraConfig
from rankbits.errors import ExportError
from rankbits.export import Format, lora, write
from rankbits.export.format import format_of

SOURCE = Path(rankbits.__file__).parents[1]


@pytest.fixture
def model(base, trained):
    return trained(base("linear"), configs()["dylora"])


@pytest.mark.parametrize(
    ("path", "to", "reason"),
    [
        ("out", None, "out has no suffix that names a format: say which with to=..., one of lora, merged"),
        ("out.gguf", None, "suffix stands for 'gguf', is no format that can be written: expected one of lora, merged"),
        ("out", "onnx", "to='onnx' is no format that can be written: expected one of lora, merged"),
        ("out.lora", "", "has no suffix"),
    ],
)
def test_formats_that_are_unknown_are_refused(model, tmp_path, path: str, to: str | None, reason: str) -> None:
    with pytest.raises(ExportError) as refusal:
        rankbits.export(model, tmp_path / path, to)
    assert reason in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_names_the_format_where_nothing_else_does() -> None:
    assert format_of(Path("out.lora"), None) is Format.LORA
    assert format_of(Path("out.lora"), "merged") is Format.MERGED
    assert format_of(Path("out.v1"), "lora") is Format.LORA


def test_a_folder_may_be_empty_or_new_and_those_above_it_are_made(model, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "new"):
        exported = rankbits.export(model, str(path), to="lora")
        assert (exported.path, exported.format, exported.verification) == (path, Format.LORA, None)
        assert (path / "adapter_config.json").is_file()
        assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_nothing_is_overwritten(model, tmp_path, taken: str) -> None:
    path = tmp_path / "out"
    if taken == "folder":
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    else:
        path.write_text("mine")
    with pytest.raises(ExportError, match="choose a new or empty folder"):
        rankbits.export(model, path, to="lora")
    assert (path / "mine.txt" if taken == "folder" else path).read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_half_way_leaves_nothing(model, tmp_path, monkeypatch) -> None:
    def half(model, adapter_name):
        def write(folder: Path) -> None:
            (folder / "adapter_model.safetensors").write_text("half")
            raise OSError("no space left")

        return write

    monkeypatch.setitem(write.WRITERS, Format.LORA, half)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b" / "out", tmp_path / "empty"):
        with pytest.raises(OSError, match="no space left"):
            rankbits.export(model, path, to="lora")
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_computes_something_else_is_refused(model, rows, tmp_path, monkeypatch) -> None:
    factors = lora._factors

    def doubled(layer, adapter_name):
        right = factors(layer, adapter_name)
        return lora.Factors(right.down, right.up, 1.01 * right.scale)

    monkeypatch.setattr(lora, "_factors", doubled)
    with pytest.raises(ExportError, match=r"does not compute what the model does: reloaded with peft .*: largest"):
        rankbits.export(model, tmp_path / "new" / "out", to="lora", example_inputs={"input": rows})
    assert list(tmp_path.iterdir()) == []
    assert rankbits.export(model, tmp_path / "unverified", to="lora").verification is None


def test_several_active_adapters_are_refused(base, tmp_path) -> None:
    model = get_peft_model(base("linear"), DyloraConfig(r=2, target_modules=["0"]), adapter_name="first")
    model.add_adapter("second", DyloraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ExportError, match=r"\['first', 'second'\] are active, expected exactly one"):
        rankbits.export(model, tmp_path / "out", to="lora")


@pytest.mark.parametrize("to", ["lora", "merged"])
@pytest.mark.parametrize("settings", [{}, {"learn_bits": False}], ids=["bits", "ranks alone"])
def test_what_is_not_hardened_is_refused(bert, tmp_path, to: str, settings: dict) -> None:
    model = get_peft_model(bert, BayesianLoraConfig(r=2, target_modules=["query"], **settings))
    with pytest.raises(ExportError, match=r"not fixed yet: call rankbits.harden\(model\)"):
        rankbits.export(model, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_merged_and_disabled_adapters_are_refused(model, tmp_path) -> None:
    model.merge_adapter()
    with pytest.raises(ExportError, match=r"\['default'\] are merged into '0': call model.unmerge_adapter"):
        rankbits.export(model, tmp_path / "out", to="lora")
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ExportError, match=r"of '0' are disabled: call model.enable_adapter_layers"):
        rankbits.export(model, tmp_path / "out", to="lora")


def test_what_is_no_peft_model_is_refused(base, tmp_path) -> None:
    with pytest.raises(ExportError, match="a Sequential was given, expected a PeftModel"):
        rankbits.export(base("linear"), tmp_path / "out", to="lora")


@pytest.mark.parametrize("to", ["lora", "merged"])
@pytest.mark.parametrize("method", ["lora", "dylora"])
def test_neither_writing_nor_verifying_changes_the_model(bert, ids, tmp_path, to: str, method: str) -> None:
    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    lora_config = LoraConfig(init_lora_weights=False, lora_dropout=0.5, **settings)
    config = lora_config if method == "lora" else DyloraConfig(init_weights=False, dropout=0.5, **settings)
    model = get_peft_model(bert, config).train()
    model.get_base_model().bert.eval()
    before = snapshot(model)
    exported = rankbits.export(model, tmp_path / "out", to=to, example_inputs=ids)
    assert unchanged(before, model)
    assert exported.verification.largest_difference <= 1e-6 * exported.verification.largest_output


def test_the_room_and_its_function_are_called_alike() -> None:
    code = """
import sys
import rankbits
{first}
assert callable(rankbits.export)
from rankbits.export.verify import verify
from rankbits import export
import rankbits.export.lora as lora
assert export is rankbits.export is sys.modules["rankbits.export"] and callable(lora.prepare)
try:
    rankbits.export(None, "out", "lora")
except rankbits.errors.ExportError as refusal:
    print(refusal)
"""
    for first in ("rankbits.export", "import rankbits.export.lora", "from rankbits.export import export"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(first=first)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(SOURCE)},
            check=False,
        )
        assert done.stdout.startswith("a NoneType was given, expected a PeftModel"), done.stderr
