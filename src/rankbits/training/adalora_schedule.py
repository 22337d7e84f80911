"""PEFT's AdaLoRA really stepped: importance of ranks, masks and orthogonality, once per optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import AdaLoraConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel
from torch import Tensor, nn

from rankbits.errors import ScheduleError
from rankbits.training.rank_budget import RankBudget

AVERAGES = "adalora_averages"
"""Attribute of a layer that holds, per adapter, both running averages of its parameters; PEFT saves it with them."""
LEFT_OPEN = 1
"""The total_step that a config is given when its maker does not know the number: PEFT accepts no config without one."""


def triplet_scores(parameter: Tensor, averages: Tensor, *, dim: int) -> Tensor:
    """Importance of ranks as one matrix sees it: the mean of I * U over a rank's entries (Zhang et al. 2023, eq. 9-11).

    Args:
        parameter: A [r, d_in], E [r, 1] or B [d_out, r]; only its shape is read.
        averages: its smoothed sensitivities and uncertainties, [2, numel].
        dim: the dimension that is averaged over: 1 for A and E, 0 for B.

    Returns:
        [r].
    """
    sensitivity, uncertainty = averages.view(2, *parameter.shape)
    scores: Tensor = (sensitivity * uncertainty).mean(dim=dim)  # [r]
    return scores


def smoothed(averages: Tensor, sensitivity: Tensor, beta1: float, beta2: float) -> Tensor:
    """The running averages after one more step (Zhang et al. 2023, equations 9 and 10).

    Args:
        averages: smoothed sensitivity and uncertainty so far, [2, n].
        sensitivity: |w dL/dw| of this step, [n].
        beta1: of the sensitivity.
        beta2: of the uncertainty.

    Returns:
        [2, n].
    """
    mean = beta1 * averages[0] + (1 - beta1) * sensitivity
    return torch.stack([mean, beta2 * averages[1] + (1 - beta2) * (sensitivity - mean).abs()])


def distance_from_orthogonal(matrices: Sequence[Tensor]) -> Tensor:
    """How far rows are from orthonormal: the mean of ||M M^T - I||_F over the matrices [r, n], in float32 or better.

    Zhang et al. 2023, equation 4, averaged over matrices and not squared, as its authors' code has it.
    """
    wide = [matrix.to(torch.promote_types(matrix.dtype, torch.float32)) for matrix in matrices]
    grams = [matrix @ matrix.T - torch.eye(len(matrix)).to(matrix) for matrix in wide]  # [r, r]
    norms = [torch.linalg.matrix_norm(gram).to(wide[0].device) for gram in grams]
    return torch.stack(norms).mean()


def largest(scores: Tensor, kept: int) -> Tensor:
    """A mask [n] with exactly `kept` entries: the largest scores [n], of equal ones the first."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[torch.sort(scores, descending=True, stable=True).indices[:kept]] = True
    return mask


