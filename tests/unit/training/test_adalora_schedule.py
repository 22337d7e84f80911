"""AdaLoRA's ranks follow the budget, its penalty is applied once a step, and nothing is lost between two processes."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rankbits import AdaloraSchedule
from rankbits.errors import ScheduleError
from rankbits.training.adalora_schedule import (
    AVERAGES,
    adalora_layers,
    distance_from_orthogonal,
    fix_ranks,
    largest,
    smoothed,
    task_loss_only,
)

STEPS = 12
# PEFT looks in its own rank_pattern for names of modules, where AdaLoRA has names of diagonals; it loads all the same.
LOADS = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
SETTINGS = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "orth_reg_weight": 0.3}


def _base() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def _model(seed: int = 0, **settings) -> PeftModel:
    base = _base()
    torch.manual_seed(seed)
    config = AdaLoraConfig(target_modules=["0", "2"], **({"total_step": STEPS} | SETTINGS | settings))
    return get_peft_model(base, config).train()


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return (model(x) - x[:, :4].flip(1)).square().mean()


def _run(schedule: AdaloraSchedule, optimizer: torch.optim.Optimizer, steps: range) -> list[int]:
    kept = []
    for step in steps:
        _loss(schedule.model, step).backward()
        schedule.add_orthogonality_gradient()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        kept.append(sum(schedule.kept().values()))
    return kept


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=0.05)


def test_scores_and_averages_are_those_of_the_formula() -> None:
    averages, sensitivity = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 0.0])
    result = smoothed(averages, sensitivity, 0.75, 0.5)
    # 0.75 * 1 + 0.25 * 5 = 2 and 0.75 * 2 = 1.5; then 0.5 * 3 + 0.5 * |5 - 2| and 0.5 * 4 + 0.5 * |0 - 1.5|.
    assert result.tolist() == [[2.0, 1.5], [3.0, 2.75]]


def test_exactly_so_many_are_kept_even_of_equal_scores() -> None:
    assert largest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]
    assert largest(torch.zeros(5), 3).tolist() == [True, True, True, False, False]
    assert largest(torch.ones(3), 0).tolist() == [False] * 3


def test_ranks_follow_the_budget_and_end_at_the_target() -> None:
    schedule = AdaloraSchedule(model := _model(), STEPS)
    kept = _run(schedule, _adam(model), range(STEPS))
    budget = schedule.budget
    assert [k for step, k in enumerate(kept, 1) if budget.masks(step)] == [
        budget.kept(step) for step in range(1, STEPS + 1) if budget.masks(step)
    ]
    assert (kept[0], kept[-1]) == (8, 4)
    assert budget.kept(6) < 8


def test_masks_and_averages_are_those_of_peft() -> None:
    """The same run, stepped by PEFT's own allocator as its documentation says, gives the same weights."""
    ours, theirs = _model(orth_reg_weight=0.0), _model(orth_reg_weight=0.0)
    schedule, optimizer = AdaloraSchedule(ours, STEPS), _adam(theirs)
    _run(schedule, _adam(ours), range(STEPS))
    for step in range(STEPS):
        _loss(theirs, step).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    for (_, mine), (_, peft) in zip(adalora_layers(ours), adalora_layers(theirs), strict=True):
        for part in ("lora_A", "lora_E", "lora_B"):
            assert torch.equal(getattr(mine, part)["default"], getattr(peft, part)["default"]), part
    fix_ranks(ours)
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern


def test_the_penalty_is_that_of_peft_and_its_gradient_autograds() -> None:
    model = _model()
    matrices = [m for _, layer in adalora_layers(model) for m in (layer.lora_A["default"], layer.lora_B["default"].T)]
    expected = 0.3 * sum(torch.norm(m @ m.T - torch.eye(4), p="fro") for m in matrices) / 4
    wanted = torch.autograd.grad(expected, leaves := [m for m in _trained(model) if min(m.shape) > 1])
    schedule = AdaloraSchedule(model, STEPS)
    torch.manual_seed(0)
    present = [torch.randn_like(leaf) for leaf in leaves]
    for leaf, gradient in zip(leaves, present, strict=True):
        leaf.grad = gradient.clone()
    assert schedule.add_orthogonality_gradient() == pytest.approx(float(expected.detach()), rel=1e-6)
    for leaf, before, added in zip(leaves, present, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, before + added, rtol=1e-5, atol=1e-7)
    matrices64 = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *m: distance_from_orthogonal(m), matrices64)
    assert float(distance_from_orthogonal([torch.eye(3, 5)])) == 0.0


