"""A Bayesian-LoRA layer computes Alg. 1: at the start, while it learns, and with the gates of inference."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from rankbits import BayesianLoraConfig
from rankbits.errors import MergeError, RankbitsWarning
from rankbits.tuners.bayesian_lora import BayesianLoraLinear, BayesianLoraModel, GatePhase, adapted_layers

SITES = ["weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output", "input"]
R, ALPHA, IN, OUT = 5, 7.0, 12, 9


class Named(nn.Module):
    """One linear layer under a name that can be targeted."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.only = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def _layer(adapt, *, transposed: bool = False, unsigned: bool = False, dtype=torch.float64, **settings):
    """A calibrated layer with gates that are neither open nor closed, ranges that clip, and a model around it."""
    torch.manual_seed(10)
    base = Conv1D(OUT, IN) if transposed else nn.Linear(IN, OUT)
    nn.init.normal_(base.bias)
    model = adapt(Named(base.to(dtype)), r=R, alpha=ALPHA, target_modules=["only"], **settings)
    ((_, layer),) = adapted_layers(model)
    with torch.no_grad():
        for container in (layer.bayesian_lora_down, layer.bayesian_lora_diagonal, layer.bayesian_lora_up):
            container["default"].normal_()
    gates = layer.gates_of("default")
    with torch.no_grad():
        if gates.bit_logits is not None:
            gates.bit_logits.normal_(std=1.5)
        if gates.rank_logits is not None:
            gates.rank_logits.copy_(torch.tensor([3.0, 1.0, 0.5, -1.0]))
    for site, quantizer in layer.bayesian_lora_quantizers["default"].items():
        state = quantizer.state_dict()
        value = {"output": 0.8, "weight": 0.1}.get(site, 0.3)
        state["log_range"] = torch.full_like(state["log_range"], value)
        state["calibrated"] = torch.tensor(True)
        state["seen_negative"] = torch.tensor(not unsigned)
        quantizer.load_state_dict(state)
    return model, layer


def _dense(layer: BayesianLoraLinear) -> SimpleNamespace:
    weight = layer.base_layer.weight
    return SimpleNamespace(
        weight=weight.T if isinstance(layer.base_layer, Conv1D) else weight,
        bias=layer.base_layer.bias,
        A=layer.bayesian_lora_down["default"],
        E=layer.bayesian_lora_diagonal["default"],
        B=layer.bayesian_lora_up["default"],
        scale=ALPHA / R,
    )


def _ranges(layer: BayesianLoraLinear) -> dict[str, Tensor]:
    quantizers = layer.bayesian_lora_quantizers["default"]
    return {site: quantizer.log_range.detach().exp().double().squeeze() for site, quantizer in quantizers.items()}


def _noise(*shape: int) -> Tensor:
    return torch.rand(*shape).clamp(1e-6, 1 - 1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("sites", "unsigned"), [(None, False), (SITES, False), (SITES, True), (["up", "output"], False)]
)
@pytest.mark.parametrize("rank_gate", ["ste", "hard_concrete"])
def test_a_training_pass_is_alg_1_with_sampled_gates(adapt, paper, rank_gate, sites, unsigned, transposed) -> None:
    _, layer = _layer(adapt, transposed=transposed, unsigned=unsigned, quantizers=sites, rank_gate=rank_gate)
    layer.train()
    gates = layer.gates_of("default")
    named = list(layer.bayesian_lora_quantizers["default"])
    assert named == [site for site in SITES if site in (sites or SITES[:7])]

    torch.manual_seed(11)
    widths = paper.hard_concrete(gates.bit_logits.detach(), _noise(len(named), 4)).double()
    if rank_gate == "ste":
        ranks = torch.round(torch.cumprod(torch.sigmoid(gates.rank_logits.detach()), 0)).double()
        assert ranks.tolist() == [1.0, 1.0, 0.0, 0.0]
    else:
        ranks = torch.cumprod(paper.hard_concrete(gates.rank_logits.detach(), _noise(R - 1)), 0).double()
    ranks = torch.cat([torch.ones(1, dtype=torch.float64), ranks])
    torch.manual_seed(11)
    values = gates.values(hard=False)
    # Equal to rounding; the layer's own values are used below, so that no grid point flips on the last bit.
    torch.testing.assert_close(values.widths.double(), widths, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values.ranks.double(), ranks, rtol=1e-5, atol=1e-6)
    widths, ranks = values.widths.detach().double(), values.ranks.detach().double()

    def quantize(site: str, tensor: Tensor) -> Tensor:
        if site not in named:
            return tensor
        return paper.soft(
            tensor, _ranges(layer)[site], widths[named.index(site)], signed=not (unsigned and site == "input")
        )

    x = torch.randn(3, 4, IN, dtype=torch.float64)
    torch.manual_seed(11)
    result = layer(x)
    expected = paper.layer_output(x, _dense(layer), ranks, quantize)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(result, layer.base_layer(x), atol=0.1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("rank_gate", ["ste", "hard_concrete"])
@pytest.mark.parametrize("fixed_phase", [False, True])
def test_inference_and_the_fixed_phase_use_single_widths(
    adapt, paper, fixed_phase, rank_gate, unsigned, transposed
) -> None:
    _, layer = _layer(adapt, transposed=transposed, unsigned=unsigned, quantizers=SITES, rank_gate=rank_gate)
    gates = layer.gates_of("default")
    bits = []
    for logits in gates.bit_logits.tolist():
        width = 2
        for logit in logits:
            if logit <= -0.935303:
                break
            width *= 2
        bits.append(width)
    assert len(set(bits)) >= 3
    # The product of the first three probabilities is 0.43; as hard concrete gates only the last is closed.
    open_ranks = 3 if rank_gate == "ste" else 4
    ranks = torch.tensor([1.0] * open_ranks + [0.0] * (R - open_ranks), dtype=torch.float64)

    def quantize(site: str, tensor: Tensor) -> Tensor:
        signed = not (unsigned and site == "input")
        return paper.hard(tensor, _ranges(layer)[site], bits[SITES.index(site)], signed=signed)

    if fixed_phase:
        layer.train()
        layer.set_phase("default", GatePhase(fixed=True), 3)
    else:
        layer.eval()
    x = torch.randn(6, IN, dtype=torch.float64)
    expected = paper.layer_output(x, _dense(layer), ranks, quantize)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)


