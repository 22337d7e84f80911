"""Quantized heads: the linear layers that are trained in full lie on learned grids, in their trained copies alone."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rankbits import BayesianLoraConfig, GateSchedule, harden, optimizer_and_scheduler, summary
from rankbits.errors import HardenError, RankbitsWarning
from rankbits.tuners.bayesian_lora import GatePhase, QuantizedHeadLinear, learning_adapters, quantized_heads
from rankbits.tuners.bayesian_lora.config import Site

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
IDS = torch.randint(2, 60, (4, 7), generator=torch.Generator().manual_seed(5))
POOLER, CLASSIFIER = "bert.pooler.dense", "classifier"


def _bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def _config(**settings: Any) -> BayesianLoraConfig:
    chosen: dict[str, Any] = {
        "r": 2,
        "target_modules": ["query", "value"],
        "modules_to_save": ["pooler"],
        "task_type": "SEQ_CLS",
        "quantizers": ["weight"],
        "calibration_passes": 1,
        "quantize_head": True,
    }
    return BayesianLoraConfig(**(chosen | settings))


def _attach(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    return get_peft_model(_bert() if model is None else model, _config(**settings))


def _heads(model: nn.Module, adapter: str = "default") -> dict[str, QuantizedHeadLinear]:
    infix = f".modules_to_save.{adapter}"
    found = {name.removeprefix("base_model.model."): head for name, head in quantized_heads(model)}
    return {name.replace(infix, ""): head for name, head in found.items() if infix in name}


def _output(model: nn.Module) -> Tensor:
    return model(input_ids=IDS)[0]


def _set_widths(head: QuantizedHeadLinear, weight: int, inputs: int) -> None:
    with torch.no_grad():
        for row, count in enumerate((weight, inputs)):
            head.head_gates.bit_logits[row] = torch.where(torch.arange(4) < count, 6.0, -6.0)


def _calibrated(model: PeftModel) -> PeftModel:
    model.train()
    for _ in range(2):
        _output(model)
    return model.eval()


def _learned(model: PeftModel) -> PeftModel:
    """Calibrated, scheduled, the pooler at 4 bits (input 16), the classifier at 8 (input 2)."""
    _calibrated(model)
    GateSchedule(model, 100).step()
    _set_widths(_heads(model)[POOLER], 1, 3)
    _set_widths(_heads(model)[CLASSIFIER], 2, 0)
    return model


def test_linear_layers_of_trained_copies_are_quantized_and_originals_are_not() -> None:
    model = _attach(granularity="channel")
    heads = _heads(model)
    assert list(heads) == [POOLER, CLASSIFIER]
    for head in heads.values():
        assert [site.value for site in head.effective_sites("default")] == ["weight", "input"]
        assert head.quantizers_of("default")["weight"].range_count == head.out_features
        assert head.quantizers_of("default")["input"].range_count == 1
        assert head.effective_sites("other") == []
        assert head.gates_of("other") is None
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert len(wrappers) == 2
    assert not any(isinstance(part, QuantizedHeadLinear) for w in wrappers for part in w.original_module.modules())
    assert _heads(_attach(quantize_head=False)) == {}


def test_heads_of_several_layers_are_quantized_inside() -> None:
    model = _attach(RobertaForSequenceClassification(RobertaConfig(**SIZES)), modules_to_save=None)
    assert list(_heads(model)) == ["classifier.dense", "classifier.out_proj"]


@pytest.mark.parametrize(
    ("kind", "task", "name"),
    [(BertForTokenClassification, "TOKEN_CLS", "classifier"), (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs")],
)
def test_heads_that_peft_names_late_are_quantized(kind: type, task: str, name: str, tmp_path) -> None:
    torch.manual_seed(0)
    base = kind(BertConfig(**SIZES | {"num_labels": 2}))
    model = _calibrated(_attach(copy.deepcopy(base), task_type=task, modules_to_save=None))
    assert list(_heads(model)) == [name]
    GateSchedule(model, 10).step()
    _set_widths(_heads(model)[name], 1, 1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(_output(again), _output(model))


def test_a_plain_module_has_its_head_quantized() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)),
        BayesianLoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], quantize_head=True),
    )
    assert list(_heads(model)) == ["1"]


def test_while_calibrating_the_head_computes_what_it_did() -> None:
    outputs = []
    for quantized in (False, True):
        model = _attach(quantize_head=quantized, init_weights=False).train()
        torch.manual_seed(1)
        outputs.append(_output(model))
    assert torch.equal(*outputs)


def _double(model: PeftModel, name: str, **ranges: float) -> QuantizedHeadLinear:
    """A head in float64 with ranges that clip and gates that are neither open nor closed."""
    head = _heads(model)[name].double()
    with torch.no_grad():
        head.weight.normal_(std=0.5)
        head.bias.normal_()
        head.head_gates.bit_logits.normal_(std=1.5)
    for site, quantizer in head.quantizers_of("default").items():
        state = quantizer.state_dict()
        state["log_range"] = torch.full_like(state["log_range"], ranges[site]).log()
        state |= {"calibrated": torch.tensor(True), "seen_negative": torch.tensor(True)}
        quantizer.load_state_dict(state)
    return head


def test_a_training_pass_is_the_product_of_sampled_grids(paper) -> None:
    head = _double(_attach(), CLASSIFIER, weight=0.6, input=0.9).train()
    x = torch.randn(5, 32, dtype=torch.float64)
    torch.manual_seed(3)
    widths = head.head_gates.values(hard=False).widths.detach().double()
    torch.manual_seed(3)
    result = head(x)
    weight = paper.soft(head.weight, torch.tensor(0.6, dtype=torch.float32).log().exp().double(), widths[0])
    rounded = paper.soft(x, torch.tensor(0.9, dtype=torch.float32).log().exp().double(), widths[1])
    torch.testing.assert_close(result, rounded @ weight.T + head.bias, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(result, F.linear(x, head.weight, head.bias), atol=0.05)


@pytest.mark.parametrize("fixed_phase", [False, True])
@pytest.mark.parametrize(("weight_bits", "input_bits"), [(2, 4), (4, 16), (8, 2), (16, 8), (32, 32)])
def test_inference_rounds_at_single_widths(paper, weight_bits: int, input_bits: int, fixed_phase: bool) -> None:
    head = _double(_attach(), CLASSIFIER, weight=0.6, input=0.9).train(fixed_phase)
    _set_widths(head, weight_bits.bit_length() - 2, input_bits.bit_length() - 2)
    head.phase["default"] = GatePhase(fixed=fixed_phase)
    x = torch.randn(5, 32, dtype=torch.float64)
    weight_range, input_range = (head.quantizers_of("default")[s].range_.double() for s in ("weight", "input"))
    weight, rounded = paper.hard(head.weight, weight_range, weight_bits), paper.hard(x, input_range, input_bits)
    torch.testing.assert_close(head(x), rounded @ weight.T + head.bias, rtol=1e-9, atol=1e-9)


def test_the_weight_is_trained_straight_through() -> None:
    head = _double(_attach(), CLASSIFIER, weight=0.6, input=0.9)
    _set_widths(head, 1, 1)
    x, upstream = torch.randn(5, 32, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    head(x).backward(upstream)
    rounded = head.head_quantizers["input"].rounded(x, torch.tensor([True, False, False, False]))
    inside = head.weight.detach().abs() <= head.head_quantizers["weight"].range_.double()
    assert bool(inside.any())
    assert not bool(inside.all())
    torch.testing.assert_close(head.weight.grad, torch.where(inside, upstream.T @ rounded, 0.0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head.bias.grad, upstream.sum(dim=0))


def test_gates_and_ranges_learn_from_the_loss_and_only_when_active() -> None:
    model = _calibrated(_attach()).train()
    with torch.no_grad():
        for head in _heads(model).values():
            head.head_gates.bit_logits.fill_(0.3)
    for _ in range(20):
        # A sampled gate is often exactly 0 or 1, and has no gradient then.
        _output(model).square().sum().backward()
    for head in _heads(model).values():
        assert (head.head_gates.bit_logits.grad.abs().sum(dim=1) > 0).all()
        assert all(float(q.log_range.grad.abs().sum()) > 0 for q in head.quantizers_of("default").values())


def test_every_parameter_of_a_head_is_in_the_group_it_belongs_to() -> None:
    model = _attach()
    optimizer, _ = optimizer_and_scheduler(GateSchedule(model, 10), learning_rate=1e-3)
    group_of = {id(p): group["name"] for group in optimizer.param_groups for p in group["params"]}
    for head in _heads(model).values():
        assert group_of[id(head.weight)] == "matrices"
        assert group_of[id(head.bias)] == "vectors"
        assert group_of[id(head.head_gates.bit_logits)] == "gates"
        ranges = {site: group_of[id(q.log_range)] for site, q in head.quantizers_of("default").items()}
        assert ranges == {"weight": "weight_ranges", "input": "ranges"}
    assert len(group_of) == sum(p.requires_grad for p in model.parameters())


def test_phases_calibrate_cover_measure_and_fix() -> None:
    model = _attach(calibration_passes=50).train()
    schedule = GateSchedule(model, 8, budget="bits=8", phases=(0.5, 0.25, 0.25))
    head = _heads(model)[CLASSIFIER]
    for step in range(4):
        _output(model)
        assert all(q.is_calibrated == (step >= 2) for q in head.quantizers_of("default").values())
        assert head.head_gates.measures == (step >= 2)
        assert not any(q.log_range.requires_grad for q in head.quantizers_of("default").values())
        with torch.no_grad():
            head.weight.mul_(2.0)
        schedule.step()
    assert head.phase["default"].fixed
    assert bool(head.head_quantizers["weight"].fitted)
    assert not head.head_gates.bit_logits.requires_grad
    assert not head.head_gates.measures
    assert head.head_quantizers["weight"].log_range.requires_grad
    assert head.weight.requires_grad
    with model.disable_adapter():
        _output(model)
    model.set_adapter("default")
    assert not head.head_gates.bit_logits.requires_grad


def test_weights_that_grow_in_the_warm_up_are_covered() -> None:
    model = _calibrated(_attach()).train()
    schedule = GateSchedule(model, 8, phases=(0.5, 0.25, 0.25))
    head = _heads(model)[CLASSIFIER]
    with torch.no_grad():
        head.weight.mul_(3.0)
    schedule.step()
    torch.testing.assert_close(head.head_quantizers["weight"].range_, head.weight.detach().abs().max())


def test_the_summary_lists_heads_in_full() -> None:
    model = _learned(_attach())
    entries = {entry.name.rpartition("base_model.model.")[2]: entry for entry in summary(model)}
    pooler = entries["bert.pooler.modules_to_save.default.dense"]
    assert (pooler.rank, pooler.max_rank, pooler.expected_rank, pooler.rank_gate) == (0, 0, None, None)
    assert pooler.bits == {"weight": 4, "input": 16}
    assert entries["classifier.modules_to_save.default"].bits == {"weight": 8, "input": 2}
    assert "in full" in str(summary(model))
    assert "a head without a low-rank update" in str(summary(model))
    assert "in full" not in str(summary(_attach(quantize_head=False)))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_a_saved_and_a_hardened_head_compute_the_same(granularity: str, tmp_path) -> None:
    inputs = "group" if granularity == "group" else "tensor"
    model = _learned(_attach(granularity=granularity, input_granularity=inputs, group_size=16))
    expected = _output(model)
    model.save_pretrained(tmp_path / "learning")
    assert torch.equal(_output(PeftModel.from_pretrained(_bert(), tmp_path / "learning").eval()), expected)
    harden(model)
    torch.testing.assert_close(_output(model), expected, rtol=1e-4, atol=1e-6)
    config = model.peft_config["default"]
    assert config.hardened_bits[POOLER] == {"weight": 4, "input": 16}
    assert config.hardened_bits[CLASSIFIER] == {"weight": 8, "input": 2}
    assert set(config.hardened_ranks) == set(config.hardened_bits) - {POOLER, CLASSIFIER}
    assert harden(model) is model
    model.save_pretrained(tmp_path / "hard")
    again = PeftModel.from_pretrained(_bert(), tmp_path / "hard").eval()
    assert torch.equal(_output(again), _output(model))
    assert next(learning_adapters(again), None) is None
    for copied in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(_output(copied), _output(model))
        assert all(any(head.wrappers[0] is part for part in copied.modules()) for head in _heads(copied).values())
    with pytest.raises(ValueError, match=r"hardened for the layers .* not for the head 'classifier\.dense'"):
        PeftModel.from_pretrained(RobertaForSequenceClassification(RobertaConfig(**SIZES)), tmp_path / "hard")


def test_a_head_with_all_codes_of_its_width_computes_the_same_when_hardened_and_loaded(tmp_path) -> None:
    model = _learned(_attach(code_range="full", granularity="group", group_size=16))
    pooler = _heads(model)[POOLER]
    pooler.fit_weight_range("default")
    assert (pooler.quantizers_of("default")["weight"].range_ < 0).any()
    expected = _output(model)
    harden(model)
    torch.testing.assert_close(_output(model), expected, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(_output(PeftModel.from_pretrained(_bert(), tmp_path).eval()), _output(model))


def test_an_adapter_may_bear_the_name_of_a_part(tmp_path) -> None:
    # PEFT cuts the name of the adapter out of keys, wherever it stands next to last.
    model = _calibrated(get_peft_model(_bert(), _config(), adapter_name="input"))
    GateSchedule(model, 10).step()
    _set_widths(_heads(model, "input")[CLASSIFIER], 1, 1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_bert(), tmp_path / "input").eval()
    assert torch.equal(_output(again), _output(model))


def test_inputs_that_are_never_negative_have_an_unsigned_grid(tmp_path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(9, 6)
    config = BayesianLoraConfig(
        r=2,
        target_modules=["0"],
        modules_to_save=["2"],
        quantizers=["weight"],
        quantize_head=True,
        calibration_passes=1,
    )
    model = get_peft_model(copy.deepcopy(base), config).train()
    model(x), model(x)
    GateSchedule(model, 10).step()
    harden(model.eval())
    assert model.peft_config["default"].unsigned_inputs == ["2"]
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(x), model(x))


def test_hardening_refuses_a_head_that_saw_nothing() -> None:
    model = _calibrated(_attach())
    head = _heads(model)[CLASSIFIER]
    with torch.no_grad():
        head.weight.zero_()
    for quantizer in head.quantizers_of("default").values():
        quantizer.load_state_dict({name: torch.zeros_like(t) for name, t in quantizer.state_dict().items()})
    GateSchedule(model, 10).step()
    with pytest.raises(HardenError, match=r"the quantizers \['weight', 'input'\] of '.*classifier.*' have no range"):
        harden(model)


def test_without_adapters_the_original_head_runs() -> None:
    before = _output(_bert())
    model = _learned(_attach())
    with model.disable_adapter():
        assert torch.equal(_output(model), before)
    assert not torch.allclose(_output(model), before, atol=1e-4)


def test_adapters_have_heads_of_their_own() -> None:
    model = _learned(_attach())
    first = _output(model)
    model.add_adapter("plain", _config(quantize_head=False))
    model.add_adapter("second", _config())
    assert torch.equal(_output(model), first)
    assert [head.active_adapters for head in _heads(model).values()] == [["default"]] * 2
    assert [head.active_adapters for head in _heads(model, "second").values()] == [[]] * 2
    assert not any(p.requires_grad for head in _heads(model, "second").values() for p in head.parameters())
    assert {name for _, name, _ in learning_adapters(model)} == {"default"}
    model.set_adapter("second")
    assert {name for _, name, _ in learning_adapters(model)} == {"second"}
    assert all(p.requires_grad for head in _heads(model, "second").values() for p in head.parameters())
    _calibrated(model)
    second = _output(model)
    model.set_adapter("plain")
    assert not any(head.active_adapters for _, head in quantized_heads(model))
    model.set_adapter("default")
    assert torch.equal(_output(model), first)
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    model.set_adapter("second")
    assert list(_heads(model)) == []
    assert torch.equal(_output(model.eval()), second)


def test_injected_adapters_and_those_that_transformers_loads(tmp_path) -> None:
    model = _learned(_attach())
    expected = _output(model)
    model.save_pretrained(tmp_path)
    plain = _bert()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(_output(plain.eval()), expected)
    plain.disable_adapters()
    assert torch.equal(_output(plain), _output(_bert()))
    injected = inject_adapter_in_model(_config(modules_to_save=["pooler", "classifier"]), _bert())
    assert list(_heads(injected)) == [POOLER, CLASSIFIER]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_merging_leaves_plain_layers_on_the_grid_of_the_weight(kind: str) -> None:
    torch.manual_seed(0)
    base = _bert() if kind == "bert" else RobertaForSequenceClassification(RobertaConfig(**SIZES))
    model = _calibrated(_attach(base, placement="merged", modules_to_save=["pooler"] if kind == "bert" else None))
    for head in _heads(model).values():
        _set_widths(head, 1, 4)
    heads, expected = _heads(model), _output(model)
    with pytest.warns(RankbitsWarning, match=r"activations \['input'\] are floats again"):
        bare = model.merge_and_unload()
    assert not any(isinstance(module, QuantizedHeadLinear | ModulesToSaveWrapper) for module in bare.modules())
    for name, head in heads.items():
        layer = bare.get_submodule(name)
        assert type(layer) is nn.Linear
        assert len(layer.weight.unique()) <= 15
        assert torch.equal(layer.bias, head.bias)
    torch.testing.assert_close(_output(bare), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hardened", [False, True])
def test_unloading_leaves_the_trained_weight(hardened: bool) -> None:
    model = _learned(_attach())
    if hardened:
        harden(model)
    heads = _heads(model)
    bare = model.unload()
    for name, head in heads.items():
        layer = bare.get_submodule(name)
        assert type(layer) is nn.Linear
        assert layer.weight is head.weight


def test_merged_adapters_keep_the_quantizers_of_the_head() -> None:
    model = _learned(_attach(placement="merged", init_weights=False))
    expected = _output(model)
    model.merge_adapter()
    assert torch.equal(_output(model), expected)
    model.unmerge_adapter()
    assert torch.equal(_output(model), expected)


def test_gates_and_ranges_stay_float32_in_half_precision() -> None:
    model = _attach(_bert().to(torch.bfloat16)).train()
    for _ in range(2):
        loss = _output(model).float().square().sum()
    loss.backward()
    model.to(torch.float16)
    for head in _heads(model).values():
        assert head.head_gates.bit_logits.dtype == torch.float32
        assert all(q.log_range.dtype == torch.float32 for q in head.quantizers_of("default").values())
        assert torch.isfinite(head.weight.grad.float()).all()


def test_what_cannot_be_quantized_is_refused_before_anything_changes() -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    for settings, message in (
        ({}, "`quantize_head`=True, but no linear layer of Sequential is trained in full"),
        ({"modules_to_save": ["1"], "granularity": "group", "group_size": 3}, "'1': .*choose another `group_size`"),
        (
            {"modules_to_save": ["1"], "granularity": "group", "group_size": 3, "input_granularity": "group"},
            "'1': .*or granularity='channel' with input_granularity='tensor'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, BayesianLoraConfig(r=2, target_modules=["0"], quantize_head=True, **settings))
        assert all(type(layer) is nn.Linear for layer in base)
    with pytest.raises(ValueError, match="`quantize_head`=True needs learn_bits=True"):
        BayesianLoraConfig(quantize_head=True, learn_bits=False)


def test_sites_of_heads_are_those_of_the_site_order() -> None:
    head = _heads(_attach())[CLASSIFIER]
    assert head.rows_of("default") == [Site.WEIGHT, Site.INPUT]
    assert head.macs_per_row("default") == [32 * 3, 32 * 3]
    assert head.stored_numbers("default") == [32 * 3, 0]
