"""Ranks stand under their layer and kind, in the colour of their share of the largest, alike in all runs."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from rankbits.records import RunRecord
from rankbits.reports.figures.canvas import page_svg
from rankbits.reports.figures.figure import Figure
from rankbits.reports.figures.ranks import ranks

mpl = pytest.importorskip("matplotlib")
Texts = Callable[[Figure], list[str]]


def _ranks(*records: RunRecord) -> Figure:
    figure = ranks({f"run {number}": record for number, record in enumerate(records)})
    assert figure is not None
    return figure


def _with(record: RunRecord, **changes: Any) -> RunRecord:
    return record.model_copy(update={"modules": [record.modules[0].model_copy(update=changes)]})


def _colours(figure: Figure) -> set[str]:
    return set(re.findall(r"fill: (#[0-9a-f]{6})", page_svg(figure))) - {"#000000", "#ffffff"}


def test_each_rank_stands_under_its_layer_and_kind(gated_run: RunRecord, texts: Texts) -> None:
    found = Counter(str(module.rank) for module in gated_run.modules)
    places = ["query", "key", "value", *(f"layer {number}" for number in range(6))]
    assert Counter(texts(_ranks(gated_run))) == found + Counter(places)


def test_it_describes_itself(gated_run: RunRecord) -> None:
    assert _ranks(gated_run).label == "Heat map of ranks: 6 layers by 3 kinds of matrix, from 1 to 8 of at most 8."


def test_runs_stand_side_by_side_with_their_names(
    gated_run: RunRecord, pruned_run: RunRecord, lora_run: RunRecord, texts: Texts
) -> None:
    figure = ranks({"ours": gated_run, "adalora": pruned_run, "lora": lora_run})
    assert figure is not None
    assert figure.label.startswith("Heat map of ranks: 2 runs, each 6 layers by 3 kinds of matrix, from 1 to 8 of at ")
    shown = texts(figure)
    assert (shown.count("ours"), shown.count("adalora"), shown.count("layer 0"), shown.count("lora")) == (1, 1, 2, 0)


def test_runs_share_one_colour_scale(gated_run: RunRecord, pruned_run: RunRecord) -> None:
    wide = _with(pruned_run, rank=4, max_rank=16)
    figure = _ranks(_with(gated_run, rank=8), wide)
    viridis = mpl.colormaps["viridis"]
    assert _colours(figure) == {mpl.colors.to_hex(viridis(0.12 + 0.83 * share)) for share in (1 / 2, 1 / 4)}


def test_a_place_is_the_same_in_all_runs(gated_run: RunRecord, texts: Texts) -> None:
    deep = _with(gated_run, layer=7, kind="dense")
    shown = texts(_ranks(_with(gated_run), deep))
    assert [shown.count(place) for place in ("layer 0", "layer 7", "query", "dense")] == [2, 2, 2, 2]


def test_the_colour_of_a_rank_follows_its_share_of_the_largest(gated_run: RunRecord) -> None:
    viridis = mpl.colormaps["viridis"]
    assert _colours(_ranks(_with(gated_run, rank=1))) == {mpl.colors.to_hex(viridis(0.12 + 0.83 / 8))}
    assert _colours(_ranks(_with(gated_run, rank=8))) == {mpl.colors.to_hex(viridis(0.95))}


def test_matrices_that_share_a_place_show_their_mean(gated_run: RunRecord, texts: Texts) -> None:
    first, second = (
        gated_run.modules[0].model_copy(update={"name": name, "rank": r}) for name, r in (("a", 1), ("b", 4))
    )
    figure = _ranks(gated_run.model_copy(update={"modules": [first, second]}))
    assert "2.5" in texts(figure)
    assert [row[5] for row in figure.rows] == [1, 4]


def test_a_matrix_outside_the_layers_stands_last(gated_run: RunRecord, texts: Texts) -> None:
    pooler = gated_run.modules[0].model_copy(update={"name": "pooler", "layer": None, "kind": "dense"})
    shown = texts(_ranks(gated_run.model_copy(update={"modules": [pooler, *gated_run.modules]})))
    assert [text for text in shown if text.startswith(("layer", "other"))][-1] == "other"


def test_long_kinds_are_slanted_so_that_they_do_not_overlap(gated_run: RunRecord) -> None:
    assert "rotate(-40" in page_svg(_ranks(_with(gated_run, kind="attention.output.dense")))
    assert "rotate(-40" not in page_svg(_ranks(gated_run))


def test_many_runs_go_into_several_lines(gated_run: RunRecord) -> None:
    def size(count: int) -> list[float]:
        svg = page_svg(_ranks(*[_with(gated_run)] * count))
        return [float(re.search(rf'{side}="([\d.]+)pt"', svg)[1]) for side in ("width", "height")]

    assert size(2)[0] > 1.8 * size(1)[0]
    assert size(20)[0] <= 10.4 * 72
    assert size(20)[1] > 3 * size(2)[1]


def test_numbers_are_those_of_each_matrix(gated_run: RunRecord, pruned_run: RunRecord) -> None:
    figure = _ranks(gated_run, pruned_run)
    first = gated_run.modules[0]
    assert figure.rows[0] == ("run 0", "film-reviews", first.name, 0, "query", 1, 8, 1.125)
    assert figure.rows[18] == ("run 1", "film-reviews", first.name, 0, "query", 3, 12, None)
    assert "run 1,film-reviews,encoder.layer.0.attention.self.query,0,query,3,12,\n" in figure.csv()


def test_fixed_ranks_are_not_drawn(lora_run: RunRecord) -> None:
    assert ranks({"lora": lora_run}) is None
    assert ranks({"lora": lora_run.model_copy(update={"modules": []})}) is None
