"""What the live count sees of single operations, names, inputs and mistakes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

from rankbits.accounting.measure import cost
from rankbits.accounting.measure.places import base_name, role_of
from rankbits.errors import ModelError
from rankbits.records import CostRecord, Product

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}


class Runs(nn.Module):
    """A model that runs one function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _count(function: Callable[..., Tensor], *shape: int, **options: Any) -> CostRecord:
    x = torch.randn(shape or (3, 5, 8))
    return cost(Runs(function), inputs={"x": x}, sequence_length=5, **options)


def _sizes(product: Product) -> tuple[int, int, int, int]:
    return product.batch, product.m, product.k, product.n


@pytest.mark.parametrize(
    ("function", "shape", "sizes"),
    [
        (lambda x: x @ x.mT, (5, 8), (1, 5, 8, 5)),
        (lambda x: x @ x.mT, (3, 5, 8), (3, 5, 8, 5)),
        (lambda x: x @ x.mT, (2, 3, 5, 8), (6, 5, 8, 5)),
        (lambda x: x @ x[0].mT, (3, 5, 8), (1, 15, 8, 5)),
        (lambda x: torch.addmm(x[:, :5], x, x.mT), (5, 8), (1, 5, 8, 5)),
        (lambda x: torch.baddbmm(x[..., :5], x, x.mT), (3, 5, 8), (3, 5, 8, 5)),
        (lambda x: torch.addbmm(x[0, :, :5], x, x.mT), (3, 5, 8), (3, 5, 8, 5)),
        (lambda x: x @ x[0], (5, 8), (1, 5, 8, 1)),
        (lambda x: x[0] @ x[1], (5, 8), (1, 1, 8, 1)),
        (lambda x: torch.vdot(x[0], x[1]), (5, 8), (1, 1, 8, 1)),
        (lambda x: torch.addmv(x[:, 0], x, x[0]), (5, 8), (1, 5, 8, 1)),
        (lambda x: torch.einsum("bik,bjk->bij", x, x), (3, 5, 8), (3, 5, 8, 5)),
        (
            lambda x: torch._int_mm(torch.ones_like(x, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)),
            (32, 8),
            (1, 32, 8, 16),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "product",
)
def test_sizes_of_single_operations(
    function: Callable[..., Tensor], shape: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    (product,) = _count(function, *shape).products
    assert _sizes(product) == sizes
    assert product.kind == "act"


def test_integer_operands_are_eight_bits_wide_and_half_precision_sixteen() -> None:
    (product,) = _count(lambda x: torch._int_mm(x.to(torch.int8), torch.ones(8, 16, dtype=torch.int8)), 32, 8).products
    assert (product.bits_left, product.bits_right) == (8, 8)
    (product,) = _count(lambda x: x.bfloat16() @ x.bfloat16().mT, 5, 8).products
    assert (product.bits_left, product.bits_right) == (16, 16)


def test_probabilities_inside_a_fused_kernel_are_held_like_its_values() -> None:
    def attend(x: Tensor) -> Tensor:
        half = x.bfloat16()
        return nn.functional.scaled_dot_product_attention(half, half, half)

    assert {(p.bits_left, p.bits_right) for p in _count(attend, 3, 4, 5, 8).products} == {(16, 16)}


@pytest.mark.parametrize("rows", [1, 5])
def test_fused_attention_is_two_products_with_shared_keys_counted_for_every_query_head(rows: int) -> None:
    def attend(x: Tensor) -> Tensor:
        query, key = x[:, :, :rows], x[:, :2]
        return nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    scores, context = _count(attend, 3, 4, 5, 8).products
    assert (scores.op, *_sizes(scores)) == ("scores", 12, rows, 8, 5)
    assert (context.op, *_sizes(context)) == ("context", 12, rows, 5, 8)
    assert (scores.left, scores.right, context.left, context.right) == ("q", "k", "p", "v")


def test_scores_are_known_by_the_softmax_that_reads_them() -> None:
    def attend(x: Tensor) -> Tensor:
        scores = x @ x.mT / 8**0.5
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        return torch.softmax(scores.masked_fill(~mask, -1e9) + 1.0, -1).masked_fill(~mask, 0.0) @ x

    assert [product.op for product in _count(attend).products] == ["scores", "context"]
    assert [product.op for product in _count(lambda x: (x @ x.mT).relu() @ x).products] == ["act", "act"]


def test_a_product_inside_inference_mode_is_seen() -> None:
    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return nn.functional.linear(x, torch.ones(4, 8))

    assert _count(run).macs == 15 * 8 * 4


@pytest.mark.parametrize("module", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_the_fused_path_of_attention_modules_is_not_taken(module: Any) -> None:
    model = module(16, 4, batch_first=True) if module is nn.MultiheadAttention else module(16, 4, 32, batch_first=True)
    x = torch.randn(3, 5, 16)
    inputs = {"query": x, "key": x, "value": x} if module is nn.MultiheadAttention else {"src": x}
    attention = 15 * 4 * 16 * 16 + 2 * 3 * 5 * 5 * 16
    feed_forward = 0 if module is nn.MultiheadAttention else 15 * 2 * 16 * 32
    assert cost(model, inputs=inputs, sequence_length=5).macs == attention + feed_forward


@torch.library.custom_op("rankbits_tests::square", mutates_args=())
def _square(x: Tensor) -> Tensor:
    return x @ x.mT


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.LSTM(8, 4)), r"'0' \(LSTM\) runs aten"),
        (nn.Sequential(Runs(_square)), r"'0' \(Runs\) runs rankbits_tests.square"),
        (nn.Sequential(Runs(torch.linalg.inv)), "linalg_inv"),
        (nn.Sequential(Runs(lambda x: torch.cdist(x, x))), "_cdist_forward"),
        (nn.Sequential(Runs(lambda x: nn.functional.bilinear(x, x, torch.ones(2, 8, 8)))), "_trilinear"),
        (Runs(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))), "cond"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_counted_is_refused_by_name(model: nn.Module, named: str) -> None:
    name = "x" if isinstance(model, Runs) else "input"
    with pytest.raises(ModelError, match=named):
        cost(model, inputs={name: torch.randn(3, 8, 8)}, sequence_length=5)


def test_compiled_models_are_counted_eagerly() -> None:
    for model in (torch.compile(nn.Sequential(nn.Linear(8, 3)), backend="eager"), nn.Sequential(nn.Linear(8, 3))):
        if not hasattr(model, "_orig_mod"):
            model.compile(backend="eager")
        (product,) = cost(model, inputs={"input": torch.randn(2, 8)}, sequence_length=1).products
        assert (product.module, product.op, product.macs) == ("0", "linear", 48)


def test_a_weight_is_on_the_right_whichever_side_it_is_multiplied_from() -> None:
    layer = nn.Linear(8, 3)
    model = Runs(lambda x: layer.weight @ x.mT)
    model.layer = layer
    (product,) = cost(model, inputs={"x": torch.randn(5, 8)}, sequence_length=5).products
    assert (product.kind, product.left, product.right) == ("weight", "x", "W0")
    assert _sizes(product) == (1, 5, 8, 3)


def test_what_does_not_depend_on_the_input_is_constant_and_left_out_when_cached() -> None:
    class Tabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.layer(self.table.weight)
            return self.layer(x) @ rows.mT

    inputs = {"x": torch.randn(5, 8)}
    found = cost(Tabled(), inputs=inputs, sequence_length=5).products
    assert [(p.left, p.right, p.kind, p.constant) for p in found] == [
        ("rel", "W0", "weight", True),
        ("x", "W0", "weight", False),
        ("x", "x", "act", False),
    ]
    cached = cost(Tabled(), inputs=inputs, sequence_length=5, positions="cached").products
    assert [p.constant for p in cached] == [False, False]


def test_work_besides_products_is_summed_by_module_and_operation() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Flatten(), nn.Softmax(-1))
    record = cost(model, inputs={"input": torch.randn(3, 5, 8)}, sequence_length=5)
    assert {(work.module, work.op): work.elements for work in record.elements} == {
        ("0", "bias"): 60,
        ("1", "relu"): 60,
        ("3", "_softmax"): 60,
    }


