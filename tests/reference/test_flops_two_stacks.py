"""Products predicted from the config of T5, mT5 or BART alone are exactly what PyTorch's FLOP counter sees it run."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutput

from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.macs import products
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.records import CountOptions

# PEFT reads a property of transformers that goes by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

T5 = {
    "model_type": "t5",
    "vocab_size": 96,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
}
BART = {
    "model_type": "bart",
    "vocab_size": 96,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_ffn_dim": 30,
    "decoder_attention_heads": 6,
    "max_position_embeddings": 64,
}
TINY = {"t5": T5, "gated": T5 | {"feed_forward_proj": "gated-gelu"}, "mt5": T5 | {"model_type": "mt5"}, "bart": BART}
BUILDERS = {
    Head.NONE: AutoModel,
    Head.LANGUAGE_MODEL: AutoModelForSeq2SeqLM,
    Head.CLASSIFICATION: AutoModelForSequenceClassification,
}
LABELS = 3
END = 1
"""The id of the token that ends a source, where a classifier reads."""


def _predicted(values: dict, spec: MethodSpec | None = None, *, top: Head = Head.LANGUAGE_MODEL, **options) -> int:
    """MACs from the config dictionary alone."""
    shape = read_shape(values, name="given", head=top, num_labels=LABELS)
    return sum(product.macs for product in products(shape, CountOptions(**options), spec))


def _counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


def _live(values: dict, top: Head = Head.LANGUAGE_MODEL, *, device: str = "cpu") -> torch.nn.Module:
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": END}
    config = AutoConfig.for_model(**values, num_labels=LABELS, **ids)
    with torch.device(device):
        return BUILDERS[top].from_config(config, attn_implementation="eager").eval()


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.arange(batch * length).view(batch, length) % 90 + 5


@pytest.mark.parametrize("top", [Head.NONE, Head.LANGUAGE_MODEL])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("values", TINY.values(), ids=TINY)
def test_a_source_and_a_shorter_target(values, batch, top):
    head = "out" if top is Head.NONE else "all"
    expected = _predicted(values, top=top, query_len=4, key_len=4, source_len=9, batch=batch, head=head)
    model, given = _live(values, top), {"input_ids": _tokens(batch, 9), "decoder_input_ids": _tokens(batch, 4)}
    assert _counted(lambda: model(**given, use_cache=False)) == expected


def test_a_target_longer_than_the_source():
    expected = _predicted(T5, query_len=11, key_len=11, source_len=3, head="all")
    model = _live(T5)
    assert _counted(lambda: model(input_ids=_tokens(1, 3), decoder_input_ids=_tokens(1, 11))) == expected


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("values", TINY.values(), ids=TINY)
def test_a_step_with_cached_keys_of_both_stacks(values, new):
    """The encoder and the keys and values of cross-attention do not run again; what they made is read from a cache."""
    expected = _predicted(values, query_len=new, key_len=5 + new, source_len=9, batch=2, head="all")
    model = _live(values)
    with torch.no_grad():
        first = model(input_ids=_tokens(2, 9), decoder_input_ids=_tokens(2, 5), use_cache=True)
    given = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state),
        "decoder_input_ids": _tokens(2, new),
        "past_key_values": first.past_key_values,
    }
    assert _counted(lambda: model(**given)) == expected
    assert expected < _predicted(values, query_len=new, key_len=new, source_len=9, batch=2, head="all")


@pytest.mark.parametrize("values", TINY.values(), ids=TINY)
def test_a_classification_head_reads_one_row_of_each_sequence(values):
    """The target is the source, shifted; the head runs where the source ends."""
    expected = _predicted(values, top=Head.CLASSIFICATION, query_len=6, key_len=6, source_len=6, batch=2)
    model = _live(values, Head.CLASSIFICATION)
    source = torch.cat([_tokens(2, 5), torch.full((2, 1), END)], dim=1)
    assert _counted(lambda: model(input_ids=source, use_cache=False)) == expected
    bare = _predicted(values, top=Head.NONE, query_len=6, key_len=6, source_len=6, batch=2)
    assert expected - bare == 2 * 24 * (24 + LABELS)


@pytest.mark.parametrize("name", ["t5-base", "bart-base", "mt0-large"])
def test_published_models_whole(name):
    """On the meta device, where a mask has to be given: making one would read values."""
    values = find_config(name)
    expected = _predicted(values, query_len=32, key_len=32, source_len=128, head="all")
    model = _live(values, device="meta")
    with torch.device("meta"):
        given = {
            "input_ids": torch.zeros(1, 128, dtype=torch.long),
            "decoder_input_ids": torch.zeros(1, 32, dtype=torch.long),
            "decoder_attention_mask": torch.zeros(1, 1, 32, 32),
            # One row of it serves the encoder's queries and the decoder's alike.
            "attention_mask": torch.zeros(1, 1, 1, 128),
        }
    assert _counted(lambda: model(**given, use_cache=False)) == expected


@pytest.mark.parametrize("targets", ["all-linear", None], ids=["all-linear", "usual"])
@pytest.mark.parametrize("values", [T5, TINY["gated"], BART], ids=["t5", "gated", "bart"])
def test_lora_beside_the_weights_and_merged(values, targets):
    lengths = {"query_len": 4, "key_len": 4, "source_len": 9, "batch": 2, "head": "all"}
    spec = MethodSpec(Method.LORA, rank=4, targets=targets)
    base = _predicted(values, **lengths)
    beside = _predicted(values, spec, **lengths, adapters="unmerged")
    assert beside > base
    assert _predicted(values, spec, **lengths) == base
    given = {"input_ids": _tokens(2, 9), "decoder_input_ids": _tokens(2, 4)}
    model = get_peft_model(_live(values), LoraConfig(r=4, target_modules=targets)).eval()
    assert _counted(lambda: model(**given, use_cache=False)) == beside
    merged = model.merge_and_unload()
    assert _counted(lambda: merged(**given, use_cache=False)) == base


@pytest.mark.parametrize("values", [T5, BART], ids=["t5", "bart"])
def test_lora_of_a_step_runs_where_its_layers_run(values):
    """Adapters of cross-attention's keys and values rest with their layers once these are cached."""
    spec = MethodSpec(Method.LORA, rank=4, targets="all-linear")
    expected = _predicted(values, spec, query_len=1, key_len=6, source_len=9, batch=2, head="all", adapters="unmerged")
    model = get_peft_model(_live(values), LoraConfig(r=4, target_modules="all-linear")).eval()
    with torch.no_grad():
        first = model(input_ids=_tokens(2, 9), decoder_input_ids=_tokens(2, 5), use_cache=True)
    given = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state),
        "decoder_input_ids": _tokens(2, 1),
        "past_key_values": first.past_key_values,
    }
    assert _counted(lambda: model(**given)) == expected


@pytest.mark.parametrize("values", [T5, BART], ids=["t5", "bart"])
def test_all_linear_reaches_the_classification_head_of_two_stacks(values):
    spec = MethodSpec(Method.LORA, rank=4, targets="all-linear")
    lengths = {"query_len": 6, "key_len": 6, "source_len": 6, "adapters": "unmerged"}
    expected = _predicted(values, spec, top=Head.CLASSIFICATION, **lengths)
    given = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=[])
    model = get_peft_model(_live(values, Head.CLASSIFICATION), given).eval()
    source = torch.cat([_tokens(1, 5), torch.full((1, 1), END)], dim=1)
    assert _counted(lambda: model(input_ids=source, use_cache=False)) == expected
