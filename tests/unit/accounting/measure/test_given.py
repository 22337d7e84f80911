"""Conditions of a count are those of the user's own inputs, which no pass may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BartConfig, BartModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from rankbits.accounting.measure import cost
from rankbits.accounting.measure.given import copied, given_sizes
from rankbits.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40}


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=32)).eval()


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(**T5)).eval()


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.full((batch, tokens), 5)


def test_two_stacks_read_their_source_and_their_query() -> None:
    record = cost(_t5(), inputs={"input_ids": _ids(2, 9), "decoder_input_ids": _ids(2, 3)}, head="last")
    asked = cost(_t5(), query_len=3, source_len=9, batch=2, head="last")
    assert (record.options, record.products, record.weights) == (asked.options, asked.products, asked.weights)
    labelled = cost(_t5(), inputs={"input_ids": _ids(2, 9), "labels": _ids(2, 3)})
    assert (labelled.options.source_len, labelled.options.query_len) == (9, 3)
    shifted = cost(BartModel(BartConfig(**BART)), inputs={"input_ids": _ids(2, 9)})
    assert (shifted.options.source_len, shifted.options.query_len) == (9, 9)


def test_embeddings_have_a_length_too() -> None:
    record = cost(_llama(), inputs={"inputs_embeds": torch.randn(2, 6, 32)}, head="last")
    assert record.macs == cost(_llama(), sequence_length=6, batch=2, head="last").macs
    assert (record.options.batch, record.options.query_len) == (2, 6)


def test_a_cache_is_part_of_the_keys_and_stays_as_it_was() -> None:
    model = _llama()
    cache = model(input_ids=_ids(1, 8), use_cache=True).past_key_values  # its tensors carry gradients
    expected = cost(model, query_len=1, key_len=9)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    record = cost(adapted, inputs={"input_ids": _ids(1, 1), "past_key_values": cache}, adapters="unmerged")
    assert cache.get_seq_length() == 8
    assert (record.options.query_len, record.options.key_len) == (1, 9)
    assert record.reference_macs == expected.macs
    assert record.macs == expected.macs + 2 * 2 * 32


def test_a_cache_of_two_stacks_knows_its_source() -> None:
    model = _t5()
    with torch.no_grad():
        first = model(input_ids=_ids(1, 7), decoder_input_ids=_ids(1, 4), use_cache=True)
    step = {"decoder_input_ids": _ids(1, 1), "past_key_values": first.past_key_values}
    state = {"encoder_outputs": (first.encoder_last_hidden_state,)}
    asked = cost(_t5(), query_len=1, key_len=5, source_len=7)
    record = cost(model, inputs=step | state)
    assert (record.options, record.macs) == (asked.options, asked.macs)
    assert given_sizes(model, step)["source_len"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 7}, "sequence_length: given 7 beside inputs, whose query_len is 3"),
        ({"batch": 1}, "batch: given 1 beside inputs, whose batch is 2"),
        ({"query_len": 4}, "query_len: given 4 beside inputs, whose query_len is 3"),
        ({"key_len": 9}, "key_len: given 9 beside inputs, whose key_len is 3"),
    ],
)
def test_what_contradicts_the_inputs_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        cost(_llama(), inputs={"input_ids": _ids(2, 3)}, **arguments)


def test_a_source_that_contradicts_the_inputs_is_refused() -> None:
    inputs = {"input_ids": _ids(1, 9), "decoder_input_ids": _ids(1, 3)}
    with pytest.raises(ModelError, match="source_len: given 5 beside inputs, whose source_len is 9"):
        cost(_t5(), inputs=inputs, source_len=5)
    assert cost(_t5(), inputs=inputs, source_len=9, batch=1, query_len=3).options.source_len == 9


def test_the_head_is_named_by_the_positions_it_ran_on() -> None:
    inputs = {"input_ids": _ids(2, 6), "logits_to_keep": 1}
    record = cost(_llama(), inputs=inputs)
    assert record.options.head == "last"
    assert record.macs == cost(_llama(), sequence_length=6, batch=2, head="last").macs
    assert cost(_llama(), inputs=inputs, head="last").macs == record.macs
    with pytest.raises(ModelError, match="head: given 'all', but it ran on 2 of 12 positions"):
        cost(_llama(), inputs=inputs, head="all")
    with pytest.raises(ModelError, match="head: given None, but it ran on 4 of 12 positions"):
        cost(_llama(), inputs={"input_ids": _ids(2, 6), "logits_to_keep": 2})


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="inputs: past_key_values is a generator, which cannot be copied"):
        copied({"past_key_values": (number for number in range(3))})
