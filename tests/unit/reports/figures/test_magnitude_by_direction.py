"""The scatter plot of magnitude and direction: every record is drawn once, where its method and kind stand."""

import csv
import io
from collections.abc import Callable

import pytest

from rankbits.records import WeightChangeRecord
from rankbits.reports.figures import Figure, magnitude_by_direction, write_figures
from rankbits.reports.figures.canvas import style

pytest.importorskip("matplotlib")
METHODS = ("full", "lora", "dora")


@pytest.fixture
def points() -> list[WeightChangeRecord]:
    """Three methods, two kinds, two layers, three checkpoints; with LoRA magnitude rises with direction, else falls."""
    return [
        WeightChangeRecord(
            method=method,
            layer=f"layer.{layer}.{kind}",
            step=step,
            magnitude=step * 1e-3 if method == "lora" else 1.0 - step * 1e-3,
            direction=step * (2e-5 + layer * 1e-6),
        )
        for method in METHODS
        for kind in ("query", "value")
        for layer in range(2)
        for step in (20, 40, 60)
    ]


def _lines(figure: Figure) -> list[list[object]]:
    """The marks of each panel, in the order of the checkpoints."""
    with style():
        axes = figure.draw().axes[:-1]  # the last is the legend
    return [[line for line in panel.lines if line.get_marker() not in {"", "None"}] for panel in axes]


def test_the_table_holds_the_records(points: list[WeightChangeRecord]) -> None:
    table = list(csv.DictReader(io.StringIO(magnitude_by_direction(points).csv())))
    read = [
        WeightChangeRecord(
            method=row["method"],
            layer=row["layer"],
            step=int(row["step"]),
            magnitude=float(row["magnitude"]),
            direction=float(row["direction"]),
        )
        for row in table
    ]
    assert read == points


def test_every_record_is_drawn_in_the_panel_of_its_method_and_kind(points: list[WeightChangeRecord]) -> None:
    panels = _lines(magnitude_by_direction(points))
    expected = [
        [
            (p.direction, p.magnitude)
            for step in (20, 40, 60)
            for p in points
            if (p.method, p.kind, p.step) == (m, k, step)
        ]
        for k in ("query", "value")
        for m in METHODS
    ]
    drawn = [[pair for line in lines for pair in zip(*line.get_data(), strict=True)] for lines in panels]
    assert drawn == expected


def test_methods_have_markers_and_checkpoints_colours_and_sizes(points: list[WeightChangeRecord]) -> None:
    panels = _lines(magnitude_by_direction(points))
    markers = [{line.get_marker() for line in lines} for lines in panels]
    assert [len(found) for found in markers] == [1] * 6
    assert markers[:3] == markers[3:]
    assert len(set.union(*markers)) == 3
    looks = [[(line.get_color(), line.get_markersize()) for line in lines] for lines in panels]
    assert looks == looks[:1] * 6
    assert [size for _, size in looks[0]] == sorted({size for _, size in looks[0]})
    assert len({colour for colour, _ in looks[0]}) == 3
    heights = [line.get_zorder() for line in panels[0]]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 3


def test_each_panel_says_its_correlation(points: list[WeightChangeRecord], texts: Callable[..., list[str]]) -> None:
    figure = magnitude_by_direction([p for p in points if p.layer.startswith("layer.0")])
    said = texts(figure)
    assert [said.count(f"correlation {number}") for number in ("+1.00", "-1.00")] == [2, 4]
    assert {"lora, query", "dora, value", "step 20", "step 60"} <= set(said)
    assert "lora query +1.00, dora query -1.00" in figure.label


def test_a_single_point_has_none(points: list[WeightChangeRecord], texts: Callable[..., list[str]]) -> None:
    figure = magnitude_by_direction(points[:1])
    assert not [text for text in texts(figure) if text.startswith("correlation")]
    assert figure.label.endswith("Correlations: full query none.")


def test_more_methods_than_a_page_is_wide_go_on_below(points: list[WeightChangeRecord]) -> None:
    more = [point.model_copy(update={"method": f"{point.method} again"}) for point in points]
    with style():
        usual, wide = (magnitude_by_direction(held).draw().get_size_inches() for held in (points, points + more))
    assert usual[0] == wide[0] <= 10.4
    assert wide[1] > 1.9 * usual[1]


def test_it_is_written_under_its_name(points: list[WeightChangeRecord], tmp_path) -> None:
    written = write_figures([magnitude_by_direction(points)], tmp_path)
    assert [path.name for path in written] == [f"magnitude-by-direction.{suffix}" for suffix in ("svg", "png", "csv")]


def test_without_points_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no points to draw: expected at least one WeightChangeRecord"):
        magnitude_by_direction([])