def test_rank_gates_get_the_straight_through_gradient_of_the_product(adapt) -> None:
    _, layer = _layer(adapt, learn_bits=False)
    layer.train()
    x, w = torch.randn(6, IN, dtype=torch.float64), _dense(layer)
    layer(x).pow(2).sum().backward()
    logits = layer.gates_of("default").rank_logits
    p = torch.cumprod(torch.sigmoid(logits.detach().double()), 0)
    g = torch.cat([torch.ones(1), torch.round(p)]).double().requires_grad_()
    dense = x @ w.weight.T + w.bias + w.scale * ((x @ w.A.T) * w.E * g) @ w.B.T
    (by_gate,) = torch.autograd.grad(dense.pow(2).sum(), g)
    # d p_i / d xi_j = p_i (1 - sigma(xi_j)) for j <= i
    expected = [(by_gate[1 + j :] * p[j:]).sum() * (1 - torch.sigmoid(logits[j].double())) for j in range(R - 1)]
    torch.testing.assert_close(logits.grad.double(), torch.stack(expected).detach(), rtol=1e-4, atol=1e-6)
    assert float(by_gate[-1].abs()) > 1e-3, "a closed rank must feel the data, so that it can reopen"


def test_gates_and_ranges_get_gradients_while_learning(adapt) -> None:
    _, layer = _layer(adapt, quantizers=SITES)
    layer.train()
    for _ in range(20):
        layer(torch.randn(6, IN, dtype=torch.float64)).pow(2).sum().backward()
    assert bool((layer.gates_of("default").bit_logits.grad != 0).any(dim=1).all())
    for quantizer in layer.bayesian_lora_quantizers["default"].values():
        assert float(quantizer.log_range.grad.abs()) > 0


def test_dropout_acts_on_the_adapter_branch_alone(adapt) -> None:
    _, layer = _layer(adapt, learn_bits=False, learn_rank=True, dropout=0.5)
    w, x = _dense(layer), torch.randn(6, IN, dtype=torch.float64)
    ranks = torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)
    layer.train()
    torch.manual_seed(12)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(12)
    expected = x @ w.weight.T + w.bias + w.scale * ((dropped @ w.A.T) * w.E * ranks) @ w.B.T
    torch.testing.assert_close(layer(x), expected)
    expected = x @ w.weight.T + w.bias + w.scale * ((x @ w.A.T) * w.E * ranks) @ w.B.T
    torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("start", [True, "lora", "adalora"])
def test_the_update_is_zero_at_the_start(bert, batch, adapt, start) -> None:
    before = bert(**batch).logits
    model = adapt(bert, init_weights=start, learn_bits=False)
    torch.testing.assert_close(model.eval()(**batch).logits, before, rtol=0, atol=0)
    torch.testing.assert_close(model.train()(**batch).logits, before, rtol=0, atol=0)