class AdaloraSchedule:
    """Moves the ranks of PEFT's AdaLoRA along its budget, and applies its orthogonality penalty.

    PEFT adds the penalty to the loss in its forward pass, in evaluation too, and there the Trainer multiplies it by
    the accumulated batches. From here on it does not: the config's weight is taken over and set to zero.

    Args:
        model: with one AdaLoRA adapter in training; possibly wrapped for distributed data parallelism.
        total_steps: optimizer steps of the run. The config's total_step is this number, or 1, which leaves it open.
        phases: fractions of all steps before the budget falls and after it has fallen; None takes the config's tinit
            and tfinal.
        orthogonality: weight of the penalty; None takes the config's.

    Raises:
        ScheduleError: no AdaLoRA adapter is in training, phases or total do not fit, or ranks are to be taken from an
            adapter that was pruned before. The model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        phases: tuple[float, float] | None = None,
        orthogonality: float | None = None,
    ) -> None:
        self.model = model
        self.adapter = trained_adapter(model)
        self.config = _config(model, self.adapter)
        self.budget = _budget(self._ranks(), self.config, total_steps, phases)
        self.orthogonality = float(self.config.orth_reg_weight if orthogonality is None else orthogonality)
        if not 0 <= self.orthogonality < float("inf"):
            raise ScheduleError(f"orthogonality must be a finite number of at least 0, got {self.orthogonality}")
        self.completed_steps = 0
        self.config.tinit, self.config.tfinal = self.budget.warmup_steps, self.budget.final_steps
        self.config.total_step = total_steps
        task_loss_only(model)
        self._freeze_divisors()
        self._hold_all_ranks()

    def add_orthogonality_gradient(self) -> float:
        """Add the penalty's gradient to `.grad`, after backward and before the optimizer's step.

        The penalty is the weight times `distance_from_orthogonal` of all A and all B^T.

        Returns:
            The penalty.
        """
        pairs = [(a, b) for a, _, b in (self._matrices(layer) for _, layer in self._layers())]
        matrices = [matrix for pair in pairs for matrix in pair if matrix.requires_grad]
        if not self.orthogonality or not matrices:
            return 0.0
        with torch.enable_grad():
            penalty = self.orthogonality * distance_from_orthogonal([rows for a, b in pairs for rows in (a, b.T)])
        # A layer that was loaded without any rank has empty matrices, which no gradient reaches.
        for parameter, gradient in zip(
            matrices, torch.autograd.grad(penalty, matrices, allow_unused=True), strict=True
        ):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return float(penalty.detach())

    def step(self) -> None:
        """Tell the schedule that the optimizer made a step; its gradients must still be there.

        Raises:
            ScheduleError: all gradients are gone, or the run was to be over.
        """
        if self.completed_steps >= self.budget.total_steps:
            raise ScheduleError(
                f"AdaLoRA's schedule was made for {self.budget.total_steps} steps and all were made: give "
                "AdaloraSchedule the run's real number"
            )
        if self.completed_steps + 1 < self.budget.last_change:
            self._measure()
        self.completed_steps += 1
        if self.budget.masks(self.completed_steps):
            self._mask()

    def restore(self, completed_steps: int) -> None:
        """Continue after this many completed steps, with adapter and averages loaded before.

        Raises:
            ScheduleError: the number is not within the run, or there are no averages where there must be some.
        """
        if not 0 <= completed_steps <= self.budget.total_steps:
            raise ScheduleError(
                f"completed_steps must be from 0 to the run's {self.budget.total_steps}, got {completed_steps}"
            )
        self._hold_all_ranks()
        measured = completed_steps > 0 and self.budget.last_change > 1
        if measured and not any(bool(_averages(layer)[self.adapter].any()) for _, layer in self._layers()):
            raise ScheduleError(
                f"AdaLoRA is to go on after step {completed_steps}, but the importance of its ranks was not restored: "
                "give AdaloraCallback to the Trainer when it is made, with callbacks=[...], and resume from a "
                "checkpoint written with it; in a loop of your own make the schedule before the adapter is loaded"
            )
        self.completed_steps = completed_steps

    def _hold_all_ranks(self) -> None:
        # With a pattern PEFT would save the kept ranks alone, and a masked one could never return after resuming.
        self.config.rank_pattern = None
        make_averages(self.model)

    def kept(self) -> dict[str, int]:
        """Ranks that each layer has now: entries of E that are not zero. Between two masks closed ones may move."""
        return {name: int(layer.lora_E[self.adapter].count_nonzero()) for name, layer in self._layers()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the adapter, ready for JSON."""
        return {"completed_steps": self.completed_steps, "orthogonality": self.orthogonality}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, with adapter and averages loaded before. Raises as `restore` does."""
        self.restore(int(state["completed_steps"]))
        self.orthogonality = float(state["orthogonality"])

    def _measure(self) -> None:
        """Take this step's sensitivities into the averages; a parameter that had no part in the loss has none."""
        parameters = [p for _, layer in self._layers() for p in self._matrices(layer)]
        if all(parameter.grad is None for parameter in parameters):
            raise ScheduleError(
                "no parameter of AdaLoRA has a gradient: call AdaloraSchedule.step() after optimizer.step() and before "
                "optimizer.zero_grad()"
            )
        for _, layer in self._layers():
            flat = [
                (p.detach() * p.grad).abs().float().flatten() if p.grad is not None else torch.zeros_like(p).flatten()
                for p in self._matrices(layer)
            ]
            averages = _averages(layer)
            averages[self.adapter] = smoothed(
                averages[self.adapter], torch.cat(flat).to(averages[self.adapter]), self.config.beta1, self.config.beta2
            )

    @torch.no_grad()
    def _mask(self) -> None:
        """Close all but the b(t) most important ranks; with unchanged averages, in the last phase, always the same."""
        layers = [layer for _, layer in self._layers()]
        scores = [self._scores(layer) for layer in layers]
        mask = largest(torch.cat([score.cpu() for score in scores]), self.budget.kept(self.completed_steps))
        for layer, kept in zip(layers, mask.split([len(score) for score in scores]), strict=True):
            diagonal = layer.lora_E[self.adapter]
            diagonal.masked_fill_(~kept.to(diagonal.device).unsqueeze(1), 0.0)

    def _scores(self, layer: AdaLoraLayer) -> Tensor:
        a, e, b = self._matrices(layer)
        parts = _averages(layer)[self.adapter].split([a.numel(), e.numel(), b.numel()], dim=1)
        return sum(
            (triplet_scores(p, part, dim=dim) for p, part, dim in zip((a, e, b), parts, (1, 1, 0), strict=True)),
            start=torch.zeros(len(e), device=e.device),
        )

    def _matrices(self, layer: AdaLoraLayer) -> tuple[Tensor, Tensor, Tensor]:
        return matrices(layer, self.adapter)

    def _freeze_divisors(self) -> None:
        """PEFT lets the number train that the update is divided by, where the base is not in float32, unsaved."""
        for _, layer in self._layers():
            layer.ranknum[self.adapter].requires_grad_(False)

    def _layers(self) -> Iterator[tuple[str, AdaLoraLayer]]:
        return ((name, layer) for name, layer in adalora_layers(self.model) if self.adapter in layer.lora_E)

    def _ranks(self) -> list[int]:
        return [len(layer.lora_E[self.adapter]) for _, layer in self._layers()]