def test_adapters_whose_weights_are_no_parameters_are_still_adapters() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), VeraConfig(r=2, target_modules=["0"]))
    record = cost(model, inputs={"input": torch.randn(5, 8)}, sequence_length=5, adapters="unmerged")
    assert [(p.op, p.kind, p.adapter, p.macs) for p in record.products] == [
        ("linear", "weight", None, 320),
        ("adapter", "weight", "default", 80),
        ("adapter", "weight", "default", 80),
    ]
    assert record.reference_macs == 320


def test_only_active_adapters_are_counted_under_their_name() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["0"]))
    model.set_adapter("second")
    inputs = {"input": torch.randn(5, 8)}
    record = cost(model, inputs=inputs, sequence_length=5, adapters="unmerged")
    assert record.macs_by(lambda product: product.adapter or "base") == {"base": 320, "second": 240}
    assert {w.operand: w.elements for w in record.weights} == {"W0": 64, "bias": 8, "A": 24, "B": 24}
    with model.disable_adapter():
        off = cost(model, inputs=inputs, sequence_length=5, adapters="unmerged")
    assert off.macs == 320
    assert {w.adapter for w in off.weights} == {None}


def test_ranks_that_adalora_has_pruned_are_not_counted() -> None:
    config = AdaLoraConfig(init_r=4, target_modules=["0"], total_step=10)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    inputs = {"input": torch.randn(5, 8)}
    ranks = []
    for kept in (0, 3):
        with torch.no_grad():
            model.base_model.model[0].lora_E["default"][:kept] = 1.0
        record = cost(model, inputs=inputs, sequence_length=5, adapters="unmerged")
        ranks.append({p.op: min(p.k, p.n) for p in record.products if p.adapter})
    # Before the first step all singular values are zero, and none has been pruned.
    assert ranks == [{"lora_down": 4, "lora_up": 4}, {"lora_down": 3, "lora_up": 3}]
    # The number of ranks is read in training only.
    assert [w.operand for w in record.weights if w.adapter] == ["A", "B", "E"]


