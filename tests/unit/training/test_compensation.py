"""Codes that make up for each other's errors: when they are chosen, by what, and that everything keeps them."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankbits import BayesianLoraConfig, GateSchedule, harden, summarize
from rankbits.errors import RankbitsWarning, ScheduleError
from rankbits.quant.codes import codes, step_at
from rankbits.quant.compensation import compensating_offsets
from rankbits.training import compensation
from rankbits.training.passes import PASSES
from rankbits.tuners.bayesian_lora import adapted_layers
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear

STEPS = 24
PHASES = (0.25, 0.0, 0.0)
"""By evidence gates are fixed when the warm-up ends, after 6 steps."""


def _model(**settings: object) -> PeftModel:
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Dropout(0.2), nn.Linear(24, 8))
    chosen = {"r": 2, "placement": "merged", "granularity": "group", "group_size": 8, "calibration_passes": 1}
    chosen |= {"rounding": "compensated", "target_modules": ["0", "3"]} | settings
    return get_peft_model(base, BayesianLoraConfig(**chosen))


def _schedule(model: nn.Module, **settings: object) -> GateSchedule:
    return GateSchedule(model, STEPS, **({"budget": "bits=4", "phases": PHASES} | settings))


def _batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(32, 3, generator=generator) @ torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    return causes + 0.1 * torch.randn(32, 16, generator=generator)


def _train(model: nn.Module, schedule: GateSchedule, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    model.train()
    for _ in range(steps):
        torch.manual_seed(schedule.completed_steps)
        x = _batch(schedule.completed_steps)
        (model(x) - x[:, :8].cumsum(dim=1)).square().mean().backward()
        optimizer.step()
        model.zero_grad()
        schedule.step()


def _trained(**settings: object) -> PeftModel:
    model = _model(**settings)
    _train(model, _schedule(model), STEPS)
    return model.eval()


def _layers(model: nn.Module) -> list[BayesianLoraLinear]:
    return [layer for _, layer in adapted_layers(model) if isinstance(layer, BayesianLoraLinear)]


def _offsets(model: nn.Module) -> list[Tensor]:
    found = [layer.quantizers_of("default")["weight"].offsets for layer in _layers(model)]
    return [offsets for offsets in found if offsets is not None]


def _sum(layer: BayesianLoraLinear) -> Tensor:
    a, e, b = (getattr(layer, f"bayesian_lora_{name}")["default"] for name in ("down", "diagonal", "up"))
    return (layer.weight + layer.scaling["default"] * (b * e) @ a).detach()


def test_what_is_evaluated_are_the_nearest_codes_of_the_sum_and_their_offsets() -> None:
    layer = _layers(_trained(learn_rank=False, quantizers=["weight"]))[0]
    weight, quantizer = _sum(layer), layer.quantizers_of("default")["weight"]
    step = step_at(quantizer.range_, 4).detach()
    nearest = codes(weight.unflatten(1, (-1, 8)), step, 4)
    expected = (nearest + quantizer.offsets.unflatten(1, (-1, 8))).clamp(-7, 7) * step
    assert quantizer.offsets.any()
    x = _batch(7)
    torch.testing.assert_close(layer(x), x @ expected.flatten(1).T + layer.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("placement", "budget", "widths"),
    [
        ("merged", "bits=2", [2, 2]),
        ("merged", "bits=4", [4, 4]),
        ("merged", "bits=3.4", [4, 2]),  # the first learns unrounded, and is rounded after the second
        ("separate", "bits=10", None),
    ],
)
@pytest.mark.parametrize("moment_bytes", [compensation.MOMENT_BYTES, 1])
def test_codes_are_chosen_for_what_a_layer_reads_where_none_before_it_is_rounded(
    placement: str, budget: str, widths: list[int] | None, moment_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensation, "MOMENT_BYTES", moment_bytes)
    model = _model(placement=placement, learn_rank=False, quantizers=["weight"])
    schedule = _schedule(model, budget=budget)
    until = STEPS if (placement, budget) == ("merged", "bits=4") else schedule.fixed_from
    _train(model, schedule, until)
    first, second = _layers(model)
    found = [entry.bits["weight"] for entry in summarize(model)]
    assert widths is None or found == widths
    bits = found[1]
    passes = torch.cat([_batch(step) for step in range(max(0, until - PASSES), until)])
    hidden = torch.tanh(passes @ _sum(first).T + first.bias).detach()
    quantizer = second.quantizers_of("default")["weight"]
    step = step_at(quantizer.range_, bits).detach().expand(8, 3, 8).reshape(8, 24)
    rounded = _sum(second) if placement == "merged" else second.weight
    largest = 2 ** (bits - 1) - 1
    expected = compensating_offsets(rounded, step, (-largest, largest), hidden.T @ hidden)
    assert expected.any()
    assert torch.equal(quantizer.offsets, expected)
    model.eval()
    for layer in (first, second):  # what was run unrounded before is rounded from now on
        x = torch.randn(4, layer.in_features)
        torch.testing.assert_close(layer(x), x @ layer.merged_weight("default", layer.weight).T + layer.bias)


def test_outputs_move_less_on_rows_never_seen() -> None:
    model = _trained(quantizers=["weight"])
    nearest = copy.deepcopy(model)
    for offsets in _offsets(nearest):
        offsets.zero_()
    x = _batch(1000)
    for layer, other in zip(_layers(model), _layers(nearest), strict=True):
        inputs = x if layer.in_features == 16 else torch.tanh(_layers(model)[0](x))
        target = inputs @ _sum(layer).T + layer.bias
        moved, before = ((found(inputs) - target).square().mean() for found in (layer, other))
        assert moved < 0.7 * before


def test_a_sum_learns_unrounded_once_its_width_is_known_and_is_rounded_after_the_last_step() -> None:
    model = _model(learn_rank=False, quantizers=["weight"])
    schedule = _schedule(model)
    _train(model, schedule, 12)
    layer, x = _layers(model)[0], _batch(9)
    assert {entry.bits["weight"] for entry in summarize(model)} == {4}
    torch.testing.assert_close(layer(x), x @ _sum(layer).T + layer.bias, rtol=1e-5, atol=1e-5)
    assert not any(offsets.any() for offsets in _offsets(model))
    rounded = layer.eval()(x)
    assert (rounded - (x @ _sum(layer).T + layer.bias)).abs().max() > 1e-2
    torch.testing.assert_close(rounded, x @ layer.train().merged_weight("default", layer.weight).T + layer.bias)
    _train(model, schedule, 12)
    assert all(offsets.any() for offsets in _offsets(model))
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_a_sum_at_two_bits_learns_through_its_codes_from_compensated_ones_on() -> None:
    model = _model(learn_rank=False, quantizers=["weight"])
    schedule = _schedule(model, budget="bits=2")
    _train(model, schedule, schedule.fixed_from)
    layer, x = _layers(model)[0], _batch(9)
    chosen = [offsets.clone() for offsets in _offsets(model)]
    assert all(offsets.any() for offsets in chosen)
    _train(model, schedule, STEPS - schedule.fixed_from)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    assert all(torch.equal(offsets, before) for offsets, before in zip(_offsets(model), chosen, strict=True))


@pytest.mark.parametrize(("placement", "budget"), [("merged", "bits=2"), ("merged", "bits=4"), ("separate", "bits=4")])
@pytest.mark.parametrize("rows", [None, 4])
def test_ranges_of_weights_learn_to_the_end_at_two_bits_and_no_others(
    placement: str, budget: str, rows: int | None
) -> None:
    model = _model(placement=placement, weight_gradient_rows=rows)
    schedule = _schedule(model, budget=budget)
    _train(model, schedule, schedule.fixed_from)
    quantizers = [layer.quantizers_of("default")["weight"] for layer in _layers(model)]
    before = [quantizer.log_range.detach().clone() for quantizer in quantizers]
    _train(model, schedule, 4)
    widths = [entry.bits["weight"] for entry in summarize(model)]
    assert min(widths) == (2 if placement == "separate" else int(budget[-1]))
    moved = [not torch.equal(q.log_range, b) for q, b in zip(quantizers, before, strict=True)]
    assert moved == [width == 2 for width in widths]


@pytest.mark.parametrize("budget", ["bits=4", "bits=2"])
def test_a_base_weight_beside_its_update_is_rounded_as_its_width_is_known(budget: str) -> None:
    model = _model(placement="separate")
    schedule = _schedule(model, budget=budget)
    _train(model, schedule, 5)
    assert not any(offsets.any() for offsets in _offsets(model))
    _train(model, schedule, 1)
    chosen = [offsets.clone() for offsets in _offsets(model)]
    assert all(offsets.any() for offsets in chosen)
    _train(model, schedule, STEPS - 6)
    assert all(map(torch.equal, _offsets(model), chosen))


def test_without_it_nothing_is_kept_and_nothing_stored() -> None:
    model = _model(rounding="nearest")
    schedule = _schedule(model)
    _train(model, schedule, STEPS - 1)
    assert not schedule.replay.recent.passes
    assert not _offsets(model)
    assert not any("offsets" in name for name in model.state_dict())


@pytest.mark.parametrize("placement", ["merged", "separate"])
@pytest.mark.parametrize("at", [3, 10, STEPS - 2])
def test_an_interrupted_run_ends_with_the_same_codes(placement: str, at: int) -> None:
    whole = _model(placement=placement)
    schedule = _schedule(whole)
    _train(whole, schedule, at)
    resumed = _model(placement=placement)
    resumed.load_state_dict(whole.state_dict())
    again = _schedule(resumed)
    again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    _train(whole, schedule, STEPS - at)
    _train(resumed, again, STEPS - at)
    assert all(offsets.any() for offsets in _offsets(whole))
    assert all(map(torch.equal, _offsets(resumed), _offsets(whole)))
    assert torch.equal(resumed.eval()(_batch(5)), whole.eval()(_batch(5)))


def test_only_the_last_training_passes_are_kept_and_only_as_long_as_they_may_be_needed() -> None:
    model = _model()
    schedule = _schedule(model)
    held = []
    for step in range(STEPS):
        _train(model, schedule, 1)
        if step:  # by then ranges are calibrated
            model.eval()(_batch(3))
        held.append(len(schedule.replay.recent.passes))
    fixed_from, between = schedule.fixed_from, STEPS - PASSES - schedule.fixed_from
    assert held == [*range(1, fixed_from), 0, *(0 for _ in range(between)), *range(1, PASSES), 0]
    model.train()(_batch(3))
    assert not schedule.replay.recent.passes


def test_choosing_codes_leaves_no_trace(step_that_leaves_no_trace) -> None:
    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, STEPS - 1)
    step_that_leaves_no_trace(schedule, "base_model.model.2")
    assert all(offsets.any() for offsets in _offsets(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_a_compiled_model_is_seen_too() -> None:
    model = _model()
    schedule = _schedule(model)
    compiled = torch.compile(model, backend="eager")
    _train(compiled, schedule, STEPS)
    assert all(offsets.any() for offsets in _offsets(model))


def test_without_a_pass_to_go_by_codes_stay_the_nearest_and_a_warning_says_so() -> None:
    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, STEPS - PASSES)
    for _ in range(PASSES - 1):
        schedule.step()
    with pytest.warns(RankbitsWarning, match="in the last 16 steps.* layers: weights keep their nearest codes"):
        schedule.step()
    assert not any(offsets.any() for offsets in _offsets(model))


def test_layers_are_looked_at_a_few_at_a_time_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    together = _trained()
    monkeypatch.setattr(compensation, "MOMENT_BYTES", 1)
    one_by_one = _trained()
    assert torch.equal(_offsets(one_by_one)[0], _offsets(together)[0])
    assert _offsets(one_by_one)[1].any()


FULL = {"code_range": "full"}


@pytest.mark.parametrize("settings", [{}, FULL, FULL | {"rounding": "nearest"}, FULL | {"scale_bits": 8}])
@pytest.mark.parametrize("budget", ["bits=4", "bits=2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hardening_merging_and_saving_keep_every_bit(
    tmp_path: Path, dtype: torch.dtype, budget: str, settings: dict[str, Any]
) -> None:
    model = _model(**settings)
    model = model.to(dtype)
    schedule = _schedule(model, budget=budget)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(STEPS):
        model.train()(_batch(step).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    x = _batch(77).to(dtype)
    expected = model.eval()(x)
    harden(model)
    torch.testing.assert_close(model(x), expected)
    expected = model(x)
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Dropout(0.2), nn.Linear(24, 8)).to(dtype)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(loaded(x), expected)
    assert all(map(torch.equal, _offsets(loaded), _offsets(model)))
    negative = [bool((layer.quantizers_of("default")["weight"].fixed_range < 0).any()) for layer in _layers(loaded)]
    assert negative == [bool(settings)] * 2
    loaded.merge_adapter()
    assert torch.equal(loaded(x), expected)
    loaded.unmerge_adapter()
    assert torch.equal(loaded(x), expected)


def test_codes_of_many_processes_follow_from_the_sum_of_their_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduced(moment: Tensor, **_: object) -> None:
        if moment.shape == (24, 24):  # as if the other processes had seen inputs that do not depend on each other
            moment.copy_(torch.eye(24))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    first, second = _offsets(_trained())
    assert first.any()
    assert not second.any()


def test_training_again_begins_with_the_nearest_codes_and_rounded_passes() -> None:
    model = _trained()
    schedule = _schedule(model)
    assert not any(layer.learns_unrounded["default"] for layer in _layers(model))
    _train(model, schedule, 1)
    assert not any(offsets.any() for offsets in _offsets(model))
    assert not any(bool(layer.quantizers_of("default")["weight"].fitted) for layer in _layers(model))
    _train(model, schedule, STEPS - 1)
    assert all(offsets.any() for offsets in _offsets(model))


def test_a_run_that_is_resumed_in_a_trained_model_keeps_the_codes_that_it_loaded() -> None:
    model = _model()
    schedule = _schedule(model, budget="bits=2")
    _train(model, schedule, 10)
    state = schedule.state_dict()
    chosen = [offsets.clone() for offsets in _offsets(model)]
    assert all(offsets.any() for offsets in chosen)
    again = _schedule(model, budget="bits=2")
    again.load_state_dict(state)
    _train(model, again, 2)
    assert all(map(torch.equal, _offsets(model), chosen))


def test_nothing_is_said_of_a_run_that_ends_early_with_all_codes_chosen(recwarn: pytest.WarningsRecorder) -> None:
    model = _model()
    schedule = _schedule(model, budget="bits=2")
    _train(model, schedule, 10)
    schedule.replay.end(schedule.completed_steps)
    assert not [w for w in recwarn if "training ended" in str(w.message)]


def test_a_hardened_layer_rounds_in_training_too() -> None:
    model = _model(learn_rank=False)
    schedule = _schedule(model)
    _train(model, schedule, 12)
    harden(model)
    layer, x = _layers(model)[0], _batch(9)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_in_training_are_looked_at_by_nobody(copied) -> None:
    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, 10)
    before = len(schedule.replay.recent.passes)
    other = copied(model)
    other.train()(_batch(1))
    assert before > 0
    assert len(schedule.replay.recent.passes) == before


@pytest.mark.parametrize("phases", [(0.25, 0.25, 0.0), (0.0, 0.0, 1.0)])
def test_phases_in_which_codes_cannot_be_chosen_are_refused(phases: tuple[float, float, float]) -> None:
    with pytest.raises(ScheduleError, match=r"chooses codes for widths that are fixed, but (0|24) of 24 steps have"):
        GateSchedule(_model(), STEPS, phases=phases)


def test_a_run_that_ends_early_says_that_codes_are_the_nearest() -> None:
    model = _model()
    schedule = _schedule(model)
    _train(model, schedule, 12)
    with pytest.warns(RankbitsWarning, match="training ended after 12 of 24 steps, before the codes of weights"):
        schedule.replay.end(12)


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`rounding` must be one of \['nearest', 'compensated'\], got 'up'"):
        BayesianLoraConfig(rounding="up")
    with pytest.raises(ValueError, match="`rounding`='compensated' needs a quantizer of the weight"):
        BayesianLoraConfig(rounding="compensated", learn_bits=False)
