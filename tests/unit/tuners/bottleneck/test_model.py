"""Models with bottleneck adapters as PEFT and transformers see them: saving, dtypes, recomputing, learning."""

import subprocess
import sys

import pytest
import tiny_models
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from rankbits import BottleneckConfig
from rankbits.tuners.bottleneck import BottleneckLinear

KINDS = ["houlsby", "pfeiffer", "parallel"]
NOT_ZERO = {"bottleneck_size": 3, "init_weights": False}


def _layers(model: nn.Module) -> list[BottleneckLinear]:
    return [module for module in model.modules() if isinstance(module, BottleneckLinear)]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_loaded_as_it_was_saved(bert, batch, tmp_path, kind, low_cpu_mem_usage) -> None:
    state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    layernorm = {"train_layernorm": kind == "houlsby"}
    model = get_peft_model(bert, BottleneckConfig(kind=kind, modules_to_save=["classifier"], **NOT_ZERO, **layernorm))
    expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    fresh = type(bert)(bert.config)
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_computes_the_same(tmp_path, kind) -> None:
    torch.manual_seed(0)
    base = tiny_models.live(tiny_models.OPT)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, BottleneckConfig(kind=kind, **NOT_ZERO)).eval()
    ids = torch.randint(0, 90, (2, 5))
    torch.save({"ids": ids, "expected": model(input_ids=ids)[0].detach()}, tmp_path / "given.pt")
    model.save_pretrained(tmp_path / "adapter")
    code = """
import rankbits, torch
from peft import PeftModel
from transformers import AutoModel
given = torch.load("given.pt")
model = PeftModel.from_pretrained(AutoModel.from_pretrained("base", attn_implementation="eager"), "adapter").eval()
print(torch.equal(model(input_ids=given["ids"])[0], given["expected"]))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert answer.stdout.splitlines()[-1:] == ["True"], answer.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_adapter_folder(bert, batch, tmp_path, kind) -> None:
    state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    model = get_peft_model(bert, BottleneckConfig(kind=kind, **NOT_ZERO)).eval()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    fresh = type(bert)(bert.config)
    fresh.load_state_dict(state)
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(fresh.eval()(**batch).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_injected_adapters_work_without_a_peft_model(bert, batch, kind) -> None:
    before = bert(**batch).logits
    model = inject_adapter_in_model(BottleneckConfig(kind=kind, **NOT_ZERO), bert).eval()
    assert model is bert
    assert not torch.allclose(model(**batch).logits, before)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "opt", "t5"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_passes_give_the_same_gradients(kind, name, use_reentrant) -> None:
    torch.manual_seed(0)
    values = {**tiny_models.ENCODERS, **tiny_models.DECODERS, **tiny_models.TWO_STACKS}[name]
    model = get_peft_model(tiny_models.live(values), BottleneckConfig(kind=kind, dropout=0.2, **NOT_ZERO)).train()
    model.enable_input_require_grads()
    ids = torch.randint(4, 30, (2, 5))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(**inputs, use_cache=False)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = gradients()
    assert plain.keys() == recomputed.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for key, grad in plain.items():
        torch.testing.assert_close(recomputed[key], grad, rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_bfloat16_base_keeps_its_dtype(bert, batch, kind, autocast_adapter_dtype) -> None:
    config = BottleneckConfig(kind=kind, **NOT_ZERO)
    model = get_peft_model(bert.to(torch.bfloat16), config, autocast_adapter_dtype=autocast_adapter_dtype).train()
    output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    own = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "bottleneck_" in n} == {own}


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_bfloat16(bert, batch, kind) -> None:
    model = get_peft_model(bert, BottleneckConfig(kind=kind, **NOT_ZERO)).eval()
    full = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**batch)
    half.loss.backward()
    torch.testing.assert_close(half.logits.float(), full, rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if "bottleneck_" in n)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_from_the_zero_start_and_the_base_stays(bert, batch, kind) -> None:
    # The head is frozen, so it has to be large enough for the loss to depend on what it reads.
    with torch.no_grad():
        bert.classifier.weight.mul_(30.0)
    model = get_peft_model(bert, BottleneckConfig(kind=kind, bottleneck_size=3)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".bottleneck_" in name}


def test_a_second_adapter_leaves_the_first_as_it_was(bert, batch) -> None:
    model = get_peft_model(bert, BottleneckConfig(kind="pfeiffer", **NOT_ZERO)).eval()
    first = model(**batch).logits
    model.add_adapter("other", BottleneckConfig(kind="parallel", **NOT_ZERO))
    assert torch.equal(model(**batch).logits, first)
    model.set_adapter("other")
    second = model(**batch).logits
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    model.delete_adapter("other")
    assert torch.equal(model(**batch).logits, first)


def test_norms_that_an_adapter_listens_to_are_not_copied() -> None:
    model = get_peft_model(tiny_models.live(tiny_models.LLAMA), BottleneckConfig(kind="pfeiffer", **NOT_ZERO))
    with pytest.raises(
        ValueError, match=r"'layers\.0\.post_attention_layernorm' is to be trained in full, but an adapter"
    ):
        model.add_adapter("norms", BottleneckConfig(train_layernorm=True))
    assert not [name for name, _ in model.named_parameters() if "modules_to_save" in name or ".norms." in name]
    model.delete_adapter("default")
    model.add_adapter("norms", BottleneckConfig(train_layernorm=True))
    assert [name for name, _ in model.named_parameters() if "modules_to_save.norms" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_equals_a_whole_pass(kind) -> None:
    torch.manual_seed(0)
    base = tiny_models.live(tiny_models.LLAMA, tiny_models.Head.LANGUAGE_MODEL)
    model = get_peft_model(base, BottleneckConfig(kind=kind, **NOT_ZERO)).eval()
    ids = torch.randint(1, 90, (1, 6))
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)
