"""What holds for the methods that are PEFT's own, as a recipe attaches them: formulas, starts, gradients, copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_methods import (
    ALPHA,
    INITIAL_RANK,
    ON_FOUR_BITS,
    ON_TOKENS,
    ON_WEIGHTS,
    RANK,
    VIRTUAL,
    attached,
    bare,
    config_of,
    padded_batch,
    recipe_of,
    stirred,
)
from torch import Tensor, nn

from rankbits.errors import ModelError
from rankbits.recipes.methods import attach
from rankbits.training.adalora_schedule import task_loss_only

pytestmark = [
    pytest.mark.parametrize("kind", ["encoder", "decoder"]),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # A base in 4 bits was read from a folder that is gone by then.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
NEEDS_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="4-bit weights are bitsandbytes'")
in_four_bits = [pytest.param(method, marks=NEEDS_BITSANDBYTES) for method in ON_FOUR_BITS]
every_update = pytest.mark.parametrize("method", [*ON_WEIGHTS, *in_four_bits])
every_method = pytest.mark.parametrize("method", [*ON_WEIGHTS, *in_four_bits, *ON_TOKENS])
tokens = pytest.mark.parametrize("method", ON_TOKENS)


def _logits(model: nn.Module, kind: str) -> Tensor:
    """Without labels: PEFT's AdaLoRA fails on them where no adapter trains."""
    inputs = padded_batch(kind)
    del inputs["labels"]
    logits: Tensor = model(**inputs).logits.detach()
    return logits


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def _gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _base_weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    if not hasattr(weight, "quant_state"):
        return weight.detach().double()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).double()


def _dense_weight(method: str, layer: Any) -> Tensor:
    """The one weight [out, in] that a layer with its adapter stands for, float64."""
    weight = _base_weight(layer.base_layer)
    a, b = (
        getattr(part["default"], "weight", part["default"]).detach().double() for part in (layer.lora_A, layer.lora_B)
    )
    if method == "adalora":
        diagonal = torch.diag(layer.lora_E["default"].detach().double()[:, 0])
        # PEFT divides its own alpha, which the recipe's rank and alpha were made into, by the first rank and a bit.
        return weight + ALPHA * INITIAL_RANK / RANK / (INITIAL_RANK + 1e-5) * b @ diagonal @ a
    updated = weight + ALPHA / (math.sqrt(RANK) if method == "rslora" else RANK) * b @ a
    if method.endswith("dora"):
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
        return magnitude[:, None] * updated / updated.square().sum(dim=1, keepdim=True).sqrt()
    return updated


@every_update
def test_an_updated_weight_is_its_formula(kind: str, method: str) -> None:
    model = stirred(attached(kind, method), head=False)
    if method in ON_WEIGHTS:
        model = model.double()
    reference = bare(kind, "lora", torch.float64)
    start = _logits(reference, kind)
    adapted = []
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            reference.get_submodule(name).weight.data = _dense_weight(method, layer)
            adapted.append(name.rsplit(".", 1)[-1])
        elif hasattr(getattr(layer, "weight", None), "quant_state") and not name.endswith("base_layer"):
            reference.get_submodule(name).weight.data = _base_weight(layer)
    assert len(adapted) == 6
    expected = _logits(reference, kind)
    assert (expected - start).abs().max() > 0.1 * start.abs().max()
    # bitsandbytes computes in float32.
    _close(_logits(model, kind).double(), expected, 1e-5 if method in ON_FOUR_BITS else 1e-10)


def _rotated(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = (part[:, None] for part in angles)
    left, right = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-right, left], dim=-1) * sine