@pytest.mark.parametrize(("kind", "bits"), [("Linear4bit", 4), ("Linear8bitLt", 8)])
@pytest.mark.filterwarnings("ignore")
def test_layers_of_bitsandbytes_are_counted_with_the_width_of_their_weights(kind: str, bits: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    extra = {"has_fp16_weights": False} if bits == 8 else {"quant_type": "nf4", "compress_statistics": True}
    layer = getattr(bitsandbytes.nn, kind)(64, 32, **extra)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    model = nn.Sequential(layer.to("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record = cost(model, inputs={"input": torch.randn(5, 64)}, sequence_length=5)
    assert [(p.macs, p.bits_left, p.bits_right) for p in record.products] == [(5 * 64 * 32, 32, bits)]
    (weight,) = [w for w in record.weights if w.operand == "W0"]
    assert (weight.elements, weight.bits) == (64 * 32, bits)
    # 32 one-byte scales of 64 elements and one four-byte scale and offset of them; or one scale per row.
    assert weight.scales == (10 if bits == 4 else 32)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_is_stored_in_few_bits_is_still_a_head() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(OrderedDict(lm_head=bitsandbytes.nn.Linear4bit(64, 32).to("cpu")))
    inputs = {"input": torch.randn(2, 5, 64)}
    sizes = {"sequence_length": 5, "batch": 2}
    heads = {choice: cost(model, inputs=inputs, head=choice, **sizes).macs for choice in ("out", "last", "all")}
    assert heads == {"out": 0, "last": 2 * 64 * 32, "all": 10 * 64 * 32}


@pytest.mark.filterwarnings("ignore")
def test_weights_of_torchao_are_counted_and_integer_products_seen() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for config, left in (
        (quantization.Int8WeightOnlyConfig(), 32),
        (quantization.Int8DynamicActivationInt8WeightConfig(), 8),
    ):
        model = nn.Sequential(nn.Linear(64, 32))
        quantization.quantize_(model, config)
        (product,) = cost(model, inputs={"input": torch.randn(5, 64)}, sequence_length=5).products
        assert (product.macs, product.bits_left, product.bits_right) == (5 * 64 * 32, left, 8)


def _bert(**sizes: Any) -> BertModel:
    return BertModel(BertConfig(**(SIZES | {"max_position_embeddings": 16} | sizes)))


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=16))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (_bert, {}, "sequence_length: given none"),
        (_bert, {"sequence_length": 0}, "query_len: given 0, expected"),
        (_bert, {"sequence_length": -3}, "query_len: given -3, expected"),
        (_bert, {"sequence_length": 4.5}, "query_len: given 4.5, expected"),
        (_bert, {"sequence_length": 4, "batch": 0}, "batch: given 0, expected"),
        (_bert, {"sequence_length": 17}, "query_len: given 17, expected at most 16"),
        (_bert, {"sequence_length": 4, "query_len": 4}, "sequence_length: given 4 together with"),
        (_bert, {"sequence_length": 4, "source_len": 4}, "source_len: given 4, but BertModel has one stack"),
        (_bert, {"query_len": 1, "key_len": 4}, "key_len: given larger than query_len, but the model keeps no cache"),
        (_llama, {"query_len": 4, "key_len": 2}, "key_len: given 2, expected at least query_len"),
        (_llama, {"query_len": 1, "key_len": 17}, "key_len: given 17, expected at most 16"),
        (_bert, {"sequence_length": 4, "adapters": "both"}, "adapters: given 'both', expected one of merged, unmerged"),
        (_bert, {"sequence_length": 4, "positons": "cached"}, "given positons='cached', expected one of .*positions"),
        (_bert, {"sequence_length": 4, "positions": "some"}, "positions: given 'some', expected"),
        (_bert, {"sequence_length": 4, "causal": "triangular"}, "causal: given 'triangular', but a live pass"),
        (_bert, {"sequence_length": 4, "lengths": [4]}, r"lengths: given \[4\], but a live pass"),
        (_bert, {"sequence_length": 4, "head": "all"}, "head: given 'all', but BertModel has no language-model head"),
        (lambda: _bert().double(), {"sequence_length": 4}, "held in torch.float64, expected at most 32 bits: cast"),
        (_bert, {"sequence_length": 4, "inputs": [1]}, "inputs: given a list, expected a mapping"),
        (lambda: nn.Linear(3, 3), {"sequence_length": 4}, r"Linear takes input: expected .* or inputs="),
        (lambda: {"a": 1}, {"sequence_length": 4}, "model: given a dict, expected a torch.nn.Module"),
    ],
)
def test_bad_input_is_refused_with_what_was_given_and_expected(
    make: Callable[[], Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        cost(make(), **arguments)


def test_positions_behind_the_padding_token_are_not_counted_as_room() -> None:
    model = RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=18, pad_token_id=1))
    assert cost(model, sequence_length=16).options.query_len == 16
    with pytest.raises(ModelError, match="given 17, expected at most 16"):
        cost(model, sequence_length=17)


