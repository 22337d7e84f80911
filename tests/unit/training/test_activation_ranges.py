"""Ranges of activations that are fitted when widths are known: when, by what, which, and that runs resume."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from rankbits import BayesianLoraConfig, GateSchedule, summarize
from rankbits.errors import RankbitsWarning, ScheduleError
from rankbits.quant import range_fit
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.range_fit import FACTORS, RangeFit
from rankbits.training.activation_ranges import fitted_quantizers, range_fits
from rankbits.tuners.bayesian_lora import adapted_layers, gated_layers
from rankbits.tuners.bayesian_lora.config import ACTIVATION_SITES, Site

PRESENT = FACTORS.index(1.0)
STEPS = 24
FIXED_FROM = 6


class _Network(nn.Module):
    """Two layers; what the first one reads has an outlier in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def _model(**settings: Any) -> PeftModel:
    torch.manual_seed(3)
    chosen = {"r": 2, "placement": "merged", "calibration_passes": 1, "activation_ranges": "fitted"}
    return get_peft_model(
        _Network(), BayesianLoraConfig(**(chosen | {"target_modules": ["first", "second"]} | settings))
    )


def _schedule(model: nn.Module, **settings: Any) -> GateSchedule:
    return GateSchedule(model, STEPS, **({"budget": "bops=0.0625", "phases": (0.25, 0.0, 0.0)} | settings))


def _batch(seed: int) -> Tensor:
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 10.0
    return x


def _train(model: nn.Module, schedule: GateSchedule, steps: int, *, rate: float = 0.02) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        torch.manual_seed(schedule.completed_steps)
        x = _batch(schedule.completed_steps)
        (model(x) - x[:, :8]).square().mean().backward()
        optimizer.step()
        model.zero_grad()
        schedule.step()


def _quantizer(model: nn.Module, layer: int = 0, site: str = "input") -> Quantizer:
    found = [layer for _, layer in adapted_layers(model)][layer].quantizers_of("default")[site]
    assert isinstance(found, Quantizer)
    return found


def _range(quantizer: Quantizer) -> float:
    return float(quantizer.range_.detach())


def _error(x: Tensor, range_: float, bits: int) -> float:
    step, largest = 2 * range_ / (2**bits - 1), 2 ** (bits - 1) - 1
    return float(((x.double() / step).round().clamp(-largest, largest) * step - x.double()).square().sum())


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_when_widths_are_known_a_range_moves_to_the_least_squared_error_of_the_last_passes(
    rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_fit, "ROWS", 128)  # all that a pass has
    model = _model(rounding=rounding)
    schedule = _schedule(model)
    _train(model, schedule, FIXED_FROM - 1)
    before = _range(_quantizer(model))
    assert before >= 10.0
    _train(model, schedule, 1)
    bits = summarize(model)[0].bits["input"]
    passes = torch.cat([_batch(step) for step in range(FIXED_FROM)])
    errors = [_error(passes, before * factor, bits) for factor in FACTORS]
    best = min(range(len(FACTORS)), key=errors.__getitem__)
    assert best > PRESENT + 2
    assert _range(_quantizer(model)) == pytest.approx(before * FACTORS[best], rel=1e-5)


def test_it_is_trained_from_there_on() -> None:
    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, FIXED_FROM)
    before = _range(_quantizer(model))
    _train(model, schedule, 3)
    assert _range(_quantizer(model)) != before
    assert _range(_quantizer(model)) == pytest.approx(before, rel=0.1)


def test_the_largest_magnitude_is_where_it_stays_without_it() -> None:
    model = _model(activation_ranges="largest")
    schedule = _schedule(model)
    _train(model, schedule, FIXED_FROM)
    assert not fitted_quantizers(model)
    assert _range(_quantizer(model)) >= 10.0
    assert not schedule.replay.recent.at


def test_weights_and_factors_are_none_of_its_business() -> None:
    """Every site of an activation has it, those within the update included, and no other site has."""
    sites = [site.value for site in Site if site is not Site.PROBABILITIES]
    model = _model(placement="separate", quantizers=sites)
    found = {id(quantizer) for quantizer in fitted_quantizers(model)}
    for _, layer in gated_layers(model):
        for site, quantizer in layer.quantizers_of("default").items():
            assert (id(quantizer) in found) == (Site(site) in ACTIVATION_SITES)
    assert len(found) == 2 * 4


