"""Widths chosen by what closing each gate was measured to cost."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from rankbits import BayesianLoraConfig, Budget, GateSchedule, summarize
from rankbits.errors import ScheduleError
from rankbits.training.evidence import TRUST, nested, posterior_evidence, shrunk
from rankbits.training.gate_table import GateTable, PerGate
from rankbits.tuners.bayesian_lora import adapted_layers, learning_adapters
from rankbits.tuners.bayesian_lora.config import PAPER_SITES, Site

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PHASES = (0.5, 0.25, 0.25)
"""By evidence only the warm-up counts."""


class TwoPaths(nn.Module):
    """Two linear layers of one shape whose outputs add up, one of them a hundredth of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.loud(x) + 0.01 * self.quiet(x)
        return result


def _model(**settings: object) -> PeftModel:
    torch.manual_seed(3)
    chosen = {"r": 2, "placement": "merged", "quantizers": ["weight"], "calibration_passes": 1} | settings
    return get_peft_model(TwoPaths(), BayesianLoraConfig(target_modules=["loud", "quiet"], **chosen))


def _train(model: nn.Module, schedule: GateSchedule, steps: int, *, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(steps):
        x = torch.randn(32, 16)
        (model(x) - x.roll(1, dims=1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize("seed", range(3))
def test_the_layer_that_matters_keeps_more_bits(seed) -> None:
    model = _model()
    schedule = GateSchedule(model, 20, budget="bits=6", allocation="evidence", phases=PHASES)
    _train(model, schedule, 20, seed=seed)
    loud, quiet = (entry.bits["weight"] for entry in summarize(model))
    assert (loud, quiet) == (8, 4)
    assert schedule.budgets()[0].cost == 6.0


def test_logits_tell_by_how_much_a_gate_was_worth_its_price() -> None:
    model = _model()
    schedule = GateSchedule(model, 20, budget="bits=6", allocation="evidence", phases=PHASES)
    _train(model, schedule, 10)
    loud, quiet = (gates.bit_logits.detach() for _, _, gates in learning_adapters(model))
    assert loud[0, 0] >= loud[0, 1] > quiet[0, 1] > quiet[0, 3]


def test_what_is_measured_is_the_squared_gradient_by_open_gates() -> None:
    model = _model(weight_gradient_rows=4)
    schedule = GateSchedule(model, 4, budget="bits=6", allocation="evidence", phases=(0.5, 0.0, 0.5))
    _train(model, schedule, 1)
    (loud, _, gates), _ = learning_adapters(model)
    assert schedule.phase().measures
    x = torch.randn(8, 16)
    before = gates.evidence.clone()
    twin = copy.deepcopy(model)
    model.zero_grad()
    (model(x) * torch.arange(16.0)).mean().backward()
    measured = gates.evidence - before

    # The same pass with gates that are leaves of their own, and the gradient of the weight from all rows.
    layer = next(layer for name, layer in adapted_layers(twin) if name.endswith("loud"))
    quantizer = layer.quantizers_of("default")["weight"]
    values = torch.ones(4, requires_grad=True)
    weight = quantizer(layer._sum("default", layer.weight, None).detach(), values, hard=False)
    (x @ weight.T * torch.arange(16.0) / (8 * 16)).sum().backward()
    torch.testing.assert_close(measured[0], values.grad.square(), rtol=1e-3, atol=1e-12)
    assert loud is not None


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({"budget": "bits=6", "allocation": "evidence"}, (0.5, 0.0, 0.5)),
        ({"lambda_q": 0.0, "lambda_r": 0.0}, (0.5, 0.0, 0.5)),
    ],
)
def test_gates_that_cannot_close_before_they_are_fixed_are_not_sampled(options: dict, phases: tuple) -> None:
    model = _model()
    schedule = GateSchedule(model, 8, phases=phases, **options)
    with torch.no_grad():
        for _, _, gates in learning_adapters(model):
            gates.bit_logits.fill_(0.0)  # open, and sampled closed in one pass of six
    assert schedule.phase().stands
    assert not schedule.phase().measures
    model.train()
    x = torch.randn(4, 16)
    first = model(x)
    assert all(torch.equal(first, model(x)) for _ in range(8))
    first.sum().backward()
    assert all(gates.bit_logits.grad is None for _, _, gates in learning_adapters(model))
    ranges = [q.log_range for layer, name, _ in learning_adapters(model) for q in layer.quantizers_of(name).values()]
    assert not any(log_range.requires_grad for log_range in ranges)
    with torch.no_grad():
        for _, _, gates in learning_adapters(model):
            gates.bit_logits.copy_(torch.tensor([8.0, -4.0, -4.0, -4.0]))  # four bits, which meets the budget
    schedule.restore(4)
    assert not schedule.phase().stands


def test_gates_that_a_penalty_can_close_are_sampled_from_the_first_step() -> None:
    model = _model()
    schedule = GateSchedule(model, 8, phases=(0.5, 0.25, 0.25))
    assert not schedule.phase().stands
    with torch.no_grad():
        for _, _, gates in learning_adapters(model):
            gates.bit_logits.fill_(0.0)
    model.train()
    x = torch.randn(4, 16)
    first = model(x)
    assert not all(torch.equal(first, model(x)) for _ in range(8))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_pass_whose_loss_overflowed_is_no_evidence(factor) -> None:
    found = []
    for with_overflow in (False, True):
        model = _model()
        schedule = GateSchedule(model, 20, budget="bits=6", allocation="evidence", phases=PHASES)
        schedule.restore(schedule.warmup_steps // 2)
        assert schedule.phase().measures
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
        (model(x) - x.roll(1, dims=1)).square().mean().backward()
        if with_overflow:
            (factor * model(x).square().mean()).backward()
        found.append(schedule.controller.table.evidence().widths)
    assert bool((found[0] > 0.0).any())
    assert torch.equal(found[0], found[1])


def test_measuring_passes_are_free_of_noise() -> None:
    model = _model()
    schedule = GateSchedule(model, 4, budget="bits=6", allocation="evidence", phases=(0.5, 0.0, 0.5))
    _train(model, schedule, 1)
    with torch.no_grad():
        for _, _, gates in learning_adapters(model):
            gates.bit_logits.fill_(0.0)  # sampled, they would differ from pass to pass
    x = torch.randn(8, 16)
    assert torch.equal(model(x), model(x))


def test_an_interrupted_run_chooses_what_an_uninterrupted_one_does() -> None:
    whole = _model()
    schedule = GateSchedule(whole, 20, budget="bits=6", allocation="evidence", phases=PHASES)
    _train(whole, schedule, 8)
    resumed = _model()
    resumed.load_state_dict(whole.state_dict())
    again = GateSchedule(resumed, 20, budget="bits=6", allocation="evidence", phases=PHASES)
    again.load_state_dict(schedule.state_dict())
    _train(whole, schedule, 4, seed=5)
    _train(resumed, again, 4, seed=5)
    for (_, _, gates), (_, _, others) in zip(learning_adapters(whole), learning_adapters(resumed), strict=True):
        assert gates.evidence.any()
        assert torch.equal(gates.evidence, others.evidence)
        assert torch.equal(gates.bit_logits, others.bit_logits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"allocation": "luck"}, "allocation: given 'luck', expected one of descent, evidence"),
        ({"phases": (0.0, 0.5, 0.5)}, "second half of the warm-up, which has 0 of 20 steps"),
    ],
)
def test_what_evidence_cannot_do_is_refused(settings, said) -> None:
    chosen = {"budget": "bits=6", "allocation": "evidence", "phases": PHASES} | settings
    with pytest.raises(ScheduleError, match=said):
        GateSchedule(_model(), 20, **chosen)


