"""What methods add to a forward pass: closed forms, and the operations that live adapters of PEFT really run."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankbits.accounting.architectures.read import Head, find_config, read_shape, shape_names
from rankbits.accounting.methods import (
    ON_LINEARS,
    active_rank,
    adapted_ends,
    adapter_elements,
    adapter_products,
    bottleneck_width,
    can_merge,
    extra_keys,
    extra_tokens,
    sublayer_elements,
    sublayer_products,
)
from rankbits.accounting.mora import mora_side
from rankbits.accounting.spec import Activation, Attention, Linear, Method, MethodSpec, ModelShape, Norm, Rows
from rankbits.errors import ModelError

LINEAR = Linear("block.proj", d_in=48, d_out=80)
ROWS = 7


def _macs(method: Method, *, linear: Linear = LINEAR, rows: int = ROWS, **sizes) -> int:
    return sum(product.macs for product in adapter_products(linear, MethodSpec(method, **sizes), rows))


def _work(method: Method, **sizes) -> dict[str, int]:
    return {entry.op: entry.elements for entry in adapter_elements(LINEAR, MethodSpec(method, **sizes), ROWS)}


def _shape(name: str) -> ModelShape:
    return read_shape(find_config(name), name=name, head=Head.NONE)


@pytest.mark.parametrize(
    ("method", "macs"),
    [
        (Method.LORA, ROWS * 4 * (48 + 80)),
        (Method.QLORA, ROWS * 4 * (48 + 80)),
        (Method.ADALORA, ROWS * 4 * (48 + 80)),
        (Method.DYLORA, ROWS * 4 * (48 + 80)),
        (Method.BAYESIAN_LORA, ROWS * 4 * (48 + 80)),
        (Method.DORA, ROWS * 4 * (48 + 80) + 4 * 48 * (48 + 80)),
        (Method.QDORA, ROWS * 4 * (48 + 80) + 4 * 48 * (48 + 80)),
        (Method.SBORA_FA, ROWS * 4 * 80),
        (Method.QSBORA_FA, ROWS * 4 * 80),
        (Method.MULTI_SBORA, ROWS * 4 * 80),
        (Method.SBORA_FB, ROWS * 4 * 48),
        (Method.QSBORA_FB, ROWS * 4 * 48),
        # sqrt(4 x 128) = 22.6 rounds to 23 and down to an even 22, and 48 inputs fill three blocks of 22.
        (Method.MORA, ROWS * 3 * 22 * 22),
    ],
)
def test_macs_of_an_adapter(method: Method, macs: int):
    assert _macs(method, rank=4) == macs


def test_every_other_method_adds_nothing_to_a_linear_layer():
    for method in set(Method) - ON_LINEARS:
        assert adapter_products(LINEAR, MethodSpec(method), ROWS) == []
        assert adapter_elements(LINEAR, MethodSpec(method), ROWS) == []


def test_products_carry_their_operands_layer_and_adapter():
    down, up = adapter_products(LINEAR, MethodSpec(Method.LORA, rank=4), ROWS, adapter="mnli")
    assert (down.op, down.left, down.right, down.m, down.k, down.n) == ("lora_down", "x", "A", ROWS, 48, 4)
    assert (up.op, up.left, up.right, up.m, up.k, up.n) == ("lora_up", "h", "B", ROWS, 4, 80)
    assert {(p.module, p.adapter, p.kind, p.constant, p.batch) for p in (down, up)} == {
        ("block.proj", "mnli", "weight", False, 1)
    }


def test_a_run_on_a_table_is_constant():
    products = adapter_products(LINEAR, MethodSpec(Method.LORA), 512, constant=True)
    assert [product.constant for product in products] == [True, True]


def test_doras_norm_does_not_depend_on_the_input():
    products = adapter_products(LINEAR, MethodSpec(Method.DORA), ROWS)
    assert [(product.op, product.constant) for product in products] == [
        ("lora_down", False),
        ("lora_up", False),
        ("dora_down", True),
        ("dora_up", True),
    ]
    assert products == [
        *adapter_products(LINEAR, MethodSpec(Method.LORA), ROWS),
        *adapter_products(LINEAR, MethodSpec(Method.DORA), 1)[2:],
    ]


def test_the_active_rank_decides_and_rank_zero_runs_nothing():
    spec = MethodSpec(Method.BAYESIAN_LORA, rank=8, ranks={"block.proj": 3, "other": 5})
    assert active_rank(LINEAR, spec) == 3
    assert sum(p.macs for p in adapter_products(LINEAR, spec, ROWS)) == ROWS * 3 * (48 + 80)
    assert {e.op: e.elements for e in adapter_elements(LINEAR, spec, ROWS)}["diagonal"] == ROWS * 3
    pruned = MethodSpec(Method.ADALORA, rank=8, ranks={"block.proj": 0})
    assert adapter_products(LINEAR, pruned, ROWS) == []


@pytest.mark.parametrize("use_dora", [False, True])
def test_equal_to_what_peft_runs(use_dora: bool):
    base = nn.Sequential(nn.Linear(48, 80))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], use_dora=use_dora)).eval()
    rows = torch.zeros(ROWS, 48)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(rows)
    method = Method.DORA if use_dora else Method.LORA
    assert counter.get_total_flops() // 2 == ROWS * 48 * 80 + _macs(method, rank=4)


def test_element_work_of_an_adapter():
    scale_and_add = {"adapter_scale": ROWS * 80, "adapter_add": ROWS * 80}
    assert _work(Method.LORA, rank=4) == scale_and_add
    assert _work(Method.ADALORA, rank=4) == {**scale_and_add, "diagonal": ROWS * 4}
    assert _work(Method.SBORA_FA, rank=4) == {**scale_and_add, "gather": ROWS * 4}
    assert _work(Method.SBORA_FB, rank=4) == {"adapter_scale": ROWS * 4, "scatter": ROWS * 4}
    assert _work(Method.DORA, rank=4) == {
        "adapter_scale": 2 * ROWS * 80,
        "adapter_add": ROWS * 80,
        "weight_norm": 48 * 80,
    }
    assert _work(Method.MORA, rank=4) == {"compress": ROWS * 66, "expand": ROWS * 80, "adapter_add": ROWS * 80}


@pytest.mark.parametrize(
    ("d_in", "d_out", "rank", "side"),
    [
        # The published examples, and 768 x 768 whose 111 rotation makes even.
        (4096, 4096, 8, 256),
        (4096, 4096, 256, 1448),
        (4096, 11008, 8, 348),
        (768, 768, 8, 110),
        (384, 384, 8, 78),
    ],
)
def test_side_of_moras_matrix(d_in: int, d_out: int, rank: int, side: int):
    assert mora_side(Linear("l", d_in, d_out), MethodSpec(Method.MORA, rank=rank)) == side


@given(st.integers(64, 4096), st.integers(64, 4096), st.integers(1, 512))
def test_moras_side_is_the_rounded_root(d_in: int, d_out: int, rank: int):
    linear = Linear("l", d_in, d_out)
    rounded = math.floor(math.sqrt(rank * (d_in + d_out)) + 0.5)
    expected = rounded - rounded % 2 if rank < 64 else rounded
    if expected > min(d_in, d_out):
        with pytest.raises(ModelError, match=f"l would have side {expected}, expected at most {min(d_in, d_out)}"):
            mora_side(linear, MethodSpec(Method.MORA, rank=rank))
    else:
        assert mora_side(linear, MethodSpec(Method.MORA, rank=rank)) == expected


def test_mora_shares_groups_from_rank_64_on():
    square = Linear("l", 2048, 2048)
    assert _macs(Method.MORA, linear=square, rank=64) == ROWS * 512 * 512
    assert _macs(Method.MORA, linear=square, rank=63) == ROWS * math.ceil(2048 / 508) * 508 * 508


def test_what_can_be_merged():
    assert {method for method in Method if not can_merge(method)} == {
        Method.HOULSBY,
        Method.PFEIFFER,
        Method.PARALLEL,
        Method.PREFIX,
        Method.PROMPT,
    }


def test_a_prefix_adds_keys_and_a_prompt_tokens():
    for method in Method:
        spec = MethodSpec(method, virtual_tokens=9)
        assert extra_keys(spec) == (9 if method is Method.PREFIX else 0)
        assert extra_tokens(spec) == (9 if method is Method.PROMPT else 0)


@pytest.mark.parametrize("name", shape_names())
def test_houlsby_has_two_places_in_every_block_and_the_others_one(name: str):
    shape = _shape(name)
    assert len(adapted_ends(shape, MethodSpec(Method.HOULSBY))) == 2 * shape.layers
    feed_forward = adapted_ends(shape, MethodSpec(Method.PFEIFFER))
    assert feed_forward == adapted_ends(shape, MethodSpec(Method.PARALLEL))
    assert len(feed_forward) == shape.layers
    assert not any(end.after_attention for end in feed_forward)
    assert adapted_ends(shape, MethodSpec(Method.LORA)) == []


def test_places_by_name():
    places = [end.linear.name for end in adapted_ends(_shape("t5-base"), MethodSpec(Method.HOULSBY))]
    assert places[:2] == ["encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.DenseReluDense.wo"]
    assert "decoder.block.0.layer.0.SelfAttention.o" in places
    assert "decoder.block.0.layer.1.EncDecAttention.o" not in places


def test_bottlenecks_cost_2ndw_each():
    shape = _shape("minilm-l6")
    houlsby = sublayer_products(shape, MethodSpec(Method.HOULSBY, width=24), ROWS, adapter="cola")
    assert sum(product.macs for product in houlsby) == 12 * 2 * ROWS * 384 * 24
    assert {product.adapter for product in houlsby} == {"cola"}
    assert [(p.op, p.m, p.k, p.n) for p in houlsby[:2]] == [
        ("adapter_down", ROWS, 384, 24),
        ("adapter_up", ROWS, 24, 384),
    ]
    pfeiffer = sublayer_products(shape, MethodSpec(Method.PFEIFFER, width=24), ROWS)
    assert sum(product.macs for product in pfeiffer) == 6 * 2 * ROWS * 384 * 24
    assert sublayer_products(shape, MethodSpec(Method.LORA), ROWS) == []


def test_two_stacks_have_their_own_rows_and_no_source_runs_no_encoder():
    shape = _shape("t5-base")
    spec = MethodSpec(Method.PARALLEL, width=10)
    both = sublayer_products(shape, spec, tokens=3, source=ROWS)
    assert sum(product.macs for product in both) == 12 * 2 * 768 * 10 * (3 + ROWS)
    cached = sublayer_products(shape, spec, tokens=1)
    assert {product.module.split(".")[0] for product in cached} == {"decoder"}
    work = sublayer_elements(shape, spec, tokens=3, source=ROWS)
    assert sum(e.elements for e in work if e.op == "activation") == 12 * 10 * (3 + ROWS)


def test_element_work_of_bottlenecks():
    shape = _shape("minilm-l6")

    def work(method: Method) -> dict[str, int]:
        entries = sublayer_elements(shape, MethodSpec(method, width=24), ROWS)
        return {entry.op: entry.elements for entry in entries if entry.module == entries[-1].module}

    usual = {"bias": ROWS * (24 + 384), "activation": ROWS * 24, "adapter_add": ROWS * 384}
    assert work(Method.HOULSBY) == usual
    assert work(Method.PFEIFFER) == {**usual, "norm": ROWS * 384}
    assert work(Method.PARALLEL) == {**usual, "adapter_scale": ROWS * 384}
    assert sublayer_elements(shape, MethodSpec(Method.LORA), ROWS) == []


@pytest.mark.parametrize(("method", "width"), [(Method.HOULSBY, 24), (Method.PFEIFFER, 24), (Method.PARALLEL, 192)])
def test_usual_width_of_a_bottleneck(method: Method, width: int):
    assert bottleneck_width(_shape("minilm-l6"), MethodSpec(method)) == width
    assert bottleneck_width(_shape("minilm-l6"), MethodSpec(method, width=5)) == 5
    with pytest.raises(ModelError, match=r"width: given 0 for .*, expected at least 1"):
        bottleneck_width(_shape("minilm-l6"), MethodSpec(method, width=0))


def test_a_narrow_model_still_gets_a_bottleneck():
    assert bottleneck_width(_tiny([]), MethodSpec(Method.HOULSBY)) == 1


def _tiny(parts: list) -> ModelShape:
    return ModelShape("tiny", "tiny", tuple(parts), 8, 1, None, 10, ())


def test_only_a_linear_layer_right_behind_ends_a_sublayer():
    attention = Attention("a", "q", "k", "v", 2, 2, 4)
    activation = Activation("f", 32)
    ends = [attention, Linear("o", 8, 8), activation, Linear("down", 32, 8)]
    spec = MethodSpec(Method.HOULSBY)
    assert [end.linear.name for end in adapted_ends(_tiny(ends), spec)] == ["o", "down"]
    others = [
        *(activation, Norm("n", 32), Linear("behind.a.norm", 32, 8)),
        *(activation, Linear("too.wide", 32, 9)),
        *(activation, Linear("head", 32, 8, op="head")),
        *(Activation("pooler", 8, rows=Rows.SEQUENCES), Linear("classifier", 8, 8, rows=Rows.SEQUENCES)),
        *(Attention("x", "q", "k", "v", 2, 2, 4, over=Rows.SOURCE), Linear("cross", 8, 8)),
    ]
    assert [end.linear.name for end in adapted_ends(_tiny(ends + others), spec)] == ["o", "down"]
    with pytest.raises(ModelError, match=r"houlsby: tiny has no feed-forward"):
        adapted_ends(_tiny([attention, Linear("o", 8, 8), *others]), spec)
