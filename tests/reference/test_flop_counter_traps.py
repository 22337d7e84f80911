"""What FlopCounterMode does not see, or sees twice: how a test must run it for its total to mean a forward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2Model

from rankbits.accounting.architectures.read import read_shape
from rankbits.accounting.macs import products
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.records import CountOptions

# PEFT asks for it by its older name whenever it wraps a model of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HIDDEN, WIDE, HEADS, TOKENS, RANK = 24, 40, 4, 6, 2
BERT = {
    "model_type": "bert",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "vocab_size": 31,
    "max_position_embeddings": 20,
}
SCORES_AND_CONTEXT = 2 * TOKENS * TOKENS * HIDDEN
PROJECTIONS = 4 * TOKENS * HIDDEN * HIDDEN
FEED_FORWARD = 2 * TOKENS * HIDDEN * WIDE
POOLER = HIDDEN * HIDDEN
WHOLE = PROJECTIONS + SCORES_AND_CONTEXT + FEED_FORWARD + POOLER


def _macs(run, **settings):
    counter = FlopCounterMode(display=False, **settings)
    with counter:
        run()
    return counter.get_total_flops() / 2


def _bert(attention="eager"):
    values = {key: value for key, value in BERT.items() if key != "model_type"}
    config = BertConfig(**values, attn_implementation=attention)
    return BertModel(config).eval()


def _ids(device="cpu"):
    return torch.full((1, TOKENS), 7, device=device)


def _predicted(spec=None):
    options = CountOptions(query_len=TOKENS, key_len=TOKENS, adapters="unmerged")
    return sum(product.macs for product in products(read_shape(BERT, name="bert"), options, spec))


def test_the_predicted_sum_is_the_closed_form():
    assert _predicted() == WHOLE


@torch.no_grad()
def test_fused_attention_on_a_cpu_counts_nothing():
    model = _bert("sdpa")
    assert _macs(lambda: model(_ids())) == WHOLE - SCORES_AND_CONTEXT
    eager = _bert("eager")
    assert _macs(lambda: eager(_ids())) == WHOLE


@torch.no_grad()
def test_the_math_backend_of_fused_attention_is_counted():
    model = _bert("sdpa")
    with sdpa_kernel(SDPBackend.MATH):
        assert _macs(lambda: model(_ids())) == WHOLE


@torch.no_grad()
def test_fused_attention_on_the_meta_device_is_counted():
    with torch.device("meta"):
        model = _bert("sdpa")
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta")
    positions = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    assert _macs(lambda: model(_ids("meta"), attention_mask=mask, position_ids=positions)) == WHOLE


@torch.no_grad()
def test_an_integer_product_looks_free_until_it_is_given_a_formula():
    left = torch.ones(32, 16, dtype=torch.int8)
    right = torch.ones(16, 24, dtype=torch.int8)

    def formula(left_shape, right_shape, *_, **__):
        return 2 * left_shape[0] * left_shape[1] * right_shape[1]

    assert _macs(lambda: torch._int_mm(left, right)) == 0
    assert _macs(lambda: torch._int_mm(left, right), custom_mapping={torch.ops.aten._int_mm: formula}) == 32 * 16 * 24


@pytest.fixture
def slow_path():
    """PyTorch's own modules without their fused shortcut."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def _torch_attention():
    module = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True).eval()
    x = torch.randn(1, TOKENS, HIDDEN)
    return lambda: module(x, x, x, need_weights=True)


def _torch_layer():
    module = nn.TransformerEncoderLayer(HIDDEN, HEADS, WIDE, batch_first=True).eval()
    x = torch.randn(1, TOKENS, HIDDEN)
    return lambda: module(x)


@torch.no_grad()
@pytest.mark.parametrize("build", [_torch_attention, _torch_layer])
def test_the_fast_path_of_torchs_own_modules_counts_nothing(build):
    assert _macs(build()) == 0


