"""What all figures of a report have in common, and which of them a report has."""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from rankbits.records import CostRecord, RunRecord
from rankbits.reports.figures import Figure, report_figures
from rankbits.reports.figures.canvas import INK, SMALLEST, file_png, file_svg, page_svg, sheet, style

mpl = pytest.importorskip("matplotlib")

NAMES_OF_ONE = ["ranks", "bits-by-quantizer", "bits-by-matrix", "training", "cost-by-product"]
NAMES_OF_SEVERAL = ["score-by-bops", "score-by-bytes", "ranks", "bits-by-run", "training", "cost-by-product"]


@pytest.fixture(scope="module")
def one(gated_run: RunRecord, narrow_costs: CostRecord) -> list[Figure]:
    return report_figures([gated_run.model_copy(update={"costs": narrow_costs})]).all()


@pytest.fixture(scope="module")
def several(runs: dict[str, RunRecord]) -> list[Figure]:
    return report_figures(list(runs.values())).shared


def _named(figures: list[Figure], name: str) -> Figure:
    return next(figure for figure in figures if figure.name == name)


class TestWhichFigures:
    def test_one_run_has_its_own(self, one: list[Figure]) -> None:
        assert [figure.name for figure in one] == NAMES_OF_ONE

    def test_several_runs_have_shared_ones_and_their_own(self, runs: dict[str, RunRecord]) -> None:
        drawn = report_figures(list(runs.values()))
        assert [figure.name for figure in drawn.shared] == NAMES_OF_SEVERAL
        own = [[figure.name for figure in figures] for figures in drawn.own]
        gated = ["bits-by-quantizer", "bits-by-matrix", "training"]
        assert own[:2] == [[f"run-1-{name}" for name in gated], ["run-2-training"]]
        assert [figure.name for figure in drawn.all()] == NAMES_OF_SEVERAL + [name for names in own for name in names]

    def test_names_of_files_are_never_used_twice(self, runs: dict[str, RunRecord]) -> None:
        names = [figure.name for figure in report_figures(list(runs.values())).all()]
        assert len(names) == len(set(names))

    def test_a_run_with_nothing_to_show_has_none(self, lora_run: RunRecord) -> None:
        assert report_figures([lora_run.model_copy(update={"history": []})]).all() == []


@pytest.fixture(scope="module")
def drawn() -> Callable[[Figure], tuple[str, str]]:
    """The text of a figure on a page and as a file, drawn once for all tests."""
    kept: dict[int, tuple[str, str]] = {}

    def drawn(figure: Figure) -> tuple[str, str]:
        if id(figure) not in kept:
            kept[id(figure)] = page_svg(figure), file_svg(figure)
        return kept[id(figure)]

    return drawn


