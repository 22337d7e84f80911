"""Quantized attention: both operands of both products lie on their grids, and everything else is the model's own."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5Model,
)

from rankbits import BayesianLoraConfig, GateSchedule, harden, summary
from rankbits.errors import MergeError, RankbitsWarning
from rankbits.tuners.bayesian_lora import GatePhase, adapted_layers
from rankbits.tuners.bayesian_lora.attention import NAME
from rankbits.tuners.bayesian_lora.config import Operand, Site

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 32,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}
TWO_STACKS: dict[str, Any] = {"d_model": 32, "vocab_size": 60, "decoder_start_token_id": 0, "pad_token_id": 0}


def _bart(**settings: Any) -> nn.Module:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    blocks = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return BartModel._from_config(BartConfig(**TWO_STACKS, **heads, **blocks, dropout=0.0), **settings)


def _t5(**settings: Any) -> nn.Module:
    config = T5Config(**TWO_STACKS, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0)
    return T5Model._from_config(config, **settings)


def _bert(**settings: Any) -> nn.Module:
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=settings.pop("dropout", 0.0))
    return BertForSequenceClassification._from_config(config, **settings)


def _distilbert(**settings: Any) -> nn.Module:
    config = DistilBertConfig(
        dim=32, hidden_dim=48, n_layers=1, n_heads=4, vocab_size=60, dropout=0.0, attention_dropout=0.0
    )
    return DistilBertModel._from_config(config, **settings)


def _opt(**settings: Any) -> nn.Module:
    config = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=60, word_embed_proj_dim=32,
        max_position_embeddings=32, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM._from_config(config, **settings)


def _llama(**settings: Any) -> nn.Module:
    return LlamaForCausalLM._from_config(LlamaConfig(**GROUPED), **settings)


def _gemma2(**settings: Any) -> nn.Module:
    config = Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=0.1)
    return Gemma2ForCausalLM._from_config(config, **settings)


MODELS = {
    "bert": _bert,
    "distilbert": _distilbert,
    "llama": _llama,
    "gemma2": _gemma2,
    "opt": _opt,
    "bart": _bart,
    "t5": _t5,
}
IMPLEMENTATIONS = [(kind, "eager") for kind in MODELS] + [(kind, "sdpa") for kind in MODELS if kind != "gemma2"]
"""Scores that are capped have no fused attention."""
PROJECTIONS = ["query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "q", "k", "v"]


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two sequences, one of them padded, of different lengths in two stacks."""
    ids = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def _output(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**(inputs or _inputs(model)))[0]


def _attach(model: nn.Module, **settings: Any) -> PeftModel:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    chosen: dict[str, Any] = {
        "r": 2,
        "target_modules": [name for name in PROJECTIONS if name in names],
        "quantizers": ["weight"],
        "calibration_passes": 1,
        "quantize_attention": True,
    }
    return get_peft_model(model, BayesianLoraConfig(**(chosen | settings)))


def _layers(model: nn.Module) -> dict[str, Any]:
    return dict(adapted_layers(model))


def _by_operand(model: nn.Module, operand: Operand) -> list[Any]:
    return [layer for layer in _layers(model).values() if layer.operands["default"] is operand]


def _set_widths(model: nn.Module, site: Site, open_gates: int) -> None:
    for layer in _layers(model).values():
        found = layer.gate_of("default", site)
        if found is not None:
            gates, row = found
            with torch.no_grad():
                gates.bit_logits[row] = torch.where(torch.arange(4) < open_gates, 6.0, -6.0)


def _calibrated(model: PeftModel, **inputs: Tensor) -> PeftModel:
    model.train()
    for _ in range(2):
        _output(model, **inputs)
    return model.eval()


def test_queries_keys_and_values_have_a_quantizer_and_values_one_of_probabilities() -> None:
    model = _attach(_llama())
    for operand, sites in {
        Operand.QUERIES: [Site.WEIGHT, Site.OUTPUT],
        Operand.KEYS: [Site.WEIGHT, Site.OUTPUT],
        Operand.VALUES: [Site.WEIGHT, Site.OUTPUT, Site.PROBABILITIES],
    }.items():
        layers = _by_operand(model, operand)
        assert len(layers) == 2
        for layer in layers:
            assert layer.sites_of("default") == layer.rows_of("default") == sites
            assert len(layer.gates_of("default").bit_logits) == len(sites)
            assert len(layer.macs_per_row("default")) == len(sites)


def test_other_layers_get_nothing() -> None:
    model = _attach(_llama(), target_modules="all-linear")
    others = [layer for name, layer in _layers(model).items() if "self_attn" not in name or "o_proj" in name]
    assert len(others) == 8
    assert all(layer.sites_of("default") == [Site.WEIGHT] for layer in others)


