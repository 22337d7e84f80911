"""The points of the study, in the order in which they are run: what is trained on what, how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

TARGETS = r".*encoder\.layer\..*(query|key|value|dense)"
"""The six linear layers of every block of the encoder; neither pooler nor classifier, which are trained in full."""
RECIPES = {task: f"glue/minilm/{task}" for task in ("stsb", "mrpc", "sst2", "cola", "rte")}
"""The shipped recipe that each task starts from; a decoder's tasks would stand here too, with work of their own."""
EPOCHS = {"stsb": 3, "mrpc": 3, "sst2": 1.5, "cola": 3, "rte": 5}
ROWS = {"sst2": 10_000}
STARTS = {"stsb": ("task.start_at_mean=true",)}
"""A regression head that starts at zero spends a number of steps on the mean that differs from seed to seed."""
SEEDS = (42, 43, 44)
FIRST_SEED = SEEDS[0]
MAIN_TASKS = ("stsb", "mrpc", "sst2")
CURVE_TASKS = ("stsb", "mrpc")
ONE_SEED_TASKS = ("cola", "rte")
SCATTERED = "cola"
"""Its first seed lost five points where the others lost none; it gets the other seeds, too, to see what that says."""
BUDGETS = (0.5, 0.25, 0.1875, 0.125, 0.09375, 0.0625)
"""Bit operations of the adapted layers as a share of their 16-bit reference; a quarter of it is of the 32-bit one."""
CLAIMED = (0.25, 0.125)
MIXED = 0.09375
"""Here 2-bit and 4-bit weights mix, and two points may be lost; with `RECIPE` alone MRPC loses more."""
LONGER = 6
"""Epochs after which MRPC is compared at that budget once more, to see whether it is only late there."""
TIGHT = 0.0625
"""What 2-bit weights and 8-bit inputs everywhere would cost: here it shows whether it matters which layer gets what."""
NARROW, BYTES = 0.125, 0.3
"""From this budget on the weights may also take no more bytes than that share of their 16-bit ones."""
VARIANTS = ("q", "q-ra")
PLACEMENTS = ("separate", "merged")
DEFAULT_PLACEMENT = "merged"
GROUP_SIZE = 64

LEARNING_RATES = ("5e-4", "1e-3", "2e-3")
LEARNING_RATE = "1e-3"
"""LoRA's for every task; `--table` shows what it was chosen on."""
OUR_RATE = "1e-3"
"""Ours, with learned and with fixed gates, chosen in the same way."""
ADALORA_RATES = ("1e-3", "2e-3", "5e-3", "1e-2", "2e-2")
ADALORA_RATE = "1e-2"
"""AdaLoRA's own, chosen in the same way: it starts more slowly at LoRA's rate, and breaks at twice this one."""