def test_the_trainer_s_callback_does_not_ask_for_faster_gates(recwarn) -> None:
    from transformers import TrainerState, TrainingArguments

    from rankbits import RankbitsCallback, optimizer_and_scheduler
    from rankbits.errors import RankbitsWarning

    model = _model()
    schedule = GateSchedule(model, 20, budget="bits=6", phases=PHASES)
    optimizer, _ = optimizer_and_scheduler(schedule, learning_rate=1e-3)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["gates"] < 1.0
    state = TrainerState(max_steps=20)
    RankbitsCallback(schedule).on_train_begin(
        TrainingArguments("unused"), state, None, model=model, optimizer=optimizer
    )
    assert not [warning for warning in recwarn if issubclass(warning.category, RankbitsWarning)]


@pytest.mark.parametrize("allocation", ["descent", "evidence"])
def test_layers_whose_gates_are_all_a_sibling_s(allocation) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16))
    tied = BayesianLoraConfig(
        r=2,
        target_modules=["query", "key", "value"],
        placement="merged",
        tie_groups="fused",
        learn_rank=False,
        calibration_passes=1,
    )
    model = get_peft_model(base, tied).train()
    schedule = GateSchedule(model, 12, budget="bits=8", allocation=allocation, phases=(0.34, 0.2, 0.2))
    for _ in range(12):
        output = model(input_ids=torch.randint(0, 20, (4, 6)), labels=torch.tensor([0, 1, 0, 1]))
        output.loss.backward()
        schedule.step()
    assert [entry.bits["weight"] for entry in summarize(model)] == [8, 8, 8]


