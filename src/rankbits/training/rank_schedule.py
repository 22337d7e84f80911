"""Which rank DyLoRA trains at each optimizer step: a function of a seed and the number of completed steps."""

from __future__ import annotations

import random
from typing import Any

from torch import nn

from rankbits.errors import ScheduleError
from rankbits.tuners.dylora import adapted_layers


def drawn_rank(seed: int, completed_steps: int, largest: int) -> int:
    """The rank of the next optimizer step, uniform on 1..largest (Valipour et al. 2022, with p_B uniform).

    The same on all machines and in all processes, and independent of every other random generator.

    Args:
        seed: of the run.
        completed_steps: optimizer steps made so far.
        largest: r.
    """
    # Of the generators of the standard library only this one's sequence for a seed is promised never to change.
    return 1 + int(random.Random(f"{seed}/{completed_steps}").random() * largest)


class DyloraSchedule:
    """Draws one rank per optimizer step for all layers, all micro-batches and all processes.

    Args:
        model: a model with at least one active DyLoRA adapter.
        seed: of the draws; processes that train together need the same.

    Raises:
        ScheduleError: the model has no active DyLoRA adapter. The model is unchanged.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        if not any(name in layer.r for _, layer in adapted_layers(model) for name in layer.active_adapters):
            raise ScheduleError(
                f"DyloraSchedule: {type(model).__name__} has no active DyLoRA adapter, so no rank to draw: attach one "
                "with get_peft_model(model, DyloraConfig(...)), or activate it with set_adapter"
            )
        self.model = model
        self.seed = seed
        self.completed_steps = 0
        self._begin()

    def step(self) -> None:
        """Tell the schedule that an optimizer step was made: its rank ends, and the next one is drawn."""
        self.finish()
        self.completed_steps += 1
        self._begin()

    def restore(self, completed_steps: int) -> None:
        """Continue after this many completed steps, as if they had been made here, from the weights as they are.

        Raises:
            ScheduleError: the number is negative.
        """
        if completed_steps < 0:
            raise ScheduleError(f"completed_steps must be >= 0, got {completed_steps}")
        for _, layer in adapted_layers(self.model):
            layer.before_step.clear()
        self.completed_steps = completed_steps
        self._begin()

    def finish(self) -> None:
        """End the present step without drawing another: from here on layers run at their evaluation rank."""
        for _, layer in adapted_layers(self.model):
            for name in layer.r:
                layer.end_step(name)

    def ranks(self) -> dict[str, int]:
        """The rank of the present step of each adapter that trains."""
        return {
            name: rank
            for _, layer in adapted_layers(self.model)
            for name, rank in layer.sampled_rank.items()
            if rank is not None
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, ready for JSON."""
        return {"completed_steps": self.completed_steps, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, with the model's weights loaded before."""
        self.seed = int(state["seed"])
        self.restore(int(state["completed_steps"]))

    def _begin(self) -> None:
        for _, layer in adapted_layers(self.model):
            for name in layer.active_adapters:
                if name in layer.r:
                    layer.begin_step(name, drawn_rank(self.seed, self.completed_steps, layer.r[name]))