WORK = (
    "task.max_length=128",
    f"adapter.targets={TARGETS}",
    "adapter.r=8",
    "adapter.alpha=16",
    "training.batch_size=32",
    "training.group_by_length=true",
    "training.warmup_ratio=0.06",
    "training.scheduler=linear",
)
RECIPE = (
    "adapter.rounding=compensated",
    "adapter.weight_gradient_rows=256",
    "gates.warmup=0.2",
    "gates.range_learning_rate=0.01",
)
"""What our points share beside sites and budget: widths are chosen after a fifth of the steps."""
GRIDS = ("adapter.group_size=8", "adapter.scale_bits=8", "adapter.code_range=full")
FINE = (*GRIDS, "adapter.activation_ranges=fitted")
"""What budgets below `NARROW` got at first: a byte of scale for 8 weights, all codes, and inputs fitted to their width.

Two and four bits round with less of an error so. From `NARROW` on it would be five bits for a weight of four, more than
the bytes that are allowed there.
"""
LATE = ("gates.warmup=0.7", "gates.ramp=0", "gates.fixed=0")
AFFINE = (
    *GRIDS,
    "adapter.activation_ranges=affine",
    "adapter.input_granularity=group",
    "gates.range_learning_rate=0.001",
    *LATE,
)
"""What they get now: inputs are rounded in the weight's groups, with low ends, and not before 0.7 of the steps."""
AFFINE16 = (*AFFINE, "adapter.group_size=16")
"""The same where bytes are as scarce as in groups of 64 with a float each: what the other budgets get."""
FINER = {"fine": FINE, "affine": AFFINE, "affine16": AFFINE16}
SITES = {"merged": "[weight,input]", "separate": "[weight,down,diagonal,up,input]"}
"""Q_out is left out: the next layer's input quantizer rounds what this one writes."""
ABLATIONS = {
    "warmup0.1": "gates.warmup=0.1",
    "warmup0.4": "gates.warmup=0.4",
    "fixed0.5": "gates.fixed=0.5",
    "range-rate1e-3": "gates.range_learning_rate=0.001",
    "range-rate3e-2": "gates.range_learning_rate=0.03",
    "nearest": "adapter.rounding=nearest",
    "full-codes": "adapter.code_range=full",
    "all-rows": "adapter.weight_gradient_rows=null",
    "descent": "gates.allocation=descent",
    "channel": "adapter.granularity=channel",
    "init-adalora": "adapter.init_weights=adalora",
    "calibration10": "adapter.calibration_passes=10",
}
"""The default recipe with one of its choices changed, on rows held out of training (STS-B)."""
MOMENTS = {"warmup0.7": LATE, "affine16": AFFINE16}
"""Widths chosen late, alone and with affine inputs, in groups that leave the bytes as they are; on rows of all main
tasks that are held out."""
PAPER = (
    "adapter.targets=[query,key,value]",
    "gates.lambda_q=1",
    "gates.lambda_r=1",
    "gates.warmup=0",
    "gates.ramp=0",
    "gates.fixed=0",
    "gates.reduction=sum",
)


class Kind(str, Enum):
    """How a point is worked out."""

    RECIPE = "recipe"
    FIXED = "fixed"
    ADALORA = "adalora"
    ROUNDED = "rounded"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Point:
    """One result of the study.

    Args:
        task: name of a GLUE task.
        label: the method as tables and file names call it.
        seed: of training; for points made from another point, of that one.
        kind: how it is worked out.
        changes: what the recipe is changed to.
        widths: (bits of weights, bits of inputs) of all layers, for uniform fixed gates.
        source: name of the point whose adapter is rounded, or whose widths are permuted.
    """

    task: str
    label: str
    seed: int
    kind: Kind = Kind.RECIPE
    changes: tuple[str, ...] = ()
    widths: tuple[int, int] | None = None
    source: str | None = None

    @property
    def name(self) -> str:
        """Name of its file of results, without the extension."""
        return f"{self.task}-{self.label}-seed{self.seed}"

    @property
    def recipe(self) -> str:
        """The shipped recipe it starts from."""
        return RECIPES[self.task]


def work(task: str, seed: int, *, rate: str = LEARNING_RATE) -> tuple[str, ...]:
    """What all methods share on one task: modules, rank, rows, order of rows, steps and learning rate."""
    rows = (f"task.train_rows={ROWS[task]}",) if task in ROWS else ()
    lengths = (f"training.epochs={EPOCHS[task]}", f"training.learning_rate={rate}", f"training.seed={seed}")
    return (*WORK, *rows, *STARTS.get(task, ()), *lengths)


def lora(task: str, seed: int) -> Point:
    """Plain LoRA."""
    return Point(task, "lora", seed, changes=("method=lora", *work(task, seed)))


def ours(placement: str, granularity: str = "group") -> tuple[str, ...]:
    """What learned and fixed gates share in one placement."""
    grid = (f"adapter.granularity={granularity}", f"adapter.quantizers={SITES[placement]}")
    size = (f"adapter.group_size={GROUP_SIZE}",) if granularity == "group" else ()
    return ("method=bayesian-lora", f"adapter.placement={placement}", *grid, *size, *RECIPE)