def test_a_budget_that_two_bits_alone_cannot_meet_takes_ranks_too() -> None:
    model = _model(placement="separate", quantizers=[*PAPER_SITES, Site.INPUT])
    # All at 2 bits: 4 bit operations for each of 16 x 16 MACs of the weight and 2 x 16 for each rank.
    costs = [4 * (16 * 16 + 32 * rank) / (16 * 16 * 256) for rank in (1, 2)]
    schedule = GateSchedule(model, 20, budget=f"bops={sum(costs) / 2}", allocation="evidence", phases=PHASES)
    _train(model, schedule, 20)
    (state,) = schedule.budgets()
    assert state.cost <= state.budget.limit
    assert min(entry.rank for entry in summarize(model)) == 1


def test_a_second_schedule_measures_afresh() -> None:
    model = _model()
    _train(model, GateSchedule(model, 20, budget="bits=6", phases=PHASES), 10)
    GateSchedule(model, 20, budget="bits=6", phases=PHASES)
    assert not any(gates.evidence.any() for _, _, gates in learning_adapters(model))


def test_a_lambda_that_would_never_act_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"lambda_r: given 0.1, but .* fixes all gates"):
        GateSchedule(_model(), 20, budget="bits=6", lambda_r=0.1, phases=PHASES)


def test_evidence_is_drawn_towards_that_of_the_same_gate_at_the_same_site() -> None:
    evidence = torch.tensor([[1.0, 8.0, 0.0, 2.0], [16.0, 8.0, 0.0, 0.0], [5.0, 3.0, 0.0, 7.0]])
    values = shrunk(evidence, torch.tensor([0, 0, 4]))
    assert torch.allclose(values[0, 0], torch.tensor(4.0 * 0.25**TRUST, dtype=torch.float64))
    assert torch.allclose(values[1, 0], torch.tensor(4.0 * 4.0**TRUST, dtype=torch.float64))
    assert torch.allclose(values[:2, 1], torch.tensor(8.0, dtype=torch.float64))
    assert torch.equal(values[:, 2], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(values[[0, 1], 3], torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert torch.allclose(values[2], evidence[2].double())


def test_shrinking_keeps_the_order_within_a_site_and_the_scale() -> None:
    evidence = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)) + 0.01
    sites = torch.tensor([0, 7]).repeat(6)
    values = shrunk(evidence, sites)
    for site in (0, 7):
        assert torch.equal(values[sites == site].argsort(dim=0), evidence[sites == site].argsort(dim=0))
    assert torch.allclose(shrunk(1e6 * evidence, sites), 1e6 * values)


def test_rows_of_gates_know_their_sites() -> None:
    model = _model(quantizers=["weight", "input"])
    kinds = [list(Site)[index] for index in GateTable(model).sites().tolist()]
    expected = [site for layer, name, _ in learning_adapters(model) for site in layer.rows_of(name)]
    assert kinds == expected
    assert {Site.WEIGHT, Site.INPUT} <= set(kinds)


def test_while_gates_are_measured_ranges_follow_the_largest_magnitude_and_nothing_is_clipped() -> None:
    model = _model(quantizers=["weight", "input"])
    schedule = GateSchedule(model, 8, budget="bits=6", allocation="evidence", phases=(0.5, 0.0, 0.5))
    _train(model, schedule, 2)
    assert schedule.phase().measures
    (layer, name, _), *_ = learning_adapters(model)
    quantizer = layer.quantizer_of(name, Site.INPUT)
    assert all(not q.log_range.requires_grad for q in layer.quantizers_of(name).values())
    x = 10.0 * torch.randn(32, 16)
    assert float(x.abs().max()) > float(quantizer.log_range.detach().exp())
    seen = layer._read(name, x, layer._pass_gates(name))
    assert torch.allclose(quantizer.range_.detach(), x.abs().max(), rtol=1e-6)
    assert torch.allclose(seen, x, rtol=1e-6)
    _train(model, schedule, 2)
    ranges = {site: q.log_range.requires_grad for site, q in layer.quantizers_of(name).items()}
    assert ranges == {"weight": False, "input": True}
    before = float(quantizer.log_range.detach())
    layer._read(name, 2.0 * x, layer._pass_gates(name))
    assert float(quantizer.log_range.detach()) == before


