"""Warm-up passes before anything is measured: nothing is rounded, and ranges follow what passes through."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

from rankbits import BayesianLoraConfig, GateSchedule
from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora import learning_adapters
from rankbits.tuners.bayesian_lora.config import PAPER_SITES

SITES = {"merged": ["weight", "input"], "separate": ["input", *PAPER_SITES]}


class TwoReaders(nn.Module):
    """Two linear layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.first(x) + self.second(x)
        return result


def _standing(placement: str = "merged", **settings: object) -> tuple[PeftModel, GateSchedule]:
    """A calibrated model whose B is not zero, with three steps to go before measuring begins."""
    torch.manual_seed(0)
    chosen = {"r": 2, "calibration_passes": 1, "quantizers": SITES[placement], "placement": placement} | settings
    model = get_peft_model(TwoReaders(), BayesianLoraConfig(target_modules=["first", "second"], **chosen)).train()
    for layer, name, _ in learning_adapters(model):
        nn.init.normal_(layer.bayesian_lora_up[name], std=0.1)
    schedule = GateSchedule(model, 20, budget="bits=6", phases=(0.4, 0.0, 0.0))
    for _ in range(2):
        model(torch.randn(4, 8)).sum().backward()
    schedule.step()
    assert schedule.phase().stands
    assert not schedule.phase().measures
    return model, schedule


def _closed() -> tuple[PeftModel, GateSchedule]:
    """A model whose gates were closed before, at the start of another schedule."""
    model, schedule = _standing()
    with torch.no_grad():
        for _, _, gates in learning_adapters(model):
            gates.bit_logits.fill_(-8.0)
    schedule.restore(8)
    again = GateSchedule(model, 20, budget="bits=6", phases=(0.4, 0.0, 0.0))
    return model, again


def _quantizers(model: PeftModel) -> list[nn.Module]:
    return [q for layer, name, _ in learning_adapters(model) for q in layer.quantizers_of(name).values()]


def _unrounded(model: PeftModel, x: torch.Tensor) -> torch.Tensor:
    """What the layers compute without any quantizer, in double precision."""
    total = torch.zeros(len(x), 8, dtype=torch.float64)
    for layer, name, _ in learning_adapters(model):
        down, diagonal, up = (factor.double() for factor in layer._factors(name))
        weight = layer.weight.double() + layer.scaling[name] * (up * diagonal) @ down
        total += F.linear(x.double(), weight, layer.bias.double())
    return total


@pytest.mark.parametrize("placement", ["merged", "separate"])
@pytest.mark.parametrize("rows", [None, 2])
def test_what_a_pass_reads_is_not_rounded(placement, rows, monkeypatch) -> None:
    model, _ = _standing(placement, weight_gradient_rows=rows)
    monkeypatch.setattr("rankbits.quant.kernels.quantize", lambda *_, **__: pytest.fail("a tensor was rounded"))
    x = torch.randn(16, 8)
    torch.testing.assert_close(model(x).double(), _unrounded(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["merged", "separate"])
def test_ranges_cover_what_passes_through(placement) -> None:
    model, _ = _standing(placement)
    before = [q.range_.detach().clone() for q in _quantizers(model)]
    with torch.no_grad():
        for layer, name, _ in learning_adapters(model):
            layer.bayesian_lora_up[name].mul_(100.0)
    x = 50.0 * torch.randn(16, 8)
    model(x)
    covered = {site: q for layer, name, _ in learning_adapters(model) for site, q in layer.quantizers_of(name).items()}
    torch.testing.assert_close(covered["input"].range_.detach(), x.abs().amax(), rtol=1e-5, atol=0.0)
    assert all((q.range_ >= old).all() for q, old in zip(_quantizers(model), before, strict=True))
    layer, name, _ = next(learning_adapters(model))
    moved = layer.quantizers_of(name)["weight" if placement == "merged" else "up"]
    assert moved.range_.amax() > 10 * before[list(layer.quantizers_of(name).values()).index(moved)].amax()


def test_nothing_is_drawn_so_that_dropout_is_that_of_lora() -> None:
    model, _ = _standing(weight_gradient_rows=2)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), expected)


def test_factors_learn_meanwhile_as_without_quantizers() -> None:
    model, _ = _standing(weight_gradient_rows=2)
    model.zero_grad()
    x = torch.randn(16, 8)
    model(x).square().sum().backward()
    for layer, name, _ in learning_adapters(model):
        found = layer.bayesian_lora_up[name]
        up = found.detach().double().requires_grad_()
        down, diagonal = (factor.detach().double() for factor in layer._factors(name)[:2])
        rest = _unrounded(model, x).detach()
        weight = layer.scaling[name] * (up * diagonal) @ down
        (rest + F.linear(x.double(), weight - weight.detach())).square().sum().backward()
        torch.testing.assert_close(found.grad.double(), up.grad, rtol=1e-4, atol=1e-4)


