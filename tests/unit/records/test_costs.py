"""Totals are sums over the list of products, and the kernel that runs a product follows from its widths."""

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from rankbits.records import CostRecord, CountOptions, ElementWork, Product, WeightRecord
from rankbits.records.costs import executed_as


def _product(**changes: Any) -> Product:
    fields = {"module": "layer", "op": "linear", "batch": 1, "m": 20, "k": 8, "n": 4, "left": "x", "right": "W0"}
    return Product.model_validate({**fields, "kind": "weight", **changes})


def _record(products: list[Product], **changes: Any) -> CostRecord:
    options = changes.pop("options", CountOptions(query_len=20, key_len=20))
    reference = sum(product.macs for product in products if product.adapter is None)
    return CostRecord(options=options, products=products, **{"reference_macs": reference, **changes})


@pytest.mark.parametrize(
    ("left", "right", "settings", "expected"),
    [
        (4, 4, {}, "int8"),
        (4, 4, {"int4": True}, "int4"),
        (2, 4, {"int4": True}, "int4"),
        (4, 8, {"int4": True}, "int8"),
        (8, 8, {}, "int8"),
        (8, 16, {}, "fp16"),
        (16, 16, {}, "fp16"),
        (2, 32, {}, "fp32"),
        (16, 32, {}, "fp32"),
        (32, 32, {}, "fp32"),
        (16, 32, {"float_bits": 16}, "fp16"),
        (2, 32, {"float_bits": 16}, "fp16"),
        (32, 32, {"float_bits": 16}, "fp16"),
    ],
)
def test_a_product_runs_as_its_wider_operand_allows(left: int, right: int, settings: Any, expected: str) -> None:
    assert executed_as(left, right, **settings) == expected
    assert executed_as(right, left, **settings) == expected


def test_totals_are_sums_over_products() -> None:
    low = _product(bits_left=8, bits_right=4)  # 640 MACs
    beside = _product(op="lora_down", n=2, right="A", adapter="default", bits_right=2)  # 320 MACs
    scores = _product(op="scores", batch=3, m=20, k=2, n=20, left="q", right="k", kind="act")  # 2400 MACs
    record = _record([low, beside, scores])
    assert (low.macs, beside.macs, scores.macs) == (640, 320, 2400)
    assert record.macs == 3360
    assert record.bops == 640 * 32 + 320 * 64 + 2400 * 1024
    assert record.executable_bops == 640 * 64 + (320 + 2400) * 1024
    assert record.reference_macs == 3040
    assert record.reference_bops(16) == 3040 * 256
    assert record.percent(32) == pytest.approx(100 * record.bops / (3040 * 1024))
    assert record.percent(16, executable=True) == pytest.approx(100 * record.executable_bops / (3040 * 256))
    assert record.integer_share == pytest.approx(640 / 3360)
    assert record.adapter_share == pytest.approx(320 / 3360)
    assert record.mean_weight_bits_by_macs() == pytest.approx((4 * 640 + 2 * 320) / 960)
    assert record.counted() == {"linear": 1, "lora_down": 1, "scores": 1}
    assert list(record.macs_by(lambda product: product.op).items()) == [
        ("scores", 2400),
        ("linear", 640),
        ("lora_down", 320),
    ]
    assert record.bops_by(lambda product: product.kind) == {"act": 2400 * 1024, "weight": 640 * 32 + 320 * 64}


def test_half_precision_and_int4_kernels_change_what_is_executed() -> None:
    products = [_product(bits_left=4, bits_right=4), _product(bits_left=32, bits_right=4)]
    options = CountOptions(query_len=20, key_len=20, float_bits=16, int4=True)
    assert _record(products, options=options).executable_bops == 640 * 16 + 640 * 256
    assert _record(products).executable_bops == 640 * 64 + 640 * 1024


def test_weights_are_packed_with_their_scales() -> None:
    weights = [
        WeightRecord(module="a", operand="W0", elements=9, bits=4, scales=2),  # 4.5 bytes round up
        WeightRecord(module="b", operand="bias", elements=3),
    ]
    record = _record([_product()], weights=weights, elements=[ElementWork(module="a", op="bias", elements=80)])
    assert [weight.size_bytes for weight in weights] == [5 + 8, 12]
    assert record.weight_bytes == 25
    assert record.mean_bits_by_parameters() == pytest.approx((9 * 4 + 3 * 32) / 12)
    assert record.element_operations == 80


def test_nothing_counted_is_not_a_division_by_zero() -> None:
    record = _record([])
    assert (record.macs, record.bops, record.integer_share) == (0, 0, 0.0)
    assert math.isnan(record.percent(16))
    assert record.mean_bits_by_parameters() is None
    assert record.mean_weight_bits_by_macs() is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_len": 0}, "greater than or equal to 1"),
        ({"query_len": -3}, "greater than or equal to 1"),
        ({"key_len": 9}, "key_len: given 9, expected at least query_len, which is 20"),
        ({"batch": 2, "lengths": [20]}, "lengths: given 1 of them, expected one for each of 2"),
        ({"lengths": [21]}, "lengths: given 21, expected at most query_len, 20"),
        ({"key_len": 30, "lengths": [20]}, "together with a cache"),
        ({"float_bits": 8}, "Input should be 16 or 32"),
        ({"sequence": 20}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        CountOptions.model_validate({"query_len": 20, "key_len": 20, **changes})


@pytest.mark.parametrize("changes", [{"m": 0}, {"batch": -1}, {"bits_left": 3}, {"kind": "other"}])
def test_impossible_products_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        _product(**changes)


def test_a_cost_survives_json() -> None:
    record = _record([_product(bits_right=4)], options=CountOptions(query_len=20, key_len=20, batch=2, lengths=[3, 20]))
    assert CostRecord.model_validate(json.loads(record.model_dump_json())) == record


def test_a_cost_is_shown_in_one_line() -> None:
    record = _record([_product()])
    assert repr(record) == str(record) == "CostRecord(1 products, 640 MACs, 655,360 nominal BOPs)"
