"""The bit operations of Bayesian-LoRA's Tables 1 and 2, from the matrix products of DeBERTaV3-base.

The paper states no sequence length. One convention fits: a sequence of 20 tokens, 512 position rows projected in every
pass, adapters beside the weights at 32 bits, on query, key and value, position rows included; no head. What quantized
attention leaves of attention's own cost, A, came from training; what that leaves of the encoder, E, follows from it:
E = 100 (1 - s) + s A with attention's share s of the MACs at the row's reference rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from pydantic import TypeAdapter

from rankbits.accounting.architectures.read import find_config, read_shape
from rankbits.accounting.macs import products
from rankbits.accounting.params import targeted
from rankbits.accounting.published.cells import Row, Verdict, number
from rankbits.accounting.published.parameters import DATA, CountGroup
from rankbits.accounting.spec import Method, MethodSpec, ModelShape
from rankbits.records import CountOptions
from rankbits.records.frozen import Frozen

MODEL = "deberta-v3-base"
TOKENS = 20
REFERENCE_RANK = 16
PROJECTIONS = ("query_proj", "key_proj", "value_proj")
CONVENTION = CountOptions(query_len=TOKENS, key_len=TOKENS, adapters="unmerged")
TABLE_2 = "Bayesian-LoRA, Table 2"


class RankFit(Frozen):
    """A sum of active ranks over all query and key matrices, and over all value matrices."""

    query_and_key: int
    value: int


class OperationCell(Frozen):
    """One printed percentage of bit operations.

    Args:
        label: the cell's name.
        published: as printed.
        verdict, reason, tolerance: what we hold of it.
        rank: LoRA's rank, if that explains it.
        ranks: active ranks of AdaLoRA, if those do.
        mean_of: the row of Table 2 whose mean it is, if it is that.
    """

    label: str
    published: str
    verdict: Verdict
    reason: str
    tolerance: float = 0.006
    rank: int | None = None
    ranks: RankFit | None = None
    mean_of: str | None = None


class EncoderRow(Frozen):
    """One row of Table 2: printed percentages per task.

    Args:
        name: q or q+ra.
        rank: LoRA's rank that the row's own reference has.
        attention: A, relative bit operations in attention.
        encoder: E, relative bit operations in the encoder.
        misprints: task to the reason why its E is one.
    """

    name: str
    rank: int
    attention: list[str]
    encoder: list[str]
    misprints: dict[str, str]


class Table1(Frozen):
    """Table 1: parameter counts and bit operations."""

    counts: list[CountGroup]
    operations: list[OperationCell]


class Table2(Frozen):
    """Table 2 with its caption."""

    tasks: list[str]
    caption: list[OperationCell]
    rows: list[EncoderRow]


@cache
def table1() -> Table1:
    """Table 1 as printed."""
    return TypeAdapter(Table1).validate_json(DATA.joinpath("table1.json").read_text(encoding="utf-8"))


@cache
def table2() -> Table2:
    """Table 2 as printed."""
    return TypeAdapter(Table2).validate_json(DATA.joinpath("table2.json").read_text(encoding="utf-8"))


@cache
def shape() -> ModelShape:
    """DeBERTaV3-base without a head."""
    return read_shape(find_config(MODEL), name=MODEL)


@cache
def macs(rank: int, options: CountOptions = CONVENTION) -> int:
    """N(r): MACs of the encoder with LoRA of rank r on query, key and value; r = 0 is the base model."""
    return sum(product.macs for product in products(shape(), options, _lora(rank)))


@cache
def attention_share(rank: int, options: CountOptions = CONVENTION) -> float:
    """s(r): the share of N(r) in attention without its output projection, position rows and adapters included."""
    inside = tuple(f"{attention.name}." for attention in shape().attentions())
    listed = products(shape(), options, _lora(rank))
    own = sum(product.macs for product in listed if f"{product.module}.".startswith(inside))
    return own / macs(rank, options)


def integer_bound(rank: int, options: CountOptions = CONVENTION) -> float:
    """Largest share of N(r), in percent, that an integer kernel can execute under Algorithm 1.

    It quantizes weights and the outputs of layers and neither a block's input nor attention probabilities, so only
    comparisons of queries, keys and positions and B's product have two quantized operands, at whatever width.
    """
    quantized = {"scores", "c2p", "p2c", "lora_up"}
    listed = products(shape(), options, _lora(rank))
    return 100 * sum(product.macs for product in listed if product.op in quantized) / macs(rank, options)


def relative(rank: int) -> float:
    """100 N(r) / N(16), percent."""
    return 100 * macs(rank) / macs(REFERENCE_RANK)


def relative_to_fit(ranks: RankFit) -> float:
    """AdaLoRA's bit operations in percent of LoRA's at rank 16, with these sums of active ranks spread evenly."""
    spec = MethodSpec(Method.ADALORA, rank=REFERENCE_RANK, targets=PROJECTIONS)
    adapted = targeted(shape(), spec)
    values = [linear.name for linear in adapted if linear.name.endswith("value_proj")]
    others = [linear.name for linear in adapted if linear.name not in values]
    active = {**_spread(ranks.query_and_key, others), **_spread(ranks.value, values)}
    pruned = MethodSpec(Method.ADALORA, rank=REFERENCE_RANK, targets=PROJECTIONS, ranks=active)
    return 100 * sum(product.macs for product in products(shape(), CONVENTION, pruned)) / macs(REFERENCE_RANK)


def encoder_percent(attention_percent: float, rank: int, options: CountOptions = CONVENTION) -> float:
    """E = 100 (1 - s(r)) + s(r) A: only attention is quantized, the rest stays at 32 x 32 bits."""
    share = attention_share(rank, options)
    return 100 * (1 - share) + share * attention_percent


def operation_rows_of_table1() -> list[Row]:
    """The column of bit operations of Table 1."""
    return [_operation_row("Bayesian-LoRA, Table 1", cell) for cell in table1().operations]


def rows_of_table2() -> list[Row]:
    """Table 2: its caption, the inputs from training, and the cells that follow from them."""
    caption = [_operation_row(f"{TABLE_2}, caption", cell) for cell in table2().caption]
    columns = range(len(table2().tasks))
    inputs = [_input_row(row, index) for row in table2().rows for index in columns]
    cells = [_encoder_row(row, index) for row in table2().rows for index in columns]
    return caption + inputs + cells


def _lora(rank: int) -> MethodSpec | None:
    return MethodSpec(Method.LORA, rank=rank, targets=PROJECTIONS) if rank else None


def _spread(total: int, names: Sequence[str]) -> dict[str, int]:
    each, left = divmod(total, len(names))
    return {name: each + (index < left) for index, name in enumerate(names)}


def _operation_row(table: str, cell: OperationCell) -> Row:
    return Row(table, cell.label, cell.published, cell.verdict, cell.reason, _operation(cell), cell.tolerance)


def _operation(cell: OperationCell) -> float | None:
    if cell.rank is not None:
        return relative(cell.rank)
    if cell.ranks is not None:
        return relative_to_fit(cell.ranks)
    if cell.mean_of is not None:
        printed = next(row for row in table2().rows if row.name == cell.mean_of).encoder
        return sum(number(text) for text in printed) / len(printed)
    return None


def _input_row(row: EncoderRow, index: int) -> Row:
    return Row(
        table=f"{TABLE_2}, attention",
        cell=f"{row.name} {table2().tasks[index]}",
        published=row.attention[index],
        verdict=Verdict.INPUT,
        reason="What attention keeps of its bit operations came out of training; no formula gives it.",
    )


def _encoder_row(row: EncoderRow, index: int) -> Row:
    task = table2().tasks[index]
    follows = (
        f"From the attention cell of the same column and attention's share of all MACs, s({row.rank}) = "
        f"{attention_share(row.rank):.6f}."
    )
    return Row(
        table=f"{TABLE_2}, encoder",
        cell=f"{row.name} {task}",
        published=row.encoder[index],
        verdict=Verdict.MISPRINT if task in row.misprints else Verdict.REPRODUCED,
        reason=row.misprints.get(task, follows),
        recomputed=encoder_percent(number(row.attention[index]), row.rank),
        tolerance=0.006,
    )
