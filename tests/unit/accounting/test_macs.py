"""Each product is where it should be, with the size that the formulas of its architecture give."""

from dataclasses import replace
from typing import Any

import pytest

from rankbits.accounting.macs import check_lengths, convolution_macs, elements, products, row_count, visible_pairs
from rankbits.accounting.spec import (
    Activation,
    Attention,
    Convolution,
    Linear,
    Method,
    MethodSpec,
    ModelShape,
    Norm,
    Rows,
    Table,
)
from rankbits.errors import ModelError
from rankbits.records import CountOptions, Product

HIDDEN, HEADS, KEY_HEADS, WIDTH, INNER, VOCABULARY = 12, 4, 2, 3, 20, 50

PARTS = (
    Table("embed", VOCABULARY, HIDDEN),
    Norm("0.norm", HIDDEN, bias=False),
    Linear("0.q", HIDDEN, HEADS * WIDTH),
    Linear("0.k", HIDDEN, KEY_HEADS * WIDTH, bias=False),
    Linear("0.v", HIDDEN, KEY_HEADS * WIDTH, bias=False),
    Attention("0", "0.q", "0.k", "0.v", HEADS, KEY_HEADS, WIDTH, causal=True, rotary=True),
    Linear("0.o", HEADS * WIDTH, HIDDEN, bias=False),
    Linear("0.up", HIDDEN, INNER, bias=False),
    Activation("0.act", INNER, gated=True),
    Linear("0.down", INNER, HIDDEN, bias=False),
    Linear("lm_head", HIDDEN, VOCABULARY, bias=False, rows=Rows.HEAD, op="head"),
)
DECODER = ModelShape(
    name="tiny", model_type="tiny", parts=PARTS, hidden=HIDDEN, layers=1, max_length=64, vocabulary=VOCABULARY,
    usual_targets=("q", "v"), decoder=True,
)  # fmt: skip
ENCODER = replace(
    DECODER,
    decoder=False,
    parts=(
        Linear("q", HIDDEN, HIDDEN, position_rows=8, position_op="pos_query"),
        Linear("k", HIDDEN, HIDDEN, position_rows=8, position_op="pos_key"),
        Linear("v", HIDDEN, HIDDEN),
        Attention("self", "q", "k", "v", HEADS, HEADS, WIDTH, position_rows=8, c2p=True, p2c=True),
        Activation("act", INNER),
        Linear("classifier", HIDDEN, 2, rows=Rows.SEQUENCES, op="head"),
    ),
)
TWO_STACKS = replace(
    DECODER,
    two_stacks=True,
    parts=(
        Linear("enc.q", HIDDEN, HIDDEN, rows=Rows.SOURCE),
        Attention("enc", "enc.q", "enc.q", "enc.q", HEADS, HEADS, WIDTH, rows=Rows.SOURCE, over=Rows.SOURCE),
        Linear("dec.q", HIDDEN, HIDDEN),
        Linear("dec.k", HIDDEN, HIDDEN, rows=Rows.SOURCE),
        Attention("cross", "dec.q", "dec.k", "dec.k", HEADS, HEADS, WIDTH, over=Rows.SOURCE),
    ),
)


def _options(length: int, **changes: Any) -> CountOptions:
    return CountOptions.model_validate({"query_len": length, "key_len": length, **changes})


def _macs(listed: list[Product]) -> dict[tuple[str, str], int]:
    sums: dict[tuple[str, str], int] = {}
    for product in listed:
        key = product.module, product.op
        sums[key] = sums.get(key, 0) + product.macs
    return sums


