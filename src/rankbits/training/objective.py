"""Penalties on open gates, as functions of the parameters alone: they never enter a model's own loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankbits.quant.grid import GATED_WIDTHS
from rankbits.training.gate_table import pressed_probability
from rankbits.tuners.bayesian_lora import GatedLayer, GatePhase, learning_adapters
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates


def bit_penalty(link_probabilities: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Expected number of open width gates, or their expected cost.

    Args:
        link_probabilities: [quantizers, 4] probability that a quantizer uses at least 4, 8, 16 and 32 bits.
        weights: cost of each link, broadcasts to [quantizers, 4].

    Returns:
        Scalar, the sum over the double product in Bayesian-LoRA's Eq. 15 with the constants for 2 bits left out.
    """
    return (link_probabilities * weights).sum()


def rank_penalty(rank_probabilities: Tensor) -> Tensor:
    """Expected number of open ranks beyond the first, a scalar, from [r - 1] probabilities (Eq. 15)."""
    return rank_probabilities.sum()


def size_weights(sizes: list[int], largest: int) -> Tensor:
    """Weights b M_k / max M that make the bit penalty proportional to what bits cost (van Baalen et al. 2020).

    Args:
        sizes: of each quantized tensor the multiply-accumulates per row that read it, or the numbers it stores.
        largest: the largest such size in the model.

    Returns:
        [quantizers, 4] float32.
    """
    per_tensor = torch.tensor(sizes, dtype=torch.float32) / largest
    return per_tensor[:, None] * torch.tensor([float(b) for b in GATED_WIDTHS])


def regularization_loss(model: nn.Module) -> Tensor:
    """The penalty lambda_q R_q + lambda_r R_r, or that of a budget, at the weights that the schedule asks for now.

    Add it to the task loss of a hand-written loop, divided by the number of accumulated micro-batches; the Trainer
    callback applies it by itself. Quantizers that are off and adapters in the fixed phase leave it.

    Args:
        model: any model with Bayesian-LoRA layers.

    Returns:
        Scalar with graph; a zero without graph while nothing is penalised.
    """
    return _loss(list(learning_adapters(model)))


def _loss(adapters: list[tuple[GatedLayer, str, LayerGates]]) -> Tensor:
    terms = []
    for layer, name, gates in adapters:
        phase = layer.phase[name]
        if phase.fixed:
            continue
        widths, ranks = gates.width_probabilities(), gates.rank_probabilities()
        if widths is not None and phase.lambda_q:
            terms.append(phase.lambda_q * bit_penalty(widths, _on(widths, link_weights(layer, name, phase))))
        if ranks is not None and phase.lambda_r:
            terms.append(phase.lambda_r * rank_penalty(ranks))
        if phase.pressure is not None:
            terms.append(pressed_probability(gates, *phase.pressure))
    if not terms:
        return torch.zeros(())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def link_weights(layer: GatedLayer, name: str, phase: GatePhase) -> Tensor | float:
    """Cost of each link of a layer's width gates: [sites, 4], or one number for all."""
    if phase.largest_stored is not None:
        return size_weights(layer.stored_numbers(name), phase.largest_stored)
    return 1.0 if phase.largest_macs is None else size_weights(layer.macs_per_row(name), phase.largest_macs)


def _on(reference: Tensor, weights: Tensor | float) -> Tensor | float:
    return weights.to(reference.device) if isinstance(weights, Tensor) else weights


def add_regularization_gradient(model: nn.Module) -> float:
    """Add the penalty's gradient to the `.grad` of the gate logits, once per optimizer step.

    Independent of the task loss, of gradient accumulation and of data parallelism, whose gradient hooks do not run.

    Returns:
        The penalty's value.
    """
    adapters = list(learning_adapters(model))
    loss = _loss(adapters)
    if not loss.requires_grad:
        return 0.0
    logits = [p for _, _, gates in adapters for p in gates.parameters() if p.requires_grad]
    for parameter, grad in zip(logits, torch.autograd.grad(loss, logits, allow_unused=True), strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    return float(loss.detach())
