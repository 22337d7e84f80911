"""RunRecord: the frozen, versioned JSON truth about one run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from rankbits.errors import RecordError, RunFolderError
from rankbits.records.certainty import DecidingGate, rank_gates, width_gates
from rankbits.records.costs import CostRecord, ReferenceBits
from rankbits.records.files import write_atomically
from rankbits.records.frozen import Frozen
from rankbits.records.portable import portable, recipe_hash, shorten, without_local_paths

SCHEMA_VERSION = 3

Site = Literal["weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output", "input", "probabilities"]
SITES: tuple[Site, ...] = get_args(Site)
ADAPTER_SITES: tuple[Site, ...] = ("down", "diagonal", "up")

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Bits = Annotated[int, Field(ge=1, le=32)]
ExpectedBits = Annotated[float, Field(ge=1, le=32)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_HOST_KEYS = frozenset({"host", "hostname", "host_name", "node", "nodename", "fqdn", "domain", "user", "username"})


class DataRecord(Frozen):
    """Which rows a run saw. `source` is a hub name, a package or a folder's last part, never an absolute path."""

    task: str
    split: str
    train_rows: Count
    evaluation_rows: dict[str, Count]
    dropped: dict[str, Count]
    fingerprint: Sha256
    source: str

    @field_validator("source")
    @classmethod
    def _shorten_source(cls, value: str) -> str:
        return shorten(value)


class ScoreRecord(Frozen):
    """One metric on one evaluation split, in the metric's unit: percent (correlations too: 100 is perfect) or nats.

    `rankbits.records.metrics` says which unit that is, and whether less is better.
    """

    metric: str
    value: float
    split: str
    primary: bool


class TrainingRecord(Frozen):
    """How the training went: optimizer steps, epochs, wall-clock seconds, mean training loss, peak bytes."""

    steps: Count
    epochs: Annotated[float, Field(ge=0)]
    seconds: Seconds
    train_loss: float
    peak_memory_bytes: Count
    resumed: bool


class ParameterRecord(Frozen):
    """Numbers of parameters: all that were trained, the parts they fall into, and the whole model.

    `base` are weights of the pre-trained model itself, which methods without adapters train.
    """

    trainable: Count
    adapter: Count
    gates: Count
    ranges: Count
    head: Count
    base: Count = 0
    total: Count


class BudgetRecord(Frozen):
    """What a run was allowed to cost and what the hardened model costs, in the same unit.

    `bops` and `bytes` are shares of the merged base model's at `reference_bits`; `bits` and `rank` are means.
    """

    quantity: Literal["bops", "bytes", "bits", "rank"]
    limit: Positive
    reference_bits: ReferenceBits = 16
    reached: Annotated[float, Field(ge=0)]

    @property
    def text(self) -> str:
        """The budget as a user writes it: "bops=0.25"."""
        return f"{self.quantity}={self.limit:g}"

    @property
    def is_met(self) -> bool:
        """Whether the hardened model costs no more than it may."""
        return self.reached <= self.limit


class ModuleRecord(Frozen):
    """One adapted matrix: its rank and the width of each quantizer that acts on it.

    A quantized matrix of a head that is trained in full has no low-rank update, which a `max_rank` of 0 tells.

    A method without quantizers has no bits. Expectations and probabilities are those before hardening. Open
    probabilities are those of single gates (of 4, 8, 16 and 32 bits; of ranks 2 and up), each on its own; a gate counts
    only where all before it in its chain are open, so that marginals are products. `shared` names, for a site whose
    gates belong to another matrix (an input that several read, tied widths), that matrix. With a `quantized_base` the
    matrix keeps the grid that the base was loaded with, and has no width of its own here.
    """

    name: str
    layer: int | None
    kind: str
    rank: Count
    max_rank: Count
    expected_rank: float | None = None
    bits: dict[Site, Bits] = Field(default_factory=dict)
    expected_bits: dict[Site, ExpectedBits] = Field(default_factory=dict)
    bit_open_probabilities: dict[Site, list[Probability]] = Field(default_factory=dict)
    rank_open_probabilities: list[Probability] = Field(default_factory=list)
    rank_gate: Literal["ste", "hard_concrete"] | None = None
    shared: dict[Site, str] = Field(default_factory=dict)
    quantized_base: bool = False

    def own_bits(self) -> dict[Site, int]:
        """Widths of the matrix's own quantizers, without that of an input which belongs to another matrix."""
        return {site: bits for site, bits in self.bits.items() if not (site == "input" and site in self.shared)}

    def deciding_gates(self) -> list[DecidingGate]:
        """The gates that decide its rank and its widths, those of other matrices left out."""
        found = rank_gates(self.rank_open_probabilities, self.rank_gate) if self.rank_gate is not None else []
        for site, probabilities in self.bit_open_probabilities.items():
            found += width_gates(site, probabilities) if site not in self.shared else []
        return found

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if self.rank > self.max_rank:
            raise ValueError(f"rank {self.rank} is larger than max_rank {self.max_rank}")
        return self


