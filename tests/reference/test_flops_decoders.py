"""Products predicted from a decoder's config alone are exactly what PyTorch's FLOP counter then sees it run."""

import pytest
import torch
from counting import counted, predicted
from peft import LoraConfig, get_peft_model
from tiny_models import DECODERS, LLAMA, MISTRAL, OPT, PHI, QWEN2, live, read
from torch.utils.flop_counter import FlopCounterMode

from rankbits.accounting.architectures.read import Head, find_config
from rankbits.accounting.macs import products
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.records import CountOptions

# PEFT reads a property of transformers that goes by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TINY = {name: DECODERS[name] for name in ("llama", "qwen2", "gemma", "gpt2")} | {
    "mistral": MISTRAL | {"head_dim": 10, "sliding_window": None},
    "phi": PHI | {"num_key_value_heads": 3},
    "opt": OPT | {"word_embed_proj_dim": 16},
}
SLIDING = {
    "mistral": MISTRAL | {"sliding_window": 4},
    "qwen2": QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}
TOP = Head.LANGUAGE_MODEL
HEADS = {"out": Head.NONE, "last": Head.LANGUAGE_MODEL, "all": Head.LANGUAGE_MODEL}


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.arange(1, batch * length + 1).view(batch, length) % 90 + 1


def _asked(head: str) -> dict[str, int]:
    """What a model with a language-model head must be told to score as many positions as `head` says."""
    return {"out": {}, "last": {"logits_to_keep": 1}, "all": {"logits_to_keep": 0}}[head]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("values", TINY.values(), ids=TINY)
def test_prefill(values, batch, head):
    expected = predicted(values, top=HEADS[head], query_len=7, key_len=7, batch=batch, head=head)
    model = live(values, HEADS[head])
    assert counted(lambda: model(input_ids=_tokens(batch, 7), use_cache=False, **_asked(head))) == expected


def _cached(model: torch.nn.Module, batch: int, length: int):
    """The cache that `length` tokens leave behind; filling it is not counted."""
    with torch.no_grad():
        return model(input_ids=_tokens(batch, length), use_cache=True).past_key_values


@pytest.mark.parametrize(("new", "head"), [(1, "last"), (3, "all"), (3, "last"), (1, "out")])
@pytest.mark.parametrize("values", TINY.values(), ids=TINY)
def test_a_step_with_a_cache(values, new, head):
    expected = predicted(values, top=HEADS[head], query_len=new, key_len=9 + new, batch=2, head=head)
    model = live(values, HEADS[head])
    cache = _cached(model, 2, 9)
    assert counted(lambda: model(input_ids=_tokens(2, new), past_key_values=cache, **_asked(head))) == expected


@pytest.mark.parametrize(("cached", "new"), [(0, 10), (0, 3), (1, 1), (2, 1), (3, 1), (4, 1), (9, 1), (9, 3), (2, 3)])
@pytest.mark.parametrize("values", SLIDING.values(), ids=SLIDING)
def test_a_window_shortens_the_cache_and_no_prefill(values, cached, new):
    """A window of 4 keeps 3 tokens in the cache; what comes at once is computed in full and then masked."""
    expected = predicted(values, query_len=new, key_len=cached + new, head="last")
    model = live(values, TOP)
    cache = _cached(model, 1, cached) if cached else None
    assert counted(lambda: model(input_ids=_tokens(1, new), past_key_values=cache, logits_to_keep=1)) == expected


@pytest.mark.parametrize("values", TINY.values(), ids=TINY)
def test_a_classification_head_scores_all_tokens(values):
    expected = predicted(values, top=Head.CLASSIFICATION, query_len=7, key_len=7, batch=2)
    model = live(values, Head.CLASSIFICATION)
    assert counted(lambda: model(input_ids=_tokens(2, 7), use_cache=False)) == expected
    assert expected == predicted(values, top=Head.NONE, query_len=7, key_len=7, batch=2) + 2 * 7 * 3 * (
        values.get("word_embed_proj_dim", 24)
    )


