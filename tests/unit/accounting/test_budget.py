"""A budget is refused where it cannot be met, and met by the width or rank that it allows."""

from dataclasses import replace

import pytest

from rankbits.accounting.budget import Budget, Quantity, Scope, expectation, parse_budget
from rankbits.accounting.macs import products
from rankbits.accounting.spec import Attention, Granularity, Linear, Method, MethodSpec, ModelShape, Placement
from rankbits.errors import RecipeError
from rankbits.records import CountOptions

SHAPE = ModelShape(
    name="tiny",
    model_type="tiny",
    parts=(
        Linear("q", 64, 64),
        Linear("v", 64, 32),
        Attention("self", "q", "q", "v", 2, 2, 16),
        Linear("o", 32, 64),
    ),
    hidden=64,
    layers=1,
    max_length=None,
    vocabulary=9,
    usual_targets=("q", "v"),
)
SITES = ("weight", "down", "diagonal", "up", "diagonal_output", "input")
SPEC = MethodSpec(Method.BAYESIAN_LORA, rank=4, sites=SITES)
OPTIONS = CountOptions(query_len=10, key_len=10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bops=0.25", Budget(Quantity.BOPS, 0.25)),
        ("bytes=0.30", Budget(Quantity.BYTES, 0.3)),
        ("bits=4", Budget(Quantity.BITS, 4.0)),
        ("rank=2.5", Budget(Quantity.RANK, 2.5)),
    ],
)
def test_a_budget_is_a_quantity_and_a_limit(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected
    assert parse_budget(text, 32).reference_bits == 32


@pytest.mark.parametrize("text", ["bops", "bops=", "bops=0", "bops=-1", "bops=nan", "bops=inf", "flops=1", "=3", ""])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected one of bops, bytes, bits, rank, '=' and a number above 0"):
        parse_budget(text)


def test_a_reference_is_16_or_32_bits_wide() -> None:
    with pytest.raises(RecipeError, match="16 or 32 bits wide, given 8"):
        parse_budget("bops=1", 8)


def _share_at(width: int, rank: int) -> float:
    """Bit operations by hand: what reads a tensor of the adapted layers, at one width, against the base at 16."""
    macs = {"q": (64, 64), "v": (64, 32)}
    base = sum(10 * a * b for a, b in macs.values())
    added = sum(10 * rank * (a + b) for a, b in macs.values())
    return (base + added) * width * width / (base * 256)


def test_the_interval_runs_from_two_bits_at_rank_one_to_all_gates_open() -> None:
    found = expectation(SHAPE, SPEC, OPTIONS, Budget(Quantity.BOPS, 0.3))
    assert found.low == pytest.approx(_share_at(2, 1))
    assert found.high == pytest.approx(_share_at(32, 4))


@pytest.mark.parametrize("width", [2, 4, 8, 16, 32])
def test_the_cost_of_a_uniform_width_asks_for_that_width(width: int) -> None:
    found = expectation(SHAPE, SPEC, OPTIONS, Budget(Quantity.BOPS, _share_at(width, 4)))
    assert found.mean_bits == pytest.approx(width)
    assert found.mean_rank == 4.0


def test_between_two_widths_cost_is_linear_in_the_share_of_each() -> None:
    half = (_share_at(4, 4) + _share_at(8, 4)) / 2
    assert expectation(SHAPE, SPEC, OPTIONS, Budget(Quantity.BOPS, half)).mean_bits == pytest.approx(6.0)


def test_below_two_bits_at_full_rank_ranks_are_given_up() -> None:
    found = expectation(SHAPE, SPEC, OPTIONS, Budget(Quantity.BOPS, _share_at(2, 2)))
    assert (found.mean_bits, found.mean_rank) == (2.0, 2.0)


@pytest.mark.parametrize("budget", [Budget(Quantity.BITS, 32.0), Budget(Quantity.BOPS, _share_at(32, 4))])
def test_a_budget_of_what_open_gates_cost_leaves_them_open(budget: Budget) -> None:
    found = expectation(SHAPE, SPEC, OPTIONS, budget)
    assert (found.mean_bits, found.mean_rank) == (32.0, 4.0)


def test_bits_and_bytes_are_those_of_the_weights() -> None:
    assert expectation(SHAPE, SPEC, OPTIONS, Budget(Quantity.BITS, 4.0)).mean_bits == pytest.approx(4.0)
    numbers = {"q": (4096, 256, 4, 256), "v": (2048, 256, 4, 128)}
    quarter = sum(-(-n * 4 // 8) + 4 for sizes in numbers.values() for n in sizes)
    share = quarter / ((4096 + 2048) * 2)
    assert expectation(SHAPE, SPEC, OPTIONS, Budget(Quantity.BYTES, share)).mean_bits == pytest.approx(4.0)
    wide = (4096 + 2048) * 4
    assert expectation(SHAPE, SPEC, OPTIONS, Budget(Quantity.BYTES, 0.5, 32)).high == pytest.approx(
        (4 * sum(map(sum, numbers.values())) + 8 * 4) / wide
    )


def test_a_tensor_without_a_quantizer_keeps_32_bits() -> None:
    only = replace(SPEC, sites=("weight",))
    found = expectation(SHAPE, only, OPTIONS, Budget(Quantity.BITS, 8.0))
    weights, rest = 4096 + 2048, 2 * (4 + 256) + 256 + 128
    assert found.low == pytest.approx((weights * 2 + 32 * (64 + 64 + 64 + 32 + 2)) / (weights + 64 + 64 + 64 + 32 + 2))
    assert found.high == 32.0
    assert found.mean_bits == pytest.approx(_bits_of_the_rest(8.0, weights, rest))


def _bits_of_the_rest(mean: float, weights: int, rest: int) -> float:
    return (mean * (weights + rest) - 32 * rest) / weights


def test_a_rank_is_met_by_that_rank() -> None:
    found = expectation(SHAPE, SPEC, OPTIONS, Budget(Quantity.RANK, 2.5))
    assert (found.low, found.high, found.mean_bits, found.mean_rank) == (1.0, 4.0, None, 2.5)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(Quantity.BOPS, 0.001), r"bops=0.001 cannot be met: with 2 bits and rank 1 everywhere it is 0.016"),
        (Budget(Quantity.BITS, 1.5), r"bits=1.5 cannot be met: .* it is 2, with all gates open 32"),
        (Budget(Quantity.BYTES, 0.01), "bytes=0.01 cannot be met"),
        (Budget(Quantity.RANK, 0.5), "rank=0.5 cannot be met: with rank 1 everywhere it is 1, .* 4"),
        (Budget(Quantity.BITS, 64.0), r"bits=64 cannot be met: .* it is 2, with all gates open 32; expected a limit"),
        (Budget(Quantity.BOPS, 99.0), "bops=99 cannot be met"),
        (Budget(Quantity.RANK, 99.0), "rank=99 cannot be met: with rank 1 everywhere it is 1, with all gates open 4"),
    ],
)
def test_what_is_out_of_reach_is_refused_with_what_can_be_reached(budget: Budget, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        expectation(SHAPE, SPEC, OPTIONS, budget)


def test_where_inputs_keep_32_bits_a_budget_that_is_too_small_says_so() -> None:
    hint = r'\. No input has a quantizer, so each counts 32 bits: add "input" to quantizers$'
    weights = replace(SPEC, sites=SITES[:-1])
    with pytest.raises(RecipeError, match=hint):
        expectation(SHAPE, weights, OPTIONS, Budget(Quantity.BOPS, 0.1))
    for spec, budget in (
        (SPEC, Budget(Quantity.BOPS, 0.001)),
        (weights, Budget(Quantity.BOPS, 99.0)),
        (weights, Budget(Quantity.BITS, 1.0)),
    ):
        with pytest.raises(RecipeError, match=r"expected a limit between them$"):
            expectation(SHAPE, spec, OPTIONS, budget)


def test_ranks_that_are_not_learned_are_not_given_up() -> None:
    fixed = replace(SPEC, learn_rank=False)
    for spec, limit in ((fixed, 2.0), (replace(SPEC, rank=1), 1.0)):
        with pytest.raises(RecipeError, match="cannot be met: no rank has a gate; expected learn_rank=True and r of"):
            expectation(SHAPE, spec, OPTIONS, Budget(Quantity.RANK, limit))
    assert expectation(SHAPE, fixed, OPTIONS, Budget(Quantity.BOPS, 0.3)).low == pytest.approx(_share_at(2, 4))
    with pytest.raises(RecipeError, match="cannot be met"):
        expectation(SHAPE, fixed, OPTIONS, Budget(Quantity.BOPS, _share_at(2, 2)))


def test_a_mean_over_weights_is_least_with_all_ranks_if_factors_alone_are_narrow() -> None:
    factors = replace(SPEC, sites=("down", "diagonal", "up"))
    weights, rest = 4096 + 2048, 4 * (64 + 64 + 64 + 32 + 2)
    found = expectation(SHAPE, factors, OPTIONS, Budget(Quantity.BITS, 31.0))
    assert found.low == pytest.approx((weights * 32 + rest * 2) / (weights + rest))


def test_a_method_without_quantizers_cannot_meet_a_budget_of_bits() -> None:
    with pytest.raises(RecipeError, match="lora has no quantizers"):
        expectation(SHAPE, MethodSpec(Method.LORA), OPTIONS, Budget(Quantity.BITS, 4.0))


def test_the_interval_is_that_of_the_products() -> None:
    widths = {name: dict.fromkeys(SITES, 4) for name in ("q", "v")}
    listed = products(SHAPE, OPTIONS.model_copy(update={"adapters": "unmerged"}), replace(SPEC, widths=widths))
    share = sum(p.bops for p in listed if p.module in widths) / (10 * 6144 * 256)
    assert share == pytest.approx(_share_at(4, 4))


def test_a_rounded_sum_leaves_the_weight_alone() -> None:
    merged = replace(SPEC, sites=("weight", "input"), placement=Placement.MERGED, granularity=Granularity.CHANNEL)
    assert expectation(SHAPE, merged, OPTIONS, Budget(Quantity.BOPS, (4 * 4) / 256)).mean_bits == pytest.approx(4.0)
    assert expectation(SHAPE, merged, OPTIONS, Budget(Quantity.BITS, 4.0)).mean_bits == pytest.approx(4.0)
    share = ((4096 + 2048) / 2 + 4 * (64 + 32)) / ((4096 + 2048) * 2)
    assert expectation(SHAPE, merged, OPTIONS, Budget(Quantity.BYTES, share)).mean_bits == pytest.approx(4.0)
    narrow = replace(merged, scale_bits=16)
    share = ((4096 + 2048) / 2 + 2 * (64 + 32) + 2 * 4) / ((4096 + 2048) * 2)
    assert expectation(SHAPE, narrow, OPTIONS, Budget(Quantity.BYTES, share)).mean_bits == pytest.approx(4.0)


def test_the_whole_model_has_its_attention_and_other_layers() -> None:
    merged = replace(SPEC, sites=("weight", "input"), placement=Placement.MERGED)
    found = expectation(SHAPE, merged, OPTIONS, Budget(Quantity.BOPS, 3.0, 16, 10, Scope.MODEL))
    other = 10 * 32 * 64 + 2 * (2 * 10 * 16 * 10)
    base = 10 * (4096 + 2048) + other
    assert found.low == pytest.approx((10 * (4096 + 2048) * 4 + other * 1024) / (base * 256))
