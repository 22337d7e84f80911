"""The arithmetic of benchmarks/training_speed and the recipes of its sides, without any training."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from rankbits import BayesianLoraConfig
from rankbits.tuners.bayesian_lora import learning_adapters


@pytest.fixture
def study(modules_of):
    """The benchmark's modules."""
    load = modules_of("training_speed")
    return SimpleNamespace(**{name: load(name) for name in ("run", "sides", "measure")})


def test_the_ratio_is_that_of_medians_and_the_quartiles_those_of_rounds(study):
    theirs, ours = [1.0, 2.0, 4.0], [1.5, 2.2, 4.0]
    ratio, low, high = study.run.compared(ours, theirs)
    assert ratio == pytest.approx(1.1)
    assert (low, high) == (1.0, 1.5)


def test_a_broken_promise_is_named(study, capsys):
    whole = {"standing": 1.5, "measuring": 3.0, "fixed": 1.05}
    for variant, ratio in (("affine", "1.890"), ("q-ra", "1.290")):
        missed = []
        slow = {"seconds": {moment: {"lora": [1.0] * 5, variant: [ratio] * 5} for moment, ratio in whole.items()}}
        case = next(case for case in study.run.STEPS if case.label == f"steps-qkv-{variant}-128")
        study.run.step_rows(case, slow, missed)
        assert missed == [f"steps-qkv-{variant}-128 run: {ratio}, at most 1.2 was promised"]
    case = next(case for case in study.run.STEPS if case.label == "steps-all-descent-128")
    study.run.step_rows(case, {"seconds": {"sampled": {"lora": [1.0] * 5, "descent": [1.31] * 5}}}, missed)
    assert missed[1:] == ["steps-all-descent-128 sampled: 1.310, at most 1.3 was promised"]
    taken = {"reference": [1.0] * 3, "fused": [0.1] * 3, "copy": [0.01] * 3}
    taken |= {"fused, forward": [0.05] * 3, "one width, forward": [0.02] * 3}
    study.run.kernel_rows({"seconds": {"2048 x 384": taken}}, missed)
    assert missed[2:] == ["quantizer on 2048 x 384: 10.0 times faster, at least 12.0 were promised"]
    study.run.peak_rows({"peak-all-lora": {"peak_bytes": 100}, "peak-all-q-ra": {"peak_bytes": 131}}, missed)
    assert missed[3:] == ["peak memory, all, q-ra: 1.310, at most 1.3 was promised"]
    assert "| 1.310 | 1.310 to 1.310 | 1.3 |" in capsys.readouterr().out


def test_phases_are_those_of_the_recipe_and_weighted_as_in_a_run(study):
    for variant, shares in study.run.SHARES.items():
        gates = study.sides.recipe(variant).gates
        assert gates.allocation is None
        expected = {"standing": gates.warmup / 2, "measuring": gates.warmup / 2, "fixed": 1 - gates.warmup}
        assert shares == pytest.approx(expected)
        assert list(shares) == list(study.sides.MOMENTS[variant])


@pytest.mark.parametrize("variant", ["q-ra", "affine16", "affine", "descent", "ra"])
def test_what_is_timed_is_the_phase_that_it_is_called_after(study, variant):
    model = nn.Sequential(nn.Linear(64, 64))
    adapter = {"learn_bits": False} if variant == "ra" else {"quantizers": ["weight"]}
    model = get_peft_model(model, BayesianLoraConfig(r=4, target_modules=["0"], **adapter))
    budget = "rank=2" if variant == "ra" else "bits=8"
    recipe = study.sides.recipe(variant, (f"gates.budget={budget}",))
    schedule = study.sides.gate_schedule(recipe, model, study.sides.TOTAL_STEPS)
    for moment, completed in study.sides.MOMENTS[variant].items():
        if moment == "fixed":
            for _, _, gates in learning_adapters(model):
                gates.bit_logits.data.copy_(torch.tensor(study.sides.FIXED_LOGITS))
        schedule.restore(completed)
        phase = schedule.phase()
        found = "fixed" if phase.fixed else "measuring" if phase.measures else "standing" if phase.stands else "sampled"
        assert found == moment


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("variant", ["lora", "q-ra", "affine", "descent", "ra"])
def test_every_variant_can_make_a_step(study, variant):
    sides = study.sides
    side = sides.Side(sides.recipe(variant, (sides.MODULES["qkv"],)), sides.batch_of(2, 8))
    before = [parameter.detach().clone() for parameter in side.trained]
    side.step()
    assert any(not now.equal(then) for now, then in zip(side.trained, before, strict=True))


def test_every_case_has_one_name(study):
    labels = [case.label for case in study.run.CASES]
    assert len(set(labels)) == len(labels)


def test_rounds_alternate_their_order(study):
    calls = []
    taken = study.measure.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls[2 * study.measure.WARM_UP :] == ["a", "b", "b", "a"]
    assert {name: len(values) for name, values in taken.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("modules", ["qkv", "all"])
def test_both_sides_adapt_the_same_modules_with_the_same_rank(study, modules):
    """And ours is the recipe of the accuracy study, calibration and targets aside."""
    sides = study.sides
    lora, ours, ranks = (sides.recipe(v, (sides.MODULES[modules],)) for v in ("lora", "q-ra", "ra"))
    assert (lora.method, ours.method) == ("lora", "bayesian-lora")
    for name in ("r", "alpha", "targets", "dropout", "modules_to_save"):
        assert getattr(lora.adapter, name) == getattr(ours.adapter, name) == getattr(ranks.adapter, name)
    assert not ranks.adapter.learn_bits
    studied = sides.load(sides.POINT.recipe, sides.POINT.changes)
    assert ours.gates == studied.gates
    changed = {"calibration_passes", "targets"}
    assert ours.adapter.model_dump(exclude=changed) == studied.adapter.model_dump(exclude=changed)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_affine_inputs_are_timed_with_low_ends(study):
    sides = study.sides
    side = sides.Side(sides.recipe("affine", (sides.MODULES["qkv"],)), sides.batch_of(2, 8))
    side.step()
    side.enter("fixed", sides.MOMENTS["affine"]["fixed"])
    lows = [quantizer.lows for quantizer in sides.quantizers_of(side.model) if quantizer.lows is not None]
    assert lows
    assert all(bool((low < 0).all()) for low in lows)
