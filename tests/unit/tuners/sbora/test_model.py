"""SBoRA in a whole model: several tasks in one base, saving and loading, checkpointing, two processes."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rankbits import SboraConfig
from rankbits.tuners.sbora import allocate, sbora_layers, task_configs

SOURCE = Path(__file__).resolve().parents[4] / "src"
VARIANTS = ["fa", "fb"]
BASE = "nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))"


def _task(r: int, variant: str = "fa", **settings) -> SboraConfig:
    return SboraConfig(
        **{"r": r, "variant": variant, "target_modules": ["0", "2"], "init_weights": False, "disjoint": True} | settings
    )


def _indices(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    return {
        name.removeprefix("base_model.model."): {adapter: layer.indices_of(adapter) for adapter in layer.variant}
        for name, layer in sbora_layers(model)
    }


def _fresh(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_tasks_added_one_by_one_get_what_a_joint_allocation_gives(mlp, variant) -> None:
    model = get_peft_model(mlp, _task(3, variant), adapter_name="one")
    model.add_adapter("two", _task(2, variant))
    model.add_adapter("three", _task(1, variant))
    ranks = {"one": 3, "two": 2, "three": 1}
    sizes = {"0": 12, "2": 10} if variant == "fa" else {"0": 10, "2": 6}
    assert _indices(model) == {name: allocate(ranks, size, seed=0, layer=name) for name, size in sizes.items()}
    freed = {name: chosen["two"] for name, chosen in _indices(model).items()}
    model.delete_adapter("two")
    model.add_adapter("four", _task(2, variant))
    assert {name: chosen["four"] for name, chosen in _indices(model).items()} == freed


def test_a_task_that_does_not_fit_leaves_no_trace(mlp, rows) -> None:
    model = get_peft_model(mlp, _task(6), adapter_name="one")
    expected, before = model(rows), {name: p.requires_grad for name, p in model.named_parameters()}
    # It fits the first layer, with 6 of 12 inputs left, and not the second, with 4 of 10.
    with pytest.raises(ValueError, match=r"'two' asks for r=5 rows or columns of '2', of which 4 are left"):
        model.add_adapter("two", _task(5))
    assert list(model.peft_config) == ["one"]
    assert all(list(chosen) == ["one"] for chosen in _indices(model).values())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert torch.equal(model(rows), expected)
    model.add_adapter("two", _task(4))


def test_an_adapter_that_came_first_keeps_what_it_has_from_those_that_may_share(mlp) -> None:
    model = get_peft_model(mlp, _task(5), adapter_name="one")
    model.add_adapter("sharing", _task(5, disjoint=False))
    model.add_adapter("also sharing", _task(5, disjoint=False))
    for chosen in _indices(model).values():
        assert not set(chosen["one"]) & set(chosen["sharing"])
        assert chosen["sharing"] == chosen["also sharing"]


def test_adapters_that_may_share_choose_alike_with_one_seed_and_apart_with_two(mlp) -> None:
    model = get_peft_model(mlp, _task(5, disjoint=False), adapter_name="one")
    model.add_adapter("same", _task(5, disjoint=False))
    model.add_adapter("other", _task(5, disjoint=False, seed=1))
    chosen = _indices(model)["0"]
    assert chosen["one"] == chosen["same"] != chosen["other"]
    assert _indices(model)["0"] != _indices(model)["2"]


def test_rows_and_columns_always_meet_so_that_they_cannot_be_disjoint(mlp) -> None:
    model = get_peft_model(mlp, _task(2, "fa"), adapter_name="one")
    said = r"'two' \(variant 'fb'\) and 'one' \(variant 'fa'\) both adapt '0'.*use one variant for both"
    for disjoint in (True, False):
        with pytest.raises(ValueError, match=said):
            model.add_adapter("two", _task(2, "fb", disjoint=disjoint))
    plain = get_peft_model(nn.Sequential(nn.Linear(4, 4)), _task(2, disjoint=False, target_modules=["0"]))
    plain.add_adapter("two", _task(2, "fb", disjoint=False, target_modules=["0"]))
    ((_, layer),) = sbora_layers(plain)
    both = layer.get_delta_weight("default").bool() & layer.get_delta_weight("two").bool()
    assert int(both.sum()) == 2 * 2


def test_tasks_in_different_layers_need_no_room_beside_each_other(mlp) -> None:
    model = get_peft_model(mlp, _task(12, target_modules=["0"]), adapter_name="one")
    model.add_adapter("two", _task(6, "fb", target_modules=["2"]))
    assert {name: sorted(chosen) for name, chosen in _indices(model).items()} == {"0": ["one"], "2": ["two"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tasks_trained_apart_meet_in_one_base(tmp_path, variant, rows) -> None:
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
    state = {name: value.clone() for name, value in base.state_dict().items()}
    configs = task_configs(_task(2, variant), {"one": 2, "two": 3})
    outputs = {}
    for task, config in configs.items():
        apart = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
        apart.load_state_dict(state)
        model = get_peft_model(apart, config)
        outputs[task] = model(rows)
        model.save_pretrained(tmp_path / task)
    model = PeftModel.from_pretrained(base, tmp_path / "two", adapter_name="two")
    model.load_adapter(tmp_path / "one", adapter_name="one")
    for task, expected in outputs.items():
        model.set_adapter(task)
        assert torch.equal(model(rows), expected)
    for chosen in _indices(model).values():
        assert len({*chosen["one"], *chosen["two"]}) == 5


def test_an_adapter_whose_rows_belong_to_another_is_not_loaded(mlp, rows, tmp_path) -> None:
    one = get_peft_model(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)), _task(3))
    one.save_pretrained(tmp_path)
    model = get_peft_model(mlp, _task(3), adapter_name="present")
    expected = model(rows)
    with pytest.raises(
        ValueError, match=r"'late' was saved with rows or columns \[.*\] of 'base_model.model.0'.*'present'"
    ):
        model.load_adapter(tmp_path, adapter_name="late")
    assert list(model.peft_config) == ["present"]
    assert all(list(chosen) == ["present"] for chosen in _indices(model).values())
    assert torch.equal(model(rows), expected)


def test_rows_that_the_base_does_not_have_are_not_loaded(mlp, tmp_path) -> None:
    wide = get_peft_model(nn.Sequential(nn.Linear(200, 10)), _task(3, target_modules=["0"]))
    wide.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"0\.weight was saved as \[10, 200\] and is \[10, 12\] here"):
        PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    save_file({n: v for n, v in stored.items() if "shape" not in n}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="expected distinct numbers below 12: load it onto the base model it was"):
        PeftModel.from_pretrained(mlp, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_saved_adapter_holds_its_indices_and_another_process_computes_the_same(variant, tmp_path, rows) -> None:
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
    torch.save(base.state_dict(), tmp_path / "base.pt")
    model = get_peft_model(base, _task(2, variant), adapter_name="one")
    # Chosen beside another task: alone, the same configuration would choose what that one has.
    model.add_adapter("two", _task(3, variant))
    model.set_adapter("two")
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    torch.save({"x": rows, "y": model(rows).detach()}, tmp_path / "outputs.pt")
    stored = load_file(tmp_path / "two" / "adapter_model.safetensors")
    which = "up" if variant == "fa" else "down"
    kinds = {name.rpartition("sbora_")[2]: value.dtype for name, value in stored.items()}
    assert kinds == {"indices": torch.int64, "shape": torch.int64, which: torch.float32}
    assert len(stored) == 6
    code = f"""
