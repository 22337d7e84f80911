"""Published parameter counts, each counted again from the model's shape and the method's formula."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal

from pydantic import TypeAdapter

from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.methods import adapted_ends, bottleneck_width
from rankbits.accounting.params import base_parameters, count
from rankbits.accounting.published.cells import Row, Verdict, half_a_digit, number
from rankbits.accounting.spec import Activation, Linear, Method, MethodSpec, ModelShape
from rankbits.records.frozen import Frozen

DATA = resources.files("rankbits.accounting.published")


class CountCell(Frozen):
    """One printed count and the method that explains it.

    Args:
        published: as printed, with % or M.
        method: the method, None where the cell belongs to none that we count.
        label: the cell's name, by default the method and its rank.
        rank, targets, width, virtual_tokens: as in `MethodSpec`; targets replace those of the group.
        magnitudes: layers that have DoRA's magnitude without its matrices.
        weights_only: leave the biases of bottlenecks out.
        quantity: parameters trained, the adapters' matrices alone, the trained as a share of all in percent, or all.
        verdict, reason: what we hold of it; the group's reason if there is none.
        tolerance: as printed, for instance "0.01M"; by default half a unit of the last digit.
        divided_by: the printed number is the true one divided by this, which explains a misprint.
    """

    published: str
    method: Method | None = None
    label: str | None = None
    rank: int = 8
    targets: list[str] | None = None
    width: int | None = None
    virtual_tokens: int = 20
    magnitudes: list[str] | None = None
    weights_only: bool = False
    quantity: Literal["trained", "matrices", "share", "all"] = "trained"
    verdict: Verdict = Verdict.REPRODUCED
    reason: str | None = None
    tolerance: str | None = None
    divided_by: int | None = None


class CountGroup(Frozen):
    """Cells of one table about one model.

    Args:
        source: where they were printed.
        model: a name of our shapes.
        layer: [d_in, d_out] of a single layer without bias, where there is no model.
        head: what stands on the model.
        targets: layers that are adapted.
        reason: the convention of all cells.
    """

    source: str
    model: str | None = None
    layer: list[int] | None = None
    head: Head = Head.NONE
    targets: list[str] | None = None
    reason: str
    cells: list[CountCell]


def read_groups(file: str) -> list[CountGroup]:
    """The groups of a data file beside this one."""
    return TypeAdapter(list[CountGroup]).validate_json(DATA.joinpath(file).read_text(encoding="utf-8"))


def count_rows(groups: list[CountGroup]) -> list[Row]:
    """Every cell of the groups, counted again.

    Raises:
        ModelError: a cell names layers that its model does not have.
    """
    return [_row(group, cell) for group in groups for cell in group.cells]


def _row(group: CountGroup, cell: CountCell) -> Row:
    value = None if cell.method is None else recount(group, cell)
    where = group.model or " to ".join(str(size) for size in group.layer or ())
    label = cell.label or _label(cell)
    tolerance = half_a_digit(cell.published) if cell.tolerance is None else float(number(cell.tolerance))
    return Row(
        table=group.source,
        cell=f"{where}: {label}" if where else label,
        published=cell.published,
        verdict=cell.verdict,
        reason=cell.reason or group.reason,
        recomputed=value,
        tolerance=tolerance,
        explained=None if value is None or cell.divided_by is None else value / cell.divided_by,
    )


def _label(cell: CountCell) -> str:
    name = "" if cell.method is None else cell.method.value
    return name if cell.method in {Method.FULL, None} else f"{name} r={cell.rank}"


def recount(group: CountGroup, cell: CountCell) -> int | float:
    """The true count of a cell, or its share of all parameters in percent.

    A share is trained / (base + trained), as PEFT prints it. `divided_by` is not applied.

    Raises:
        ModelError: the cell names layers that its model does not have.
    """
    shape = _shape(group)
    trained = _trained(shape, cell, cell.targets or group.targets)
    if cell.quantity in {"trained", "matrices"}:
        return trained
    everything = base_parameters(shape) + trained
    return everything if cell.quantity == "all" else 100 * trained / everything


def _trained(shape: ModelShape, cell: CountCell, targets: list[str] | None) -> int:
    def spec(method: Method, names: list[str] | None) -> MethodSpec:
        return MethodSpec(
            method,
            rank=cell.rank,
            targets=None if names is None else tuple(names),
            width=cell.width,
            virtual_tokens=cell.virtual_tokens,
        )

    if cell.method is None:
        return 0
    own = spec(cell.method, targets)
    counted = count(shape, own)
    trained = counted.paper if cell.quantity == "matrices" else counted.trainable
    if cell.weights_only:
        width = bottleneck_width(shape, own)
        trained -= sum(width + end.linear.d_out for end in adapted_ends(shape, own))
    if cell.magnitudes is not None:
        with_magnitudes, without = (count(shape, spec(m, cell.magnitudes)) for m in (Method.DORA, Method.LORA))
        trained += with_magnitudes.trainable - without.trainable
    return trained


def _shape(group: CountGroup) -> ModelShape:
    if group.model is not None:
        return _model(group.model, group.head)
    d_in, d_out = group.layer or (1, 1)
    parts = (Activation("activation", d_in), Linear("layer", d_in, d_out, bias=False))
    return ModelShape("one layer", "layer", parts, d_out, 1, None, 1, ("layer",))


@cache
def _model(name: str, head: Head) -> ModelShape:
    return read_shape(find_config(name), name=name, head=head)