def adalora_layers(model: nn.Module) -> Iterator[tuple[str, AdaLoraLayer]]:
    """All layers that PEFT's AdaLoRA has adapted, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaLoraLayer))


def matrices(layer: AdaLoraLayer, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, d_in], E [r, 1] and B [d_out, r], as they are now: PEFT replaces parameters when it casts or loads them."""
    found = layer.lora_A[adapter], layer.lora_E[adapter], layer.lora_B[adapter]
    return cast("tuple[Tensor, Tensor, Tensor]", found)


def trained_adapter(model: nn.Module) -> str:
    """The name of the one AdaLoRA adapter whose diagonals train. ScheduleError if there is none."""
    found = {n for _, layer in adalora_layers(model) for n, e in layer.lora_E.items() if e.requires_grad}
    if len(found) != 1:
        raise ScheduleError(
            f"{type(model).__name__} has {len(found) or 'no'} AdaLoRA adapters in training, expected one: attach it "
            "with get_peft_model(model, AdaLoraConfig(...)), or load it with is_trainable=True"
        )
    return str(found.pop())


def make_averages(model: nn.Module) -> None:
    """Give every layer of the adapter in training a place for its averages, which a checkpoint then fills.

    Those that are there already stay as they are.
    """
    adapter = trained_adapter(model)
    for _, layer in adalora_layers(model):
        if adapter not in layer.lora_E:
            continue
        if not isinstance(getattr(layer, AVERAGES, None), BufferDict):
            setattr(layer, AVERAGES, BufferDict(persistent=True))
        if adapter not in _averages(layer):
            size = sum(matrix.numel() for matrix in matrices(layer, adapter))
            _averages(layer)[adapter] = torch.zeros(2, size, device=layer.lora_E[adapter].device)


