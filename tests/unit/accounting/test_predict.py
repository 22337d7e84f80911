"""A prediction holds the products of the formulas and every tensor that has to be kept."""

from dataclasses import replace

import pytest

from rankbits.accounting.macs import products
from rankbits.accounting.params import base_parameters, count
from rankbits.accounting.predict import predict
from rankbits.accounting.spec import (
    Activation,
    Attention,
    Convolution,
    Granularity,
    Linear,
    Method,
    MethodSpec,
    ModelShape,
    Norm,
    Placement,
    Rows,
    Table,
)
from rankbits.records import CountOptions

SHAPE = ModelShape(
    name="tiny",
    model_type="tiny",
    parts=(
        Table("embed", 50, 64),
        Norm("norm", 64),
        Convolution("conv", 64, 64, (3,), groups=2),
        Linear("q", 64, 64),
        Linear("v", 64, 32, bias=False),
        Linear("lm_head", 64, 50, bias=False, rows=Rows.HEAD, op="head", tied_to="embed"),
    ),
    hidden=64,
    layers=1,
    max_length=None,
    vocabulary=50,
    usual_targets=("q", "v"),
)
OPTIONS = CountOptions(query_len=10, key_len=10, head="all", embeddings="in")
UNMERGED = OPTIONS.model_copy(update={"adapters": "unmerged"})


def _elements(cost, *, adapter: bool) -> int:
    return sum(weight.elements for weight in cost.weights if (weight.adapter is not None) == adapter)


def test_the_base_is_its_own_reference() -> None:
    cost = predict(SHAPE, OPTIONS)
    assert cost.products == products(SHAPE, OPTIONS)
    assert cost.percent(32) == pytest.approx(100.0)
    assert cost.reference_macs == cost.macs
    assert _elements(cost, adapter=False) == base_parameters(SHAPE), "a tied weight is kept once"
    assert cost.element_operations == 10 * 64 * 2


