"""The published tables by name: which cells they hold, and what is said above them."""

import pytest

from rankbits.accounting.published import PublishedTable, Verdict, heading, rows
from rankbits.accounting.published.operations import macs


@pytest.mark.parametrize(
    ("table", "verdicts"),
    [
        (PublishedTable.TABLE1, {"reproduced": 12, "misprint": 2, "cannot be reproduced": 3}),
        (PublishedTable.TABLE2, {"reproduced": 18, "misprint": 1, "input": 16}),
        (PublishedTable.PARAMETERS, {"reproduced": 72, "misprint": 13, "cannot be reproduced": 11}),
    ],
)
def test_cells_by_verdict(table: PublishedTable, verdicts: dict[str, int]):
    found = rows(table)
    counted = {verdict.value: sum(row.verdict is verdict for row in found) for verdict in Verdict}
    assert {name: number for name, number in counted.items() if number} == verdicts
    assert all(row.holds for row in found)


@pytest.mark.parametrize("table", [PublishedTable.TABLE1, PublishedTable.TABLE2])
def test_percentages_stand_below_their_convention_and_absolute_costs(table: PublishedTable):
    text = heading(table)
    for part in ("T = S = 20 tokens", "batch 1", "512 position rows recomputed", "unmerged", "32 x 32 bits", "2.9 %"):
        assert part in text
    assert f"{macs(16):,} MACs" in text
    assert f"{macs(16) * 1024:,} bit operations" in text


def test_shares_of_parameters_say_what_they_are_shares_of():
    assert "trained / (base + trained)" in heading(PublishedTable.PARAMETERS)
