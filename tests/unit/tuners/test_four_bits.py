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
