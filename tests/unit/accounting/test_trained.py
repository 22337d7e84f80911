"""Which parts are trained in full, by method."""

from __future__ import annotations

from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.accounting.trained import above_body, block_of, trained_in_full


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


def test_what_stands_on_the_body() -> None:
    def above(model: str, head: Head) -> tuple[str, ...]:
        return above_body(read_shape(find_config(model), name=model, head=head))

    assert above("minilm-l6", Head.CLASSIFICATION) == ("classifier",)
    assert above("deberta-v3-base", Head.CLASSIFICATION) == ("pooler", "classifier")
    assert above("deberta-v3-base", Head.NONE) == ()
    assert above("smollm2-135m", Head.CLASSIFICATION) == ("score",)
    assert above("smollm2-135m", Head.LANGUAGE_MODEL) == ()
    assert above("llama-7b", Head.LANGUAGE_MODEL) == ("lm_head",)
