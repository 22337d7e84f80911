"""Denoisers of diffusers, built small: every mergeable tuner trains and merges there, two concepts meet in one base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import Tensor, nn

import rankbits
from rankbits import (
    AdaloraSchedule,
    BayesianLoraConfig,
    DyloraConfig,
    DyloraSchedule,
    GateSchedule,
    MoraConfig,
    SboraConfig,
    regularization_loss,
)
from rankbits.errors import ExportError, MergeError
from rankbits.tuners.mora import MoraType

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
WIDTH = 8
"""Of a word."""
STEPS = 12
"""In which a tuner learns enough of four images."""

PEFT_CONFIGS: Mapping[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "rslora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    # All its three matrices start small, and few steps carry them far only with a large scale.
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, lora_alpha=64, target_modules=TARGETS, total_step=STEPS),
}
"""Tuners of PEFT's own that `rankbits list methods` lists as merging exactly."""

CONFIGS: Mapping[str, Callable[[], PeftConfig]] = {
    "bayesian-lora": lambda: BayesianLoraConfig(r=4, target_modules=TARGETS, learn_bits=False),
    "bayesian-lora-merged": lambda: BayesianLoraConfig(
        r=4, target_modules=TARGETS, placement="merged", calibration_passes=2
    ),
    "sbora-fa": lambda: SboraConfig(r=4, target_modules=TARGETS),
    "sbora-fb": lambda: SboraConfig(r=4, target_modules=TARGETS, variant="fb"),
    "dylora": lambda: DyloraConfig(r=4, target_modules=TARGETS),
    **{
        f"mora-{kind.value}": lambda kind=kind: MoraConfig(r=2, target_modules=TARGETS, mora_type=kind.value)
        for kind in MoraType
    },
    **PEFT_CONFIGS,
}


def _unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()


def _transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=4,
    ).eval()


MODELS = {"unet": _unet, "transformer": _transformer}


def _inputs(model: nn.Module, words: Tensor, noisy: Tensor, times: Tensor) -> dict[str, Tensor]:
    if isinstance(model, UNet2DConditionModel):
        return {"sample": noisy, "timestep": times, "encoder_hidden_states": words}
    named = {"hidden_states": noisy, "timestep": times, "encoder_hidden_states": words}
    return named | {"pooled_projections": words.mean(dim=1)}