def test_measuring_and_fixed_passes_round() -> None:
    model, schedule = _standing()
    x = torch.randn(16, 8)
    schedule.restore(4)
    assert schedule.phase().measures
    model(x).sum().backward()
    assert all(gates.evidence.any() for _, _, gates in learning_adapters(model))
    with torch.no_grad():
        for _, _, gates in learning_adapters(model):
            gates.bit_logits.fill_(-8.0)
    schedule.restore(8)
    assert (model(x).double() - _unrounded(model, x)).abs().max() > 0.1


def test_gates_that_were_closed_before_still_round() -> None:
    model, again = _closed()
    assert again.phase().stands
    x = torch.randn(16, 8)
    assert (model(x).double() - _unrounded(model, x)).abs().max() > 0.1


def test_evaluation_rounds_by_the_gates_of_inference(monkeypatch) -> None:
    model, _ = _standing()
    asked = []
    for quantizer in _quantizers(model):
        monkeypatch.setattr(quantizer, "rounded", lambda x, gates: (asked.append(gates), x)[1])
    model.eval()(torch.randn(4, 8))
    assert len(asked) == len(_quantizers(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_passes_repeat_the_one_in_which_calibration_ends(reentrant) -> None:
    config = BayesianLoraConfig(
        r=2, target_modules=["0"], placement="merged", quantizers=["weight", "input"], calibration_passes=2
    )
    found = {}
    for recomputes in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).train()
        GateSchedule(model, 20, budget="bits=6", phases=(0.4, 0.0, 0.0))
        gradients, passes = [], []
        for _ in range(4):
            x = torch.randn(4, 8, requires_grad=True)
            out = checkpoint(model, x, use_reentrant=reentrant) if recomputes else model(x)
            out.square().sum().backward()
            gradients += [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            passes += [int(q.passes) for q in _quantizers(model)]
        found[recomputes] = (gradients, passes)
    assert found[True][1] == found[False][1]
    torch.testing.assert_close(found[True][0], found[False][0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_inputs": False},
        {"tie_groups": "fused"},
        {"quantize_attention": True},
        {"quantize_head": True},
        {"granularity": "group", "group_size": 4, "input_granularity": "group", "activation_ranges": "affine"},
    ],
    ids=str,
)
def test_whatever_is_shared_or_attended_is_covered_and_not_rounded(settings, monkeypatch) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16, hidden_dropout_prob=0.0))
    config = BayesianLoraConfig(
        r=2,
        target_modules=r".*layer.*(query|key|value|dense)",
        modules_to_save=["classifier"],
        placement="merged",
        quantizers=["weight", "input"],
        calibration_passes=1,
        **settings,
    )
    model = get_peft_model(base, config).train()
    schedule = GateSchedule(model, 20, budget="bits=6", phases=(0.4, 0.0, 0.0))
    ids = torch.arange(12).reshape(2, 6)
    for _ in range(2):
        model(ids)
    schedule.step()
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    assert all(q.is_calibrated for q in quantizers)
    with torch.no_grad():
        for q in quantizers:
            q.log_range.fill_(-20.0)
    monkeypatch.setattr("rankbits.quant.kernels.quantize", lambda *_, **__: pytest.fail("a tensor was rounded"))
    model(ids)
    assert all(bool((q.log_range > -20.0).all()) for q in quantizers)


@pytest.mark.parametrize("phases", [(0.4, 0.0, 0.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("placement", ["merged", "separate"])
def test_ranges_cover_the_weights_after_every_step(placement, phases) -> None:
    torch.manual_seed(0)
    chosen = {"r": 2, "calibration_passes": 1, "quantizers": SITES[placement], "placement": placement}
    grid = {"granularity": "group", "group_size": 4}
    model = get_peft_model(TwoReaders(), BayesianLoraConfig(target_modules=["first", "second"], **chosen, **grid))
    budget = None if phases[0] == 1.0 else "bits=6"
    schedule = GateSchedule(model.train(), 5, budget=budget, phases=phases, lambda_q=None, lambda_r=None)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5 if budget is None else 1):
        (model(torch.randn(4, 8)) - 1.0).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for layer, name, _ in learning_adapters(model):
        for quantizer, weight in layer._weight_quantizers(name):
            parts = quantizer.layout.parts(weight.detach())
            assert (parts.abs() <= quantizer.range_.abs() * (1 + 1e-6)).all()


def test_a_second_run_that_is_resumed_rounds_by_the_gates_it_loads() -> None:
    model, again = _closed()
    resumed, _ = _standing()
    schedule = GateSchedule(resumed, 20, budget="bits=6", phases=(0.4, 0.0, 0.0))
    x = torch.randn(16, 8)
    resumed(x)
    resumed.load_state_dict(model.state_dict())
    schedule.load_state_dict(again.state_dict())
    assert schedule.phase().stands
    torch.testing.assert_close(resumed(x), model(x))