def test_equal_start_and_target_ranks_are_no_error() -> None:
    schedule = AdaloraSchedule(model := _model(init_r=3, target_r=3), STEPS)
    assert _run(schedule, _adam(model), range(STEPS)) == [6] * STEPS
    assert set(fix_ranks(model).values()) == {3}


def test_a_resumed_run_equals_one_that_was_not_cut(tmp_path) -> None:
    for cut in (1, 5, 8, 9, 11):
        schedule = AdaloraSchedule(whole := _model(), STEPS)
        _run(schedule, _adam(whole), range(STEPS))
        schedule = AdaloraSchedule(first := _model(), STEPS)
        _run(schedule, optimizer := _adam(first), range(cut))
        first.save_pretrained(tmp_path / str(cut))
        saved = copy.deepcopy((schedule.state_dict(), optimizer.state_dict()))
        schedule = AdaloraSchedule(second := _model(seed=9, orth_reg_weight=0.0), STEPS)
        second.load_adapter(tmp_path / str(cut), "default", is_trainable=True)
        schedule.load_state_dict(saved[0])
        optimizer = _adam(second)
        optimizer.load_state_dict(saved[1])
        _run(schedule, optimizer, range(cut, STEPS))
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)), cut
        assert fix_ranks(whole) == fix_ranks(second)


@LOADS
def test_fixed_ranks_are_saved_alone_and_load_as_they_ran(tmp_path) -> None:
    schedule = AdaloraSchedule(model := _model(), STEPS)
    _run(schedule, _adam(model), range(STEPS))
    before = model(torch.eye(6))
    left = fix_ranks(model)
    assert not any(hasattr(layer, AVERAGES) for _, layer in adalora_layers(model))
    assert torch.equal(model(torch.eye(6)), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_base(), tmp_path)
    assert [len(layer.lora_E["default"]) for _, layer in adalora_layers(loaded)] == list(left.values())
    assert sum(left.values()) == 4
    torch.testing.assert_close(loaded(torch.eye(6)), before, rtol=1e-6, atol=1e-7)


@LOADS
def test_a_pruned_adapter_trains_on_with_the_ranks_it_has(tmp_path) -> None:
    schedule = AdaloraSchedule(model := _model(), STEPS)
    _run(schedule, _adam(model), range(STEPS))
    fix_ranks(model)
    model.save_pretrained(tmp_path / "first")
    pruned = PeftModel.from_pretrained(_base(), tmp_path / "first", is_trainable=True).train()
    schedule = AdaloraSchedule(pruned, STEPS)
    assert _run(schedule, _adam(pruned), range(STEPS)) == [4] * STEPS
    fix_ranks(pruned)
    pruned.save_pretrained(tmp_path / "second")
    again = PeftModel.from_pretrained(_base(), tmp_path / "second")
    torch.testing.assert_close(again(torch.eye(6)), pruned(torch.eye(6)), rtol=1e-6, atol=1e-7)
    other = PeftModel.from_pretrained(_base(), tmp_path / "first", is_trainable=True)
    other.peft_config["default"].target_r = 1
    with pytest.raises(ScheduleError, match="was pruned before: 4 of its 8 ranks are left, and target_r=1 asks for 2"):
        AdaloraSchedule(other, STEPS)