@torch.no_grad()
def test_without_the_fast_path_torchs_own_modules_are_counted(slow_path):
    assert _macs(_torch_attention()) == PROJECTIONS + SCORES_AND_CONTEXT
    with sdpa_kernel(SDPBackend.MATH):
        assert _macs(_torch_layer()) == PROJECTIONS + SCORES_AND_CONTEXT + FEED_FORWARD


@torch.no_grad()
def test_a_vector_in_place_of_a_matrix_counts_nothing():
    matrix, vector = torch.randn(5, 7), torch.randn(7)
    assert _macs(lambda: matrix @ vector) == _macs(lambda: vector @ vector) == 0
    assert _macs(lambda: matrix @ vector[:, None]) == 5 * 7


@torch.no_grad()
def test_without_a_mask_tokens_are_searched_for_padding_which_the_meta_device_cannot_answer():
    values = {key: value for key, value in BERT.items() if key != "model_type"}
    with torch.device("meta"):
        model = DebertaV2Model(DebertaV2Config(**values)).eval()
    with pytest.raises(RuntimeError, match=r"\.item\(\) cannot be called on meta tensors"):
        _macs(lambda: model(_ids("meta")))
    mask = torch.ones(1, TOKENS, device="meta")
    assert _macs(lambda: model(_ids("meta"), attention_mask=mask)) == WHOLE - POOLER


def _adapted(use_dora=False):
    targets = ["query", "key", "value"]
    return get_peft_model(_bert(), LoraConfig(r=RANK, target_modules=targets, use_dora=use_dora)).eval()


@torch.no_grad()
def test_merging_is_work_that_belongs_before_the_count():
    inside, outside = _adapted(), _adapted()
    three_products_of_b_and_a = 3 * HIDDEN * RANK * HIDDEN
    assert _macs(lambda: inside.merge_and_unload()(_ids())) == WHOLE + three_products_of_b_and_a
    merged = outside.merge_and_unload()
    assert _macs(lambda: merged(_ids())) == WHOLE


def test_gradients_add_the_products_of_the_backward_pass():
    model = _bert()

    def step():
        model(_ids()).pooler_output.sum().backward()

    # The gradient of a product is two more of its size: one for each operand.
    assert _macs(step) == 3 * WHOLE
    with torch.no_grad():
        assert _macs(lambda: model(_ids())) == WHOLE


@torch.no_grad()
def test_the_counts_of_modules_overlap_so_that_only_the_total_is_a_sum():
    model = _bert()
    counter = FlopCounterMode(display=False, depth=None)
    with counter:
        model(_ids())
    by_module = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    assert by_module["Global"] == counter.get_total_flops() // 2 == WHOLE
    assert by_module["BertModel.encoder.layer.0.attention"] == PROJECTIONS + SCORES_AND_CONTEXT
    assert by_module["BertModel.encoder.layer.0.attention.self.query"] == TOKENS * HIDDEN * HIDDEN
    assert sum(by_module.values()) > 2 * WHOLE


@torch.no_grad()
def test_a_mask_saves_no_product():
    model = _bert()
    half = torch.tril(torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool))
    masked = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~half, torch.finfo(torch.float32).min)
    assert _macs(lambda: model(_ids(), attention_mask=masked)) == WHOLE


@torch.no_grad()
def test_dora_in_peft_sends_an_identity_through_its_matrices_at_every_call():
    low_rank = 3 * TOKENS * RANK * (HIDDEN + HIDDEN)
    identity = 3 * RANK * HIDDEN * (HIDDEN + HIDDEN)
    lora, dora = _adapted(), _adapted(use_dora=True)
    assert _macs(lambda: lora(_ids())) == WHOLE + low_rank
    counted = _macs(lambda: dora(_ids()))
    assert counted == WHOLE + low_rank + identity
    spec = MethodSpec(Method.DORA, rank=RANK, targets=("query", "key", "value"))
    assert counted == _predicted(spec)