class RunRecord(Frozen):
    """Everything there is to say about one run. Holds no host name and no absolute path: those are shortened on entry.

    `created` is a UTC time in ISO format; `machine` describes the hardware; `scores` have units, and the first one
    marked primary is the headline; `history` is one dict per logged step ("step", "loss", "bits_mean", "rank_mean");
    `costs` is what one forward pass of the finished model costs, absent from records of schema version 1; `budgets` are
    what it was allowed to cost. Certainty of what was learned (open probabilities) is absent before version 3.
    """

    schema_version: Literal[1, 2, 3] = 3
    name: str
    method: str
    recipe: dict[str, Any]
    recipe_hash: str
    command: str
    created: str
    seed: int
    versions: dict[str, str]
    machine: dict[str, str | int]
    data: DataRecord
    scores: list[ScoreRecord]
    training: TrainingRecord
    parameters: ParameterRecord
    modules: list[ModuleRecord]
    history: list[dict[str, float]]
    costs: CostRecord | None = None
    budgets: list[BudgetRecord] = Field(default_factory=list)

    @field_validator("recipe")
    @classmethod
    def _portable_recipe(cls, value: dict[str, Any]) -> dict[str, Any]:
        recipe: dict[str, Any] = portable(value, "recipe")
        return recipe

    @field_validator("command")
    @classmethod
    def _portable_command(cls, value: str) -> str:
        return without_local_paths(value)

    @field_validator("created")
    @classmethod
    def _created_in_utc(cls, value: str) -> str:
        if datetime.fromisoformat(value).utcoffset() != timedelta(0):
            raise ValueError("expected a UTC time such as 2026-01-31T12:00:00+00:00")
        return value

    @field_validator("machine")
    @classmethod
    def _no_host(cls, value: dict[str, str | int]) -> dict[str, str | int]:
        named = sorted(key for key in value if key.lower() in _HOST_KEYS)
        if named:
            raise ValueError(f"a record names no host and no user, drop: {', '.join(named)}")
        return value

    @field_validator("scores")
    @classmethod
    def _has_primary(cls, value: list[ScoreRecord]) -> list[ScoreRecord]:
        if not any(score.primary for score in value):
            raise ValueError(f"none of the {len(value)} scores is marked primary")
        return value

    @field_validator("modules")
    @classmethod
    def _names_differ(cls, value: list[ModuleRecord]) -> list[ModuleRecord]:
        names = [module.name for module in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"listed more than once: {', '.join(twice)}")
        return value

    @model_validator(mode="after")
    def _hash_fits(self) -> Self:
        expected = recipe_hash(self.recipe)
        if self.recipe_hash != expected:
            raise ValueError(f"recipe_hash is {self.recipe_hash}, but the recipe hashes to {expected}")
        return self

    def primary_score(self) -> ScoreRecord:
        """The headline score: the first one marked primary."""
        return next(score for score in self.scores if score.primary)

    def adapted(self) -> list[ModuleRecord]:
        """The matrices that have a low-rank update: all but those of quantized heads."""
        return [module for module in self.modules if module.max_rank]

    def mean_rank(self) -> float | None:
        """Mean rank over the adapted matrices, None if no matrix was adapted."""
        return _mean(module.rank for module in self.adapted())

    def mean_bits(self, site: Site) -> float | None:
        """Mean width in bits over the quantizers at `site`, one that several matrices share once; None without any."""
        return _mean(bits[site] for module in self.modules if site in (bits := module.own_bits()))

    def mean_adapter_bits(self) -> float | None:
        """Mean width in bits over the quantizers of the adapter's own weights A, E and B, None if there are none."""
        return _mean(module.bits[site] for module in self.modules for site in ADAPTER_SITES if site in module.bits)

    def to_json(self) -> str:
        """The record as the text that `write` stores: indented JSON with a final newline."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Store the record in one step. Writing the same record again does nothing.

        Raises RunFolderError if `path` holds anything else or cannot be written, and leaves it as it was.
        """
        text = self.to_json()
        if not path.exists():
            write_atomically(path, text)
            return
        try:
            same = path.read_bytes() == text.encode("utf-8")
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read ({error.strerror or error})") from error
        if not same:
            raise RunFolderError(f"{path}: holds another record; a record is written once and never changed")

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """The record stored at `path`; RecordError with the path, each wrong field and the reason if it is not one."""
        content = _read_object(path)
        version = content.get("schema_version")
        if type(version) is not int or version < 1:
            raise RecordError(f"{path}: schema_version: expected a whole number from 1, given {version!r}")
        if version > SCHEMA_VERSION:
            raise RecordError(
                f"{path}: schema_version: given {version}, this rankbits reads up to {SCHEMA_VERSION}; "
                "update rankbits to read it"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problems = "\n".join(f"  {_problem(detail)}" for detail in error.errors(include_url=False))
            raise RecordError(f"{path}: not a valid run record\n{problems}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise RecordError(f"{path}: expected a JSON object, given {type(content).__name__}")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _problem(detail: Mapping[str, Any]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
    field = "".join(parts).lstrip(".")
    given = repr(detail["input"])
    if detail["type"] == "missing" or not field or len(given) > 80:
        return f"{field or 'record'}: {detail['msg']}"
    return f"{field}: {detail['msg']} (given {given})"


def _mean(values: Iterable[int]) -> float | None:
    kept = list(values)
    return sum(kept) / len(kept) if kept else None