def test_a_decoder_is_counted_part_by_part_in_running_order() -> None:
    listed = products(DECODER, _options(10, batch=2, head="all"))
    rows, wide = 20, HEADS * WIDTH
    assert _macs(listed) == {
        ("0.q", "linear"): rows * HIDDEN * wide,
        ("0.k", "linear"): rows * HIDDEN * KEY_HEADS * WIDTH,
        ("0.v", "linear"): rows * HIDDEN * KEY_HEADS * WIDTH,
        ("0", "scores"): rows * 10 * wide,  # grouped queries share keys, which leaves scores as they are
        ("0", "context"): rows * 10 * wide,
        ("0.o", "linear"): rows * wide * HIDDEN,
        ("0.up", "linear"): rows * HIDDEN * INNER,
        ("0.down", "linear"): rows * INNER * HIDDEN,
        ("lm_head", "head"): rows * HIDDEN * VOCABULARY,
    }
    assert [product.op for product in listed][3:5] == ["scores", "context"]


def test_a_decode_step_reads_the_cache() -> None:
    step = _macs(products(DECODER, CountOptions(query_len=1, key_len=33)))
    assert step["0.q", "linear"] == HIDDEN * HEADS * WIDTH
    assert step["0", "scores"] == 33 * HEADS * WIDTH
    assert ("lm_head", "head") not in step


@pytest.mark.parametrize(("head", "rows"), [("out", 0), ("last", 3), ("all", 30)])
def test_the_head_runs_on_what_it_is_asked_for(head: Any, rows: int) -> None:
    assert row_count(Rows.HEAD, _options(10, batch=3, head=head)) == rows


def test_a_triangle_leaves_what_a_causal_mask_leaves() -> None:
    dense, masked = _options(10), _options(10, causal="triangular")
    assert _macs(products(DECODER, masked))["0", "scores"] == 55 * HEADS * WIDTH
    assert _macs(products(DECODER, masked))["0", "context"] == 55 * HEADS * WIDTH
    assert _macs(products(ENCODER, masked)) == _macs(products(ENCODER, dense)), "an encoder has no mask"


@pytest.mark.parametrize(
    ("queries", "keys", "window", "pairs"),
    [(4, 4, None, 10), (1, 9, None, 9), (3, 9, None, 6 + 18), (4, 4, 2, 1 + 2 + 2 + 2), (1, 9, 5, 5), (4, 4, 99, 10)],
)
def test_visible_pairs(queries: int, keys: int, window: int | None, pairs: int) -> None:
    allowed = [
        1 for query in range(keys - queries, keys) for key in range(query + 1) if window is None or query - key < window
    ]
    assert visible_pairs(queries, keys, window) == pairs == len(allowed)


def test_a_window_shortens_a_cache_and_not_what_eager_code_multiplies_at_once() -> None:
    parts = tuple(replace(part, window=4) if isinstance(part, Attention) else part for part in PARTS)
    windowed = replace(DECODER, parts=parts)
    assert _macs(products(windowed, _options(10)))["0", "scores"] == 100 * HEADS * WIDTH
    assert _macs(products(windowed, CountOptions(query_len=1, key_len=10)))["0", "scores"] == 4 * HEADS * WIDTH


def test_position_rows_run_once_per_batch_and_can_be_cached() -> None:
    listed = products(ENCODER, _options(10, batch=3))
    assert _macs(listed) == {
        ("q", "pos_query"): 8 * HIDDEN**2,
        ("q", "linear"): 30 * HIDDEN**2,
        ("k", "pos_key"): 8 * HIDDEN**2,
        ("k", "linear"): 30 * HIDDEN**2,
        ("v", "linear"): 30 * HIDDEN**2,
        ("self", "scores"): 30 * 10 * HIDDEN,
        ("self", "c2p"): 30 * 8 * HIDDEN,
        ("self", "p2c"): 30 * 8 * HIDDEN,
        ("self", "context"): 30 * 10 * HIDDEN,
        ("classifier", "head"): 3 * HIDDEN * 2,
    }
    assert {product.op for product in listed if product.constant} == {"pos_query", "pos_key"}
    cached = products(ENCODER, _options(10, batch=3, positions="cached"))
    assert cached == [product for product in listed if not product.constant]


