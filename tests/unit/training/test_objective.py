"""The penalty has the values and gradients of the paper's formula, and stays out of the model's loss."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from rankbits import BayesianLoraConfig, GateSchedule, regularization_loss
from rankbits.training.objective import add_regularization_gradient, bit_penalty, rank_penalty, size_weights
from rankbits.tuners.bayesian_lora import GatePhase, adapted_layers, learning_adapters

SHIFT = 1.598597
AT_ONCE = (0.0, 0.0, 0.0)


def _bert(layers: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("logit", "lambdas", "value"),
    [(6.0, (1.0, 0.0), 1006.74), (2.0, (1.0, 0.0), 942.65), (6.0, (0.0, 1.0), 249.52), (6.0, (2.0, 3.0), 2762.04)],
    ids=["bits at 6", "bits at 2", "ranks", "both, weighted"],
)
def test_values_at_the_start_of_twelve_layers(logit, lambdas, value) -> None:
    config = BayesianLoraConfig(r=8, target_modules=["query", "key", "value"], initial_bit_logit=logit)
    model = get_peft_model(_bert(12), config)
    schedule = GateSchedule(model, 10, lambda_q=lambdas[0], lambda_r=lambdas[1], phases=AT_ONCE)
    assert schedule.phase().lambda_q == lambdas[0]
    assert sum(len(layer.sites_of(name)) for layer, name, _ in learning_adapters(model)) == 252
    assert regularization_loss(model).item() == pytest.approx(value, abs=0.02)


def test_value_of_one_quantizer() -> None:
    p = torch.sigmoid(torch.full((1, 4), 6.0) + SHIFT)
    assert bit_penalty(torch.cumprod(p, -1)).item() == pytest.approx(3.99499, abs=1e-5)
    assert rank_penalty(torch.cumprod(torch.sigmoid(torch.full((7,), 6.0)), 0)).item() == pytest.approx(
        249.52 / 36, abs=1e-3
    )


def test_gradients_are_the_closed_form(adapted) -> None:
    model = adapted()
    with torch.no_grad():
        for _, _, gates in learning_adapters(model):
            gates.bit_logits.normal_()
            gates.rank_logits.normal_()
    GateSchedule(model, 10, lambda_q=0.3, lambda_r=0.7, phases=AT_ONCE)
    regularization_loss(model).backward()
    for _, _, gates in learning_adapters(model):
        for logits, shift, weight in ((gates.bit_logits, SHIFT, 0.3), (gates.rank_logits[None], 0.0, 0.7)):
            p = torch.sigmoid(logits.detach().double() + shift)
            pi = torch.cumprod(p, -1)
            tails = pi.flip(-1).cumsum(-1).flip(-1)
            grad = gates.bit_logits.grad if shift else gates.rank_logits.grad[None]
            torch.testing.assert_close(grad.double(), weight * tails * (1 - p), rtol=1e-4, atol=1e-6)


def test_bit_operations_weight_the_penalty(adapted) -> None:
    assert size_weights([100, 25], 100).tolist() == [[4, 8, 16, 32], [1, 2, 4, 8]]
    model = adapted(learn_rank=False)
    GateSchedule(model, 10, lambda_q=0.5, lambda_r=0.0, phases=AT_ONCE, weighting="bop")
    expected = 0.0
    p = torch.cumprod(torch.sigmoid(torch.full((4,), 6.0) + SHIFT), 0).double()
    for inputs, outputs in ((12, 10), (10, 6)):
        macs = [inputs * outputs, 4 * inputs, 4, 4 * outputs, 4, 4 * outputs, 0]
        expected += 0.5 * sum(m / 120 * float((p * torch.tensor([4.0, 8, 16, 32])).sum()) for m in macs)
    assert regularization_loss(model).item() == pytest.approx(expected, rel=1e-5)


def test_the_mean_divides_by_the_number_of_gates(adapted) -> None:
    model = adapted()
    GateSchedule(model, 10, lambda_q=1.0, lambda_r=0.0, phases=AT_ONCE, reduction="mean")
    assert regularization_loss(model).item() == pytest.approx(3.99499 / 4, abs=1e-4)
    GateSchedule(model, 10, lambda_q=0.0, lambda_r=1.0, phases=AT_ONCE, reduction="mean")
    p = 1 / (1 + 2.718281828**-6)
    assert regularization_loss(model).item() == pytest.approx((p + p**2 + p**3) / 3, abs=1e-5)


def test_without_a_phase_that_penalises_it_is_a_plain_zero(adapted) -> None:
    model = adapted()
    for phase in (GatePhase(), GatePhase(lambda_q=1.0, lambda_r=1.0, fixed=True)):
        for layer, name, _ in learning_adapters(model):
            layer.set_phase(name, phase, 1)
        loss = regularization_loss(model)
        assert loss.item() == 0.0
        assert not loss.requires_grad
        assert add_regularization_gradient(model) == 0.0
        assert all(p.grad is None for p in model.parameters())


def test_only_active_adapters_are_penalised(adapted) -> None:
    model = adapted()
    GateSchedule(model, 10, lambda_q=1.0, lambda_r=1.0, phases=AT_ONCE)
    alone = regularization_loss(model).item()
    model.add_adapter("other", BayesianLoraConfig(r=2, target_modules=["0"]))
    assert regularization_loss(model).item() == alone
    model.set_adapter("other")
    assert regularization_loss(model).item() == 0.0


def test_the_gradient_is_added_to_what_is_there_and_touches_only_gates(adapted, rows) -> None:
    model = adapted().train()
    for _ in range(3):
        model(rows)
    GateSchedule(model, 10, lambda_q=0.3, lambda_r=0.7, phases=AT_ONCE)
    model(rows).pow(2).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    value = add_regularization_gradient(model)
    assert value == pytest.approx(regularization_loss(model).item())
    penalty = {name: p.grad - before[name] for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    regularization_loss(model).backward()
    for name, p in model.named_parameters():
        if "logits" in name:
            torch.testing.assert_close(penalty[name], p.grad, rtol=1e-3, atol=1e-5)
        elif name in penalty:
            assert not penalty[name].any(), name


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_the_model_is_the_task_loss_alone(training) -> None:
    model = get_peft_model(_bert(1), BayesianLoraConfig(r=2, target_modules=["query"], learn_bits=False))
    GateSchedule(model, 10, lambda_q=1e3, lambda_r=1e3, phases=AT_ONCE)
    labels = torch.tensor([0, 1, 1])
    output = model.train(training)(input_ids=torch.randint(0, 100, (3, 5)), labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


@pytest.mark.filterwarnings("ignore:.* has closed every gate")
def test_penalty_alone_closes_every_gate(adapted) -> None:
    model = adapted()
    schedule = GateSchedule(model, 400, lambda_q=1.0, lambda_r=1.0, phases=AT_ONCE)
    logits = [p for _, _, gates in learning_adapters(model) for p in gates.parameters()]
    optimizer = torch.optim.Adam(logits, lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        add_regularization_gradient(model)
        optimizer.step()
        schedule.step()
    for _, layer in adapted_layers(model):
        values = layer.gates_of("default").values(hard=True)
        assert not values.widths.any()
        assert values.ranks.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_byte_weights_count_what_is_stored(adapted) -> None:
    model = adapted(initial_bit_logit=2.0)
    GateSchedule(model, 10, lambda_q=0.5, lambda_r=0.0, phases=AT_ONCE, weighting="byte")
    open_ = torch.sigmoid(torch.tensor(2.0 + SHIFT)) ** torch.arange(1, 5)
    per_number = float((open_ * torch.tensor([4.0, 8, 16, 32])).sum())
    stored = sum(inputs * outputs + 4 * inputs + 4 + 4 * outputs for inputs, outputs in ((12, 10), (10, 6)))
    assert float(regularization_loss(model).detach()) == pytest.approx(0.5 * stored / 120 * per_number, rel=1e-5)


def test_the_pressure_of_a_budget_is_on_the_gates_own_probability(adapted) -> None:
    model = adapted(initial_bit_logit=1.0, initial_rank_logit=2.0)
    schedule = GateSchedule(model, 10, budget=["bits=8", "rank=2"], phases=(0.1, 0.1, 0.1))
    schedule.step()
    schedule.step()
    assert regularization_loss(model).requires_grad
    (layer, name, gates), _ = learning_adapters(model)
    widths, ranks = layer.phase[name].pressure
    assert bool((widths[:, :3] == 0.0).all())
    assert bool((ranks[:2] == 0.0).all())
    assert float(ranks[2]) > 0.0
    grads = torch.autograd.grad(regularization_loss(model), [gates.bit_logits, gates.rank_logits])
    slope = torch.sigmoid(gates.bit_logits + SHIFT)
    assert torch.allclose(grads[0], widths * slope * (1.0 - slope), rtol=1e-4)
    own = torch.sigmoid(gates.rank_logits)
    assert torch.allclose(grads[1], ranks * own * (1.0 - own), rtol=1e-4)