def test_a_block_that_is_adapted_in_part_is_left_alone() -> None:
    model = _attach(_llama(), target_modules=r".*layers\.0\.self_attn\.[qkv]_proj|.*layers\.1\.self_attn\.v_proj")
    assert [layer.operands["default"] for layer in _layers(model).values()] == [*Operand, None]
    _output(_calibrated(model))


@pytest.mark.parametrize(("kind", "implementation"), IMPLEMENTATIONS)
def test_while_calibrating_it_is_the_models_own_eager_attention(kind: str, implementation: str) -> None:
    torch.manual_seed(0)
    reference = MODELS[kind](attn_implementation="eager")
    model = MODELS[kind](attn_implementation=implementation)
    model.load_state_dict(reference.state_dict())
    adapted = _attach(model, quantizers=[], calibration_passes=5, learn_rank=False)
    assert adapted.config._attn_implementation == NAME or adapted.config.is_encoder_decoder
    for train in (True, False):
        reference.train(train)
        adapted.train(train)
        if not train:
            with pytest.warns(RankbitsWarning, match="before its range was calibrated"):
                result = _output(adapted)
        else:
            result = _output(adapted)
        assert torch.equal(result, _output(reference))


def test_dropout_draws_what_the_models_own_attention_draws() -> None:
    torch.manual_seed(0)
    model = _bert(dropout=0.5, attn_implementation="eager").train()
    adapted = _attach(copy.deepcopy(model), quantizers=[], calibration_passes=5, learn_rank=False).train()
    for layer in _layers(adapted).values():
        # Gates that are fixed are not drawn.
        layer.set_phase("default", GatePhase(fixed=True), 1)
    results = []
    for each in (model, adapted):
        torch.manual_seed(3)
        results.append(_output(each))
    assert torch.equal(*results)
    torch.manual_seed(4)
    assert not torch.equal(_output(adapted), results[1])


def _attention_by_hand(
    layers: tuple[Any, Any, Any], x: Tensor, mask: Tensor, paper: Any, bits: dict[str, int]
) -> Tensor:
    """Softmax of quantized q k^T, quantized, times quantized v: [batch, tokens, 32], with dense matrices."""
    made = []
    for layer, name in zip(layers, "qkv", strict=True):
        projected = x @ layer.weight.T + layer.bias
        made.append(paper.hard(projected, layer.quantizers_of("default")["output"].range_, bits[name]))
    q, k, v = (tensor.view(*x.shape[:2], 4, 8).transpose(1, 2) for tensor in made)
    scores = q @ k.transpose(2, 3) / 8**0.5
    p = scores.masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(dim=-1)
    p = paper.hard(p, layers[2].quantizers_of("default")["probabilities"].range_, bits["p"], signed=False)
    return (p @ v).transpose(1, 2).reshape(x.shape)


