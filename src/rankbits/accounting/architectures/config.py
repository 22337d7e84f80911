"""A checked view of a model's config: every size is a whole number above its minimum, or the reader hears of it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from rankbits.errors import ModelError

WIDTHS_OF_TYPES: dict[str, int] = {
    "float32": 32,
    "float": 32,
    "bfloat16": 16,
    "float16": 16,
    "half": 16,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
}


class Head(str, Enum):
    """What stands on top of the stack."""

    NONE = "none"
    """The bare model, as `AutoModel` builds it."""
    CLASSIFICATION = "classification"
    """One score per label and sequence, as `AutoModelForSequenceClassification` builds it."""
    LANGUAGE_MODEL = "language-model"
    """One score per word, as `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` builds it."""


class Config:
    """The values of a config.json, read by key and checked as they are read. null counts as absent.

    Args:
        values: the mapping as it was parsed.
        name: the model or file it came from, for messages.
    """

    def __init__(self, values: Mapping[str, Any], *, name: str) -> None:
        self._values = values
        self.name = name

    @property
    def model_type(self) -> str:
        """The architecture, as transformers names it."""
        return self.text("model_type")

    @property
    def stored_bits(self) -> int:
        """Width of a weight in the published files: that of `dtype` or, in older configs, `torch_dtype`; else 32."""
        key = "dtype" if self.has("dtype") else "torch_dtype"
        given = self.text(key, "float32").removeprefix("torch.")
        if given not in WIDTHS_OF_TYPES:
            raise self.error(key, f"one of {', '.join(WIDTHS_OF_TYPES)}")
        return WIDTHS_OF_TYPES[given]

    def has(self, key: str) -> bool:
        """Whether `key` is there with a value other than null."""
        return self._values.get(key) is not None

    def size(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """The whole number under `key`.

        Args:
            key: where to look.
            default: what an absent key means; without one it has to be there.
            minimum: the least number that makes sense; 0 for what a model may lack.

        Raises:
            ModelError: if it is absent without a default, no whole number, or below `minimum`.
        """
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        # True is an int to Python, and no size to anybody.
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(key, f"a whole number of at least {minimum}")
        return value

    def optional_size(self, key: str) -> int | None:
        """The whole number above 0 under `key`, or None where it is absent: no window, no limit.

        Raises:
            ModelError: if it is there and is no whole number above 0.
        """
        return self.size(key) if self.has(key) else None

    def part_of(self, key: str, whole: str) -> int:
        """`whole` divided by `key`, both sizes: the width of one head.

        Raises:
            ModelError: if either is no size, or the first does not divide the second.
        """
        parts, total = self.size(key), self.size(whole)
        if total % parts:
            raise self.error(key, f"a divisor of {whole}, which is {total}")
        return total // parts

    def flag(self, key: str, default: bool) -> bool:
        """The boolean under `key`, or `default` where it is absent.

        Raises:
            ModelError: if it is there and neither true nor false.
        """
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """The string under `key`, or `default` where it is absent.

        Raises:
            ModelError: if it is absent without a default, or no string.
        """
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not value:
            raise self.error(key, "a name")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """The strings under `key`: a list, or one string parted by "|" as DeBERTa's `pos_att_type` is; absent: none.

        Raises:
            ModelError: if it is there and neither.
        """
        value = self._values.get(key)
        if value is None:
            return ()
        if isinstance(value, str):
            value = [part.strip() for part in value.split("|") if part.strip()]
        if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
            raise self.error(key, "a list of names")
        return tuple(value)

    def error(self, key: str, expected: str) -> ModelError:
        """The complaint that `key` does not hold what was `expected`; the caller raises it."""
        given = repr(self._values[key]) if key in self._values else "nothing"
        return ModelError(f"config of {self.name}: {key}: given {given}, expected {expected}")
