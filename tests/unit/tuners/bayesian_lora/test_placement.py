"""One quantizer on the sum of weight and update: what runs, how it learns, and that merging changes no bit."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rankbits import BayesianLoraConfig, GateSchedule, harden
from rankbits.errors import MergeError, RankbitsWarning
from rankbits.quant.codes import codes, step_at
from rankbits.tuners.bayesian_lora import GatePhase, adapted_layers
from rankbits.tuners.bayesian_lora.config import Site

MERGED = {"placement": "merged"}


def _only(model):
    return [layer for _, layer in adapted_layers(model)]


def test_the_quantizers_are_those_of_weight_and_input(mlp, adapt) -> None:
    (layer, _) = _only(adapt(mlp, target_modules=["0", "2"], **MERGED))
    assert layer.sites_of("default") == [Site.WEIGHT, Site.INPUT]


def test_the_output_is_that_of_the_rounded_sum(mlp, rows, adapt, learn, paper) -> None:
    model = adapt(mlp, target_modules=["0"], quantizers=["weight", "input", "output"], **MERGED)
    learn(model, rows, rank=2, widths=False)
    (layer,) = _only(model)
    gates = layer.gates_of("default")
    with torch.no_grad():
        gates.bit_logits[0, 1:] = -3.0
    quantizers = layer.quantizers_of("default")
    down, diagonal, up = (
        p["default"] for p in (layer.bayesian_lora_down, layer.bayesian_lora_diagonal, layer.bayesian_lora_up)
    )
    total = layer.weight + layer.scaling["default"] * (up[:, :2] * diagonal[:2]) @ down[:2]
    weight = paper.hard(total, quantizers["weight"].range_, 4)
    x = paper.hard(rows, quantizers["input"].range_, 32)
    expected = paper.hard(x @ weight.T + layer.bias, quantizers["output"].range_, 32)
    torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "granularity",
    [
        {},
        {"granularity": "channel"},
        {"granularity": "group", "group_size": 2},
        {"granularity": "group", "group_size": 2, "input_granularity": "group"},
    ],
)
def test_merging_is_exact_bit_for_bit_with_its_quantizers_of_activations(
    mlp, rows, adapt, learn, granularity, dtype
) -> None:
    model = adapt(
        mlp.to(dtype), target_modules=["0", "2"], quantizers=["weight", "input", "output"], **MERGED, **granularity
    )
    rows = rows.to(dtype)
    learn(model, rows, rank=2)
    expected = model(rows)
    before = [layer.weight.detach().clone() for layer in _only(model)]
    model.merge_adapter()
    assert torch.equal(model(rows), expected)
    for layer, weight in zip(_only(model), before, strict=True):
        assert not torch.equal(layer.weight, weight)
    model.unmerge_adapter()
    assert all(torch.equal(layer.weight, w) for layer, w in zip(_only(model), before, strict=True))


def test_the_merged_weight_lies_on_the_grid_of_its_width(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0"], granularity="group", group_size=4, **MERGED)
    learn(model, rows, widths=False)
    (layer,) = _only(model)
    with torch.no_grad():
        layer.gates_of("default").bit_logits[0, 1:] = -3.0
    quantizer = layer.quantizers_of("default")["weight"]
    model.merge_adapter()
    parts = quantizer.layout.parts(layer.weight)
    step = step_at(quantizer.range_, 4)
    assert quantizer.range_.shape == (10, 3, 1)
    assert torch.equal(step * codes(parts, step, 4), parts)
    assert codes(parts, step, 4).abs().max() <= 7


def test_merging_into_conv1d_is_exact(adapt, learn) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0)
    model = adapt(GPT2LMHeadModel(config), target_modules=["c_attn"], granularity="group", group_size=8, **MERGED)
    inputs = {"input_ids": torch.randint(0, 50, (2, 5))}
    learn(model, rank=2, **inputs)
    expected = model(**inputs).logits
    (layer,) = _only(model)
    weight = layer.merged_weight("default", layer.oriented(layer.weight))
    model.merge_adapter()
    assert torch.equal(layer.oriented(layer.weight), weight)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-6)


def test_unloading_says_that_activations_lose_their_quantizers(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0", "2"], **MERGED)
    learn(model, rows)
    with pytest.warns(RankbitsWarning, match="input"):
        plain = model.merge_and_unload()
    assert type(plain[0]) is nn.Linear


def test_unloading_weights_alone_computes_the_same_and_says_nothing(mlp, rows, adapt, learn, recwarn) -> None:
    model = adapt(mlp, target_modules=["0", "2"], quantizers=["weight"], **MERGED)
    learn(model, rows)
    expected = model(rows)
    plain = model.merge_and_unload()
    assert torch.equal(plain(rows), expected)
    assert not [w for w in recwarn if issubclass(w.category, RankbitsWarning)]


def test_two_adapters_cannot_be_merged_together(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0"], **MERGED)
    model.add_adapter("other", BayesianLoraConfig(r=2, target_modules=["0"], placement="merged"))
    learn(model, rows)
    with pytest.raises(MergeError, match="alone"):
        model.merge_adapter(["default", "other"])


def _gradients(model, rows, names) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    model(rows).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and any(k in n for k in names)}


def test_factors_learn_alike_from_all_rows_and_token_by_token(mlp, rows, adapt) -> None:
    names = ("down", "diagonal", "up", "rank_logits")
    torch.manual_seed(5)
    whole = adapt(copy.deepcopy(mlp), target_modules=["0", "2"], quantizers=["weight"], **MERGED)
    sampled = adapt(mlp, target_modules=["0", "2"], quantizers=["weight"], weight_gradient_rows=2, **MERGED)
    sampled.load_state_dict(whole.state_dict())
    for model in (whole, sampled):
        model.train()
        for layer in _only(model):
            layer.cover_weights("default")
            with torch.no_grad():
                # Open gates without noise: only the way of the gradient differs.
                layer.gates_of("default").bit_logits.fill_(30.0)
    expected, got = _gradients(whole, rows, names), _gradients(sampled, rows, names)
    assert expected.keys() == got.keys()
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


def test_gates_and_ranges_learn_from_some_rows_without_bias(adapt) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(6, 5))
    model = adapt(linear, target_modules=["0"], quantizers=["weight"], weight_gradient_rows=1, r=2, **MERGED)
    (layer,) = _only(model)
    model.train()
    layer.set_phase("default", GatePhase(), 1)
    layer.cover_weights("default")
    with torch.no_grad():
        layer.gates_of("default").bit_logits.fill_(30.0)
    x, target = torch.randn(4, 6), torch.randn(4, 5)
    parameter = layer.quantizers_of("default")["weight"].log_range
    layer.weight_gradient_rows["default"] = None

    def gradient() -> torch.Tensor:
        model.zero_grad()
        (model(x) * target).sum().backward()
        return parameter.grad.clone()

    exact = gradient()
    layer.weight_gradient_rows["default"] = 1
    draws = torch.stack([gradient() for _ in range(400)])
    assert draws.std() > 0
    standard_error = draws.std(dim=0) / 20
    assert ((draws.mean(dim=0) - exact).abs() < 4 * standard_error).all()


@pytest.mark.parametrize(("closed", "least", "most", "learns"), [(0, 14.0, 16.0, True), (1, 10.0, 11.0, False)])
def test_a_fixed_phase_fits_the_range_of_the_weight_and_freezes_it_unless_at_two_bits(
    mlp, rows, adapt, learn, closed, least, most, learns
) -> None:
    model = adapt(mlp, target_modules=["0"], quantizers=["weight"], weight_gradient_rows=2, **MERGED)
    learn(model, rows, widths=False)
    (layer,) = _only(model)
    quantizer = layer.quantizers_of("default")["weight"]
    with torch.no_grad():
        layer.gates_of("default").bit_logits[0, closed:] = -3.0
        # One weight far out: the grid reaches it with a range of one and a half times its size at 2 bits, 15/14 at 4.
        layer.weight[0, 0] = 10.0
    layer.set_phase("default", GatePhase(fixed=True), 2)
    assert bool(quantizer.fitted)
    assert least < quantizer.range_.item() < most
    assert quantizer.log_range.requires_grad == learns
    model.set_adapter("default")
    assert quantizer.log_range.requires_grad == learns
    fitted = quantizer.log_range.detach().clone()
    with torch.no_grad():
        layer.bayesian_lora_up["default"].add_(1.0)
    layer.set_phase("default", GatePhase(fixed=True), 3)
    assert torch.equal(fitted, quantizer.log_range)
    layer.set_phase("default", GatePhase(), 4)
    assert quantizer.log_range.requires_grad


def test_a_saved_and_a_hardened_adapter_compute_the_same(mlp, rows, adapt, learn, tmp_path) -> None:
    from peft import PeftModel

    base = copy.deepcopy(mlp)
    model = adapt(mlp, target_modules=["0", "2"], granularity="group", group_size=2, **MERGED)
    learn(model, rows, rank=2)
    expected = model(rows)
    harden(model)
    torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(again(rows), model(rows))
    after = model(rows)
    model.merge_adapter()
    assert torch.equal(model(rows), after)


def test_dropout_factor_sites_and_quantized_bases_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`dropout`=0.1 has no place with placement='merged'"):
        BayesianLoraConfig(placement="merged", dropout=0.1)
    with pytest.raises(ValueError, match=r"\['down'\].*placement='merged'"):
        BayesianLoraConfig(placement="merged", quantizers=["down"])
    with pytest.raises(ValueError, match="`placement` must be one of"):
        BayesianLoraConfig(placement="beside")


def test_a_schedule_runs_through_all_phases(mlp, rows, adapt) -> None:
    model = adapt(mlp, target_modules=["0", "2"], weight_gradient_rows=3, **MERGED)
    schedule = GateSchedule(model, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        loss = (model(rows) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("inputs", "advice"),
    [("tensor", "or granularity='channel', or"), ("group", "'channel' with input_granularity='tensor'")],
)
def test_groups_that_do_not_divide_a_row_say_what_to_set(mlp, adapt, inputs, advice) -> None:
    with pytest.raises(ValueError, match=rf"'0': .* 5 .*choose another `group_size`, .*{advice}"):
        adapt(mlp, target_modules=["0"], granularity="group", group_size=5, input_granularity=inputs, **MERGED)