def test_a_matrix_without_part_in_the_loss_is_not_important() -> None:
    schedule = AdaloraSchedule(model := _model(tinit=0, tfinal=0, deltaT=1), STEPS)
    optimizer = _adam(model)
    (_, first), (_, second) = adalora_layers(model)
    for step in range(STEPS):
        second(torch.randn(3, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert not first.lora_E["default"].any()
    assert second.lora_E["default"].all()


def test_the_number_that_the_update_is_divided_by_does_not_train() -> None:
    """PEFT sets it to train when it casts it to the dtype of a base that is not in float32."""
    config = AdaLoraConfig(target_modules=["0", "2"], total_step=STEPS, **SETTINGS)
    model = get_peft_model(_base().to(torch.bfloat16), config).train()
    AdaloraSchedule(model, STEPS)
    trains = {name.split(".")[-2]: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert trains["ranknum"] is False
    assert trains["lora_E"] is True


def test_total_steps_that_the_config_left_open_are_set() -> None:
    model = _model(total_step=1, tinit=0, tfinal=0)
    schedule = AdaloraSchedule(model, 40, phases=(0.1, 0.3))
    config = model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (40, 4, 12)
    assert schedule.budget.last_change == 28


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"total_steps": 13}, "AdaLoraConfig[(]total_step=12[)], but the run will make 13 optimizer steps"),
        ({"phases": (0.5, 0.5)}, "sum below 1, got [(]0.5, 0.5[)]"),
        ({"orthogonality": -1.0}, "finite number of at least 0, got -1.0"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(given, message) -> None:
    model = _model()
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    with pytest.raises(ScheduleError, match=message):
        AdaloraSchedule(model, **({"total_steps": STEPS} | given))
    assert model.peft_config["default"].to_dict() == before
    assert not any(hasattr(layer, AVERAGES) for _, layer in adalora_layers(model))


def test_misuse_is_refused(tmp_path) -> None:
    with pytest.raises(ScheduleError, match="Linear has no AdaLoRA adapters in training"):
        AdaloraSchedule(nn.Linear(2, 2), 5)
    model = _model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ScheduleError, match="is_trainable=True"):
        AdaloraSchedule(PeftModel.from_pretrained(_base(), tmp_path), STEPS)
    schedule = AdaloraSchedule(model, STEPS)
    with pytest.raises(ScheduleError, match=r"before optimizer[.]zero_grad"):
        schedule.step()
    with pytest.raises(ScheduleError, match="importance of its ranks was not restored"):
        schedule.restore(3)
    with pytest.raises(ScheduleError, match="from 0 to the run's 12, got 13"):
        schedule.restore(13)
    _run(schedule, _adam(model), range(STEPS))
    with pytest.raises(ScheduleError, match="made for 12 steps and all were made"):
        schedule.step()


PROGRAM = """
import sys
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from rankbits import AdaloraSchedule

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
config = AdaLoraConfig(init_r=4, target_r=2, total_step=8, target_modules=["0", "2"], tfinal=2)
model = nn.parallel.DistributedDataParallel(get_peft_model(base, config).train())
schedule = AdaloraSchedule(model, 8)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
for step in range(8):
    torch.manual_seed(10 * step + rank)
    with model.no_sync():
        model(torch.randn(4, 6)).square().mean().backward()
    model(torch.randn(4, 6)).square().mean().backward()
    schedule.add_orthogonality_gradient()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
torch.distributed.destroy_process_group()
print(list(schedule.kept().values()), [p.double().sum().item().hex() for p in model.parameters()])
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs PyTorch's gloo backend")
def test_processes_that_train_together_keep_the_same_ranks(two_processes) -> None:
    first, second = two_processes(PROGRAM)
    assert first == second
    assert sum(int(number) for number in first.partition("]")[0].strip("[").split(",")) == 4


def test_labels_can_be_evaluated_without_an_adapter_in_training(tmp_path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def base() -> nn.Module:
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        return BertForSequenceClassification(config).eval()

    config = AdaLoraConfig(init_r=3, target_r=2, total_step=4, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(base(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        loaded(**batch)
    task_loss_only(loaded)
    out = loaded(**batch)
    assert float(out.loss) == float(nn.functional.cross_entropy(out.logits, batch["labels"]))