@pytest.mark.parametrize("allocation", ["evidence", "descent"])
def test_a_budget_of_the_whole_model_is_met_by_the_widths_of_attention_too(allocation: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=30, max_position_embeddings=32, hidden_dropout_prob=0.0)
    settings = BayesianLoraConfig(
        r=2,
        target_modules=["query", "key", "value"],
        placement="merged",
        calibration_passes=1,
        quantize_attention=True,
        learn_rank=False,
    )
    model = get_peft_model(BertForSequenceClassification(config), settings)
    # The dense layers and the head run in floats, 32 bits wide; attention and what it reads can be had for little.
    budget = Budget("bops", 2.7, 16, 32, "model")
    schedule = GateSchedule(model, 24, budget=budget, allocation=allocation, phases=PHASES)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    measured: dict[str, torch.Tensor] = {}
    for _ in range(24):
        model(input_ids=torch.randint(0, 30, (4, 32)), labels=torch.randint(0, 2, (4,))).loss.backward()
        measured |= {
            f"{layer.operands[name].value} {site.value}": gates.evidence[row].clone()
            for layer, name, gates in learning_adapters(model)
            for row, site in enumerate(layer.rows_of(name))
            if gates.measures and gates.evidence.any()
        }
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    (state,) = schedule.budgets()
    assert state.cost <= 2.7
    attended = [
        entry.bits[site] for entry in summarize(model) for site in ("output", "probabilities") if site in entry.bits
    ]
    assert len(attended) == 8
    assert min(attended) < 32
    if allocation == "evidence":
        assert {"queries output", "keys output", "values output", "values probabilities"} <= set(measured)
        assert all(float(evidence[0]) > 0 for name, evidence in measured.items() if not name.endswith("weight"))


def test_a_budget_is_met_by_evidence_that_was_drawn_together() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    settings = {"placement": "merged", "quantizers": ["weight"], "learn_rank": False}
    model = get_peft_model(base, BayesianLoraConfig(r=2, target_modules=list("0123"), **settings))
    schedule = GateSchedule(model, 4, budget="bits=4", allocation="evidence", phases=(0.5, 0.0, 0.5))
    schedule.step()
    # At its word 8 bits for the first are worth more than 4 for the last two: 0.03 / 4 against 0.01 / 2 a bit.
    tiny = [1e-9, 1e-9]
    evidence = torch.tensor([[1, 0.03, *tiny], [1, 0.001, *tiny], [0.01, 0.001, *tiny], [0.01, 0.001, *tiny]])
    schedule.controller.table.set_evidence(PerGate(evidence, torch.zeros(0, 0)))
    schedule.step()
    assert [entry.bits["weight"] for entry in summarize(model)] == [4, 4, 4, 4]


OFF_GRID = {"placement": "separate", "quantizers": ["weight", "input", "down", "up", "diagonal_output"], "r": 3}


def _with_one_useful_layer(**settings: object) -> PeftModel:
    """All components of the loud layer's update matter, and of the quiet one's the first alone."""
    model = _model(**(OFF_GRID | settings))
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            up = layer.bayesian_lora_up["default"]
            up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(8)))
            up[:, 1:] *= float(name.endswith("loud"))
    return model


def _standing_still(model: PeftModel, schedule: GateSchedule, steps: int) -> None:
    torch.manual_seed(1)
    model.train()
    for _ in range(steps):
        x = torch.randn(32, 16)
        (model(x) - x.roll(1, dims=1)).square().mean().backward()
        model.zero_grad()
        schedule.step()


