"""SBoRA's parameters and products by formula are those of live models with our tuner attached."""

import pytest
from peft import get_peft_model
from tiny_models import DECODERS, ENCODERS, live, read
from torch import nn

import rankbits
from rankbits import SboraConfig
from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.methods import adapter_products
from rankbits.accounting.params import count, targeted
from rankbits.accounting.spec import Method, MethodSpec

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
METHODS = {"fa": Method.SBORA_FA, "fb": Method.SBORA_FB}
Q_K_V_UP_DOWN = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _stored(model: nn.Module) -> int:
    return sum(buffer.numel() for name, buffer in model.named_buffers() if "sbora_indices" in name)


@pytest.mark.parametrize("variant", METHODS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "deberta-v3"])
def test_small_encoders_train_what_the_formula_says(name: str, targets: str | None, variant: str) -> None:
    model = get_peft_model(
        live(ENCODERS[name], device="meta"), SboraConfig(r=3, variant=variant, target_modules=targets)
    )
    found = count(read(ENCODERS[name]), MethodSpec(METHODS[variant], rank=3, targets=targets))
    assert (found.adapter, found.stored_indices) == (_trained(model), _stored(model))


@pytest.mark.parametrize("variant", METHODS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "phi", "opt", "gpt2"])
def test_small_decoders_train_what_the_formula_says(name: str, targets: str | None, variant: str) -> None:
    head = Head.LANGUAGE_MODEL
    config = SboraConfig(r=3, variant=variant, target_modules=targets)
    model = get_peft_model(live(DECODERS[name], head, device="meta"), config)
    found = count(read(DECODERS[name], head), MethodSpec(METHODS[variant], rank=3, targets=targets))
    assert (found.adapter, found.stored_indices) == (_trained(model), _stored(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "rank", "targets", "parameters"),
    [
        ("llama-7b", "fa", 32, Q_K_V_UP_DOWN, 28_049_408),
        ("llama-7b", "fb", 32, Q_K_V_UP_DOWN, 28_049_408),
        ("llama-7b", "fa", 64, Q_K_V_UP_DOWN, 56_098_816),
        ("llama3-8b", "fa", 32, Q_K_V_UP_DOWN, 25_165_824),
        ("llama3-8b", "fb", 32, Q_K_V_UP_DOWN, 31_457_280),
        ("llama3-8b", "fb", 64, Q_K_V_UP_DOWN, 62_914_560),
        ("llama-7b", "fa", 64, "all-linear", 87_031_808),
        ("llama-7b", "fb", 64, "all-linear", 72_876_032),
        ("llama-13b", "fa", 64, "all-linear", 136_314_880),
        ("llama-13b", "fb", 64, "all-linear", 114_032_640),
        ("llama3-8b", "fa", 64, "all-linear", 88_080_384),
        ("llama3-8b", "fb", 64, "all-linear", 79_691_776),
        ("minilm-l6", "fa", 8, ("query", "key", "value"), 55_296),
    ],
)
def test_published_models_train_what_the_formula_says(name, variant, rank, targets, parameters) -> None:
    """Po et al. 2024 print 28.0M, 56.1M, 25.2M, 31.5M and 62.9M, and half of the counts for all linear layers."""
    head = Head.NONE if name == "minilm-l6" else Head.LANGUAGE_MODEL
    given = list(targets) if isinstance(targets, tuple) else targets
    config = SboraConfig(
        r=rank, variant=variant, target_modules=given, task_type=None if name == "minilm-l6" else "CAUSAL_LM"
    )
    model = get_peft_model(live(find_config(name), head, device="meta"), config)
    shape = read_shape(find_config(name), name=name, head=head)
    assert (
        _trained(model) == count(shape, MethodSpec(METHODS[variant], rank=rank, targets=targets)).adapter == parameters
    )


@pytest.mark.parametrize("variant", METHODS)
def test_products_of_a_live_pass_are_those_of_the_formula(variant: str) -> None:
    values, targets = ENCODERS["bert"], ("query", "value", "dense")
    model = get_peft_model(
        live(values), SboraConfig(r=3, variant=variant, target_modules=list(targets), init_weights=False)
    )
    record = rankbits.cost(model, sequence_length=7, adapters="unmerged")
    found = [(p.module, p.op, p.m, p.k, p.n, p.right) for p in record.products if p.adapter]
    spec = MethodSpec(METHODS[variant], rank=3, targets=targets)
    rows = {linear.name: 1 if "pooler" in linear.name else 7 for linear in targeted(read(values), spec)}
    expected = [
        (p.module, p.op, p.m, p.k, p.n, p.right)
        for linear in targeted(read(values), spec)
        for p in adapter_products(linear, spec, rows[linear.name])
    ]
    assert sorted(found) == sorted(expected)
    assert expected
    merged = rankbits.cost(model, sequence_length=7)
    assert merged.options.adapters == "merged"
    assert not any(p.adapter for p in merged.products)