def learned(task: str, variant: str, placement: str, budget: float, seed: int) -> Point:
    """Learned widths, with or without learned ranks, under a budget of bit operations."""
    ranks = () if variant == "q-ra" else ("adapter.learn_rank=false",)
    limits = f"bops={budget:g}" if budget > NARROW else f"[bops={budget:g},bytes={BYTES:g}]"
    changes = (*ours(placement), *ranks, f"gates.budget={limits}", *work(task, seed, rate=OUR_RATE))
    return Point(task, f"{variant}-{placement}-bops{budget:g}", seed, changes=changes)


def finer(point: Point, grids: str = "affine") -> Point:
    """The same with one of `FINER`."""
    return replace(point, label=f"{point.label}-{grids}", changes=(*point.changes, *FINER[grids]))


def affine(task: str, budget: float, seed: int) -> Point:
    """What we recommend at a budget: learned widths and ranks with affine inputs, in groups that its bytes allow."""
    grids = "affine" if budget < NARROW else "affine16"
    return finer(learned(task, "q-ra", DEFAULT_PLACEMENT, budget, seed), grids)


def longer(point: Point) -> Point:
    """The same with `LONGER` epochs."""
    changes = (*point.changes, f"training.epochs={LONGER}")
    return replace(point, label=f"{point.label}-epochs{LONGER}", changes=changes)


def uniform(task: str, widths: tuple[int, int], granularity: str, seed: int) -> Point:
    """The same quantizers with gates that stand still at one width for all layers: quantization-aware LoRA."""
    label = f"uniform-w{widths[0]}a{widths[1]}-{granularity}"
    changes = (*ours(DEFAULT_PLACEMENT, granularity), "adapter.learn_rank=false", *work(task, seed, rate=OUR_RATE))
    return Point(task, label, seed, Kind.FIXED, changes, widths=widths)


def permuted(task: str, budget: float, seed: int, *, finely: bool = False) -> Point:
    """Learned widths and ranks, dealt out to other layers at the same cost and trained with fixed gates."""
    source = learned(task, "q-ra", DEFAULT_PLACEMENT, budget, seed)
    changes = (*ours(DEFAULT_PLACEMENT), *work(task, seed, rate=OUR_RATE))
    point = Point(task, f"permuted-bops{budget:g}", seed, Kind.FIXED, changes, source=source.name)
    return replace(finer(point), source=finer(source).name) if finely else point


def rounded(task: str, seed: int) -> Point:
    """LoRA merged and rounded after training, by several schemes."""
    return Point(task, "rounded", seed, Kind.ROUNDED, source=lora(task, seed).name)


def foreign(task: str, seed: int) -> Point:
    """The same by torchao, with its own activations: rounded afresh for every token."""
    return Point(task, "torchao", seed, Kind.FOREIGN, source=lora(task, seed).name)


def adalora(task: str, seed: int, rate: str = ADALORA_RATE) -> Point:
    """AdaLoRA at LoRA's scale and mean rank."""
    return Point(task, "adalora", seed, Kind.ADALORA, ("method=lora", *work(task, seed, rate=rate)))


def paper(task: str, seed: int) -> Point:
    """The letter of the paper: query, key and value, seven quantizers, full penalty from the first step."""
    changes = ("method=bayesian-lora", *work(task, seed), *PAPER)
    return Point(task, "paper", seed, changes=changes)


def _held_out(task: str, name: str, rate: str, kind: Kind, *more: str) -> Point:
    changes = (*more, *work(task, FIRST_SEED, rate=rate), "task.evaluate_on=development")
    return Point(task, name, FIRST_SEED, kind, changes)


def _under_a_budget(*more: str) -> tuple[str, ...]:
    return (*ours(DEFAULT_PLACEMENT), f"gates.budget=[bops={NARROW:g},bytes={BYTES:g}]", *more)


def rate_choices() -> list[Point]:
    """Learning rates tried on a slice of the training rows that is held out; validation is not read."""
    rates, fitted = LEARNING_RATES, _under_a_budget()
    points = [
        _held_out(task, f"{label}-development-lr{rate}", rate, Kind.RECIPE, *changes)
        for label, changes in (("lora", ("method=lora",)), ("q-ra", fitted))
        for task in CURVE_TASKS
        for rate in rates
    ]
    adaptive = [
        _held_out("stsb", f"adalora-development-lr{rate}", rate, Kind.ADALORA, "method=lora") for rate in ADALORA_RATES
    ]
    return [*points, *adaptive]