import rankbits, torch
from peft import PeftModel
from torch import nn
outputs = torch.load("outputs.pt")
for low in (False, True):
    base = {BASE}
    base.load_state_dict(torch.load("base.pt"))
    model = PeftModel.from_pretrained(base, "two", low_cpu_mem_usage=low)
    print(torch.equal(model(outputs["x"]), outputs["y"]))
    merged = model.merge_and_unload()
    print(torch.allclose(merged(outputs["x"]), outputs["y"], atol=1e-6))
"""
    answer = _fresh(code, tmp_path)
    assert answer.stdout.split() == ["True"] * 4, answer.stderr


def test_indices_of_a_base_without_weights_are_unknown() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(12, 10))
    model = get_peft_model(base, _task(2, target_modules=["0"]))
    with pytest.raises(ValueError, match="on the meta device: load the base model's weights before"):
        model.add_adapter("two", _task(2, target_modules=["0"]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(bert, batch, variant, use_reentrant) -> None:
    targets = ["query", "value", "dense"]
    config = SboraConfig(r=4, variant=variant, target_modules=targets, init_weights=False, dropout=0.1)
    model = get_peft_model(bert, config).train()
    model.enable_input_require_grads()

    def gradients() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain_loss, plain = gradients()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    loss, checkpointed = gradients()
    assert loss == plain_loss
    assert plain.keys() == checkpointed.keys()
    assert plain
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_learns_with_the_untouched_part_of_every_weight_as_it_was(bert, batch, variant) -> None:
    config = SboraConfig(r=8, variant=variant, target_modules=["query", "value", "dense"], alpha=16.0)
    before = {name: p.detach().clone() for name, p in bert.named_parameters()}
    model = get_peft_model(bert, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The head stays as it is, so that the loss cannot reach zero.
    assert losses[-1] < 0.9 * losses[0]
    chosen = {
        name.removeprefix("base_model.model."): layer.indices_of("default") for name, layer in sbora_layers(model)
    }
    merged = dict(model.merge_and_unload().named_parameters())
    for name, weight in before.items():
        changed = (merged[name] != weight).nonzero()
        layer = name.removesuffix(".weight")
        if layer in chosen and name.endswith(".weight"):
            assert set(changed[:, int(variant == "fa")].tolist()) == set(chosen[layer])
        else:
            assert len(changed) == 0


def test_transformers_loads_and_deletes_adapters_itself(tmp_path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "base")
    inputs = torch.arange(6)[None]
    model = get_peft_model(base, SboraConfig(r=4, variant="fb", init_weights=False, disjoint=True))
    expected = model(inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    without = plain(inputs).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.load_adapter(str(tmp_path / "adapter"), adapter_name="one")
        assert torch.equal(plain(inputs).logits, expected)
        plain.delete_adapter("one")
    assert torch.equal(plain(inputs).logits, without)


PROGRAM = """
import json, sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from peft import get_peft_model
from rankbits import SboraConfig
from rankbits.tuners.sbora import sbora_layers