def fix_ranks(model: nn.Module) -> dict[str, int]:
    """End AdaLoRA's training: the kept ranks become the config's rank_pattern, and averages are dropped.

    What is saved from here on are the kept ranks alone, in the form that PEFT loads without this package. The output
    of the model does not change.

    Returns:
        Ranks left, by layer.

    Raises:
        ScheduleError: no AdaLoRA adapter is in training. The model is unchanged.
    """
    adapter = trained_adapter(model)
    config = _config(model, adapter)
    prefix = next((f"{name}.model." for name, m in model.named_modules() if isinstance(m, AdaLoraModel)), "")
    pattern: dict[str, list[bool]] = {}
    for name, layer in adalora_layers(model):
        if adapter not in layer.lora_E:
            continue
        if hasattr(layer, AVERAGES):
            delattr(layer, AVERAGES)
        kept = (layer.lora_E[adapter] != 0).view(-1).tolist()
        if len(kept) < config.init_r:
            # Loaded with ranks already taken out: all rows that are here are rows of the file, as PEFT reads it.
            kept = [True] * len(kept) + [False] * (config.init_r - len(kept))
        pattern[f"{name.removeprefix(prefix).removeprefix('.')}.lora_E.{adapter}"] = kept
    config.rank_pattern = pattern
    return {name: sum(kept) for name, kept in pattern.items()}


def task_loss_only(model: nn.Module) -> None:
    """Stop PEFT's AdaLoRA from adding its penalty to the loss, so that a loss in evaluation is the task's.

    PEFT's forward also fails on labels where no adapter is in training: such models can be evaluated from here on.
    """
    for module in model.modules():
        if isinstance(module, AdaLoraModel):
            for config in module.peft_config.values():
                if isinstance(config, AdaLoraConfig):
                    config.orth_reg_weight = 0.0
            if "trainable_adapter_name" not in vars(module):
                module.trainable_adapter_name = next(iter(module.peft_config))


def _averages(layer: AdaLoraLayer) -> BufferDict:
    held = getattr(layer, AVERAGES)
    assert isinstance(held, BufferDict)
    return held


def _config(model: nn.Module, adapter: str) -> AdaLoraConfig:
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and isinstance(configs.get(adapter), AdaLoraConfig):
            found: AdaLoraConfig = configs[adapter]
            return found
    raise ScheduleError(
        f"{type(model).__name__} has AdaLoRA layers but no configuration of adapter {adapter!r}: attach it with "
        "get_peft_model, which keeps one in model.peft_config"
    )


def _budget(
    ranks: list[int], config: AdaLoraConfig, total_steps: int, phases: tuple[float, float] | None
) -> RankBudget:
    if config.total_step not in {total_steps, LEFT_OPEN}:
        raise ScheduleError(
            f"AdaLoraConfig(total_step={config.total_step}), but the run will make {total_steps} optimizer steps: give "
            f"the same number, or {LEFT_OPEN}, which leaves it to the schedule"
        )
    warmup, final = config.tinit, config.tfinal
    if phases is not None:
        if min(phases) < 0 or sum(phases) >= 1:
            raise ScheduleError(f"phases must be two fractions of at least 0 with a sum below 1, got {phases}")
        warmup, final = (round(share * total_steps) for share in phases)
    initial, target = sum(ranks), config.target_r * len(ranks)
    if initial < config.init_r * len(ranks):
        if target < initial:
            raise ScheduleError(
                f"this adapter was pruned before: {initial} of its {config.init_r * len(ranks)} ranks are left, and "
                f"target_r={config.target_r} asks for {target}; PEFT can save one pruning only. Train on with "
                "target_r as it was, or resume from a checkpoint of the first training"
            )
        target = initial
    return RankBudget(initial, target, total_steps, warmup, final, config.deltaT)
