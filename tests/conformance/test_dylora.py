"""PEFT's own tests over DyLoRA: at its largest rank, and at a smaller one."""

from __future__ import annotations

import cases
import dylora

globals().update(cases.classes("FullRank", dylora.FULL_RANK))
globals().update(cases.classes("ChosenRank", dylora.CHOSEN_RANK))