def _batch(model: nn.Module, size: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """Noisy latents at some times with three words each, and the noise in them."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(size, 4, 4, 4, generator=generator)
    noisy = 0.6 * torch.randn(size, 4, 4, 4, generator=generator) + 0.8 * noise
    times = torch.randint(0, 1000, (size,), generator=generator)
    return _inputs(model, torch.randn(size, 3, WIDTH, generator=generator), noisy, times), noise


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def _outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).sample


def _train(model: nn.Module, inputs: dict[str, Tensor], noise: Tensor, *, steps: int) -> None:
    config = model.peft_config["default"]
    gates = GateSchedule(model, steps) if isinstance(config, BayesianLoraConfig) else None
    ranks = DyloraSchedule(model) if isinstance(config, DyloraConfig) else None
    budget = AdaloraSchedule(model, steps) if isinstance(config, AdaLoraConfig) else None
    optimizer = torch.optim.Adam(_trained(model), lr=0.02)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(**inputs).sample, noise)
        (loss if gates is None else loss + regularization_loss(model)).backward()
        optimizer.step()
        for schedule in (gates, ranks, budget):
            if schedule is not None:
                schedule.step()
    if gates is not None:
        rankbits.harden(model)
    if ranks is not None:
        ranks.finish()


@pytest.mark.filterwarnings("ignore:a quantizer is evaluated before its range:rankbits.errors.RankbitsWarning")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_mergeable_tuner_trains_and_merges(kind: str, method: str) -> None:
    model = MODELS[kind]().requires_grad_(False)
    inputs, noise = _batch(model)
    start, base = _outputs(model, inputs), copy.deepcopy(model.state_dict())
    model.add_adapter(CONFIGS[method]())
    # Grids begin at 32 bits, where they are as fine as the numbers.
    torch.testing.assert_close(_outputs(model, inputs), start, rtol=0.0, atol=1e-5 * float(start.abs().max()))

    _train(model, inputs, noise, steps=STEPS)
    learned = _outputs(model, inputs)
    assert F.mse_loss(learned, noise) < 0.97 * F.mse_loss(start, noise)
    for name, tensor in model.state_dict().items():
        if name.replace(".base_layer", "") in base:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name
    for name, parameter in model.named_parameters():
        assert name.replace(".base_layer", "") not in base or parameter.grad is None, name

    model.fuse_lora(safe_fusing=True)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    torch.testing.assert_close(_outputs(model, inputs), learned, rtol=0.0, atol=1e-5 * float(learned.abs().max()))
    model.unfuse_lora()
    # PEFT's own tuners subtract what they added, and rounding stays; ours put back the weights that they kept.
    rounding = 1e-5 if method in PEFT_CONFIGS else 0.0
    torch.testing.assert_close(_outputs(model, inputs), learned, rtol=0.0, atol=rounding * float(learned.abs().max()))
    model.disable_adapters()
    torch.testing.assert_close(_outputs(model, inputs), start, rtol=0.0, atol=rounding * float(start.abs().max()))
    model.enable_adapters()
    model.delete_adapters("default")
    assert not _trained(model)
    torch.testing.assert_close(_outputs(model, inputs), start, rtol=0.0, atol=rounding * float(start.abs().max()))


def test_activations_on_grids_are_trained_but_not_merged() -> None:
    model = _unet().requires_grad_(False)
    inputs, noise = _batch(model)
    start = F.mse_loss(_outputs(model, inputs), noise)
    inject_adapter_in_model(BayesianLoraConfig(r=4, target_modules=TARGETS, calibration_passes=2), model)
    _train(model, inputs, noise, steps=12)
    assert F.mse_loss(_outputs(model, inputs), noise) < 0.97 * start
    with pytest.raises(MergeError, match="quantizes the activations"):
        model.fuse_lora()


def test_layers_share_the_input_that_they_read() -> None:
    settings: dict[str, Any] = {"placement": "merged", "calibration_passes": 1}
    added = [f"add_{name}_proj" for name in "qkv"]
    shared = {}
    for kind, model in (("unet", _unet()), ("transformer", _transformer())):
        model.add_adapter(BayesianLoraConfig(r=2, target_modules=[*TARGETS, *added], **settings))
        for entry in rankbits.summary(model):
            *_, attention, layer = entry.name.removesuffix(".0").split(".")
            shared[kind, attention, layer] = entry.shared.get("input", "itself").rpartition(".")[2]
    itself = "itself"
    assert [shared["unet", "attn1", name] for name in ("to_q", "to_k", "to_v")] == [itself, "to_q", "to_q"]
    assert [shared["unet", "attn2", name] for name in ("to_q", "to_k", "to_v")] == [itself, itself, "to_k"]
    assert [shared["transformer", "attn", name] for name in ("to_q", "to_k", "to_v")] == [itself, "to_q", "to_q"]
    assert sorted(shared["transformer", "attn", name] for name in added) == ["add_k_proj", "add_k_proj", itself]


@pytest.mark.parametrize("targets", [["conv_in"], ["time_emb_proj", "conv2"]], ids=["first", "after-a-linear-layer"])
def test_a_convolution_is_refused_and_the_model_is_as_it_was(targets: list[str]) -> None:
    model = _unet()
    with pytest.raises(TypeError, match=r"'[\w.]*conv\w+' is a Conv2d, .* supported are torch.nn.Linear"):
        inject_adapter_in_model(SboraConfig(r=2, target_modules=targets), model)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


@pytest.mark.parametrize("config", [SboraConfig, MoraConfig, DyloraConfig, BayesianLoraConfig])
def test_targets_have_to_be_named(config: type[PeftConfig]) -> None:
    with pytest.raises(ValueError, match=r"`target_modules`=None .* UNet2DConditionModel names none: .*'to_q'"):
        _unet().add_adapter(config())


def test_attentions_that_multiply_by_themselves_are_named() -> None:
    config = BayesianLoraConfig(target_modules=TARGETS, quantize_attention=True)
    with pytest.raises(ValueError, match=r"cannot quantize 'mid_block\.[\w.]*attn1' \(Attention\).*by itself"):
        _unet().add_adapter(config)


def test_no_strength_but_one_is_taken() -> None:
    model = _unet()
    inputs, _ = _batch(model)
    model.add_adapter(SboraConfig(r=2, target_modules=TARGETS, init_weights=False))
    expected = _outputs(model, inputs)
    model.set_adapters("default")
    assert torch.equal(_outputs(model, inputs), expected)
    for scaled in (
        lambda: model.set_adapters("default", 0.5),
        lambda: model(**inputs, cross_attention_kwargs={"scale": 0.5}),
        lambda: model.fuse_lora(0.5),
    ):
        with pytest.raises(ValueError, match=r"strength of 0.5 was given for 'default'.*expected 1.0"):
            scaled()
    assert torch.equal(_outputs(model, inputs), expected)


def test_a_denoiser_is_counted_with_its_convolutions() -> None:
    model = _unet()
    inputs, _ = _batch(model)
    model.add_adapter(DyloraConfig(r=4, target_modules=TARGETS))
    merged = rankbits.cost(model, inputs=inputs, sequence_length=16)
    beside = rankbits.cost(model, inputs=inputs, sequence_length=16, adapters="unmerged")
    convolutions = sum(4 * 16 * layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert sum(product.macs for product in merged.products if product.op == "conv") == convolutions
    # Six layers read 16 places of four images, and keys and values of words three words each.
    assert beside.macs - merged.macs == 4 * 4 * (6 * 16 * (16 + 16) + 2 * 3 * (8 + 16))


def test_what_leaves_loads_without_rankbits(tmp_path: Path) -> None:
    inputs, _ = _batch(_unet())
    model = get_peft_model(_unet(), SboraConfig(r=4, target_modules=TARGETS, init_weights=False))
    expected = _outputs(model, inputs)
    model.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(_unet(), tmp_path / "ours")
    assert torch.equal(_outputs(again, inputs), expected)

    exported = rankbits.export(model, tmp_path / "lora", to="lora", example_inputs=inputs)
    assert exported.verification is not None
    assert exported.verification.holds
    plain = _unet()
    weights = {key.removeprefix("base_model.model."): t for key, t in load_peft_weights(tmp_path / "lora").items()}
    plain.load_lora_adapter(weights, prefix=None, metadata=LoraConfig.from_pretrained(tmp_path / "lora").to_dict())
    torch.testing.assert_close(_outputs(plain, inputs), expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(ExportError, match="merge_and_unload"):
        rankbits.export(model, tmp_path / "merged", to="merged")

    model.merge_and_unload().save_pretrained(tmp_path / "unet")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "unet", local_files_only=True)
    torch.testing.assert_close(_outputs(plain, inputs), expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))