@pytest.mark.parametrize("rank_gate", ["ste", "hard_concrete"])
@pytest.mark.parametrize("placement", ["separate", "merged"])
def test_what_is_measured_of_ranks_is_the_squared_gradient_by_open_gates(rank_gate, placement) -> None:
    chosen = {"quantizers": ["weight"], "weight_gradient_rows": 4} if placement == "merged" else {}
    model = _with_one_useful_layer(rank_gate=rank_gate, placement=placement, **chosen)
    schedule = GateSchedule(model, 4, budget="bits=6", allocation="evidence", phases=(0.5, 0.0, 0.5))
    _standing_still(model, schedule, 1)
    assert schedule.phase().measures
    x, weights = torch.randn(8, 16), torch.randn(16)
    (model(x) * weights).sum().backward()
    (loud, name, gates), (_, _, quiet) = learning_adapters(model)
    down, up = loud.bayesian_lora_down[name].detach(), loud.bayesian_lora_up[name].detach()
    by_gate = loud.scaling[name] * (x @ down.T * (weights @ up)).sum(dim=0)  # E is one
    torch.testing.assert_close(gates.rank_evidence, by_gate[1:].square(), rtol=1e-3, atol=1e-6)
    assert torch.equal(quiet.rank_evidence, torch.zeros(2))


def test_ranks_that_are_worth_nothing_close_before_bits_that_are_worth_something() -> None:
    model = _with_one_useful_layer()
    # All gates open: 32 x 32 bit operations for each of 16 x 16 MACs of the weight and 2 x 16 of each of three ranks.
    # That makes 5.5; without two ranks of one layer it is 5.0.
    schedule = GateSchedule(model, 20, budget="bops=5.05", phases=PHASES)
    _standing_still(model, schedule, 20)
    loud, quiet = summarize(model)
    assert (loud.rank, quiet.rank) == (3, 1)
    (state,) = schedule.budgets()
    assert state.cost <= state.budget.limit
    assert loud.rank_open_probabilities[0] > 0.7
    assert quiet.rank_open_probabilities[0] < 0.1, "a gate that was worth nothing is known to be"


@pytest.mark.parametrize("budget", ["bops=0.2", "bytes=0.3", "bits=4"])
def test_ranks_that_cost_nothing_stay(budget: str) -> None:
    model = _with_one_useful_layer(placement="merged", quantizers=["weight", "input"])
    _standing_still(model, GateSchedule(model, 20, budget=budget, phases=PHASES), 20)
    assert [entry.rank for entry in summarize(model)] == [3, 3]


@pytest.mark.parametrize("rows_of_gradient", [None, 4])
def test_learning_ranks_changes_nothing_where_a_rank_costs_nothing(adapted, rows, rows_of_gradient) -> None:
    found = []
    for learn_rank in (True, False):
        model = adapted(placement="merged", weight_gradient_rows=rows_of_gradient, learn_rank=learn_rank).train()
        schedule = GateSchedule(model, 16, budget="bops=0.15", phases=(0.5, 0.0, 0.5))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
        torch.manual_seed(1)
        losses = []
        for _ in range(16):
            loss = (model(rows) - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        found.append((losses, [(entry.bits, entry.rank) for entry in summarize(model)]))
    assert found[0] == found[1]
    assert {rank for _, rank in found[0][1]} == {4}
    assert {width for bits, _ in found[0][1] for width in bits.values()} & {2, 4}


def test_a_budget_of_ranks_can_be_met_by_evidence() -> None:
    model = _with_one_useful_layer(learn_bits=False)
    schedule = GateSchedule(model, 20, budget="rank=2", allocation="evidence", phases=PHASES)
    _standing_still(model, schedule, 20)
    assert [entry.rank for entry in summarize(model)] == [3, 1]


def test_a_rank_behind_others_that_are_worth_less_is_worth_their_mean() -> None:
    evidence = torch.tensor([[1.0, 4.0, 1.0], [5.0, 2.0, -torch.inf], [-torch.inf] * 3], dtype=torch.float64)
    expected = torch.tensor([[2.5, 2.5, 1.0], [5.0, 2.0, -torch.inf], [-torch.inf] * 3], dtype=torch.float64)
    assert torch.equal(nested(evidence), expected)


def test_evidence_of_ranks_is_drawn_together_before_it_is_put_in_order() -> None:
    measured = PerGate(torch.zeros(0, 4), torch.tensor([[1.0, 16.0], [16.0, -torch.inf]]))
    found = posterior_evidence(measured, torch.zeros(0, dtype=torch.int64)).ranks
    first = 4.0 * 0.25**TRUST
    assert torch.allclose(found[0], torch.full((2,), (first + 16.0) / 2.0, dtype=torch.float64))
    assert found[1].tolist() == [pytest.approx(4.0 * 4.0**TRUST), -torch.inf]
