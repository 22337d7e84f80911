"""What is wrong with keys and values that a user wrote, in words: key, given, expected, where it was written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rankbits.recipes.nearest import nearest
from rankbits.recipes.schema import Recipe

_ABSENT = object()
_NOTHING_GIVEN = ("missing", "nothing_given")


@dataclass(frozen=True)
class Problem:
    """One thing to correct. `key` is empty if the problem is with a whole file; `where` names a file or an override."""

    key: str
    text: str
    where: str = ""

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        where = f" [{self.where}]" if self.where else ""
        return f"{key}{self.text}{where}"


def describe(what: str, problems: Sequence[Problem]) -> str:
    """One message for all problems of one thing, such as "recipe quickstart"."""
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{what} has {count}:", *(f"  {problem}" for problem in problems)])


def problems_of(
    error: ValidationError, raw: Mapping[str, Any], *, complete: bool = True, schema: type[BaseModel] = Recipe
) -> list[Problem]:
    """Every problem that a schema found in `raw`, one per key, without their places.

    `complete=False` says that a part of the input could not be read; keys that are missing are then not reported.
    """
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] in _NOTHING_GIVEN and not complete:
            continue
        key, field = _key_and_field(detail["loc"], schema)
        if key not in found:
            text = _text(field, detail, _given(raw, key, detail)) if field else _unknown(key, schema)
            found[key] = Problem(key, text)
    return list(found.values())


def value_at(raw: Mapping[str, Any], key: str) -> object:
    """The value of a dotted key in nested mappings, or a marker that `is_absent` recognises."""
    value: object = raw
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def is_absent(value: object) -> bool:
    """Whether `value_at` found nothing."""
    return value is _ABSENT


def valid_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of a recipe, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        section = _section(field)
        if section is not None:
            keys += valid_keys(section, f"{prefix}{name}.")
    return keys


def shown(given: object) -> str:
    """A value as messages quote it: nothing, a text, or JSON of at most 100 characters."""
    if given is _ABSENT or given is None:
        return "nothing"
    if isinstance(given, str):
        return f"the text {given!r}"
    text = json.dumps(given, default=str)
    return text if len(text) <= 100 else text[:97] + "..."


def _key_and_field(location: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[str, FieldInfo | None]:
    # A location goes on inside unions and lists; the key ends where the schema's fields end.
    parts: list[str] = []
    field: FieldInfo | None = None
    model: type[BaseModel] | None = schema
    for part in location:
        if model is None:
            break
        parts.append(str(part))
        field = model.model_fields.get(str(part))
        model = _section(field)
    return ".".join(parts), field


def _section(field: FieldInfo | None) -> type[BaseModel] | None:
    annotation = None if field is None else field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _text(field: FieldInfo, detail: Mapping[str, Any], given: str) -> str:
    return f"given {given}, expected {_expected(field, detail)}"


def _unknown(key: str, schema: type[BaseModel]) -> str:
    known = valid_keys(schema)
    close = nearest(key, known)
    section = key.rpartition(".")[0]
    siblings = ", ".join(name for name in known if name.rpartition(".")[0] == section)
    return "unknown key; " + (f"nearest valid key: {close[0]}" if close else f"valid keys: {siblings}")


def _given(raw: Mapping[str, Any], key: str, detail: Mapping[str, Any]) -> str:
    value = value_at(raw, key)
    if not is_absent(value) or detail["type"] in _NOTHING_GIVEN:
        return shown(value)
    return f"{shown(detail['input'])} (the default)"


def _expected(field: FieldInfo, detail: Mapping[str, Any]) -> str:
    section = _section(field)
    if section is not None:
        return f"a section with the keys {', '.join(section.model_fields)}"
    if detail["type"] == "nothing_given":
        return str(detail["msg"])
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return field.description or str(detail["msg"])
