"""The side of MoRA's matrix: published sizes, the rounding of the paper and of its code, the largest rank that fits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankbits.accounting.mora import mora_side
from rankbits.accounting.spec import Linear, Method, MethodSpec
from rankbits.errors import ModelError
from rankbits.tuners.mora import MoraConfig
from rankbits.tuners.mora.layer import form_of
from rankbits.tuners.mora.side import Rounding, largest_rank, square_side

SIZES = st.integers(1, 400)


@pytest.mark.parametrize(
    ("in_features", "out_features", "r", "side", "parameters", "of_lora"),
    [
        (4096, 4096, 8, 256, 65_536, 65_536),
        (4096, 4096, 256, 1448, 2_096_704, 2_097_152),
        (4096, 11008, 8, 348, 121_104, 120_832),
        (768, 768, 8, 111, 12_321, 12_288),
        (768, 3072, 8, 175, 30_625, 30_720),
    ],
)
def test_sides_of_the_papers_code(in_features, out_features, r, side, parameters, of_lora) -> None:
    found = square_side(r, in_features, out_features, rounding=Rounding.NEAREST, even=False)
    assert (found, found**2, r * (in_features + out_features)) == (side, parameters, of_lora)


def test_rotation_makes_the_side_even() -> None:
    found = square_side(8, 768, 768, rounding=Rounding.NEAREST, even=True)
    assert (found, found**2) == (110, 12_100)
    assert square_side(8, 384, 384, rounding=Rounding.NEAREST, even=True) == 78


@given(st.integers(1, 600), st.integers(1, 20_000), st.integers(1, 20_000))
def test_a_side_is_the_rounded_root_and_floor_never_exceeds_lora(r, in_features, out_features) -> None:
    parameters = r * (in_features + out_features)
    nearest = square_side(r, in_features, out_features, rounding=Rounding.NEAREST, even=False)
    floor = square_side(r, in_features, out_features, rounding=Rounding.FLOOR, even=False)
    # 2 side - 1 <= 2 sqrt(n) < 2 side + 1, in integers.
    assert (2 * nearest - 1) ** 2 <= 4 * parameters < (2 * nearest + 1) ** 2
    assert nearest == int(math.sqrt(parameters) + 0.5)
    assert floor**2 <= parameters < (floor + 1) ** 2
    even = square_side(r, in_features, out_features, rounding=Rounding.NEAREST, even=True)
    assert even == nearest - nearest % 2


@given(SIZES, SIZES, st.sampled_from(Rounding), st.booleans())
def test_the_largest_rank_fits_and_the_next_does_not(in_features, out_features, rounding, even) -> None:
    most, smaller = (
        largest_rank(in_features, out_features, rounding=rounding, even=even),
        min(in_features, out_features),
    )

    def side(r: int) -> int:
        return square_side(r, in_features, out_features, rounding=rounding, even=even)

    if most:
        assert 1 <= side(most) <= smaller
        assert side(1) >= 1
    elif not (even and smaller == 1):
        assert side(1) > smaller
    assert side(most + 1) > smaller or (even and smaller == 1)


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 512))
def test_a_layer_has_the_side_that_accounting_predicts(in_features, out_features, r) -> None:
    linear, spec = Linear("l", in_features, out_features), MethodSpec(Method.MORA, rank=r)
    try:
        form = form_of(MoraConfig(r=r), "l", (out_features, in_features))
    except ValueError:
        if min(in_features, out_features) > 1:
            with pytest.raises(ModelError):
                mora_side(linear, spec)
    else:
        assert form.side == mora_side(linear, spec)