def test_sizes_are_those_of_the_ids_that_are_given() -> None:
    record = cost(_bert(), inputs={"input_ids": torch.full((3, 5), 7)})
    assert (record.options.batch, record.options.query_len, record.options.key_len) == (3, 5, 5)
    assert record == cost(_bert(), sequence_length=5, batch=3)


def test_a_language_model_head_runs_on_all_the_last_or_no_positions() -> None:
    model = _llama()
    default = cost(model, sequence_length=6, batch=2)
    assert default.options.head == "all"
    heads = {
        choice: sum(p.macs for p in cost(model, sequence_length=6, batch=2, head=choice).products if p.op == "head")
        for choice in ("out", "last", "all")
    }
    assert heads == {"out": 0, "last": 2 * 32 * 60, "all": 12 * 32 * 60}
    without = cost(model, sequence_length=6, batch=2, head="out")
    assert default.macs - without.macs == default.reference_macs - without.reference_macs == heads["all"]


def test_options_of_the_deployment_are_kept() -> None:
    record = cost(_bert(), sequence_length=4, float_bits=16, int4=True)
    assert (record.options.float_bits, record.options.int4) == (16, True)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("base_model.bert.layer.0.query.base_layer", "bert.layer.0.query"),
        ("_orig_mod.layer._orig_mod.query", "layer.query"),
        ("classifier.modules_to_save.default.dense", "classifier.dense"),
        ("classifier.original_module", "classifier"),
        ("layer.base_layers", "layer.base_layers"),
    ],
)
def test_names_are_those_of_the_base_model(wrapped: str, plain: str) -> None:
    assert base_name(wrapped) == plain


def test_roles_are_told_by_the_last_name() -> None:
    names = ["self.query", "attn.k_proj", "v", "value_proj", "pos_query_proj", "query.dense", "v_norm", "c_attn"]
    assert [role_of(name) for name in names] == ["q", "k", "v", "v", "q", None, None, None]
