"""Products predicted from the config of T5, mT5 or BART alone are exactly what PyTorch's FLOP counter sees it run."""

import pytest
import torch
from counting import counted, predicted
from peft import LoraConfig, get_peft_model
from tiny_models import BART, END, LABELS, T5, TWO_STACKS, live
from transformers.modeling_outputs import BaseModelOutput

from rankbits.accounting.architectures.read import Head, find_config
from rankbits.accounting.spec import Method, MethodSpec

# PEFT reads a property of transformers that goes by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TINY = {name: TWO_STACKS[name] for name in ("t5", "t5 gated", "mt5", "bart")}
TOP = Head.LANGUAGE_MODEL


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.arange(batch * length).view(batch, length) % 90 + 5


@pytest.mark.parametrize("top", [Head.NONE, Head.LANGUAGE_MODEL])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("values", TINY.values(), ids=TINY)
def test_a_source_and_a_shorter_target(values, batch, top):
    head = "out" if top is Head.NONE else "all"
    expected = predicted(values, top=top, query_len=4, key_len=4, source_len=9, batch=batch, head=head)
    model, given = live(values, top), {"input_ids": _tokens(batch, 9), "decoder_input_ids": _tokens(batch, 4)}
    assert counted(lambda: model(**given, use_cache=False)) == expected


def test_a_target_longer_than_the_source():
    expected = predicted(T5, query_len=11, key_len=11, source_len=3, head="all")
    model = live(T5, TOP)
    assert counted(lambda: model(input_ids=_tokens(1, 3), decoder_input_ids=_tokens(1, 11))) == expected


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("values", TINY.values(), ids=TINY)
def test_a_step_with_cached_keys_of_both_stacks(values, new):
    """The encoder and the keys and values of cross-attention do not run again; what they made is read from a cache."""
    expected = predicted(values, query_len=new, key_len=5 + new, source_len=9, batch=2, head="all")
    model = live(values, TOP)
    with torch.no_grad():
        first = model(input_ids=_tokens(2, 9), decoder_input_ids=_tokens(2, 5), use_cache=True)
    given = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state),
        "decoder_input_ids": _tokens(2, new),
        "past_key_values": first.past_key_values,
    }
    assert counted(lambda: model(**given)) == expected
    assert expected < predicted(values, query_len=new, key_len=new, source_len=9, batch=2, head="all")


@pytest.mark.parametrize("values", TINY.values(), ids=TINY)
def test_a_classification_head_reads_one_row_of_each_sequence(values):
    """The target is the source, shifted; the head runs where the source ends."""
    expected = predicted(values, top=Head.CLASSIFICATION, query_len=6, key_len=6, source_len=6, batch=2)
    model = live(values, Head.CLASSIFICATION)
    source = torch.cat([_tokens(2, 5), torch.full((2, 1), END)], dim=1)
    assert counted(lambda: model(input_ids=source, use_cache=False)) == expected
    bare = predicted(values, top=Head.NONE, query_len=6, key_len=6, source_len=6, batch=2)
    assert expected - bare == 2 * 24 * (24 + LABELS)


@pytest.mark.parametrize("name", ["t5-base", "bart-base", "mt0-large"])
def test_published_models_whole(name):
    """On the meta device, where a mask has to be given: making one would read values."""
    values = find_config(name)
    expected = predicted(values, query_len=32, key_len=32, source_len=128, head="all")
    model = live(values, TOP, device="meta")
    with torch.device("meta"):
        given = {
            "input_ids": torch.zeros(1, 128, dtype=torch.long),
            "decoder_input_ids": torch.zeros(1, 32, dtype=torch.long),
            "decoder_attention_mask": torch.zeros(1, 1, 32, 32),
            # One row of it serves the encoder's queries and the decoder's alike.
            "attention_mask": torch.zeros(1, 1, 1, 128),
        }
    assert counted(lambda: model(**given, use_cache=False)) == expected


@pytest.mark.parametrize("targets", ["all-linear", None], ids=["all-linear", "usual"])
@pytest.mark.parametrize("values", [T5, TINY["t5 gated"], BART], ids=["t5", "gated", "bart"])
def test_lora_beside_the_weights_and_merged(values, targets):
    lengths = {"query_len": 4, "key_len": 4, "source_len": 9, "batch": 2, "head": "all"}
    spec = MethodSpec(Method.LORA, rank=4, targets=targets)
    base = predicted(values, **lengths)
    beside = predicted(values, spec, **lengths, adapters="unmerged")
    assert beside > base
    assert predicted(values, spec, **lengths) == base
    given = {"input_ids": _tokens(2, 9), "decoder_input_ids": _tokens(2, 4)}
    model = get_peft_model(live(values, TOP), LoraConfig(r=4, target_modules=targets)).eval()
    assert counted(lambda: model(**given, use_cache=False)) == beside
    merged = model.merge_and_unload()
    assert counted(lambda: merged(**given, use_cache=False)) == base


@pytest.mark.parametrize("values", [T5, BART], ids=["t5", "bart"])
def test_lora_of_a_step_runs_where_its_layers_run(values):
    """Adapters of cross-attention's keys and values rest with their layers once these are cached."""
    spec = MethodSpec(Method.LORA, rank=4, targets="all-linear")
    expected = predicted(values, spec, query_len=1, key_len=6, source_len=9, batch=2, head="all", adapters="unmerged")
    model = get_peft_model(live(values, TOP), LoraConfig(r=4, target_modules="all-linear")).eval()
    with torch.no_grad():
        first = model(input_ids=_tokens(2, 9), decoder_input_ids=_tokens(2, 5), use_cache=True)
    given = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state),
        "decoder_input_ids": _tokens(2, 1),
        "past_key_values": first.past_key_values,
    }
    assert counted(lambda: model(**given)) == expected


@pytest.mark.parametrize("values", [T5, BART], ids=["t5", "bart"])
def test_all_linear_reaches_the_classification_head_of_two_stacks(values):
    spec = MethodSpec(Method.LORA, rank=4, targets="all-linear")
    lengths = {"query_len": 6, "key_len": 6, "source_len": 6, "adapters": "unmerged"}
    expected = predicted(values, spec, top=Head.CLASSIFICATION, **lengths)
    given = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=[])
    model = get_peft_model(live(values, Head.CLASSIFICATION), given).eval()
    source = torch.cat([_tokens(1, 5), torch.full((1, 1), END)], dim=1)
    assert counted(lambda: model(input_ids=source, use_cache=False)) == expected