@pytest.mark.parametrize("place", range(len(NAMES_OF_ONE) + len(NAMES_OF_SEVERAL)))
class TestEveryFigure:
    @pytest.fixture
    def figure(self, place: int, one: list[Figure], several: list[Figure]) -> Figure:
        return [*one, *several][place]

    @pytest.fixture
    def page(self, figure: Figure, drawn: Callable[[Figure], tuple[str, str]]) -> str:
        return drawn(figure)[0]

    @pytest.fixture
    def file(self, figure: Figure, drawn: Callable[[Figure], tuple[str, str]]) -> str:
        return drawn(figure)[1]

    def test_is_an_image_with_a_description(self, figure: Figure, page: str, file: str) -> None:
        for svg in (page, file):
            root = ET.fromstring(svg)
            assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", figure.label)
        assert len(figure.label) > 20

    def test_takes_its_ink_from_the_page_and_has_its_own_as_a_file(self, page: str, file: str) -> None:
        assert "currentColor" in page
        assert INK not in page
        assert "currentColor" not in file
        assert INK in file

    def test_has_a_white_ground_as_a_file_only(self, page: str, file: str) -> None:
        def has_ground(svg: str) -> bool:
            root = ET.fromstring(svg)
            size = {float(root.attrib[side].removesuffix("pt")) for side in ("width", "height")}
            first = next(element for element in root.iter() if element.tag.endswith("path"))
            corners = {float(number) for number in re.findall(r"[\d.]+", first.get("d", ""))}
            return corners == size | {0.0} and "fill: #ffffff" in first.get("style", "")

        assert not has_ground(page)
        assert has_ground(file)

    def test_has_no_date_and_no_style_for_the_whole_page(self, page: str, file: str) -> None:
        assert not re.search(r"<style|<metadata|<\?xml|<!DOCTYPE", page)
        assert not re.search(r"<style|<metadata|<!DOCTYPE", file)

    def test_ids_are_only_those_in_use_and_never_twice(self, page: str, file: str) -> None:
        for svg in (page, file):
            ids = re.findall(r' id="([^"]*)"', svg)
            used = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg))
            assert len(set(ids)) == len(ids)
            assert set(ids) == {name for pair in used for name in pair if name}

    def test_all_text_lies_inside(self, figure: Figure) -> None:
        """Of the drawing itself, with its own font; a page is looked at in a browser."""
        with style():
            drawing = figure.draw()
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.text import Text

            renderer = FigureCanvasAgg(drawing).get_renderer()
            drawing.draw(renderer)
            width, height = drawing.bbox.size
            for text in drawing.findobj(Text):
                box = text.get_window_extent(renderer)
                if text.get_visible() and text.get_text():
                    assert -2 <= box.x0 <= box.x1 <= width + 2, text.get_text()
                    assert -2 <= box.y0 <= box.y1 <= height + 2, text.get_text()

    def test_shrinks_on_a_page_only_so_far(self, page: str) -> None:
        root = ET.fromstring(page)
        width = float(root.attrib["width"].removesuffix("pt"))
        assert root.attrib["style"] == f"min-width: {SMALLEST * width:.0f}pt"

    def test_numbers_stand_under_their_columns(self, figure: Figure) -> None:
        table = list(csv.reader(io.StringIO(figure.csv())))
        assert tuple(table[0]) == figure.columns
        assert table[0][0] == "run"
        assert len(table) == len(figure.rows) + 1 > 1
        assert {len(row) for row in table} == {len(figure.columns)}

    def test_is_the_same_each_time_and_leaves_the_settings_of_matplotlib_alone(self, figure: Figure, page: str) -> None:
        with mpl.rc_context({"axes.linewidth": 5.0, "font.size": 30.0}):
            assert page_svg(figure) == page
            assert mpl.rcParams["font.size"] == 30.0


def test_ids_of_different_figures_differ(one: list[Figure]) -> None:
    drawn = [page_svg(_named(one, name)) for name in ("bits-by-quantizer", "training")]
    found = [set(re.findall(r' id="([^"]*)"', svg)) for svg in drawn]
    assert all(found)
    assert not found[0] & found[1]


def test_pixels_are_200_to_an_inch_and_never_too_many(one: list[Figure]) -> None:
    def size(figure: Figure) -> tuple[int, int]:
        header = file_png(figure)[16:24]
        return int.from_bytes(header[:4]), int.from_bytes(header[4:])

    figure = _named(one, "bits-by-quantizer")
    width = float(ET.fromstring(file_svg(figure)).attrib["width"].removesuffix("pt"))
    assert size(figure)[0] == pytest.approx(width / 72 * 200, abs=1)
    tall = replace(figure, draw=lambda: sheet(0.2, 400))
    assert 19_000 < size(tall)[1] <= 20_000


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$\\frac{", "検索"])
def test_names_are_text_and_nothing_else(
    runs: dict[str, RunRecord], texts: Callable[[Figure], list[str]], name: str
) -> None:
    first, second, *_ = runs.values()
    module = first.modules[0].model_copy(update={"kind": name, "name": name})
    data = first.data.model_copy(update={"task": name})
    changed = first.model_copy(update={"modules": [module], "method": name, "data": data} | {"history": []})
    other = second.model_copy(update={"data": data, "history": []})
    for figure in report_figures([changed, other]).all():
        assert name in "\n".join(texts(figure)) or figure.name.startswith("run-")