def _attention(
    attention: Any, prefix: tuple[Tensor, Tensor], visible: Tensor, hidden_states: Tensor, *_: Any, **more: Any
) -> tuple[Tensor, None]:
    """Softmax over virtual keys, as they are, and then those of the tokens; a decoder's are rotated."""
    rows, length, _width = hidden_states.shape
    llama = hasattr(attention, "o_proj")
    projections = ("q_proj", "k_proj", "v_proj") if llama else ("query", "key", "value")
    size = prefix[0].shape[-1]
    query, key, value = (
        getattr(attention, name)(hidden_states).view(rows, length, -1, size).transpose(1, 2) for name in projections
    )
    if llama:
        query, key = (_rotated(heads, more["position_embeddings"]) for heads in (query, key))
    keys, values = (
        torch.cat([virtual.expand(rows, -1, -1, -1), own], dim=2)
        for virtual, own in zip(prefix, (key, value), strict=True)
    )  # [rows, heads of keys, VIRTUAL + length, size]
    keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (keys, values))
    weights = torch.exp(query @ keys.transpose(2, 3) / math.sqrt(size)) * visible
    found = (weights / weights.sum(dim=-1, keepdim=True)) @ values
    joined = found.transpose(1, 2).reshape(rows, length, -1)
    return (attention.o_proj(joined) if llama else joined), None


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_prefix_is_keys_and_values_before_those_of_the_tokens(kind: str, kernel: str) -> None:
    """Positions of the tokens go on after the virtual ones, for transformers takes these for a past of the row."""
    model = stirred(attached(kind, "prefix", torch.float64), head=False).double()
    model.get_base_model().set_attn_implementation(kernel)
    reference = bare(kind, "prefix", torch.float64)
    attentions = [m for m in reference.modules() if hasattr(m, "q_proj") or hasattr(m, "query")]
    size, heads = (6, 4) if kind == "encoder" else (4, 2)
    learned = model.prompt_encoder["default"].embedding.weight.detach().view(VIRTUAL, len(attentions), 2, heads, size)
    inputs = padded_batch(kind)
    padded = inputs["attention_mask"]
    start = _logits(reference, kind)
    for mask in (padded, torch.ones_like(padded), None):
        seen = torch.ones(4, 6, 6) if mask is None else mask[:, None].expand(-1, 6, -1)  # [rows, queries, keys]
        seen = seen.tril() if kind == "decoder" else seen
        visible = torch.cat([torch.ones(4, 6, VIRTUAL), seen], dim=-1)[:, None]
        for attention, virtual in zip(attentions, learned.permute(1, 2, 3, 0, 4), strict=True):
            attention.forward = partial(_attention, attention, (virtual[0], virtual[1]), visible)
        inputs = {name: value for name, value in inputs.items() if name != "labels"} | {"attention_mask": mask}
        expected = reference(**inputs, position_ids=VIRTUAL + torch.arange(6)[None]).logits.detach()
        # The eager attention of Llama rounds its shares to float32.
        _close(model(**inputs).logits, expected, 1e-6 if (kind, kernel) == ("decoder", "eager") else 1e-10)
        assert (expected - start).abs().max() > 0.1 * start.abs().max()


def test_a_prompt_is_embeddings_before_those_of_the_tokens(kind: str) -> None:
    """They take the first positions, are all attended to, are of type 0 and are no part of the loss."""
    model = stirred(attached(kind, "prompt", torch.float64), head=False).double()
    reference, inputs = bare(kind, "prompt", torch.float64), padded_batch(kind)
    prompt = model.prompt_encoder["default"].embedding.weight.detach().expand(4, -1, -1)
    before = {"attention_mask": 1, "token_type_ids": 0, "labels": -100}
    expected_inputs = {"inputs_embeds": torch.cat([prompt, reference.get_input_embeddings()(inputs["input_ids"])], 1)}
    for name, fill in before.items():
        if name in inputs and inputs[name].dim() == 2:
            expected_inputs[name] = torch.cat([torch.full((4, VIRTUAL), fill), inputs[name]], dim=1)
    expected, found = reference(**{"labels": inputs["labels"]} | expected_inputs), model(**inputs)
    _close(found.logits, expected.logits.detach(), 1e-10)
    _close(found.loss, expected.loss.detach(), 1e-10)