def test_what_the_starts_draw(adapt) -> None:
    def start(init_weights):
        torch.manual_seed(0)
        model = adapt(Named(nn.Linear(400, 300)), r=32, target_modules=["only"], init_weights=init_weights)
        layer = model.base_model.model.only
        return [
            layer.bayesian_lora_down["default"],
            layer.bayesian_lora_diagonal["default"],
            layer.bayesian_lora_up["default"],
        ]

    a, e, b = start("lora")
    assert float(a.detach().abs().max()) <= 1 / 20
    assert float(a.detach().std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.05)
    assert bool((e == 1).all())
    assert not b.any()
    a, e, b = start("adalora")
    assert float(a.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(b.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not e.any()
    a, e, b = start(False)
    assert float(a.detach().abs().max()) <= 1 / 20
    assert bool((e == 1).all())
    assert float(b.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("learn_bits", "learn_rank", "quantizers", "rank_logits"),
    [(True, False, 7, None), (False, True, 0, 3), (True, True, 7, 3), (False, False, 0, None)],
    ids=["q", "ra", "q+ra", "neither"],
)
def test_variants_have_only_what_they_learn(mlp, rows, adapt, learn_bits, learn_rank, quantizers, rank_logits) -> None:
    model = adapt(mlp, target_modules=["0"], learn_bits=learn_bits, learn_rank=learn_rank)
    ((_, layer),) = adapted_layers(model)
    assert len(layer.sites_of("default")) == quantizers
    gates = layer.gates_of("default")
    if not learn_bits and not learn_rank:
        assert gates is None
    else:
        assert (gates.bit_logits is None) == (not learn_bits)
        assert (None if gates.rank_logits is None else gates.rank_logits.numel()) == rank_logits
    assert bool(torch.isfinite(model.train()(rows)).all())


@pytest.mark.parametrize("learn_bits", [False, True])
def test_a_layer_of_full_rank_one_has_no_rank_gates_and_works(mlp, rows, adapt, learn_bits) -> None:
    model = adapt(mlp, r=1, target_modules=["0", "2"], learn_bits=learn_bits).train()
    for _ in range(3):
        model(rows).sum().backward()
    for _, layer in adapted_layers(model):
        assert layer.gates_of("default").rank_logits is None
    assert all(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_of_the_paper() -> None:
    with torch.device("meta"):
        base = BertModel(BertConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, vocab_size=100))
    config = BayesianLoraConfig(r=8, target_modules=["query", "key", "value"])
    model = BayesianLoraModel(base, config, "default", low_cpu_mem_usage=True)
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    kinds = ("_lora_down", "_lora_up", "diagonal.default", "rank_logits", "bit_logits", "log_range")
    counts = [sum(count for name, count in trained if kind in name) for kind in kinds]
    assert len(list(adapted_layers(model))) == 36
    assert counts[0] + counts[1] == 442_368
    assert counts[2:] == [288, 252, 1008, 252]
    assert sum(count for _, count in trained) == 442_368 + 288 + 252 + 1008 + 252


def test_r_beyond_what_the_matrix_has_is_refused_with_the_layer(mlp, adapt) -> None:
    with pytest.raises(
        ValueError, match=r"`r`=7 exceeds the rank that '2' can have: its weight is \[6, 10\], so r <= 6"
    ):
        adapt(mlp, r=7, target_modules=["2"])


def test_the_largest_possible_r_is_allowed(mlp, rows, adapt) -> None:
    assert bool(torch.isfinite(adapt(mlp, r=6, target_modules=["2"]).train()(rows)).all())


def test_a_zero_tensor_stays_in_calibration_without_nan(mlp, rows, adapt) -> None:
    model = adapt(mlp, target_modules=["0", "2"], init_weights=True)
    for _ in range(4):
        model.train()(rows).sum().backward()
    for _, layer in adapted_layers(model):
        quantizers = layer.bayesian_lora_quantizers["default"]
        assert not quantizers["up"].is_calibrated
        assert quantizers["down"].is_calibrated
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.bayesian_lora_up["default"].fill_(0.1)
    for _ in range(2):
        model(rows)
    assert all(layer.bayesian_lora_quantizers["default"]["up"].is_calibrated for _, layer in adapted_layers(model))


def test_a_constant_diagonal_is_exact_at_every_width_at_the_start(mlp, rows, adapt) -> None:
    model = adapt(mlp, target_modules=["0"], quantizers=["diagonal"])
    for _ in range(3):
        model.train()(rows)
    ((_, layer),) = adapted_layers(model)
    quantizer, ones = layer.bayesian_lora_quantizers["default"]["diagonal"], torch.ones(4)
    for width in range(5):
        gates = torch.tensor([True] * width + [False] * (4 - width))
        torch.testing.assert_close(quantizer.rounded(ones, gates), ones, rtol=1e-6, atol=0)


def test_the_weight_is_calibrated_at_construction(mlp, adapt) -> None:
    largest = float(mlp[0].weight.detach().abs().max())
    ((_, layer),) = adapted_layers(adapt(mlp, target_modules=["0"]))
    quantizers = layer.bayesian_lora_quantizers["default"]
    assert quantizers["weight"].range_.item() == pytest.approx(largest, rel=1e-6)
    assert [site for site, q in quantizers.items() if q.is_calibrated] == ["weight"]


def test_cover_weights_widens_ranges_and_never_narrows_them(mlp, rows, adapt) -> None:
    model = adapt(mlp, target_modules=["0"])
    for _ in range(3):
        model.train()(rows)
    ((_, layer),) = adapted_layers(model)
    quantizers = layer.bayesian_lora_quantizers["default"]
    before = {site: q.range_.item() for site, q in quantizers.items()}
    with torch.no_grad():
        layer.bayesian_lora_down["default"].mul_(3)
        layer.bayesian_lora_up["default"].mul_(0.1)
    layer.cover_weights("default")
    after = {site: q.range_.item() for site, q in quantizers.items()}
    assert after["down"] == pytest.approx(3 * before["down"], rel=1e-5)
    assert {k: v for k, v in after.items() if k != "down"} == {k: v for k, v in before.items() if k != "down"}


def test_a_hundred_passes_without_a_schedule_warn_once(mlp, rows, adapt) -> None:
    model = adapt(mlp, target_modules=["0"]).train()
    for _ in range(99):
        model(rows)
    with pytest.warns(RankbitsWarning, match="100 training passes without a step of the gate schedule"):
        model(rows)
    for _ in range(101):
        model(rows)


def test_evaluating_before_calibration_is_the_identity_and_says_so(mlp, rows, adapt) -> None:
    model = adapt(mlp, target_modules=["0"], quantizers=["output"], learn_rank=False)
    ((_, layer),) = adapted_layers(model)
    w = SimpleNamespace(A=layer.bayesian_lora_down["default"], B=layer.bayesian_lora_up["default"])
    with pytest.warns(RankbitsWarning, match="before its range was calibrated"):
        result = layer.eval()(rows)
    torch.testing.assert_close(result, layer.base_layer(rows) + 4.0 * rows @ w.A.T @ w.B.T)


def test_macs_per_row_follow_the_sites(mlp, adapt) -> None:
    model = adapt(mlp, r=4, target_modules=["0"], quantizers=SITES)
    ((_, layer),) = adapted_layers(model)
    assert layer.macs_per_row("default") == [120, 48, 4, 40, 4, 40, 0, 168]


def test_a_hardened_configuration_refuses_a_layer_it_does_not_know(mlp, adapt) -> None:
    with pytest.raises(ValueError, match=r"hardened for the layers \['0'\], not for '2'"):
        adapt(mlp, target_modules=["0", "2"], hardened_ranks={"0": 2}, hardened_bits={"0": {}})


def test_the_layer_names_its_method(mlp, adapt) -> None:
    ((_, layer),) = adapted_layers(adapt(mlp, target_modules=["0"]))
    assert repr(layer).startswith("bayesian_lora.")


@pytest.mark.parametrize("phase", ["calibrating", "sampled", "fixed"])
def test_a_following_layer_may_work_in_place(adapt, phase) -> None:
    model = adapt(
        Named(nn.Linear(12, 8)), r=2, target_modules=["only"], calibration_passes=0 if phase != "calibrating" else 9
    )
    layer = model.base_model.model.only
    layer.set_phase("default", GatePhase(fixed=phase == "fixed"), 1)
    for _ in range(2):
        output = torch.relu_(layer(torch.randn(5, 12)))
        output.sum().backward()
    assert layer.bayesian_lora_up["default"].grad is not None


def test_nothing_is_merged_on_top_of_an_adapter_that_quantizes_the_base_weight(adapt) -> None:
    model = adapt(
        Named(nn.Linear(12, 8)), r=2, target_modules=["only"], quantizers=["weight", "down", "diagonal", "up"]
    )
    model.add_adapter("plain", BayesianLoraConfig(r=2, target_modules=["only"], learn_bits=False))
    layer = model.base_model.model.only
    layer.merge(adapter_names=["default"])
    merged = layer.get_base_weight().clone()
    with (
        pytest.warns(UserWarning, match="additionally merging"),
        pytest.raises(MergeError, match="only be merged alone"),
    ):
        layer.merge(adapter_names=["plain"])
    assert layer.merged_adapters == ["default"]
    assert torch.equal(layer.get_base_weight(), merged)
