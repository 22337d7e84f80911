"""The table of costs for a terminal: 80 columns, all totals, all conditions, all parts."""

from rankbits.records import CostRecord
from rankbits.reports.cost_table import cost_table


def _row(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


def test_totals_stand_beside_both_references(narrow_costs: CostRecord) -> None:
    text = cost_table(narrow_costs)
    assert _row(text, "MACs") == ["1,000"]
    assert _row(text, "nominal BOPs") == ["60,800", "23.75", "%", "5.94", "%"]
    assert _row(text, "executable BOPs") == ["371,200", "145.00", "%", "36.25", "%"]
    assert _row(text, "base MACs") == ["1,000"]
    assert _row(text, "base at 16 bits") == ["256,000"]
    assert _row(text, "base at 32 bits") == ["1,024,000"]
    assert "60.0% of the MACs can run in integer kernels" in text


def test_parts_are_listed_by_product_and_by_module(narrow_costs: CostRecord) -> None:
    text = cost_table(narrow_costs)
    assert _row(text, "linear ") == ["2", "900", "90.0%", "48.00", "K", "345.6", "K", "66.7%"]
    assert _row(text, "attention.self.query") == ["1", "600", "60.0%", "9.600", "K", "38.40", "K", "100.0%"]
    assert _row(text, "output.dense") == ["1", "300", "30.0%", "38.40", "K", "307.2", "K", "0.0%"]


def test_conditions_and_what_is_no_product_are_said(narrow_costs: CostRecord) -> None:
    text = " ".join(cost_table(narrow_costs).split())
    for said in ("20 query and 20 key tokens, batch 1", "adapters merged", "linear 2, scores 1", "4,321", "554"):
        assert said in text
    assert "mean bits by numbers 11.00" in text


def test_it_fits_80_columns_and_cuts_nothing(narrow_costs: CostRecord) -> None:
    module = "a_name_that_is_longer_than_its_column.and_longer"
    long = narrow_costs.products[0].model_copy(update={"module": module, "m": 10**15})
    text = cost_table(narrow_costs.model_copy(update={"products": [long], "reference_macs": 10**15}))
    assert max(map(len, text.splitlines())) <= 80
    assert module in text
    assert "…" not in text


def test_without_products_there_are_no_parts(narrow_costs: CostRecord) -> None:
    nothing = {"products": [], "weights": [], "elements": [], "reference_macs": 0}
    text = cost_table(narrow_costs.model_copy(update=nothing))
    assert "by product" not in text
    assert "bytes" not in text.replace("left out in bytes", "")
    assert _row(text, "nominal BOPs") == ["0", "no", "reference", "no", "reference"]