def test_the_context_is_that_of_quantized_operands(paper) -> None:
    torch.manual_seed(0)
    model = _attach(_bert(), quantizers=[], learn_rank=False)
    for layer in _layers(model).values():
        with torch.no_grad():
            layer.weight.mul_(20.0)
    _calibrated(model)
    # 4 bits for queries and keys, 8 for values, 2 for probabilities.
    _set_widths(model, Site.OUTPUT, 1)
    for layer in _by_operand(model, Operand.VALUES):
        gates = layer.gates_of("default")
        with torch.no_grad():
            gates.bit_logits[0, 1] = 6.0
            gates.bit_logits[1] = -6.0
    block = model.get_base_model().bert.encoder.layer[0].attention.self
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, args, out: seen.extend([args[0], out[0]]))
    inputs = _inputs(model)
    _output(model, **inputs)
    handle.remove()
    expected = _attention_by_hand(
        (block.query, block.key, block.value),
        seen[0],
        inputs["attention_mask"],
        paper,
        {"q": 4, "k": 4, "v": 8, "p": 2},
    )
    torch.testing.assert_close(seen[1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_what_the_products_read_lies_on_the_grids(kind: str, monkeypatch) -> None:
    torch.manual_seed(0)
    model = _calibrated(_attach(MODELS[kind]()))
    _set_widths(model, Site.OUTPUT, 1)
    _set_widths(model, Site.PROBABILITIES, 1)
    read: list[tuple[Tensor, Tensor]] = []
    product = torch.matmul

    def watched(left: Tensor, right: Tensor) -> Tensor:
        if left.dim() == 4 and right.numel():
            read.append((left.detach(), right.detach()))
        return product(left, right)

    monkeypatch.setattr(torch, "matmul", watched)
    _output(model)
    blocks = len(_by_operand(model, Operand.VALUES))
    assert len(read) == 2 * blocks
    for (left, right), signed in zip(read, [True, False] * blocks, strict=True):
        assert len(left.unique()) <= (15 if signed else 16)
        assert bool((left < 0).any()) == signed
        assert len(right.unique()) <= 15


def test_all_learns_from_the_loss() -> None:
    torch.manual_seed(0)
    model = _attach(_llama())
    model.train()
    _output(model)
    for layer in _layers(model).values():
        layer.finish_calibration("default")
    with torch.no_grad():
        for layer in _layers(model).values():
            layer.gates_of("default").bit_logits.fill_(0.3)
    for _ in range(20):
        # A sampled gate is often exactly 0 or 1, and has no gradient then.
        _output(model).square().sum().backward()
    for operand in Operand:
        for layer in _by_operand(model, operand):
            assert (layer.gates_of("default").bit_logits.grad[1:].abs().sum(dim=1) > 0).all()
            for site in ("output", "probabilities"):
                quantizer = layer.quantizers_of("default").get(site)
                assert quantizer is None or float(quantizer.log_range.grad.abs()) > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_gradient(use_reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = _attach(_llama())
        model.train()
        if checkpointed:
            model.enable_input_require_grads()
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
        for step in range(3):
            torch.manual_seed(step)
            model.zero_grad()
            _output(model).square().mean().backward()
        for layer in _layers(model).values():
            assert all(int(q.passes) == 1 for s, q in layer.quantizers_of("default").items() if s != "weight")
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any("probabilities" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_trains_under_autocast(kind: str) -> None:
    torch.manual_seed(0)
    model = _attach(MODELS[kind]())
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            result = _output(model)
    result.float().square().mean().backward()
    for layer in _by_operand(model, Operand.VALUES):
        for site in ("output", "probabilities"):
            assert layer.quantizers_of("default")[site].log_range.dtype == torch.float32
            assert torch.isfinite(layer.quantizers_of("default")[site].log_range.grad).all()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "implementation"), IMPLEMENTATIONS)
def test_without_adapters_the_model_computes_what_it_computed_before(kind: str, implementation: str) -> None:
    torch.manual_seed(0)
    base = MODELS[kind](attn_implementation=implementation).eval()
    for name, parameter in base.named_parameters():
        if name.rpartition(".")[0].rpartition(".")[2] in PROJECTIONS:
            parameter.mul_(10.0)
    before = _output(base)
    model = _calibrated(_attach(base))
    _set_widths(model, Site.OUTPUT, 0)
    assert not torch.allclose(_output(model), before, rtol=0.01)
    with model.disable_adapter():
        assert torch.equal(_output(model), before)
    for layer in _layers(model).values():
        layer.enable_adapters(False)
    torch.testing.assert_close(_output(model), before, rtol=1e-4, atol=1e-6)
    for layer in _layers(model).values():
        layer.enable_adapters(True)
    bare = model.unload()
    assert bare.config._attn_implementation == implementation
    assert torch.equal(_output(bare), before)


def test_adapters_come_and_go() -> None:
    torch.manual_seed(0)
    base = _bert().eval()
    before = _output(base)
    model = _attach(base)
    assert NAME not in base.config.to_dict().values()
    settings: dict[str, Any] = {"r": 2, "target_modules": ["query"], "learn_bits": False}
    model.add_adapter("plain", BayesianLoraConfig(**settings))
    model.add_adapter("again", model.peft_config["default"])
    _calibrated(model)
    _set_widths(model, Site.OUTPUT, 0)
    model.set_adapter("plain")
    torch.testing.assert_close(_output(model), before, rtol=1e-4, atol=1e-6)
    model.delete_adapter("default")
    assert model.config._attn_implementation == NAME
    model.delete_adapter("again")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(_output(model), before)


def test_a_saved_and_a_hardened_adapter_compute_the_same(tmp_path) -> None:
    torch.manual_seed(0)
    base = _llama()
    model = _calibrated(_attach(copy.deepcopy(base), quantizers=["weight", "input"]))
    GateSchedule(model, 100).step()
    _set_widths(model, Site.OUTPUT, 2)
    _set_widths(model, Site.PROBABILITIES, 1)
    expected = _output(model)
    model.save_pretrained(tmp_path / "learning")
    assert torch.equal(_output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "learning").eval()), expected)
    harden(model)
    torch.testing.assert_close(_output(model), expected, rtol=1e-4, atol=1e-6)
    widths = {entry.name.rpartition(".")[2]: entry.bits for entry in summary(model)}
    assert widths["v_proj"] == {"weight": 32, "output": 8, "input": 32, "probabilities": 4}
    assert widths["q_proj"] == {"weight": 32, "output": 8, "input": 32}
    assert "probabilities" in str(summary(model))
    model.save_pretrained(tmp_path / "hard")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "hard").eval()
    assert again.config._attn_implementation == NAME
    assert torch.equal(_output(again), _output(model))
    assert torch.equal(_output(copy.deepcopy(again)), _output(model))
    assert torch.equal(_output(pickle.loads(pickle.dumps(again))), _output(model))


