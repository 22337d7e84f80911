"""On every architecture the adapters stand where the papers put them, and there are as many as the formulas count."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel, OPTConfig, OPTModel

from rankbits import BottleneckConfig
from rankbits.accounting.measure import cost
from rankbits.accounting.methods import adapted_ends, sublayer_products
from rankbits.accounting.params import count
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.tuners.bottleneck import BottleneckLinear

MODELS = {
    **tiny_models.ENCODERS,
    **tiny_models.DECODERS,
    **tiny_models.TWO_STACKS,
    "opt after": tiny_models.OPT | {"do_layer_norm_before": False},
}
KINDS = {"houlsby": Method.HOULSBY, "pfeiffer": Method.PFEIFFER, "parallel": Method.PARALLEL}


def _live(values: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return tiny_models.live(values)


def _inputs(values: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 30, (2, 7), generator=generator)
    two = values["model_type"] in {"t5", "mt5", "bart"}
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if two else {})


def _adapted(model: nn.Module, **settings: Any) -> nn.Module:
    chosen = {"bottleneck_size": 3, "init_weights": False, "scaling": 0.7}
    return get_peft_model(model, BottleneckConfig(**(chosen | settings))).eval()


def _layers(model: nn.Module) -> dict[str, BottleneckLinear]:
    named = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {name: module for name, module in named.items() if isinstance(module, BottleneckLinear)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_places_and_parameters_are_those_of_the_formulas(name, kind) -> None:
    shape, spec = tiny_models.read(MODELS[name]), MethodSpec(KINDS[kind], width=3)
    model = _adapted(_live(MODELS[name]), kind=kind)
    assert sorted(_layers(model)) == sorted(end.linear.name for end in adapted_ends(shape, spec))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count(shape, spec).trainable


@pytest.mark.parametrize("name", ["bert", "deberta-v3", "llama", "gpt2", "opt", "t5"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_live_model_costs_what_the_formulas_count(name, kind) -> None:
    shape, spec = tiny_models.read(MODELS[name]), MethodSpec(KINDS[kind], width=3)
    model = _adapted(_live(MODELS[name]), kind=kind)
    source = {"source_len": 6} if shape.two_stacks else {}
    found = [p for p in cost(model, sequence_length=6, **source).products if p.adapter is not None]
    expected = sublayer_products(shape, spec, 6, source.get("source_len", 0))
    assert sorted((p.module, p.m, p.k, p.n) for p in found) == sorted((p.module, p.m, p.k, p.n) for p in expected)
    assert {p.right for p in found} == {"D", "U"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_base_model_to_the_bit(name, kind) -> None:
    base = _live(MODELS[name])
    with torch.no_grad():
        expected = base(**_inputs(MODELS[name])).last_hidden_state
        model = _adapted(base, kind=kind, init_weights=True)
        assert torch.equal(model(**_inputs(MODELS[name])).last_hidden_state, expected)


# What a block does around its feed-forward, stated once more: the norm whose output is the feed-forward's input, and
# the norm that the residual sum enters ("" if it leaves the block as it is).
BLOCKS: dict[str, tuple[str, str, str]] = {
    "bert": (r"encoder\.layer\.\d+", "attention.output.LayerNorm", "output.LayerNorm"),
    "roberta": (r"encoder\.layer\.\d+", "attention.output.LayerNorm", "output.LayerNorm"),
    "deberta-v3": (r"encoder\.layer\.\d+", "attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert": (r"transformer\.layer\.\d+", "sa_layer_norm", "output_layer_norm"),
    "llama": (r"layers\.\d+", "post_attention_layernorm", ""),
    "qwen2": (r"layers\.\d+", "post_attention_layernorm", ""),
    "mistral": (r"layers\.\d+", "post_attention_layernorm", ""),
    "gemma": (r"layers\.\d+", "post_attention_layernorm", ""),
    "opt": (r"decoder\.layers\.\d+", "final_layer_norm", ""),
    "opt after": (r"decoder\.layers\.\d+", "self_attn_layer_norm", "final_layer_norm"),
    "gpt2": (r"h\.\d+", "ln_2", ""),
    "t5": (r"(encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2)", "layer_norm", ""),
    "t5 gated": (r"(encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2)", "layer_norm", ""),
    "bart": (r"(encoder|decoder)\.layers\.\d+", "", "final_layer_norm"),
}


def _function(layer: BottleneckLinear) -> Callable[[Tensor], Tensor]:
    """The paper's formula in plain tensors, with the weights of a layer's adapter."""
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    f = torch.relu if layer.kind["default"] != "houlsby" else lambda h: h * torch.sigmoid(h)
    return lambda z: 0.7 * (f(z @ down.weight.T + down.bias) @ up.weight.T + up.bias)


def _patched(module: nn.Module, change: Callable[..., Any]) -> Any:
    """The module with its forward wrapped: `change(original, *args)`."""
    original = module.forward
    return mock.patch.object(module, "forward", lambda *args, **kwargs: change(original, *args, **kwargs))


def _reference(base: nn.Module, name: str, kind: str, layers: dict[str, BottleneckLinear], stack: ExitStack) -> None:
    """Let the blocks of the base model compute what the paper says, by rewriting what enters and leaves them."""
    pattern, entry, behind = BLOCKS[name]
    for block_name, block in base.named_modules():
        if not re.fullmatch(pattern, block_name):
            continue
        ends = [layer for layer in layers if layer.startswith(f"{block_name}.")]
        assert len(ends) == 1
        adapter, seen = _function(layers[ends[0]]), SimpleNamespace(x=None)

        def heard(original: Callable, x: Tensor, seen: SimpleNamespace = seen) -> Tensor:
            seen.x = original(x)
            return seen.x

        def summed(original: Callable, s: Tensor, adapter=adapter, seen=seen) -> Tensor:
            return original(s + adapter(original(s) if kind == "pfeiffer" else seen.x))

        def left(original: Callable, *args: Any, adapter=adapter, seen=seen, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            first = out[0] if isinstance(out, tuple) else out
            read = first if kind == "pfeiffer" else seen.x.reshape(first.shape)
            first = first + adapter(read)
            return (first, *out[1:]) if isinstance(out, tuple) else first

        if not entry:
            entry_name = "encoder_attn_layer_norm" if "decoder" in block_name else "self_attn_layer_norm"
        else:
            entry_name = entry
        stack.enter_context(_patched(block.get_submodule(entry_name), heard))
        place = block.get_submodule(behind) if behind else block
        stack.enter_context(_patched(place, summed if behind else left))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["pfeiffer", "parallel"])
def test_feed_forward_adapters_compute_the_papers_formula(name, kind) -> None:
    base, inputs = _live(MODELS[name]), _inputs(MODELS[name])
    plain = copy.deepcopy(base)
    model = _adapted(base, kind=kind)
    with torch.no_grad(), ExitStack() as stack:
        unchanged = plain(**inputs).last_hidden_state
        _reference(plain, name, kind, _layers(model), stack)
        expected = plain(**inputs).last_hidden_state
        found = model(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unchanged, expected, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_houlsbys_adapters_read_and_change_the_output_of_the_sublayer(name) -> None:
    base, inputs = _live(MODELS[name]), _inputs(MODELS[name])
    plain = copy.deepcopy(base)
    model = _adapted(base, kind="houlsby")
    with torch.no_grad(), ExitStack() as stack:
        for place, layer in _layers(model).items():
            function = _function(layer)

            def changed(original: Callable, x: Tensor, adapter=function) -> Tensor:
                h = original(x)
                return h + adapter(h)

            stack.enter_context(_patched(plain.get_submodule(place), changed))
        torch.testing.assert_close(model(**inputs)[0], plain(**inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["pfeiffer", "parallel"])
def test_phis_feed_forward_stands_beside_its_attention(kind) -> None:
    base, inputs = _live(MODELS["phi"]), _inputs(MODELS["phi"])
    plain = copy.deepcopy(base)
    model = _adapted(base, kind=kind)
    with torch.no_grad(), ExitStack() as stack:
        for index, block in enumerate(plain.layers):
            seen = SimpleNamespace(q=None)
            adapter = _function(_layers(model)[f"layers.{index}.mlp.fc2"])

            def entered(original: Callable, q: Tensor, seen=seen) -> Tensor:
                seen.q = q
                return original(q)

            def added(original: Callable, x: Tensor, seen=seen, adapter=adapter) -> Tensor:
                h = original(x)
                return h + adapter(h + seen.q if kind == "pfeiffer" else x)

            stack.enter_context(_patched(block.input_layernorm, entered))
            stack.enter_context(_patched(block.mlp, added))
        torch.testing.assert_close(model(**inputs)[0], plain(**inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        ("bert", {"kind": "houlsby", "bottleneck_size": 48}, 1_789_056),
        ("bert", {"kind": "houlsby"}, 1_789_056),
        ("bert", {"kind": "pfeiffer", "bottleneck_size": 48}, 894_528),
        ("minilm", {"kind": "houlsby", "bottleneck_size": 24}, 226_080),
        ("llama", {"target_modules": ["down_proj"], "bottleneck_size": 256, "use_biases": False}, 67_108_864),
        (
            "llama",
            {
                "kind": "parallel",
                "target_modules": ["up_proj", "down_proj"],
                "bottleneck_size": 256,
                "use_biases": False,
            },
            247_463_936,
        ),
        ("gpt3", {"bottleneck_size": 1}, 7_078_080),
        ("gpt3", {"bottleneck_size": 8}, 40_109_568),
    ],
)
def test_published_parameter_counts(config, settings, expected) -> None:
    with torch.device("meta"):
        if config == "llama":
            base: nn.Module = LlamaModel(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
        elif config == "gpt3":
            wide = {"hidden_size": 12288, "ffn_dim": 49152, "num_attention_heads": 96, "word_embed_proj_dim": 12288}
            base = OPTModel(OPTConfig(num_hidden_layers=96, **wide))
        else:
            small = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
            base = AutoModel.from_config(AutoConfig.for_model("bert", **(small if config == "minilm" else {})))
        model = get_peft_model(base, BottleneckConfig(**settings))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_one_adapter_of_24_on_1024() -> None:
    base = nn.Sequential(nn.Linear(1024, 1024))
    sizes = []
    for use_biases in (False, True):
        config = BottleneckConfig(target_modules=["0"], bottleneck_size=24, use_biases=use_biases)
        model = get_peft_model(copy.deepcopy(base), config)
        sizes.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert sizes == [49_152, 50_200]


@pytest.mark.parametrize(("kind", "width"), [("houlsby", 4), ("pfeiffer", 4), ("parallel", 32)])
def test_usual_widths_functions_and_factors(kind, width) -> None:
    values = tiny_models.LLAMA | {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = get_peft_model(_live(values), BottleneckConfig(kind=kind))
    layer = next(iter(_layers(model).values()))
    assert layer.bottleneck_down["default"].weight.shape == (width, 64)
    assert layer.bottleneck_up["default"].weight.shape == (64, width)
    assert layer.non_linearity["default"] == ("swish" if kind == "houlsby" else "relu")
    assert layer.scaling["default"] == (4.0 if kind == "parallel" else 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_can_be_chosen_and_layers_left_out(kind) -> None:
    model = _adapted(_live(MODELS["bert"]), kind=kind, layers_to_transform=[1])
    assert {name.split(".")[2] for name in _layers(model)} == {"1"}
    for excluded in (["encoder.layer.0.output.dense"], r"encoder\.layer\.0\.output\.dense"):
        model = _adapted(_live(MODELS["bert"]), kind=kind, exclude_modules=excluded)
        places = {end.linear.name for end in adapted_ends(tiny_models.read(MODELS["bert"]), MethodSpec(KINDS[kind]))}
        assert set(_layers(model)) == places - {"encoder.layer.0.output.dense"}


def test_cross_attention_has_no_adapter() -> None:
    values = MODELS["bert"] | {"is_decoder": True, "add_cross_attention": True}
    names = set(_layers(_adapted(_live(values))))
    assert names
    assert not [name for name in names if "crossattention" in name]


def test_norms_are_trained_only_if_asked_for() -> None:
    plain = _adapted(_live(MODELS["bert"]))
    assert not [name for name, p in plain.named_parameters() if p.requires_grad and "LayerNorm" in name]
    base = _live(MODELS["bert"])
    expected = base(**_inputs(MODELS["bert"])).last_hidden_state
    model = _adapted(base, train_layernorm=True)
    norms = [p for name, p in model.named_parameters() if p.requires_grad and "LayerNorm" in name]
    assert sum(p.numel() for p in norms) == 2 * 2 * (24 + 24)
    with torch.no_grad():
        for p in norms:
            p.mul_(0.5)
    assert not torch.allclose(model(**_inputs(MODELS["bert"])).last_hidden_state, expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(**_inputs(MODELS["bert"])).last_hidden_state, expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_norms_of_every_block_are_found(name) -> None:
    base = _live(MODELS[name])
    expected = {
        n
        for n, m in base.named_modules()
        if "norm" in type(m).__name__.lower() and re.search(r"(layer|layers|h|block)\.\d+\.", n)
    }
    model = _adapted(base, train_layernorm=True)
    saved = {n.partition(".modules_to_save")[0] for n, _ in model.named_parameters() if ".modules_to_save." in n}
    assert {n.removeprefix("base_model.model.") for n in saved} >= expected


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.widen, self.narrow = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.narrow(torch.relu(self.widen(self.norm(x))))


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList([_Block(), _Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.stack:
            x = block(x)
        return x


PATHS = {"output": "narrow", "input": "widen", "norm_before": "norm"}


@pytest.mark.parametrize(("kind", "paths"), [("pfeiffer", PATHS), ("parallel", {"output": "narrow", "input": "widen"})])
def test_an_architecture_that_is_not_known_can_be_described(kind, paths) -> None:
    torch.manual_seed(0)
    base, x = _Unknown(), torch.randn(3, 6)
    plain = copy.deepcopy(base)
    model = _adapted(base, kind=kind, feed_forward=paths)
    assert sorted(_layers(model)) == ["stack.0.narrow", "stack.1.narrow"]
    expected = x
    for index, block in enumerate(plain.stack):
        adapter = _function(_layers(model)[f"stack.{index}.narrow"])
        q = expected + block.attend(expected)
        h = block.narrow(torch.relu(block.widen(block.norm(q))))
        expected = q + h + adapter(h + q if kind == "pfeiffer" else block.norm(q))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            r"no places of kind='houlsby' are known for model_type='custom'; known are bart, .*target_modules=\[...\]",
        ),
        ({"kind": "parallel"}, r"target_modules=\[...\] and feed_forward=\{...\}"),
        ({"kind": "pfeiffer", "target_modules": ["narrow"]}, "no places of kind='pfeiffer'"),
        ({"target_modules": ["narrow"], "train_layernorm": True}, r"say where they are with modules_to_save=\[...\]"),
        (
            {"kind": "pfeiffer", "target_modules": ["attend"], "feed_forward": PATHS},
            "'stack.0.attend' is not the end of a feed-forward, which is 'narrow' here",
        ),
        (
            {"kind": "parallel", "feed_forward": PATHS | {"input": "wide"}},
            "the model has no module 'stack.0.wide', which `feed_forward` names as 'input' of the block 'stack.0.'",
        ),
        (
            {"kind": "parallel", "feed_forward": {"output": "widen", "input": "attend"}},
            "'stack.0.attend' reads 6 values, but 'stack.0.widen' writes 9",
        ),
        (
            {"kind": "pfeiffer", "feed_forward": PATHS, "modules_to_save": ["norm"]},
            r"`modules_to_save` \['norm'\] would replace 'stack.0.norm'",
        ),
    ],
)
def test_places_that_do_not_exist_are_refused(settings, message) -> None:
    model = _Unknown()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, BottleneckConfig(**settings))
    assert not [module for module in model.modules() if module._forward_pre_hooks]