def test_a_fit_leaves_no_trace(step_that_leaves_no_trace) -> None:
    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, FIXED_FROM - 1)
    step_that_leaves_no_trace(schedule, "base_model.model.second")
    assert _range(_quantizer(model)) < 8.0
    assert not schedule.replay.recent.passes
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("at", [3, FIXED_FROM - 1, FIXED_FROM, 10])
@pytest.mark.parametrize("ranges", ["fitted", "affine"])
def test_an_interrupted_run_has_the_same_ranges(ranges: str, at: int) -> None:
    whole = _model(activation_ranges=ranges)
    schedule = _schedule(whole)
    _train(whole, schedule, at, rate=0.0)
    resumed = _model(activation_ranges=ranges)
    resumed.load_state_dict(whole.state_dict())
    again = _schedule(resumed)
    again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    for model, gates in ((whole, schedule), (resumed, again)):
        _train(model, gates, 12 - at)
    assert [entry.bits for entry in summarize(resumed)] == [entry.bits for entry in summarize(whole)]
    for layer in (0, 1):
        assert torch.equal(_quantizer(resumed, layer).log_range, _quantizer(whole, layer).log_range)
        if ranges == "affine":
            low = _quantizer(whole, layer).low_
            assert low is not None
            assert bool((low < 0).all())
            assert torch.equal(low, _quantizer(resumed, layer).lows.reshape(low.shape))  # type: ignore[union-attr]
    assert _range(_quantizer(whole)) < (8.0 if ranges == "fitted" else 10.0)  # where all values span 14


def test_a_pass_that_was_never_seen_is_said_and_ranges_stay() -> None:
    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, 1)
    schedule.replay.recent.passes.clear()
    for _ in range(FIXED_FROM - 2):
        schedule.step()
    before = _range(_quantizer(model))
    with pytest.warns(RankbitsWarning, match=r"no training pass .*: activations keep their ranges\. Train"):
        schedule.step()
    assert _range(_quantizer(model)) == before


@pytest.mark.parametrize("phases", [(0.5, 0.2, 0.0), (0.0, 0.0, 1.0)])
def test_phases_without_fixed_gates_or_without_others_are_refused(phases: tuple[float, float, float]) -> None:
    with pytest.raises(ScheduleError, match=r"activation_ranges fits ranges .* activation_ranges='largest'"):
        GateSchedule(_model(), STEPS, phases=phases)


def test_evidence_is_taken_for_the_ranges_that_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each gate was measured to cost, times the share of that width's error that the fit leaves."""
    monkeypatch.setattr(range_fit, "ROWS", 128)
    found = {}
    for ranges in ("largest", "fitted"):
        model = _model(activation_ranges=ranges)
        schedule = _schedule(model)
        _train(model, schedule, FIXED_FROM - 1)
        passes = torch.cat([_batch(step) for step in range(FIXED_FROM - 1)])
        layer = next(adapted_layers(model))[1]
        weight = layer.merged_weight("default", layer.weight).detach()  # all gates are open: unrounded
        present = layer.quantizers_of("default")["weight"].range_.detach().clone()
        before = layer.gates_of("default").evidence.clone()
        schedule.step()  # without a pass in between
        found[ranges] = layer.gates_of("default").evidence / before
    largest = _range(_quantizer(_trained_to(FIXED_FROM - 1)))
    for gate, bits in enumerate((2, 4, 8)):
        errors = [_error(passes, largest * factor, bits) for factor in FACTORS]
        assert float(found["fitted"][1, gate]) == pytest.approx(min(errors) / errors[PRESENT], rel=1e-3)
        fitted = Quantizer(calibration_passes=1, shape=tuple(weight.shape))
        fitted.calibrate_to(weight)
        fitted.fit(weight, bits)
        share = _error(weight, _range(fitted), bits) / _error(weight, float(present), bits)
        assert float(found["fitted"][0, gate]) == pytest.approx(share, rel=1e-3)
    assert torch.equal(found["fitted"][:, 3], torch.ones(2))
    assert torch.equal(found["largest"], torch.ones(2, 4))
    assert float(found["fitted"][1, 1]) < 0.5


def _trained_to(steps: int) -> PeftModel:
    model = _model()
    _train(model, _schedule(model), steps)
    return model


