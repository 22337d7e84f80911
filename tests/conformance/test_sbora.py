"""PEFT's own tests over SBoRA: chosen inputs, chosen outputs, and adapters that share no input."""

from __future__ import annotations

import cases
import sbora

globals().update(cases.classes("Inputs", sbora.INPUTS))
globals().update(cases.classes("Outputs", sbora.OUTPUTS))
globals().update(cases.classes("Disjoint", sbora.DISJOINT))
