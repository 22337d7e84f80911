"""The plain LoRA pair of an adapter without gates and quantizers, and who has none."""

import pytest
import torch

from rankbits import harden
from rankbits.tuners.bayesian_lora import adapted_layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_factors_are_the_update(mlp, rows, adapt, learn, dtype) -> None:
    model = adapt(mlp.to(dtype), target_modules=["0", "2"], learn_bits=False, alpha=5.0)
    learn(model, rows.to(dtype), rank=3)
    harden(model)
    for _, layer in adapted_layers(model):
        with torch.no_grad():
            layer.bayesian_lora_diagonal["default"].uniform_(-2, 2)
        factors = (layer.bayesian_lora_down, layer.bayesian_lora_diagonal, layer.bayesian_lora_up)
        a, e, b = (container["default"].detach().double() for container in factors)
        down, up, scale = layer.lora_factors("default")
        assert (down.shape, up.shape) == ((3, layer.in_features), (layer.out_features, 3))
        assert (
            down.dtype == up.dtype == torch.promote_types(a.dtype if dtype is torch.float64 else dtype, torch.float32)
        )
        assert scale == 5.0 / 4
        precision = torch.finfo(up.dtype).eps
        torch.testing.assert_close(
            scale * up.double() @ down.double(), 5 / 4 * b @ torch.diag(e) @ a, rtol=0, atol=4 * precision
        )
        assert not down.requires_grad
        assert not up.requires_grad
        down.zero_()
        assert layer.bayesian_lora_down["default"].any()


def test_gates_and_quantizers_are_refused(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0"], quantizers=["weight", "input"])
    learn(model, rows, rank=2)
    ((_, layer),) = adapted_layers(model)
    with pytest.raises(ValueError, match=r"still has gates.*call rankbits.harden\(model\)"):
        layer.lora_factors("default")
    harden(model)
    with pytest.raises(ValueError, match=r"quantizes \['weight', 'input'\].*learned grids"):
        layer.lora_factors("default")
