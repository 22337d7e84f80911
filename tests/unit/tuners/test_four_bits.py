"""Bases in 4 bits: what a merged layer computes does not depend on whether the base was evaluated before."""

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from rankbits import BayesianLoraConfig, DyloraConfig, MoraConfig, SboraConfig

TUNED = {"r": 4, "target_modules": ["0"], "init_weights": False}


@pytest.mark.parametrize(
    "config",
    [
        BayesianLoraConfig(**TUNED, learn_bits=False),
        MoraConfig(**TUNED, mora_type="sharing"),
        SboraConfig(**TUNED),
        DyloraConfig(**TUNED),
    ],
    ids=lambda config: config.peft_type.value,
)
@pytest.mark.parametrize("evaluated_first", [False, True])
@pytest.mark.filterwarnings("ignore:.*merge.*")
def test_merging_is_close_to_the_forward_pass_on_any_cpu(config: PeftConfig, evaluated_first: bool) -> None:
    """Bitsandbytes rearranges a 4-bit weight when it is first evaluated on CPUs with AVX512-BF16."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(bnb.nn.Linear4bit(128, 128, quant_type="nf4", compute_dtype=torch.float32))
    model = get_peft_model(base.to("cpu"), config).eval()
    x = torch.randn(3, 128)
    if evaluated_first:
        with torch.no_grad():
            model(x)
    with torch.no_grad():
        before = model(x).clone()
        model.base_model.merge_adapter()
        after = model(x)
    # The sum is rounded to 4 bits again: a tenth of the signal, where wrongly ordered codes share nothing with it.
    assert float((after - before).norm() / before.norm()) < 0.2


@pytest.mark.parametrize(
    "config",
    [
        BayesianLoraConfig(**TUNED | {"target_modules": ["0", "1"]}, learn_bits=False),
        MoraConfig(**TUNED | {"target_modules": ["0", "1"]}, mora_type="sharing"),
        SboraConfig(**TUNED | {"target_modules": ["0", "1"]}),
        DyloraConfig(**TUNED | {"target_modules": ["0", "1"]}),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_a_layer_that_was_evaluated_trains_as_before(config: PeftConfig) -> None:
    """The kernel for CPUs with AVX512-BF16 has no backward: layers below one that it ran would get no gradient."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers = (bnb.nn.Linear4bit(128, 128, quant_type="nf4", compute_dtype=torch.float32) for _ in range(2))
    model = get_peft_model(nn.Sequential(*layers).to("cpu"), config)
    x = torch.randn(3, 128)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)  # DyLoRA draws a rank in each training pass.
        model.train().zero_grad()
        model(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(x)
    after = gradients()
    assert len(before) == len(after) >= 2
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