def ablations() -> list[Point]:
    """The default recipe with one choice changed at a time, beside which `q-ra-development` at its rate stands."""
    return [
        _held_out("stsb", f"q-ra-development-{name}", OUR_RATE, Kind.RECIPE, *_under_a_budget(change))
        for name, change in ABLATIONS.items()
    ]


def moments() -> list[Point]:
    """The default recipe with widths that are chosen late, beside it and LoRA at their rates."""
    rates = {"lora": LEARNING_RATE, "q-ra": OUR_RATE}
    forms = {f"lora-development-lr{rates['lora']}": ("method=lora",)}
    forms |= {f"q-ra-development-lr{rates['q-ra']}": _under_a_budget()}
    forms |= {f"q-ra-development-{name}": _under_a_budget(*changes) for name, changes in MOMENTS.items()}
    return [
        _held_out(task, name, rates[name.split("-development")[0]], Kind.RECIPE, *changes)
        for task in MAIN_TASKS
        for name, changes in forms.items()
    ]


def _seeded() -> list[tuple[str, int]]:
    """(task, seed) of the claims: three seeds of the main tasks seed by seed, one of the others, more of CoLA."""
    main = [(t, s) for s in SEEDS for t in MAIN_TASKS]
    return [*main, *((t, FIRST_SEED) for t in ONE_SEED_TASKS), *((SCATTERED, s) for s in SEEDS[1:])]


def _all() -> list[Point]:
    seeded = _seeded()
    points = [*rate_choices(), *(lora(t, s) for t, s in seeded), *(rounded(t, s) for t, s in seeded)]
    points += [affine(t, b, s) for b in CLAIMED[::-1] for t, s in seeded]
    points += [learned(t, "q-ra", DEFAULT_PLACEMENT, b, s) for b in CLAIMED for t, s in seeded]
    points += [
        learned(t, v, p, b, FIRST_SEED)
        for p in PLACEMENTS[::-1]
        for v in VARIANTS[::-1]
        for b in BUDGETS
        for t in CURVE_TASKS
    ]
    points += [uniform(t, w, "group", s) for w in ((4, 8), (2, 8)) for s in SEEDS for t in CURVE_TASKS]
    points += [learned(t, "q-ra", DEFAULT_PLACEMENT, b, s) for b in (MIXED, TIGHT) for s in SEEDS for t in CURVE_TASKS]
    points += [affine(t, b, s) for b in (MIXED, TIGHT) for s in SEEDS for t in CURVE_TASKS]
    points += [finer(learned(t, "q-ra", DEFAULT_PLACEMENT, MIXED, s), "fine") for s in SEEDS for t in CURVE_TASKS]
    points += [finer(uniform(t, w, "group", s)) for w in ((2, 8), (4, 4)) for s in SEEDS for t in CURVE_TASKS]
    points += [permuted(t, TIGHT, s, finely=True) for s in SEEDS for t in CURVE_TASKS]
    points += [
        longer(point)
        for s in SEEDS
        for point in (lora("mrpc", s), learned("mrpc", "q-ra", DEFAULT_PLACEMENT, MIXED, s))
    ]
    points += [permuted(t, TIGHT, s) for s in SEEDS for t in CURVE_TASKS]
    points += [uniform(t, w, "group", FIRST_SEED) for w in ((8, 8), (4, 4)) for t in CURVE_TASKS]
    points += [adalora(t, s) for s in SEEDS for t in CURVE_TASKS]
    points += [paper(t, FIRST_SEED) for t in CURVE_TASKS]
    points += [foreign(t, FIRST_SEED) for t in CURVE_TASKS]
    points += [*moments(), *ablations()]
    return list({point.name: point for point in points}.values())


POINTS = _all()
