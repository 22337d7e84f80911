"""What an answer costs a language model: negative log-likelihoods summed over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label of a token that is not to be predicted, by PyTorch's convention."""


def answer_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of negative log-likelihoods of each row's labelled tokens, and how many there are.

    Args:
        logits: of the next token [b, t, words], in any floating type.
        labels: ids of the tokens themselves, not shifted, IGNORED where nothing is to be predicted [b, t].

    Returns:
        Nats and numbers of tokens, in float64 so that no count is rounded [b, 2].

    Source: the usual shift of causal language models (Radford et al. 2018, equation 1).
    """
    # Before the shift a first token could carry a label, which nothing predicts.
    predicted, wanted = logits[:, :-1], labels[:, 1:]  # [b, t - 1, words], [b, t - 1]
    counted = wanted != IGNORED  # [b, t - 1]
    # Prompts and padding are most of a batch, and a word list is long: only the rows that count are made float32.
    nats = F.cross_entropy(predicted[counted].float(), wanted[counted], reduction="none")  # [counted]
    sums = torch.zeros(labels.shape[0], dtype=torch.float64, device=logits.device)  # [b]
    rows = counted.nonzero()[:, 0]  # [counted]
    sums.index_add_(0, rows, nats.double())
    return torch.stack([sums, counted.sum(dim=1).double()], dim=1)  # [b, 2]
