"""Figures show the record's numbers as text, are the same each time, and take their ink from the page."""

import re
from collections import Counter
from collections.abc import Callable
from xml.etree import ElementTree as ET

import pytest

from rankbits.errors import RankbitsError
from rankbits.records import RunRecord
from rankbits.reports.figures import bits_box, bits_heatmap, has_curves, rank_heatmap, training_curves

mpl = pytest.importorskip("matplotlib")

ALL = [rank_heatmap, bits_heatmap, bits_box, training_curves]


def _texts(svg: str) -> list[str]:
    root = ET.fromstring(svg)
    return ["".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("text")]


def _label(svg: str) -> str:
    return ET.fromstring(svg).attrib["aria-label"]


@pytest.mark.parametrize("draw", ALL)
class TestEveryFigure:
    def test_is_the_same_text_each_time(self, gated_run: RunRecord, draw: Callable[[RunRecord], str]) -> None:
        assert draw(gated_run) == draw(gated_run)

    def test_is_an_image_with_a_description(self, gated_run: RunRecord, draw: Callable[[RunRecord], str]) -> None:
        root = ET.fromstring(draw(gated_run))
        assert root.attrib["role"] == "img"
        assert len(root.attrib["aria-label"]) > 20

    def test_takes_its_ink_from_the_page(self, gated_run: RunRecord, draw: Callable[[RunRecord], str]) -> None:
        svg = draw(gated_run)
        assert "currentColor" in svg
        assert "#0b0c0d" not in svg

    def test_has_no_background_date_or_style_for_the_whole_page(
        self, gated_run: RunRecord, draw: Callable[[RunRecord], str]
    ) -> None:
        svg = draw(gated_run)
        assert not re.search(r"<style|<metadata|<\?xml|<!DOCTYPE", svg)
        paths = [element for element in ET.fromstring(svg).iter() if element.tag.endswith("path")]
        assert not any("fill: #ffffff" in path.get("style", "") for path in paths)

    def test_ids_are_only_those_in_use_and_never_twice(
        self, gated_run: RunRecord, draw: Callable[[RunRecord], str]
    ) -> None:
        svg = draw(gated_run)
        ids = re.findall(r' id="([^"]*)"', svg)
        used = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg))
        assert len(set(ids)) == len(ids)
        assert set(ids) == {name for pair in used for name in pair if name}

    def test_leaves_the_settings_of_matplotlib_alone(
        self, gated_run: RunRecord, draw: Callable[[RunRecord], str]
    ) -> None:
        plain = draw(gated_run)
        with mpl.rc_context({"axes.linewidth": 5.0, "font.size": 30.0}):
            assert draw(gated_run) == plain
            assert mpl.rcParams["font.size"] == 30.0


def test_ids_of_different_figures_differ(gated_run: RunRecord) -> None:
    found = [set(re.findall(r' id="([^"]*)"', draw(gated_run))) for draw in (bits_box, training_curves)]
    assert all(found)
    assert not found[0] & found[1]


def test_rank_heatmap_shows_each_rank_under_its_layer_and_kind(gated_run: RunRecord) -> None:
    texts = _texts(rank_heatmap(gated_run))
    ranks = Counter(str(module.rank) for module in gated_run.modules)
    places = ["query", "key", "value", *(f"layer {number}" for number in range(6))]
    assert Counter(texts) == ranks + Counter(places)


def test_rank_heatmap_describes_itself(gated_run: RunRecord) -> None:
    assert _label(rank_heatmap(gated_run)) == (
        "Heat map of ranks: 6 layers by 3 kinds of matrix, from 1 to 8 of at most 8."
    )


def test_matrices_that_share_a_place_show_their_mean(gated_run: RunRecord) -> None:
    first, second = (
        gated_run.modules[0].model_copy(update={"name": name, "rank": r}) for name, r in (("a", 1), ("b", 4))
    )
    assert "2.5" in _texts(rank_heatmap(gated_run.model_copy(update={"modules": [first, second]})))


def test_a_matrix_outside_the_layers_stands_last(gated_run: RunRecord) -> None:
    pooler = gated_run.modules[0].model_copy(update={"name": "pooler", "layer": None, "kind": "dense"})
    record = gated_run.model_copy(update={"modules": [pooler, *gated_run.modules]})
    rows = [text for text in _texts(rank_heatmap(record)) if text.startswith(("layer", "other"))]
    assert rows[-1] == "other"
    assert "dense" in _texts(bits_heatmap(record))


