"""Which parts are trained in full, by method."""

from __future__ import annotations

from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.accounting.trained import block_of, trained_in_full


def test_parts_that_are_trained_in_full() -> None:
    shape = read_shape(find_config("minilm-l6"), name="minilm-l6", head=Head.CLASSIFICATION)
    assert trained_in_full(shape, MethodSpec(Method.FULL)) == {part.name for part in shape.parts}
    assert trained_in_full(shape, MethodSpec(Method.FEATURE_BASED)) == {"classifier"}
    top = trained_in_full(shape, MethodSpec(Method.TOP_LAYER, layers=1))
    assert {block_of(part) for part in shape.parts if part.name in top} == {None, ("bert.encoder.layer", 5)}
    assert trained_in_full(shape, MethodSpec(Method.LORA, trained_in_full=("pooler",))) == {
        "bert.pooler.dense",
        "bert.pooler.activation",
    }