def test_an_adapter_runs_on_position_rows_too() -> None:
    spec = MethodSpec(Method.LORA, rank=2, targets=("q", "v"))
    base = products(ENCODER, _options(10))
    beside = products(ENCODER, _options(10, adapters="unmerged"), spec)
    added = [product for product in beside if product.adapter is not None]
    assert sum(product.macs for product in added) == 2 * 2 * HIDDEN * (2 * 10 + 8)
    assert [product for product in beside if product.adapter is None] == base
    assert products(ENCODER, _options(10), spec) == base, "merged adapters add nothing"
    kept = products(ENCODER, _options(10, adapters="unmerged", positions="cached"), spec)
    assert sum(p.macs for p in kept if p.adapter) == 2 * 2 * HIDDEN * 2 * 10


def test_real_lengths_are_summed_and_their_squares_too() -> None:
    lengths = [3, 7, 7]
    counted = _macs(products(ENCODER, _options(10, batch=3, lengths=lengths)))
    assert counted["v", "linear"] == 17 * HIDDEN**2
    assert counted["self", "scores"] == (9 + 49 + 49) * HIDDEN
    assert counted["classifier", "head"] == 3 * HIDDEN * 2
    assert counted["q", "pos_query"] == 8 * HIDDEN**2


def test_cross_attention_runs_over_the_source_once() -> None:
    whole = _macs(products(TWO_STACKS, _options(5, source_len=9, batch=2)))
    assert whole == {
        ("enc.q", "linear"): 18 * HIDDEN**2,
        ("enc", "scores"): 18 * 9 * HIDDEN,
        ("enc", "context"): 18 * 9 * HIDDEN,
        ("dec.q", "linear"): 10 * HIDDEN**2,
        ("dec.k", "linear"): 18 * HIDDEN**2,
        ("cross", "scores"): 10 * 9 * HIDDEN,
        ("cross", "context"): 10 * 9 * HIDDEN,
    }
    step = _macs(products(TWO_STACKS, CountOptions(query_len=1, key_len=6, source_len=9)))
    assert step == {
        ("dec.q", "linear"): HIDDEN**2,
        ("cross", "scores"): 9 * HIDDEN,
        ("cross", "context"): 9 * HIDDEN,
    }


def test_virtual_tokens_lengthen_sequences_and_a_prefix_the_keys() -> None:
    prompt = MethodSpec(Method.PROMPT, virtual_tokens=3)
    assert _macs(products(DECODER, _options(10), prompt)) == _macs(products(DECODER, _options(13)))
    step = CountOptions(query_len=1, key_len=11)
    assert _macs(products(DECODER, step, prompt)) == _macs(products(DECODER, CountOptions(query_len=1, key_len=14)))
    prefix = _macs(products(DECODER, _options(10), MethodSpec(Method.PREFIX, virtual_tokens=3)))
    assert prefix["0.q", "linear"] == 10 * HIDDEN * HEADS * WIDTH
    assert prefix["0", "scores"] == 10 * 13 * HEADS * WIDTH
    both = _macs(products(TWO_STACKS, _options(5, source_len=9), prompt))
    assert both == _macs(products(TWO_STACKS, _options(8, source_len=12)))


@pytest.mark.parametrize("method", [Method.PROMPT, Method.PREFIX])
def test_virtual_tokens_take_positions(method: Method) -> None:
    spec = MethodSpec(method, virtual_tokens=4)
    assert products(DECODER, _options(60), spec)
    with pytest.raises(ModelError, match="sequence length 61 and 4 virtual tokens: tiny has 64 positions"):
        products(DECODER, _options(61), spec)


def test_the_norm_that_dora_takes_anew_is_never_cached() -> None:
    spec = MethodSpec(Method.DORA, rank=2, targets=("v",))
    cached = products(ENCODER, _options(10, adapters="unmerged", positions="cached"), spec)
    assert {product.op for product in cached if product.constant} == {"dora_down", "dora_up"}