def test_the_colour_of_a_rank_follows_its_share_of_the_largest(gated_run: RunRecord) -> None:
    def colours(rank: int) -> set[str]:
        module = gated_run.modules[0].model_copy(update={"rank": rank})
        svg = rank_heatmap(gated_run.model_copy(update={"modules": [module]}))
        return set(re.findall(r"fill: (#[0-9a-f]{6})", svg)) - {"#000000", "#ffffff"}

    viridis = mpl.colormaps["viridis"]
    assert colours(1) == {mpl.colors.to_hex(viridis(0.12 + 0.83 / 8))}
    assert colours(8) == {mpl.colors.to_hex(viridis(0.95))}


def test_bits_heatmap_shows_each_width_in_its_row_and_column(gated_run: RunRecord) -> None:
    texts = _texts(bits_heatmap(gated_run))
    widths = Counter(str(bits) for module in gated_run.modules for bits in module.bits.values())
    rows = [f"{layer}.{kind}" for layer in range(6) for kind in ("query", "key", "value")]
    assert Counter(texts) == widths + Counter([*rows, "W0", "A", "E", "B", "A out", "E out", "out"])


def test_rows_of_the_bits_heatmap_are_in_the_order_of_layers(gated_run: RunRecord) -> None:
    record = gated_run.model_copy(update={"modules": gated_run.modules[::-1]})
    rows = [text for text in _texts(bits_heatmap(record)) if "." in text]
    assert [row[0] for row in rows] == [layer for layer in "012345" for _ in range(3)]


def test_rows_with_one_label_are_told_apart_by_name(gated_run: RunRecord) -> None:
    twins = [gated_run.modules[0].model_copy(update={"name": name}) for name in ("encoder.0.q", "decoder.0.q")]
    texts = _texts(bits_heatmap(gated_run.model_copy(update={"modules": twins})))
    assert {"encoder.0.q", "decoder.0.q"} <= set(texts)


def test_long_kinds_are_slanted_so_that_they_do_not_overlap(gated_run: RunRecord) -> None:
    module = gated_run.modules[0].model_copy(update={"kind": "attention.output.dense"})
    svg = rank_heatmap(gated_run.model_copy(update={"modules": [module]}))
    assert "rotate(-40" in svg
    assert "rotate(-40" not in rank_heatmap(gated_run)


def test_bits_box_has_a_dot_for_each_matrix_and_the_means(gated_run: RunRecord) -> None:
    svg = bits_box(gated_run)
    assert svg.count("fill: #0072b2") == 18 * 7
    assert svg.count("fill: #d55e00") == 7
    assert _label(svg).endswith("W0 7.0, A 6.2, E 7.0, B 8.7, A out 7.0, E out 6.2, out 7.0.")


def test_curves_have_a_panel_for_each_quantity_that_was_logged(gated_run: RunRecord, lora_run: RunRecord) -> None:
    assert {"loss", "mean bits", "mean rank"} <= set(_texts(training_curves(gated_run)))
    assert not {"mean bits", "mean rank"} & set(_texts(training_curves(lora_run)))


@pytest.mark.parametrize(
    "history", [[], [{"step": 1.0, "loss": 0.5}], [{"loss": 0.5}, {"loss": 0.4}], [{"step": 1.0}] * 2]
)
def test_a_history_without_a_line_has_no_curves(lora_run: RunRecord, history: list[dict[str, float]]) -> None:
    record = lora_run.model_copy(update={"history": history})
    assert not has_curves(record)
    with pytest.raises(RankbitsError, match="'quickstart' logged no loss, bits or ranks"):
        training_curves(record)


@pytest.mark.parametrize("draw", [bits_heatmap, bits_box])
def test_bits_of_a_run_without_quantizers_cannot_be_drawn(
    lora_run: RunRecord, draw: Callable[[RunRecord], str]
) -> None:
    with pytest.raises(RankbitsError, match="'quickstart' quantized nothing"):
        draw(lora_run)


def test_ranks_of_a_run_without_adapters_cannot_be_drawn(lora_run: RunRecord) -> None:
    with pytest.raises(RankbitsError, match="'quickstart' adapted no matrix"):
        rank_heatmap(lora_run.model_copy(update={"modules": []}))


@pytest.mark.parametrize("kind", ["<script>alert(1)</script>", "a$b$c", "$\\frac{"])
def test_names_are_text_and_nothing_else(gated_run: RunRecord, kind: str) -> None:
    module = gated_run.modules[0].model_copy(update={"kind": kind})
    record = gated_run.model_copy(update={"modules": [module]})
    assert kind in _texts(rank_heatmap(record))
    assert f"0.{kind}" in _texts(bits_heatmap(record))
    assert "<script" not in rank_heatmap(record)