def test_the_counter_does_not_see_fused_attention_on_a_cpu():
    """Why all other tests ask for eager attention: its products would be missing, and no error would say so."""
    listed = products(read(LLAMA, TOP), CountOptions(query_len=7, key_len=7, head="all"))
    model = live(LLAMA, TOP, attention="sdpa")
    seen = counted(lambda: model(input_ids=_tokens(1, 7), use_cache=False))
    assert seen == sum(product.macs for product in listed if product.kind == "weight")


def test_gradients_would_be_counted_too():
    model = live(LLAMA, TOP)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=_tokens(1, 7), use_cache=False, labels=_tokens(1, 7)).loss.backward()
    assert counter.get_total_flops() // 2 > 2 * predicted(LLAMA, query_len=7, key_len=7, head="all")


def _on_meta(values: dict, tokens: int) -> int:
    """Full size without weights: the mask and the positions are given, since making them would read values."""
    model = live(values, TOP, device="meta")
    with torch.device("meta"):
        given = {
            "input_ids": torch.zeros(1, tokens, dtype=torch.long),
            "attention_mask": torch.zeros(1, 1, tokens, tokens),
            "position_ids": torch.zeros(1, tokens, dtype=torch.long),
        }
    return counted(lambda: model(**given, use_cache=False))


@pytest.mark.parametrize(
    ("name", "macs"), [("qwen2-7b", 99_706_994_688), ("phi-2", 26_927_431_680), ("llama3-8b", 95_294_586_880)]
)
def test_one_layer_and_head_of_published_models(name, macs):
    values = find_config(name) | {"num_hidden_layers": 1}
    assert predicted(values, query_len=128, key_len=128, head="all") == macs
    assert _on_meta(values, 128) == macs


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2-7b", "phi-2", "llama3-8b", "llama2-70b", "gpt3-175b"])
def test_published_models_whole(name):
    values = find_config(name)
    expected = predicted(values, query_len=128, key_len=128, head="all")
    assert _on_meta(values, 128) == expected


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")], ids=["all-linear", "q and v"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi", "opt"])
def test_lora_beside_the_weights_and_merged(name, targets):
    _check_lora(TINY[name], targets)


@pytest.mark.parametrize("targets", ["all-linear", ("c_attn",), None], ids=["all-linear", "fused", "usual"])
def test_lora_on_the_fused_layer_of_gpt2(targets):
    _check_lora(TINY["gpt2"], targets, fan_in_fan_out=True)


def test_lora_on_the_usual_targets_of_phi():
    _check_lora(TINY["phi"], None)


def _check_lora(values: dict, targets: str | tuple[str, ...] | None, **settings) -> None:
    lengths = {"query_len": 7, "key_len": 7, "batch": 2, "head": "all"}
    spec = MethodSpec(Method.LORA, rank=4, targets=targets)
    base = predicted(values, **lengths)
    beside = predicted(values, spec, **lengths, adapters="unmerged")
    assert beside > base
    assert predicted(values, spec, **lengths) == base
    given = list(targets) if isinstance(targets, tuple) else targets
    model = get_peft_model(live(values, TOP), LoraConfig(r=4, target_modules=given, **settings)).eval()
    assert counted(lambda: model(input_ids=_tokens(2, 7), use_cache=False)) == beside
    merged = model.merge_and_unload()
    assert counted(lambda: merged(input_ids=_tokens(2, 7), use_cache=False)) == base


def test_lora_of_a_step_with_a_cache_and_of_a_classifier():
    spec = MethodSpec(Method.LORA, rank=4, targets="all-linear")
    expected = predicted(LLAMA, spec, query_len=1, key_len=10, head="last", adapters="unmerged")
    model = get_peft_model(live(LLAMA, TOP), LoraConfig(r=4, target_modules="all-linear")).eval()
    cache = _cached(model, 1, 9)
    assert counted(lambda: model(input_ids=_tokens(1, 1), past_key_values=cache, logits_to_keep=1)) == expected
    lengths = {"query_len": 7, "key_len": 7, "adapters": "unmerged"}
    expected = predicted(LLAMA, spec, top=Head.CLASSIFICATION, **lengths)
    given = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    classifier = get_peft_model(live(LLAMA, Head.CLASSIFICATION), given).eval()
    assert counted(lambda: classifier(input_ids=_tokens(1, 7), use_cache=False)) == expected
