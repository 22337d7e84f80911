"""From a recipe's name or path and `key=value` overrides to one checked Recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from rankbits.errors import RecipeError
from rankbits.recipes.problems import Problem, describe, is_absent, problems_of, value_at
from rankbits.recipes.schema import Recipe
from rankbits.recipes.shipped import RecipeFile, find, is_base, names
from rankbits.recipes.suits import unsuited

__all__ = ["load", "names", "resolved_yaml"]

_NOT_INHERITED = ("name", "output")


@dataclass(frozen=True)
class _Layer:
    """Keys from one place: a file or an override. Later layers win."""

    where: str
    content: dict[str, Any]


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe (by name) or a YAML file (by path), apply what it extends and the overrides, check it.

    A recipe without `name` takes its shipped name or its file's; one without `output` takes `runs/<name>`, with the
    method appended for any other method than bayesian-lora, unless the name ends in it.

    Raises:
        RecipeError: the recipe does not exist or is not valid; all problems are listed together.
    """
    file = find(recipe)
    if file.name == file.label and is_base(file.name):
        raise RecipeError(f"recipe {file.name} is only there to be extended; `rankbits list recipes` shows others")
    problems: list[Problem] = []
    layers = _file_layers(file, problems)
    complete = not problems
    layers += _override_layers(overrides, problems)
    raw = _merge(layers, problems)
    checked = _check(raw, file, layers, problems, complete=complete)
    if checked is None:
        raise RecipeError(describe(f"recipe {file.label}", problems))
    return checked


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every key and no `extends`, as YAML that `load` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump()))


def _check(
    raw: dict[str, Any], file: RecipeFile, layers: Sequence[_Layer], problems: list[Problem], *, complete: bool
) -> Recipe | None:
    raw.setdefault("name", file.name)
    if raw.get("output") is None:
        raw["output"] = _default_output(raw)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        found = problems_of(error, raw, complete=complete)
        problems += [replace(one, where=_where(one.key, layers)) for one in found if one.key not in known]
        return None
    problems += [replace(one, where=_where(one.key, layers)) for one in unsuited(recipe)]
    return None if problems else recipe


def _default_output(raw: Mapping[str, Any]) -> str:
    name, method = str(raw["name"]), raw.get("method", "bayesian-lora")
    told = method == "bayesian-lora" or method == name.rpartition("/")[2]
    return f"runs/{name}" + ("" if told else f"-{method}")


def _where(key: str, layers: Sequence[_Layer]) -> str:
    written = [layer.where for layer in layers if not is_absent(value_at(layer.content, key))]
    return written[-1] if written else ""


def _file_layers(file: RecipeFile, problems: list[Problem]) -> list[_Layer]:
    own = _read(file.path, file.label, problems)
    if own is None:
        return []
    extended = own.content.pop("extends", None)
    if extended is None:
        return [own]
    base = _extended(extended, file, problems)
    return [own] if base is None else [base, own]


def _extended(given: object, file: RecipeFile, problems: list[Problem]) -> _Layer | None:
    if not isinstance(given, str):
        text = f"given {given!r}, expected the name of a shipped recipe or a path relative to this file"
        problems.append(Problem("extends", text, file.label))
        return None
    try:
        base_file = find(given, beside=file.path.parent)
    except RecipeError as error:
        problems.append(Problem("extends", str(error), file.label))
        return None
    base = _read(base_file.path, base_file.label, problems)
    if base is not None and "extends" in base.content:
        text = f"given {given!r}, which itself extends {base.content['extends']!r}; expected one that extends nothing"
        problems.append(Problem("extends", text, file.label))
        return None
    return base and _Layer(base.where, {key: base.content[key] for key in base.content if key not in _NOT_INHERITED})


def _read(path: Path, label: str, problems: list[Problem]) -> _Layer | None:
    try:
        content = _as_dict(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(Problem("", f"cannot be read: {error.strerror}", label))
    except UnicodeDecodeError as error:
        problems.append(Problem("", f"is not UTF-8 text: byte {error.start} cannot be decoded", label))
    except YAMLError as error:
        problems.append(Problem("", f"is not valid YAML: {_yaml_place(error)}", label))
    except (OmegaConfBaseException, ValueError) as error:
        problems.append(Problem("", _first_line(error), label))
    else:
        return _Layer(label, content)
    return None


def _as_dict(text: str) -> dict[str, Any]:
    expected = "expected keys such as `task:` and `model:`"
    try:
        config = OmegaConf.load(StringIO(text))
    except OSError as error:
        raise ValueError(f"holds a single value, {expected}") from error
    content = OmegaConf.to_container(config, resolve=False)
    if not isinstance(content, dict) or content == {text.strip(): None}:
        raise ValueError(f"holds a list or a single value, {expected}")
    return {str(key): value for key, value in content.items()}


def _yaml_place(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or _first_line(error)
    return str(problem) if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _override_layers(overrides: Sequence[str], problems: list[Problem]) -> list[_Layer]:
    layers: list[_Layer] = []
    for override in overrides:
        where = f"override {override}"
        key, equals, _ = override.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(Problem("", f"given {override!r}, expected key=value such as training.epochs=3", where))
            continue
        try:
            content = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
        except (YAMLError, OmegaConfBaseException, ValueError) as error:
            problems.append(Problem(key, f"the value cannot be read: {_first_line(error)}", where))
            continue
        if isinstance(content, dict):
            layers.append(_Layer(where, {str(name): value for name, value in content.items()}))
    return layers


def _merge(layers: Sequence[_Layer], problems: list[Problem]) -> dict[str, Any]:
    merged = OmegaConf.merge({}, *(layer.content for layer in layers))
    try:
        content = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        problems.append(Problem(key, _first_line(error), _where(key, layers)))
        content = OmegaConf.to_container(merged, resolve=False)
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