def test_affine_inputs_begin_where_they_are_rounded_best_and_evidence_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_fit, "ROWS", 128)
    found = {}
    for ranges in ("fitted", "affine"):
        model = _model(activation_ranges=ranges, quantizers=["weight", "input", "output"])
        schedule = _schedule(model)
        _train(model, schedule, FIXED_FROM - 1)
        before = next(adapted_layers(model))[1].gates_of("default").evidence.clone()
        fits = {site: RangeFit(_quantizer(model, site=site)) for site in ("input", "output")}
        schedule.step()
        found[ranges] = next(adapted_layers(model))[1].gates_of("default").evidence / before
        assert fits["input"].affine == (ranges == "affine")
        assert not fits["output"].affine, "of what a layer reads alone"
    rows = [site.value for site in next(adapted_layers(model))[1].rows_of("default")]
    better, same = found["affine"][rows.index("input")], found["fitted"][rows.index("input")]
    assert bool((better[:2] < same[:2]).all()), "2^b codes of the values' own span leave less of the error"
    assert torch.equal(found["affine"][rows.index("output")], found["fitted"][rows.index("output")])
    quantizer = _quantizer(model)
    assert not quantizer.is_signed
    assert quantizer.low_ is not None
    low, high = float(quantizer.low_), float((quantizer.low_ + quantizer.range_).detach())
    passes = torch.cat([_batch(step) for step in range(FIXED_FROM - 1)])
    assert float(passes.min()) <= low < 0.0 < high <= float(passes.max()) + 1e-5


def test_a_new_schedule_judges_affine_inputs_around_zero_again() -> None:
    model = _model(activation_ranges="affine")
    _train(model, _schedule(model), STEPS)
    low = _quantizer(model).low_
    assert low is not None
    assert float(low) < 0.0
    _train(model, _schedule(model), 2)
    assert float(_quantizer(model).low_) == 0.0  # type: ignore[arg-type]
    assert _quantizer(model).is_signed
    assert _range(_quantizer(model)) >= 10.0


def test_by_descent_it_happens_when_gates_are_fixed() -> None:
    model = _model()
    schedule = _schedule(model, allocation="descent", phases=(0.25, 0.25, 0.25))
    _train(model, schedule, 17)
    assert _range(_quantizer(model)) > 8.0
    _train(model, schedule, 1)
    assert _range(_quantizer(model)) < 8.0


def test_processes_agree_on_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others saw counts: here they saw values so small that the narrowest range is best."""

    def reduced(tensor: Tensor, **_: object) -> None:
        if len(tensor) == 2 * 3 * (1 + len(FACTORS)):
            theirs = torch.linspace(1e9, 0.0, len(FACTORS))
            tensor += torch.cat([theirs[PRESENT].expand(3), theirs.repeat(3)]).repeat(2)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, FIXED_FROM - 1)
    before = _range(_quantizer(model))
    _train(model, schedule, 1)
    assert _range(_quantizer(model)) == pytest.approx(before * FACTORS[-1], rel=1e-5)


def test_a_process_that_saw_no_pass_takes_part_with_those_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait for it otherwise."""
    reduced: list[int] = []

    def reduce(tensor: Tensor, **_: object) -> None:
        reduced.append(tensor.numel())
        if tensor.numel() == 1:  # whether anybody saw a pass
            tensor.fill_(1.0)

    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, FIXED_FROM - 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    schedule.replay.recent.passes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()
    assert 2 * 3 * (1 + len(FACTORS)) in reduced


def test_each_is_fitted_for_the_width_that_it_learned() -> None:
    """With 8 bits for the same values the largest magnitude is left where it is."""
    model = _model()
    schedule = _schedule(model, budget="bops=0.5")
    _train(model, schedule, FIXED_FROM)
    assert summarize(model)[0].bits["input"] >= 8
    assert _range(_quantizer(model)) == pytest.approx(10.0)


