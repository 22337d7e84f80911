"""The points of the study, in the order in which they are run: what is trained on what, how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
BUDGETS = (0.5, 0.25, 0.1875, 0.125, 0.09375, 0.0625)
"""Bit operations of the adapted layers as a share of their 16-bit reference; a quarter of it is of the 32-bit one."""
CLAIMED = (0.25, 0.125)
MIXED = 0.09375
"""Here 2-bit and 4-bit weights mix, and two points may be lost."""
TIGHT = 0.0625
"""What 2-bit weights and 8-bit inputs everywhere would cost: here it shows whether it matters which layer gets what."""
NARROW, BYTES = 0.125, 0.3
"""Up to this budget the weights may also take no more bytes than that share of their 16-bit ones."""
REFERENCE_BITS = 16
"""Of what budgets are shares of."""
EQUAL_WIDTHS = {0.125: ((4, 8),), 0.0625: ((2, 8), (4, 4))}
"""Bits of all weights and of all inputs that cost exactly a budget. At 0.25 it is W8A8, which q + ra learns."""
CLOSEST = (4, 4)
"""The one of them that was ahead of learned widths, on MRPC with the first seed: it gets three seeds there, too."""
VARIANTS = ("q", "q-ra")
PLACEMENTS = ("separate", "merged")
DEFAULT_PLACEMENT = "merged"

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
GROUP_SIZES = {"affine16": 16, "affine": 8}
"""Weights that share a scale, and inputs that share a range and a low end, by the name that points bear."""
RECIPE = (
    "adapter.rounding=compensated",
    "adapter.weight_gradient_rows=256",
    "adapter.granularity=group",
    "adapter.scale_bits=8",
    "adapter.code_range=full",
    "adapter.activation_ranges=affine",
    "adapter.input_granularity=group",
    "gates.range_learning_rate=0.001",
    "gates.warmup=0.7",
    "gates.ramp=0",
    "gates.fixed=0",
)
"""What all our points share beside sites, groups and budget: the shipped recipe `glue/minilm-budget`."""
SITES = {"merged": "[weight,input]", "separate": "[weight,down,diagonal,up,input]"}
"""Q_out is left out: the next layer's input quantizer rounds what this one writes."""
DESCENT = ("gates.allocation=descent", "gates.warmup=0.2", "gates.ramp=0.2", "gates.fixed=0.2")
ABLATIONS = {
    "warmup0.2": ("gates.warmup=0.2",),
    "range-rate1e-2": ("gates.range_learning_rate=0.01",),
    "fitted": ("adapter.activation_ranges=fitted", "adapter.input_granularity=tensor"),
    "nearest": ("adapter.rounding=nearest",),
    "all-rows": ("adapter.weight_gradient_rows=null",),
    "descent": DESCENT,
}
"""The recipe with one of its choices changed, on rows held out of training (STS-B)."""
ALSO_ON_MRPC = ("warmup0.2",)
"""What was chosen by MRPC, with the recipe before."""
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


Make = Callable[[str, int], Point]
"""From a task and a seed to a point."""


def work(task: str, seed: int, *, rate: str = LEARNING_RATE) -> tuple[str, ...]:
    """What all methods share on one task: modules, rank, rows, order of rows, steps and learning rate."""
    rows = (f"task.train_rows={ROWS[task]}",) if task in ROWS else ()
    lengths = (f"training.epochs={EPOCHS[task]}", f"training.learning_rate={rate}", f"training.seed={seed}")
    return (*WORK, *rows, *STARTS.get(task, ()), *lengths)


def lora(task: str, seed: int) -> Point:
    """Plain LoRA."""
    return Point(task, "lora", seed, changes=("method=lora", *work(task, seed)))


def grids(budget: float) -> str:
    """The groups that a budget leaves the bytes for: a byte of scale for 8 weights of 4 bits would be too many."""
    return "affine16" if budget >= NARROW else "affine"


def ours(placement: str, budget: float) -> tuple[str, ...]:
    """What learned and fixed gates share in one placement, at what a budget leaves."""
    sites = (f"adapter.placement={placement}", f"adapter.quantizers={SITES[placement]}")
    return ("method=bayesian-lora", *sites, *RECIPE, f"adapter.group_size={GROUP_SIZES[grids(budget)]}")


def limits(budget: float) -> str:
    """A budget of bit operations as a recipe has it, with one of bytes where they are scarce."""
    return f"gates.budget=bops={budget:g}" if budget > NARROW else f"gates.budget=[bops={budget:g},bytes={BYTES:g}]"


def learned(task: str, budget: float, seed: int, variant: str = "q-ra", placement: str = DEFAULT_PLACEMENT) -> Point:
    """Learned widths, with or without learned ranks, under a budget of bit operations."""
    ranks = () if variant == "q-ra" else ("adapter.learn_rank=false",)
    changes = (*ours(placement, budget), *ranks, limits(budget), *work(task, seed, rate=OUR_RATE))
    return Point(task, f"{variant}-{placement}-bops{budget:g}-{grids(budget)}", seed, changes=changes)


