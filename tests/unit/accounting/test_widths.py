"""A learned width reaches the products that read the tensor, and is lost where the tensor leaves its grid."""

from dataclasses import replace

from rankbits.accounting.macs import products
from rankbits.accounting.spec import Attention, Linear, Method, MethodSpec, ModelShape, Rows
from rankbits.accounting.widths import four_bit_layers
from rankbits.records import CountOptions

SHAPE = ModelShape(
    name="tiny",
    model_type="tiny",
    parts=(
        Linear("q", 8, 8, position_rows=4, position_op="pos_query"),
        Linear("k", 8, 8, position_rows=4, position_op="pos_key"),
        Linear("v", 8, 8),
        Attention("self", "q", "k", "v", 2, 2, 4, position_rows=4, c2p=True, p2c=True),
        Linear("o", 8, 8),
        Linear("classifier", 8, 2, rows=Rows.SEQUENCES, op="head"),
        Linear("lm_head", 8, 9, rows=Rows.HEAD, op="head"),
    ),
    hidden=8,
    layers=1,
    max_length=None,
    vocabulary=9,
    usual_targets=("q",),
)
LEARNED = {
    "q": {"weight": 8, "down": 2, "up": 4, "input": 16, "diagonal_output": 16, "output": 8},
    "k": {"weight": 4, "output": 2},
    "v": {"output": 16},
}
SPEC = MethodSpec(Method.BAYESIAN_LORA, rank=2, targets=("q", "k", "v"), widths=LEARNED)
UNMERGED = CountOptions(query_len=3, key_len=3, adapters="unmerged", head="all")


def _bits(shape: ModelShape, spec: MethodSpec, options: CountOptions = UNMERGED) -> dict[tuple[str, str], object]:
    return {(p.module, p.op): (p.bits_left, p.bits_right) for p in products(shape, options, spec)}


def test_every_operand_has_the_width_of_its_own_quantizer() -> None:
    bits = _bits(SHAPE, SPEC)
    assert bits["q", "linear"] == (16, 8)
    assert bits["q", "pos_query"] == (16, 8), "the quantizer of the input stands before the layer, whatever its rows"
    assert bits["q", "lora_up"] == (16, 4)
    assert bits["k", "linear"] == (32, 4)
    assert bits["k", "lora_down"] == (32, 32)
    assert bits["o", "linear"] == (32, 32)


def test_outputs_keep_their_width_into_attention() -> None:
    bits = _bits(SHAPE, SPEC)
    assert bits["self", "scores"] == (8, 2)
    assert bits["self", "c2p"] == (8, 2)
    assert bits["self", "p2c"] == (2, 8)
    assert bits["self", "context"] == (32, 16), "probabilities are floats"


def test_positions_with_projections_of_their_own_are_not_the_keys_output() -> None:
    parts = tuple(replace(part, position_rows=0) if isinstance(part, Linear) else part for part in SHAPE.parts)
    bits = _bits(replace(SHAPE, parts=parts), SPEC)
    assert bits["self", "c2p"] == (8, 32)
    assert bits["self", "p2c"] == (2, 32)


def test_rotation_takes_queries_and_keys_off_their_grid_and_leaves_values() -> None:
    parts = tuple(replace(part, rotary=True) if isinstance(part, Attention) else part for part in SHAPE.parts)
    bits = _bits(replace(SHAPE, parts=parts), SPEC)
    assert bits["self", "scores"] == (32, 32)
    assert bits["self", "context"] == (32, 16)


def test_operands_that_attention_rounds_itself_keep_their_width_behind_a_rotation() -> None:
    parts = tuple(replace(part, rotary=True) if isinstance(part, Attention) else part for part in SHAPE.parts)
    learned = LEARNED | {"v": {"output": 16, "probabilities": 4}}
    bits = _bits(replace(SHAPE, parts=parts), replace(SPEC, widths=learned))
    assert bits["self", "scores"] == (8, 2)
    assert bits["self", "context"] == (4, 16)


def test_a_merged_sum_lies_on_no_grid() -> None:
    bits = _bits(SHAPE, SPEC, UNMERGED.model_copy(update={"adapters": "merged"}))
    assert bits["q", "linear"] == (16, 32)
    assert ("q", "lora_up") not in bits


def test_a_four_bit_base_is_four_bits_wide_everywhere_but_in_heads_until_it_is_merged() -> None:
    spec = MethodSpec(Method.QLORA, rank=2, targets=("q",))
    bits = _bits(SHAPE, spec)
    assert bits["q", "linear"] == bits["o", "linear"] == (32, 4)
    assert bits["classifier", "head"] == bits["lm_head", "head"] == (32, 32)
    assert bits["q", "lora_up"] == (32, 32), "adapters beside a 4-bit base are not 4-bit"
    merged = _bits(SHAPE, spec, UNMERGED.model_copy(update={"adapters": "merged"}))
    assert merged["q", "linear"] == (32, 32)


def test_what_is_trained_in_full_or_tied_to_a_table_is_not_held_in_four_bits() -> None:
    spec = MethodSpec(Method.QLORA, rank=2, targets=("q",), trained_in_full=("o",))
    assert four_bit_layers(SHAPE, spec) == {"q", "k", "v"}
    tied = replace(SHAPE, parts=(*SHAPE.parts, Linear("out", 8, 9, tied_to="embed")))
    assert four_bit_layers(tied, spec) == {"q", "k", "v"}
