"""Legends: no two of many entries look alike, and entries stand in as many lines as they need."""

import pytest

from rankbits.reports.figures.legend import dashed, hatched, legend_height, marked

NAMES = [f"run {number}" for number in range(24)]


@pytest.mark.parametrize("make", [marked, dashed, hatched])
def test_looks_repeat_late(make) -> None:
    looks = [(key.colour, key.marker, str(key.dashes), key.hatch) for key in make(NAMES)]
    assert len(set(looks)) == 24


@pytest.mark.parametrize(("make", "field"), [(marked, "marker"), (dashed, "dashes"), (hatched, "hatch")])
def test_neighbours_differ_without_colour(make, field: str) -> None:
    assert len({str(getattr(key, field)) for key in make(NAMES[:5])}) == 5


def test_narrow_legends_are_higher() -> None:
    keys = marked(["a", "bb", "ccc"])
    heights = [legend_height(keys, width) for width in (9.0, 2.0, 0.5)]
    assert heights[0] < heights[1] < heights[2]