def test_a_rounded_sum_is_a_packed_weight_with_its_ranges_once_merged() -> None:
    widths = {"q": {"weight": 4, "input": 8}, "v": {"weight": 2, "input": 8}}
    sites = ("weight", "input")
    spec = MethodSpec(
        Method.BAYESIAN_LORA,
        rank=3,
        targets=("q", "v"),
        sites=sites,
        widths=widths,
        placement=Placement.MERGED,
        granularity=Granularity.GROUP,
        group_size=16,
    )
    merged, beside = predict(SHAPE, OPTIONS, spec), predict(SHAPE, UNMERGED, spec)
    packed = {w.module: w for w in merged.weights if w.operand == "W0" and w.module in widths}
    assert packed["q"].size_bytes == 64 * 64 // 2 + 4 * 64 * 64 // 16
    assert packed["v"].size_bytes == 64 * 32 // 4 + 4 * 64 * 32 // 16
    assert [(w.module, w.elements, w.adapter) for w in merged.weights if w.operand == "ranges"] == [("q", 1, None)]
    in_groups = predict(SHAPE, OPTIONS, replace(spec, input_granularity=Granularity.GROUP)).weights
    assert [(w.module, w.elements) for w in in_groups if w.operand == "ranges"] == [("q", 64 // 16)]
    affine = predict(SHAPE, OPTIONS, replace(spec, input_granularity=Granularity.GROUP, affine_inputs=True)).weights
    assert [w.elements for w in affine if w.operand == "ranges"] == [2 * 64 // 16], "their low ends are kept, too"
    narrow = {w.module: w for w in predict(SHAPE, OPTIONS, replace(spec, scale_bits=8)).weights if w.operand == "W0"}
    assert narrow["q"].size_bytes == 64 * 64 // 2 + 64 * 64 // 16 + 4, "a byte for each scale, and what they share"
    assert "scale_bits" in narrow["q"].model_dump()
    assert "scale_bits" not in packed["q"].model_dump(), "where it says nothing new it is left out"
    assert {w.adapter for w in merged.weights} == {None}
    bits = {p.module: (p.bits_left, p.bits_right) for p in merged.products if p.module in widths}
    assert bits == {"q": (8, 4), "v": (8, 2)}
    assert merged.macs == merged.reference_macs

    kept = {(w.module, w.operand): (w.elements, w.bits) for w in beside.weights if w.module == "q"}
    assert kept["q", "W0"] == (64 * 64, 32), "as long as it is not merged the sum is made of floats"
    assert kept["q", "A"] == (3 * 64, 32)
    assert kept["q", "ranges"] == (1 + 64 * 4, 32)
    forming = [(p.module, p.op, p.macs, p.constant) for p in beside.products if p.adapter is not None]
    assert forming == [("q", "lora_merge", 3 * 64 * 64, True), ("v", "lora_merge", 3 * 64 * 32, True)]
    written = {(work.module, work.op): work.elements for cost in (merged, beside) for work in cost.elements}
    assert written["q", "quantizer"] == 10 * 64
    assert ("v", "quantizer") not in written, "the input is rounded once for both"
    assert written["q", "weight_quantizer"] == 64 * 64
    assert ("q", "weight_quantizer") not in {(work.module, work.op) for work in merged.elements}


def test_without_tables_a_tied_head_still_needs_its_weight() -> None:
    cost = predict(SHAPE, OPTIONS.model_copy(update={"embeddings": "out"}))
    assert {weight.module for weight in cost.weights} == {"norm", "conv", "q", "v", "lm_head"}


@pytest.mark.parametrize(
    "method",
    [Method.LORA, Method.ADALORA, Method.DYLORA, Method.DORA, Method.SBORA_FA, Method.SBORA_FB],
)
def test_an_adapter_keeps_what_it_trained_and_its_indices(method: Method) -> None:
    spec = MethodSpec(method, rank=4)
    counts = count(SHAPE, spec)
    cost = predict(SHAPE, UNMERGED, spec)
    assert _elements(cost, adapter=True) == counts.adapter + counts.diagonal + counts.stored_indices
    assert predict(SHAPE, OPTIONS, spec).weights == predict(SHAPE, OPTIONS).weights


def test_mora_keeps_one_square_matrix_per_layer() -> None:
    spec = MethodSpec(Method.MORA, rank=4)
    assert _elements(predict(SHAPE, UNMERGED, spec), adapter=True) == count(SHAPE, spec).adapter


@pytest.mark.parametrize("method", [Method.HOULSBY, Method.PFEIFFER, Method.PARALLEL, Method.PREFIX, Method.PROMPT])
def test_what_never_merges_is_kept_too(method: Method) -> None:
    shape = replace(
        SHAPE,
        parts=(
            Attention("self", "q", "q", "v", 2, 2, 16),
            Linear("o", 32, 64),
            Activation("act", 80),
            Linear("down", 80, 64),
        ),
    )
    spec = MethodSpec(method, width=4, virtual_tokens=3)
    assert _elements(predict(shape, OPTIONS, spec), adapter=True) == count(shape, spec).adapter > 0


def test_learned_widths_and_ranks_are_what_is_kept() -> None:
    widths = {"q": {"weight": 4, "down": 2, "diagonal": 8, "up": 16}}
    spec = MethodSpec(Method.BAYESIAN_LORA, rank=4, sites=("weight",), widths=widths, ranks={"q": 2})
    kept = {(w.module, w.operand): (w.elements, w.bits, w.scales) for w in predict(SHAPE, UNMERGED, spec).weights}
    assert kept["q", "W0"] == (4096, 4, 1)
    assert kept["q", "A"] == (128, 2, 1)
    assert kept["q", "E"] == (2, 8, 1)
    assert kept["q", "B"] == (128, 16, 1)
    assert kept["q", "bias"] == (64, 32, 0)
    assert kept["v", "A"] == (256, 32, 0)
    merged = {(w.module, w.operand): w.bits for w in predict(SHAPE, OPTIONS, spec).weights}
    assert merged["q", "W0"] == 32


def test_ranges_of_activations_are_kept_by_themselves() -> None:
    spec = MethodSpec(Method.BAYESIAN_LORA, rank=4, targets=("q",), sites=("weight", "input", "output"))
    kept = [w for w in predict(SHAPE, UNMERGED, spec).weights if w.operand == "ranges"]
    assert [(w.module, w.elements, w.bits) for w in kept] == [("q", 2, 32)]


def test_a_four_bit_base_has_a_scale_for_each_block_and_full_heads() -> None:
    cost = predict(replace(SHAPE, parts=SHAPE.parts[3:]), UNMERGED, MethodSpec(Method.QLORA, rank=4))
    kept = {(w.module, w.operand): (w.bits, w.scales) for w in cost.weights}
    assert kept["q", "W0"] == (4, 64)
    assert kept["v", "W0"] == (4, 32)
    assert ("lm_head", "W0") not in kept
    assert kept["q", "B"] == (32, 0)


def test_floats_are_as_wide_as_the_deployment() -> None:
    half = predict(SHAPE, OPTIONS.model_copy(update={"float_bits": 16}))
    assert {weight.bits for weight in half.weights} == {16}
    assert half.weight_bytes == 2 * base_parameters(SHAPE)
