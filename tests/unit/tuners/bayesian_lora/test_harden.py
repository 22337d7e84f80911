"""Hardening keeps what the model computes and drops what encoded its gates."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from rankbits import BayesianLoraConfig, GateSchedule, harden, summarize
from rankbits.errors import HardenError
from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.tuners.bayesian_lora import adapted_layers
from rankbits.tuners.bayesian_lora.config import Site

ALL_SITES = ["weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output", "input"]
VARIANTS = {
    "q+ra": {},
    "q": {"learn_rank": False},
    "ra": {"learn_bits": False},
    "hard concrete": {"rank_gate": "hard_concrete"},
    "all sites": {"quantizers": ALL_SITES},
}


def _clone(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_output_before_equals_output_after(bert, batch, adapt, learn, settings, tmp_path) -> None:
    model = adapt(bert, target_modules=["query", "value", "dense"], **settings)
    learn(model, rank=2, **batch)
    expected, learned = model(**batch).logits, summarize(model)
    model.save_pretrained(tmp_path / "soft")
    assert harden(model) is model
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.train()(**batch).logits, model.eval()(**batch).logits)

    after = summarize(model)
    assert [(s.name, s.rank, s.bits) for s in after] == [(s.name, s.rank, s.bits) for s in learned]
    assert [name for name, _ in model.named_parameters() if "logits" in name or "log_range" in name] == []
    rank = 4 if settings.get("learn_rank") is False else 2
    for _, layer in adapted_layers(model):
        assert layer.bayesian_lora_down["default"].shape == (rank, layer.in_features)
        assert layer.bayesian_lora_diagonal["default"].shape == (rank,)
        assert layer.bayesian_lora_up["default"].shape == (layer.out_features, rank)
        assert layer.gates_of("default") is None
        assert all(isinstance(q, FixedQuantizer) for q in layer.bayesian_lora_quantizers["default"].values())
    model.save_pretrained(tmp_path / "hard")
    sizes = [(tmp_path / kind / "adapter_model.safetensors").stat().st_size for kind in ("soft", "hard")]
    assert sizes[1] < sizes[0]


def test_widths_are_really_different_in_the_test_model(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0", "2"])
    learn(model, rows, rank=2)
    harden(model)
    assert {width for s in summarize(model) for width in s.bits.values()} == {2, 4, 8, 16}


def test_hardening_twice_changes_nothing(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0", "2"])
    learn(model, rows, rank=2)
    harden(model)
    state, config = _clone(model), model.peft_config["default"]
    assert harden(model) is model
    assert model.peft_config["default"] is config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


GROUPS = {"granularity": "group", "input_granularity": "group", "group_size": 2}


@pytest.mark.parametrize("ranges", [{}, GROUPS], ids=["one range", "groups"])
def test_hardened_adapters_load_onto_a_fresh_base(mlp, rows, adapt, learn, tmp_path, ranges) -> None:
    base = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    model = adapt(mlp, target_modules=["0", "2"], quantizers=ALL_SITES, **ranges)
    learn(model, rows, rank=3)
    harden(model)
    expected = model(rows)
    inputs = [layer.quantizer_of("default", Site.INPUT).fixed_range for _, layer in adapted_layers(model)]
    assert [tuple(r.shape) for r in inputs] == ([(6, 1), (5, 1)] if ranges else [(), ()])
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        fresh = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
        fresh.load_state_dict(base)
        loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(loaded(rows), expected)
        assert summarize(loaded) == summarize(model)
        assert not any(p.requires_grad for p in loaded.parameters())


def test_an_unsigned_input_stays_unsigned(rows, adapt, learn, tmp_path) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    base = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    model = adapt(mlp, target_modules=["0", "2"], quantizers=["input"])
    learn(model, rows)
    expected = model(rows)
    harden(model)
    assert torch.equal(model(rows), expected)
    assert model.peft_config["default"].unsigned_inputs == ["2"]
    model.save_pretrained(tmp_path)
    fresh = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    fresh.load_state_dict(base)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    signs = [layer.bayesian_lora_quantizers["default"]["input"].is_signed for _, layer in adapted_layers(loaded)]
    assert signs == [True, False]
    assert torch.equal(loaded(rows), expected)


@pytest.mark.parametrize("ranges", [{}, GROUPS], ids=["one range", "groups"])
def test_affine_inputs_stay_as_they_are_when_saved_hardened_merged_and_loaded(rows, adapt, ranges, tmp_path) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 6))
    base = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    settings = {"placement": "merged", "activation_ranges": "affine", "calibration_passes": 1}
    model = adapt(mlp, target_modules=["0", "2"], **settings, **ranges).train()
    schedule = GateSchedule(model, 8, budget="bops=0.0625", phases=(0.5, 0.0, 0.0))
    for _ in range(8):
        model(rows).square().mean().backward()
        schedule.step()
    model.eval()
    expected = model(rows)
    lows = [layer.quantizer_of("default", Site.INPUT).low_.clone() for _, layer in adapted_layers(model)]
    assert all(bool((low != 0).any()) for low in lows)

    def load(path):
        fresh = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 6))
        fresh.load_state_dict(base)
        return PeftModel.from_pretrained(fresh, path).eval()

    model.save_pretrained(tmp_path / "learning")
    assert torch.equal(load(tmp_path / "learning")(rows), expected)
    harden(model)
    assert torch.equal(model(rows), expected)
    model.save_pretrained(tmp_path / "hard")
    loaded = load(tmp_path / "hard")
    assert torch.equal(loaded(rows), expected)
    found = [layer.quantizer_of("default", Site.INPUT).low_ for _, layer in adapted_layers(loaded)]
    assert all(torch.equal(one, other) for one, other in zip(found, lows, strict=True))
    loaded.merge_adapter()
    assert torch.equal(loaded(rows), expected)


def test_the_scale_keeps_the_maximum_rank(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, r=4, alpha=8.0, target_modules=["0"], learn_bits=False)
    learn(model, rows, rank=1)
    harden(model)
    ((_, layer),) = adapted_layers(model)
    assert layer.scaling["default"] == 2.0
    assert summarize(model)[0].max_rank == 4
    assert model.peft_config["default"].r == 4


def test_without_a_schedule_it_is_refused_and_nothing_changes(mlp, rows, adapt) -> None:
    model = adapt(mlp, target_modules=["0"]).train()
    for _ in range(3):
        model(rows)
    state = _clone(model)
    with pytest.raises(HardenError, match="gate schedule was never stepped"):
        harden(model)
    assert not model.peft_config["default"].hardened
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_quantizers_without_a_range_are_named_and_nothing_changes(mlp, rows, adapt) -> None:
    model = adapt(mlp, target_modules=["0", "2"], init_weights=True, calibration_passes=50).train()
    for _ in range(3):
        model(rows)
    GateSchedule(model, 10).step()
    state = _clone(model)
    with pytest.raises(HardenError, match=r"the quantizers \['up'\] of 'base_model.model.0' have no range"):
        harden(model)
    assert all(layer.gates_of("default") is not None for _, layer in adapted_layers(model))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_merged_adapter_is_refused(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0"], learn_bits=False)
    learn(model, rows)
    model.merge_adapter()
    with pytest.raises(HardenError, match=r"is merged into 'base_model\.model\.0': unmerge it"):
        harden(model)


def test_an_unknown_adapter_is_refused_with_those_there_are(mlp, rows, adapt) -> None:
    model = adapt(mlp, target_modules=["0"])
    with pytest.raises(HardenError, match=r"no Bayesian-LoRA adapter 'other'; it has \['default'\]"):
        harden(model, "other")
    with pytest.raises(HardenError, match="it has none"):
        harden(nn.Linear(2, 2))


def test_other_adapters_stay_as_they_are(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0"])
    learn(model, rows, rank=2)
    model.add_adapter("other", BayesianLoraConfig(r=3, target_modules=["0"]))
    harden(model)
    ((_, layer),) = adapted_layers(model)
    assert layer.gates_of("other") is not None
    assert layer.bayesian_lora_down["other"].shape[0] == 3
    assert not model.peft_config["other"].hardened


def test_injected_adapters_are_hardened_with_their_own_names(mlp, rows, learn) -> None:
    config = BayesianLoraConfig(r=4, target_modules=["0"], init_weights=False, calibration_passes=1)
    model = inject_adapter_in_model(config, mlp)
    learn(model, rows, rank=2)
    expected = model(rows)
    harden(model)
    torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-6)
    assert model.peft_config["default"].hardened_ranks == {"0": 2}


def test_a_hardened_adapter_can_be_merged_where_a_learning_one_could(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0", "2"], quantizers=["weight", "down", "diagonal", "up"])
    learn(model, rows, rank=2)
    harden(model)
    expected = model(rows)
    model.merge_adapter()
    torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-6)


def test_a_hardened_adapter_can_be_trained_on(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0", "2"])
    learn(model, rows, rank=2)
    harden(model)
    model.train()(rows).sum().backward()
    for _, layer in adapted_layers(model):
        for container in (layer.bayesian_lora_down, layer.bayesian_lora_diagonal, layer.bayesian_lora_up):
            assert container["default"].requires_grad
            assert container["default"].grad is not None


def test_an_adapter_without_gates_needs_no_schedule(mlp, rows) -> None:
    config = BayesianLoraConfig(r=2, target_modules=["0"], init_weights=False, learn_bits=False, learn_rank=False)
    model = get_peft_model(mlp, config).eval()
    expected = model(rows)
    harden(model)
    assert torch.equal(model(rows), expected)
    assert not [key for key in get_peft_model_state_dict(model) if "gates" in key]