def test_heads_and_attention_are_fitted_too_and_a_shared_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[int] = Counter()

    def see(fit: RangeFit, x: Tensor) -> None:
        seen[id(fit.quantizer)] += 1

    monkeypatch.setattr(RangeFit, "see", see)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    config = BayesianLoraConfig(
        r=2,
        target_modules=["query", "key", "value"],
        modules_to_save=["pooler"],
        task_type="SEQ_CLS",
        placement="merged",
        calibration_passes=1,
        quantize_attention=True,
        quantize_head=True,
        activation_ranges="fitted",
    )
    model = get_peft_model(base, config)
    schedule = GateSchedule(model, 8, phases=(0.25, 0.25, 0.5))
    for _ in range(4):
        model.train()(input_ids=torch.randint(50, (3, 5)), labels=torch.tensor([0, 1, 0])).loss.backward()
        schedule.step()
    # One input for query, key and value; four operands of two products; inputs of pooler and classifier.
    assert len(seen) == 1 + 4 + 2
    assert set(seen.values()) == {4}
    assert set(seen) == {id(quantizer) for quantizer in fitted_quantizers(model)}


@pytest.mark.parametrize("placement", ["merged", "separate"])
def test_nothing_is_rounded_while_ranges_are_fitted(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that gates which someone has set before do not change what is fitted; afterwards all is rounded again."""
    seen: list[Tensor] = []
    monkeypatch.setattr(RangeFit, "see", lambda fit, x: seen.append(x.clone()))
    model = _model(placement=placement, quantizers=["weight", "input"])
    schedule = _schedule(model, budget="bops=1", allocation="descent", phases=(0.25, 0.25, 0.25))
    _train(model, schedule, 17)
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer.gates_of("default").bit_logits.data.fill_(-4.0)
    model.train()(_batch(17))
    schedule.step()
    expected = []
    for step in range(2, 18):
        x = _batch(step)
        for layer in layers:
            expected.append(x)
            down, diagonal, up = (getattr(layer, f"bayesian_lora_{n}")["default"] for n in ("down", "diagonal", "up"))
            weight = layer.weight + layer.scaling["default"] * (up * diagonal) @ down
            outputs = (x @ weight.T + layer.bias).detach()
            x = torch.tanh(outputs)
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (model.eval()(_batch(17)) - outputs).abs().max() > 0.05


def test_looking_at_passes_leaves_no_weight_unrounded_that_a_layer_keeps() -> None:
    model = _model(placement="separate", quantizers=["weight", "input"])
    schedule = _schedule(model, budget="bops=0.5")
    _train(model, schedule, FIXED_FROM + 1)
    x = _batch(30)
    with torch.no_grad():
        expected = model.eval()(x)
        for layer in adapted_layers(model):
            layer[1].gates_of("default").clamp(-8.0, 8.0)  # what was kept is of no use any more
        range_fits(model, [((x,), {})])
        assert torch.equal(model(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_a_model_that_is_compiled_in_place_is_looked_at_uncompiled() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    model = _model()
    schedule = _schedule(model)
    model.compile(backend=backend)
    _train(model, schedule, FIXED_FROM - 1)
    before = len(compiled)
    schedule.step()
    assert len(compiled) == before > 0
    assert _range(_quantizer(model)) < 8.0


def test_weights_that_share_a_width_are_judged_together() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    targets = ["query", "key", "value"]
    config = BayesianLoraConfig(r=2, target_modules=targets, placement="merged", tie_groups="fused")
    model = get_peft_model(base, config)
    layers = [layer for _, layer in adapted_layers(model)]
    layers[2].weight.data[0, 0] = 5.0
    for layer in layers:
        layer.quantizers_of("default")["weight"].cover(layer.weight)
    found = layers[0].errors_of_fit("default", (2, 4))
    each = [
        torch.stack([layer.quantizers_of("default")["weight"].errors_of_fit(layer.weight, bits) for bits in (2, 4)])
        for layer in layers
    ]
    torch.testing.assert_close(found, sum(each))
    assert (found[:, 1] < found[:, 0]).all()


def test_a_weight_that_is_elsewhere_is_not_judged() -> None:
    model = _model()
    layer = next(adapted_layers(model))[1]
    layer.base_layer.to("meta")
    assert not layer.errors_of_fit("default", (2, 4)).any()


def test_a_run_that_ends_before_says_that_ranges_stay() -> None:
    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, 2)
    with pytest.warns(RankbitsWarning, match="after 2 of 24 steps, before the ranges of activations were fitted"):
        schedule.replay.end(2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_a_compiled_model_is_seen_too() -> None:
    model = _model()
    schedule = _schedule(model)
    _train(torch.compile(model, backend="eager"), schedule, FIXED_FROM + 1)
    assert _range(_quantizer(model)) < 8.0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`activation_ranges` must be one of .*'affine'.*, got 'best'"):
        _model(activation_ranges="best")
