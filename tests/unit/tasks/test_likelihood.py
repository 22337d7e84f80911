"""Likelihood of answers: the shift by one token, what is counted, and rows of different lengths."""

from __future__ import annotations

import math

import pytest
import torch

from rankbits.tasks.likelihood import IGNORED, answer_nats


def test_nats_of_two_rows_by_hand() -> None:
    logits = torch.zeros(2, 4, 8)
    # The logits at place 1 predict the token at place 2: e^2 against seven others of weight one.
    logits[0, 1, 5] = 2.0
    labels = torch.tensor([[IGNORED, IGNORED, 5, 3], [IGNORED, 6, IGNORED, IGNORED]])
    found = answer_nats(logits, labels)
    known = math.log(math.exp(2.0) + 7.0) - 2.0
    assert found.dtype == torch.float64
    assert found.tolist() == [pytest.approx([known + math.log(8.0), 2.0]), pytest.approx([math.log(8.0), 1.0])]


def test_the_sums_give_the_loss_that_transformers_gives() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    ids = torch.randint(0, 32, (3, 7))
    labels = ids.masked_fill(torch.rand(3, 7) < 0.5, IGNORED)
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    nats, tokens = answer_nats(output.logits, labels).sum(dim=0).tolist()
    assert tokens == (labels[:, 1:] != IGNORED).sum()
    assert nats / tokens == pytest.approx(output.loss.item(), rel=1e-5)


def test_a_row_without_labels_has_no_tokens() -> None:
    assert answer_nats(torch.randn(1, 3, 4), torch.full((1, 3), IGNORED)).tolist() == [[0.0, 0.0]]


def test_low_precision_logits_are_summed_in_full_precision() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(10).reshape(2, 5)
    assert torch.equal(answer_nats(logits, labels), answer_nats(logits.float(), labels))