@every_update
def test_the_start_is_the_base_model(kind: str, method: str) -> None:
    """Exactly; virtual tokens have no such start: even zeros as keys take a share of the attention."""
    expected = _logits(bare(kind, method), kind)
    model = attached(kind, method)
    for training in (False, True):
        assert torch.equal(_logits(model.train(training), kind), expected)


@every_method
def test_the_adapter_and_the_head_are_used_in_every_pass_and_nothing_else_trains(kind: str, method: str) -> None:
    """The condition of data parallelism: a parameter without a gradient would keep the other processes waiting."""
    model = attached(kind, method).train()
    if method == "adalora":
        # As its training does: PEFT's penalty would give gradients to factors that the task's loss forgets.
        task_loss_only(model)
    trained = _trained(model)
    own, head = ("prompt_encoder" if method in ON_TOKENS else "lora_"), "modules_to_save"
    assert any(own in name for name in trained)
    assert any(head in name for name in trained) == (kind == "encoder")
    assert all(own in name or head in name for name in trained)
    for _ in range(2):
        assert _gradients(model, padded_batch(kind)).keys() == trained
    for name, gradient in _gradients(stirred(model), padded_batch(kind)).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("method", ON_WEIGHTS)
def test_a_merged_model_computes_the_same(kind: str, method: str) -> None:
    model = stirred(attached(kind, method))
    expected, start = _logits(model, kind), _logits(bare(kind, method), kind)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any("lora" in name for name, _ in merged.named_modules())
    # Sums of some tens of float32 products, added in another order.
    _close(_logits(merged, kind), expected, 1e-5)
    assert (expected - start).abs().max() > 0.1 * start.abs().max()


@tokens
def test_virtual_tokens_are_not_merged(kind: str, method: str) -> None:
    with pytest.raises(AttributeError, match="merge_and_unload"):
        attached(kind, method).merge_and_unload()


@every_method
def test_a_saved_adapter_computes_the_same_on_a_fresh_base(kind: str, method: str, tmp_path: Path) -> None:
    model = stirred(attached(kind, method))
    expected = _logits(model, kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare(kind, method), tmp_path).eval()
    assert torch.equal(_logits(loaded, kind), expected)
    assert not torch.equal(_logits(attached(kind, method), kind), expected)
    # PEFT freezes what it loads to be used, all but virtual tokens.
    assert _trained(loaded) == ({"prompt_encoder.default.embedding.weight"} if method in ON_TOKENS else set())


@every_method
def test_a_bfloat16_base_trains_float32_adapters(kind: str, method: str) -> None:
    """A head is a copy of the base's, in bfloat16; recipes leave the base in float32 and compute in bfloat16."""
    start, full = (
        _logits(model, kind) for model in (attached(kind, method), stirred(attached(kind, method), head=False))
    )
    assert (full - start).abs().max() > 0.1 * full.abs().max()
    model = attached(kind, method, torch.bfloat16)
    # A fault of PEFT, which casts it to the base's dtype: the number that AdaLoRA divides by trains, and is not saved.
    divisors = {name for name in _trained(model) if "ranknum" in name}
    assert len(divisors) == (6 if method == "adalora" else 0)
    for name in divisors:
        model.get_parameter(name).requires_grad_(False)
    stirred(model, head=False)
    held = torch.float32 if method in ON_FOUR_BITS else torch.bfloat16
    assert model.get_base_model().dtype == held
    half = _logits(model, kind)
    assert half.dtype == held
    assert not torch.equal(half.float(), full)
    # A bfloat16 number has 8 bits, and some tens of roundings follow one another.
    _close(half.float(), full, 0.05)
    gradients = _gradients(model.train(), padded_batch(kind))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert {g.dtype for name, g in gradients.items() if "modules_to_save" not in name} == {torch.float32}
    assert {g.dtype for name, g in gradients.items() if "modules_to_save" in name} <= {held}


