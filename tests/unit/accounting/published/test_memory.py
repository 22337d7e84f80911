"""The lecture's sums are those of its own rules, and the two that are not are marked."""

from rankbits.accounting.published import PublishedTable, Verdict, heading, rows
from rankbits.accounting.rules_of_thumb import LOOSE

GB = 10**9


def test_each_example_is_recomputed_from_its_rule():
    found = {row.cell: row.recomputed for row in rows(PublishedTable.MEMORY)}
    assert found["LLaMA-3-8B, fp32"] == 8 * 4 * GB
    assert found["LLaMA-3-8B, full fine-tuning"] == 8 * 16 * GB
    assert found["LLaMA-3-8B, 4-bit base"] == 4 * GB
    assert found["QLoRA, 48 M adapters"] == 408_000_000
    assert found["QLoRA, base and adapters"] == 4_408_000_000
    assert found["QLoRA and inference in fp16"] == 16 * GB
    assert found["LLaMA-3-70B, fp32"] == 280 * GB
    assert abs(found["65B, saved by double quantization"] - 65e9 * (0.5 - 0.126953125) / 8) < 10_000


def test_every_verdict_holds_and_wrong_sums_are_called_so():
    listed = rows(PublishedTable.MEMORY)
    assert all(row.holds for row in listed)
    assert [row.published for row in listed if row.verdict is Verdict.MISPRINT] == ["4.1GB", "820GB"]
    assert [row.published for row in listed if row.verdict is Verdict.IRREPRODUCIBLE] == ["14GB"]


def test_the_heading_says_where_the_arithmetic_is_loose():
    assert all(sentence in heading(PublishedTable.MEMORY) for sentence in LOOSE)