def test_a_bottleneck_never_merges() -> None:
    spec = MethodSpec(Method.PFEIFFER, width=2)
    listed = products(DECODER, _options(10), spec)
    assert sum(product.macs for product in listed if product.adapter) == 2 * 10 * HIDDEN * 2


@pytest.mark.parametrize(
    ("convolution", "positions", "macs"),
    [
        (Convolution("c", 6, 8, (3,)), 10, 2 * 8 * 10 * 6 * 3),
        (Convolution("c", 6, 8, (3, 5), groups=2), 10, 2 * 8 * 10 * 3 * 15),
        (Convolution("c", 6, 8, (3,), groups=2, transposed=True), 10, 2 * 6 * 10 * 4 * 3),
    ],
)
def test_convolutions(convolution: Convolution, positions: int, macs: int) -> None:
    assert convolution_macs(convolution, 2, positions) == macs


def test_a_convolution_over_tokens_follows_their_number() -> None:
    shape = replace(ENCODER, parts=(Convolution("conv", HIDDEN, HIDDEN, (3,)),))
    assert _macs(products(shape, _options(10, batch=2))) == {("conv", "conv"): 20 * HIDDEN**2 * 3}
    assert _macs(products(shape, _options(10, batch=2, lengths=[4, 7]))) == {("conv", "conv"): 11 * HIDDEN**2 * 3}
    fixed = replace(shape, parts=(Convolution("conv", HIDDEN, HIDDEN, (3,), positions=6),))
    assert _macs(products(fixed, _options(10, batch=2))) == {("conv", "conv"): 12 * HIDDEN**2 * 3}


def test_elementwise_work_is_a_list_of_its_own() -> None:
    work: dict[str, int] = {}
    for entry in elements(DECODER, _options(10, batch=2)):
        work[entry.op] = work.get(entry.op, 0) + entry.elements
    rows = 20
    assert work == {
        "norm": rows * HIDDEN,
        "bias": rows * HEADS * WIDTH,
        "scale": HEADS * 2 * 100,
        "softmax": HEADS * 2 * 100,
        "rotary": rows * (HEADS + KEY_HEADS) * WIDTH,
        "activation": 2 * rows * INNER,
        "residual": 2 * rows * HIDDEN,
    }


def test_activation_quantizers_write_elements_and_weights_are_rounded_once() -> None:
    sites = ("weight", "up", "down_output", "output", "input")
    spec = MethodSpec(Method.BAYESIAN_LORA, rank=4, targets=("q",), sites=sites, ranks={"q": 2})
    listed = elements(ENCODER, _options(10, adapters="unmerged"), spec)
    assert [e.elements for e in listed if e.op == "quantizer"] == [(10 + 8) * (HIDDEN + 2 + HIDDEN)]
    assert not [e for e in elements(ENCODER, _options(10), spec) if e.op == "quantizer"]


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        (DECODER, _options(65), "sequence length 65: tiny has 64 positions"),
        (TWO_STACKS, _options(5), "source_len, the encoder's tokens, is missing"),
        (TWO_STACKS, _options(5, source_len=65), "sequence length 65"),
        (DECODER, _options(5, source_len=5), "tiny has one stack"),
        (ENCODER, CountOptions(query_len=1, key_len=5), "tiny is an encoder, which has no cache"),
        (TWO_STACKS, _options(5, source_len=9, lengths=[4]), "two stacks; real lengths are counted for one"),
    ],
)
def test_lengths_that_do_not_suit_the_model_are_refused(shape: ModelShape, options: CountOptions, reason: str) -> None:
    for call in (check_lengths, products, elements):
        with pytest.raises(ModelError, match=reason):
            call(shape, options)


def test_a_model_without_a_limit_takes_any_length() -> None:
    check_lengths(replace(DECODER, max_length=None), _options(100_000))