def test_merged_weights_keep_the_quantizers_of_attention() -> None:
    torch.manual_seed(0)
    model = _calibrated(_attach(_llama(), placement="merged", quantizers=None, init_weights=False))
    GateSchedule(model, 100).step()
    _set_widths(model, Site.OUTPUT, 1)
    _set_widths(model, Site.PROBABILITIES, 1)
    expected = _output(model)
    model.merge_adapter()
    assert torch.equal(_output(model), expected)
    model.unmerge_adapter()
    with pytest.warns(RankbitsWarning, match=r"\['input', 'output', 'probabilities'\] are floats again"):
        bare = model.merge_and_unload()
    assert bare.config._attn_implementation == "sdpa"


def test_adapters_beside_the_weight_cannot_be_merged() -> None:
    model = _calibrated(_attach(_bert(), quantizers=["weight"]))
    with pytest.raises(MergeError, match="'output'"):
        model.merge_adapter()
    assert model.config._attn_implementation == NAME


def test_a_cache_changes_nothing() -> None:
    torch.manual_seed(0)
    model = _calibrated(_attach(_llama()))
    _set_widths(model, Site.OUTPUT, 2)
    ids = torch.randint(1, 60, (1, 6))
    whole = model(input_ids=ids).logits[:, -1]
    kept = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    step = model(input_ids=ids[:, 5:], past_key_values=kept).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


def test_text_is_generated() -> None:
    torch.manual_seed(0)
    model = _calibrated(_attach(_llama()))
    _set_widths(model, Site.OUTPUT, 2)
    inputs = {name: tensor.flip(1) for name, tensor in _inputs(model).items()}
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    text = model.generate(**inputs, **kwargs)
    assert text.shape == (2, 11)
    assert torch.equal(text, model.generate(**inputs, **kwargs, use_cache=False))


def test_the_attentions_that_are_shown_are_quantized() -> None:
    model = _calibrated(_attach(_llama()))
    _set_widths(model, Site.PROBABILITIES, 0)
    shown = model(**_inputs(model), output_attentions=True).attentions
    assert len(shown) == 2
    assert all(len(probabilities.unique()) <= 4 for probabilities in shown)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@torch.no_grad()
def test_a_hardened_model_is_one_graph() -> None:
    torch.manual_seed(0)
    model = _calibrated(_attach(_llama()))
    GateSchedule(model, 10).step()
    harden(model)
    expected = _output(model)
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(_output(compiled, **_inputs(model)), expected, rtol=1e-5, atol=1e-6)


class _Scaled(nn.Module):
    """An attention whose own function does more than multiply probabilities and values."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BertConfig()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
    return 2 * (weights @ value).transpose(1, 2), weights


def test_models_that_cannot_be_quantized_are_refused_before_anything_changes() -> None:
    config = DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0)
    deberta = DebertaV2ForSequenceClassification(config)
    settings: dict[str, Any] = {"quantize_attention": True, "r": 2}
    for targets in ("all-linear", ["query_proj", "key_proj", "value_proj"]):
        with pytest.raises(ValueError, match=r"\(DisentangledSelfAttention\) of DebertaV2For.* attention interface"):
            get_peft_model(deberta, BayesianLoraConfig(target_modules=targets, **settings))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    with pytest.raises(ValueError, match="no attention of GPT2LMHeadModel has its queries, keys and values"):
        get_peft_model(gpt2, BayesianLoraConfig(target_modules=["c_attn"], **settings))
    llama = _llama()
    with pytest.raises(ValueError, match="no attention of LlamaForCausalLM has its queries, keys and values"):
        get_peft_model(llama, BayesianLoraConfig(**settings))
    with pytest.raises(ValueError, match="no attention of LlamaForCausalLM"):
        get_peft_model(llama, BayesianLoraConfig(target_modules="all-linear", exclude_modules=["q_proj"], **settings))
    with pytest.raises(
        ValueError, match=r"'0' \(_Scaled\) of Sequential: .* not seen to be a product of probabilities"
    ):
        get_peft_model(nn.Sequential(_Scaled()), BayesianLoraConfig(target_modules="all-linear", **settings))
    for model in (deberta, gpt2, llama):
        assert not list(adapted_layers(model))
        assert model.config._attn_implementation != NAME


def test_configurations_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="`quantize_attention`=True needs learn_bits=True"):
        BayesianLoraConfig(quantize_attention=True, learn_bits=False)
    with pytest.raises(ValueError, match=r"`quantizers` has unknown names \['probabilities'\]"):
        BayesianLoraConfig(quantizers=["probabilities"])
