"""`rankbits estimate`: parameters, memory, bit operations and disk of a run, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankbits.errors import ModelError, UnknownArchitectureError

if TYPE_CHECKING:
    from rankbits.accounting.budget import Budget, Expectation
    from rankbits.recipes.estimate import Estimate
    from rankbits.recipes.question import Question
    from rankbits.records import CostRecord

What = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL",
        help="A recipe (name or YAML file); or a model: a published shape such as llama3-8b, a config.json, a folder "
        "that holds one, or a hub id in the local cache.",
    ),
]
Keys = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe; or, of a model: sequence_length=512 (needed), batch_size=8, method=qlora, r=64, "
        "targets=all-linear, precision=bf16, base=nf4-double, optimizer=adamw-8bit, gradient_checkpointing=true ...",
    ),
]
BudgetText = Annotated[
    str | None, typer.Option("--budget", help="What the learned model may cost: bops=0.5, bytes=0.3, bits=4, rank=2.")
]
Products = Annotated[bool, typer.Option("--products", help="Break the costs down by product and by module.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

GIGABYTE = 10**9
Rows = list[tuple[str, str]]


def estimate(
    what: What, keys: Keys = None, budget: BudgetText = None, products: Products = False, as_json: AsJson = False
) -> None:
    """Say what a run will take: parameters, memory, bit operations, files. Loads nothing, needs no network."""
    from rankbits.recipes import estimate as answers

    try:
        question = _question(what, keys or [], budget)
    except UnknownArchitectureError as unknown:
        if _is_recipe(what) or budget is not None:
            # What can be counted on a model without weights answers neither.
            raise
        _count_live(what, keys or [], unknown, as_json=as_json)
        return
    answer = answers.estimate(question)
    if as_json:
        _print_json(answers.as_json(answer))
        return
    typer.echo(question.title)
    for title, rows in _tables(answer):
        _print_rows(title, rows)
    costs = {"beside": answer.unmerged} | ({"merged": answer.merged} if answer.merged is not None else {})
    typer.echo("\nOne forward pass of one sequence, adapters beside the weights or merged into them")
    _print_costs(costs, products=products)


def _question(what: str, keys: Sequence[str], budget: str | None) -> Question:
    from rankbits.recipes.load import load
    from rankbits.recipes.nearest import nearest
    from rankbits.recipes.question import config_of, from_keys, from_recipe
    from rankbits.recipes.shipped import names

    if _is_recipe(what):
        return from_recipe(load(what, keys), budget)
    try:
        config_of(what)
    except ModelError as error:
        close = nearest(what, names(), count=3)
        raise ModelError(f"{error}; nearest recipes: {', '.join(close)}" if close else str(error)) from error
    return from_keys(what, keys, budget)


def _is_recipe(what: str) -> bool:
    from rankbits.recipes.shipped import names

    return what.removesuffix(".yaml") in names() or Path(what).suffix in {".yaml", ".yml"}


def _print_json(content: object) -> None:
    import json

    typer.echo(json.dumps(content, indent=1, allow_nan=False))


def _count_live(what: str, keys: Sequence[str], unknown: UnknownArchitectureError, *, as_json: bool) -> None:
    """Where no formula knows the architecture: what can be counted on a model without weights, and what cannot."""
    from rankbits.cli.running import quiet_libraries
    from rankbits.recipes.estimate import totals_as_json
    from rankbits.recipes.live import count_live

    quiet_libraries()
    parameters, costs = count_live(what, keys, unknown)
    if as_json:
        _print_json({"asked": what, "model": {"parameters": parameters}, "costs": {"live": totals_as_json(costs)}})
        return
    typer.echo(f"{what}: no formula knows this architecture, so it was built without weights and counted as it runs.")
    typer.echo("Base model only; memory of activations and the cost of adapters are not known.")
    rows = [("base model", f"{parameters:,}"), ("bytes in fp32", f"{4 * parameters:,}")]
    _print_rows("Parameters", [*rows, ("bytes in bf16", f"{2 * parameters:,}")])
    typer.echo("\nOne forward pass of one sequence")
    _print_costs({what: costs}, products=True)


def _tables(answer: Estimate) -> Iterator[tuple[str, Rows]]:
    settings = answer.question.settings
    yield "Parameters", _parameters(answer)
    under = f"batch {settings.batch}, {settings.sequence_length} tokens, {settings.precision}, base in {settings.base}"
    host = [("on the host, if paged out", f"{answer.training.host / GIGABYTE:.3f}")] if answer.training.host else []
    yield (
        f"Memory of training on {settings.device}, GB: {under}",
        _bytes(answer.training.items, answer.training.total) + host,
    )
    held = {_AT_INFERENCE.get(name, name): number for name, number in answer.inference.items.items()}
    yield f"Memory of inference on {settings.device}, GB", _bytes(held, answer.inference.total)
    yield "Files, bytes, before hardening", [(name, f"{number:,}") for name, number in answer.artefacts.items()]
    if answer.expected is not None and answer.question.budget is not None:
        yield _budget(answer.question.budget, answer.expected)


def _parameters(answer: Estimate) -> Rows:
    counts = answer.counts
    groups = [
        ("adapter matrices", counts.adapter),
        ("diagonals E", counts.diagonal),
        ("gates", counts.gates),
        ("ranges", counts.ranges),
        ("head, in full", counts.head),
        ("base weights", counts.base),
    ]
    rows = [("base model", answer.base_parameters), ("trained", counts.trainable)]
    rows += [(f"  {name}", number) for name, number in groups if number]
    rows += [("stored indices", counts.stored_indices)] if counts.stored_indices else []
    rows += [(f"effective, {form}", number) for form, number in answer.effective.items()]
    return [(name, f"{number:,}") for name, number in rows]


def _budget(budget: Budget, expected: Expectation) -> tuple[str, Rows]:
    bits = "not limited" if expected.mean_bits is None else f"{expected.mean_bits:.2f}"
    rows = [
        ("reachable from", f"{expected.low:.4g}"),
        ("with all gates open", f"{expected.high:.4g}"),
        ("mean bits, if all share one width", bits),
        ("mean rank", f"{expected.mean_rank:.2f}"),
    ]
    meaning = _BUDGETS[budget.quantity.value].format(bits=budget.reference_bits, scope=_SCOPES[budget.scope.value])
    return f"Budget {budget}: {meaning}", rows


_AT_INFERENCE = {"activations": "key-value cache"}
_SCOPES = {"adapted": "the adapted layers", "model": "the whole model"}
_BUDGETS = {
    "bops": "bit operations of {scope}, as a share of the merged base's at {bits} bits",
    "bytes": "bytes of the adapted layers' weights, as a share of the base's at {bits} bits",
    "bits": "mean bits of the adapted layers' weights",
    "rank": "mean rank",
}


def _bytes(items: Mapping[str, int], total: int) -> Rows:
    rows = [(name, f"{number / GIGABYTE:.3f}") for name, number in items.items() if number]
    return [*rows, ("at the peak", f"{total / GIGABYTE:.3f}")]


def _print_rows(title: str, rows: Rows) -> None:
    typer.echo(f"\n{title}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"  {name:<{width}}  {value:>18}")


def _print_costs(costs: Mapping[str, CostRecord], *, products: bool) -> None:
    from rankbits.cli.running import print_cost_comparison
    from rankbits.reports.cost_table import cost_table

    print_cost_comparison(costs)
    if products:
        for form, record in costs.items():
            typer.echo(f"\n{form}\n{cost_table(record)}")