rank, store, variant = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)).double()
x, y = torch.randn(8, 12).double(), torch.randn(8, 6).double()
torch.manual_seed(100 + rank)  # what is drawn now differs between the processes
model = get_peft_model(base, SboraConfig(r=3, variant=variant, target_modules=["0", "2"]))
single = [layer.indices_of("default") for _, layer in sbora_layers(model)]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
parallel = DistributedDataParallel(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
half = slice(4 * rank, 4 * rank + 4)
for _ in range(3):
    loss = nn.functional.mse_loss(parallel(x[half]), y[half])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.distributed.destroy_process_group()
print(json.dumps({"indices": single, "out": model(x).tolist()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs PyTorch's gloo backend")
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_choose_the_same_and_learn_what_one_would(two_processes, variant) -> None:
    answers = two_processes(PROGRAM, variant, PYTHONPATH=str(SOURCE))
    first, second = (json.loads(printed.strip().splitlines()[-1]) for printed in answers)
    assert first == second
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)).double()
    x, y = torch.randn(8, 12).double(), torch.randn(8, 6).double()
    model = get_peft_model(base, SboraConfig(r=3, variant=variant, target_modules=["0", "2"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(torch.tensor(first["out"]).double(), model(x).detach(), rtol=1e-6, atol=1e-7)