def _passes(model: nn.Module) -> Callable[[], int]:
    """How often the first attention was computed since this was last asked."""
    seen: list[None] = []
    first = next(m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in {"self", "self_attn"})
    first.register_forward_hook(lambda *_: seen.append(None))

    def passes() -> int:
        count = len(seen)
        seen.clear()
        return count

    return passes


@pytest.mark.parametrize("method", [*ON_WEIGHTS, *in_four_bits, "prompt"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_blocks_give_the_same_gradients(kind: str, method: str, use_reentrant: bool) -> None:
    model = stirred(attached(kind, method)).train()
    model.enable_input_require_grads()
    passes, inputs = _passes(model), padded_batch(kind)
    expected = _gradients(model, inputs)
    assert passes() == 1
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    found = _gradients(model, inputs)
    assert passes() == 2
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_a_prefix_and_recomputed_blocks_exclude_each_other(kind: str) -> None:
    """PEFT refuses them in one order alone. In the other transformers drops the prefix, and the mask gives it away.

    A recipe that asks for both is refused before.
    """
    base = bare(kind, "prefix")
    base.activation_checkpointing_enable()
    with pytest.raises(ModelError, match=r"prefix cannot be attached .* does not work with gradient checkpointing"):
        attach(recipe_of(kind, "prefix"), base)
    model = attached(kind, "prefix").train()
    model.get_base_model().activation_checkpointing_enable()
    with pytest.raises(RuntimeError, match="must match the size"):
        model(**padded_batch(kind))


@every_method
def test_switched_adapters_compute_what_each_computes_alone(kind: str, method: str, tmp_path: Path) -> None:
    alone = {}
    for seed, name in enumerate(["one", "two"]):
        model = stirred(attached(kind, method), seed)
        alone[name] = _logits(model, kind)
        model.save_pretrained(tmp_path / name)
    assert not torch.equal(alone["one"], alone["two"])
    both = PeftModel.from_pretrained(bare(kind, method), tmp_path / "one", adapter_name="one").eval()
    both.load_adapter(tmp_path / "two", "two")
    for name in ("one", "two", "one"):
        both.set_adapter(name)
        assert torch.equal(_logits(both.eval(), kind), alone[name])


@every_method
def test_a_second_adapter_waits_for_its_turn(kind: str, method: str) -> None:
    """Two limits of PEFT: AdaLoRA has one adapter that trains, and virtual tokens wait with requires_grad set."""
    model = stirred(attached(kind, method))
    expected = _logits(model, kind)
    if method == "adalora":
        with pytest.raises(ValueError, match="supports only 1 trainable adapter"):
            model.add_adapter("other", config_of(kind, method, model))
        assert torch.equal(_logits(model, kind), expected)
        return
    model.add_adapter("other", config_of(kind, method, model))
    assert torch.equal(_logits(model.eval(), kind), expected)
    for active, idle in (("default", "other"), ("other", "default")):
        model.set_adapter(active)
        waiting = {f"prompt_encoder.{idle}.embedding.weight"} if method in ON_TOKENS else set()
        assert {name for name in _trained(model) if f".{idle}." in name} == waiting
        assert _gradients(model.train(), padded_batch(kind)).keys() == _trained(model) - waiting


@every_method
def test_a_disabled_adapter_leaves_the_base_model(kind: str, method: str) -> None:
    """PEFT cannot switch off the virtual tokens of a model that generates nothing."""
    base = _logits(bare(kind, method), kind)
    model = stirred(attached(kind, method))
    expected = _logits(model, kind)
    if kind == "encoder" and method in ON_TOKENS:
        with pytest.raises(UnboundLocalError, match="old_prepare_inputs_for_generation"), model.disable_adapter():
            pass
    else:
        with model.disable_adapter():
            assert torch.equal(_logits(model, kind), base)
    assert torch.equal(_logits(model, kind), expected)
    assert expected.shape != base.shape or not torch.equal(expected, base)