def uniform(task: str, widths: tuple[int, int], seed: int) -> Point:
    """The same quantizers with gates that stand still at one width for all layers: quantization-aware LoRA."""
    budget = widths[0] * widths[1] / REFERENCE_BITS**2
    label = f"uniform-w{widths[0]}a{widths[1]}-group-{grids(budget)}"
    form = (*ours(DEFAULT_PLACEMENT, budget), "adapter.learn_rank=false")
    return Point(task, label, seed, Kind.FIXED, (*form, *work(task, seed, rate=OUR_RATE)), widths=widths)


def permuted(task: str, budget: float, seed: int) -> Point:
    """Learned widths and ranks, dealt out to other layers at the same cost and trained with fixed gates."""
    changes = (*ours(DEFAULT_PLACEMENT, budget), *work(task, seed, rate=OUR_RATE))
    label = f"permuted-bops{budget:g}-{grids(budget)}"
    return Point(task, label, seed, Kind.FIXED, changes, source=learned(task, budget, seed).name)


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


def held_out(task: str, name: str, rate: str, *changes: str, kind: Kind = Kind.RECIPE) -> Point:
    """A run on a slice of the training rows that is held out; validation is not read."""
    changes = (*changes, *work(task, FIRST_SEED, rate=rate), "task.evaluate_on=development")
    return Point(task, name, FIRST_SEED, kind, changes)


def ours_held_out(task: str, name: str = "", rate: str = OUR_RATE, *changes: str) -> Point:
    """The recipe at `NARROW` on such a slice."""
    label = "-".join(filter(None, ("q-ra-development", grids(NARROW), name)))
    return held_out(task, label, rate, *ours(DEFAULT_PLACEMENT, NARROW), limits(NARROW), *changes)


def rate_choices() -> list[Point]:
    """Learning rates tried for LoRA, for ours and for AdaLoRA."""
    tried = [(t, r) for t in CURVE_TASKS for r in LEARNING_RATES]
    points = [held_out(t, f"lora-development-lr{r}", r, "method=lora") for t, r in [*tried, ("sst2", LEARNING_RATE)]]
    points += [ours_held_out(t, "" if r == OUR_RATE else f"lr{r}", r) for t, r in [*tried, ("sst2", OUR_RATE)]]
    return points + [
        held_out("stsb", f"adalora-development-lr{rate}", rate, "method=lora", kind=Kind.ADALORA)
        for rate in ADALORA_RATES
    ]


def ablations() -> list[Point]:
    """The recipe with one choice changed at a time, beside which `rate_choices` has it as it is."""
    tried = [*(("stsb", name) for name in ABLATIONS), *(("mrpc", name) for name in ALSO_ON_MRPC)]
    return [ours_held_out(task, name, OUR_RATE, *ABLATIONS[name]) for task, name in tried]


def seeded() -> list[tuple[str, int]]:
    """(task, seed) of the claims: three seeds of the main tasks seed by seed, one of the others."""
    return [*((t, s) for s in SEEDS for t in MAIN_TASKS), *((t, FIRST_SEED) for t in ONE_SEED_TASKS)]


def is_run_of_its_own(variant: str, placement: str) -> bool:
    """Whether learned ranks can matter: where the sum is rounded no budget pays for them, and all of them stay.

    There q is q + ra, but for the order in which the norm of all gradients is summed: one budget is run to show it.
    """
    return (variant, placement) != ("q", "merged")


def _all() -> list[Point]:
    curves = [(t, s) for s in SEEDS for t in CURVE_TASKS]
    points = [*rate_choices(), *(lora(t, s) for t, s in seeded())]
    points += [learned(t, b, s) for b in CLAIMED[::-1] for t, s in seeded()]
    points += [learned(t, b, s) for b in (MIXED, TIGHT) for t, s in curves]
    rivals = [*(("stsb", s) for s in SEEDS), ("mrpc", FIRST_SEED)]
    points += [uniform(t, w, s) for w in EQUAL_WIDTHS[TIGHT] for t, s in (curves if w == CLOSEST else rivals)]
    points += [permuted(t, TIGHT, s) for t, s in rivals]
    points += [rounded(t, s) for t, s in curves]
    points += [uniform(t, w, FIRST_SEED) for w in EQUAL_WIDTHS[NARROW] for t in CURVE_TASKS]
    points += [
        learned(t, b, FIRST_SEED, variant, placement)
        for placement in PLACEMENTS[::-1]
        for variant in VARIANTS[::-1]
        for b in BUDGETS
        if is_run_of_its_own(variant, placement) or b == NARROW
        for t in CURVE_TASKS
    ]
    points += [adalora(t, s) for t, s in curves]
    points += [paper(t, FIRST_SEED) for t in CURVE_TASKS] + [foreign(t, FIRST_SEED) for t in CURVE_TASKS]
    points += ablations()
    return list({point.name: point for point in points}.values())


POINTS = _all()
