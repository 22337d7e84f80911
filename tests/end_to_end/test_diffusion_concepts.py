"""Concepts in a denoiser of diffusers: SBoRA trains one, Multi-SBoRA merges two, and the page about it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankbits import SboraConfig
from rankbits.tuners.sbora import task_configs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "diffusion.md"
CONCEPTS = ("cat", "hat")
WIDTH = 16
"""Of a word: a quarter for each concept, half for what the base knows before."""
# Keys and values of words are what says which concept an image shows (Kumari et al. 2023, Custom Diffusion).
SETTINGS = {"r": 8, "alpha": 8.0, "variant": "fb", "target_modules": r".*attn2\.to_[kv]"}


def _unet(state: Path | None = None) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    if state is not None:
        unet.load_state_dict(load_file(state))
    return unet.eval()


def _concept(concept: str, size: int) -> tuple[Tensor, Tensor]:
    """Words [size, 3, width] and images [size, 4, 4, 4] of a concept, a colour that the base has no word for."""
    words = torch.zeros(size, 3, WIDTH)
    own = slice(0, 4) if concept == "cat" else slice(4, 8)
    words[..., own] = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3))
    colour = {"cat": [1.0, -1.0, 1.0, -1.0], "hat": [-1.0, -1.0, 1.0, 1.0]}[concept]
    return words, torch.tensor(colour)[None, :, None, None].expand(size, 4, 4, 4)


def _known(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words and images of colours that the base learns: each colour is a linear function of its word."""
    colours_of_words = torch.randn(8, 4, generator=torch.Generator().manual_seed(7)) / 8**0.5
    word = torch.randn(size, 1, 8, generator=generator)
    words = torch.cat([torch.zeros(size, 1, WIDTH - 8), word], dim=-1).expand(-1, 3, -1)
    return words, (word[:, 0] @ colours_of_words)[:, :, None, None].expand(size, 4, 4, 4)


def _loss(model: nn.Module, words: Tensor, image: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the images that are predicted of their noisy forms, at random times."""
    times = torch.randint(0, 1000, (len(image),), generator=generator)
    noisy = DDPMScheduler(1000).add_noise(image, torch.randn(image.shape, generator=generator), times)
    return F.mse_loss(model(sample=noisy, timestep=times, encoder_hidden_states=words).sample, image)


@torch.no_grad()
def _error(model: nn.Module, concept: str) -> float:
    return _loss(model.eval(), *_concept(concept, 32), torch.Generator().manual_seed(1000)).item()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that knows some colours, and two concepts, each trained by itself on that base."""
    folder, generator = tmp_path_factory.mktemp("concepts"), torch.Generator().manual_seed(1)
    base = _unet().train()
    optimizer = torch.optim.Adam(base.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        _loss(base, *_known(16, generator), generator).backward()
        optimizer.step()
    save_file(base.state_dict(), folder / "base.safetensors")
    for concept, config in task_configs(SboraConfig(**SETTINGS), dict.fromkeys(CONCEPTS, 8)).items():
        model = get_peft_model(_unet(folder / "base.safetensors"), config).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(40):
            optimizer.zero_grad()
            _loss(model, *_concept(concept, 8), generator).backward()
            optimizer.step()
        model.save_pretrained(folder / concept)
    return folder


def test_one_concept_is_learned_and_nothing_is_said_of_another(trained: Path) -> None:
    unet = _unet(trained / "base.safetensors")
    base = {concept: _error(unet, concept) for concept in CONCEPTS}
    model = PeftModel.from_pretrained(unet, trained / "cat")
    assert _error(model, "cat") < 0.3 * base["cat"]
    # Rows of an update that has seen no word of the hat are orthogonal to all of them.
    assert _error(model, "hat") == base["hat"]


def test_two_concepts_are_merged_and_one_is_taken_out_to_the_bit(trained: Path) -> None:
    unet = _unet(trained / "base.safetensors")
    base = {concept: _error(unet, concept) for concept in CONCEPTS}
    model = PeftModel.from_pretrained(unet, trained / "cat", adapter_name="cat")
    model.load_adapter(trained / "hat", adapter_name="hat")
    before = _weights(model)
    model.merge_adapter(["hat"])
    hat_alone = _weights(model)
    model.unmerge_adapter(["hat"])

    model.merge_adapter(["cat", "hat"])
    for concept in CONCEPTS:
        assert _error(model, concept) < 0.3 * base[concept]
    model.unmerge_adapter(["cat"])
    for name, weight in _weights(model).items():
        assert torch.equal(weight, hat_alone[name]), name
    assert _error(model, "hat") < 0.3 * base["hat"]
    assert _error(model, "cat") == base["cat"]
    model.unmerge_adapter(["hat"])
    for name, weight in _weights(model).items():
        assert torch.equal(weight, before[name]), name


def test_the_snippets_of_the_page_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) == 4
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    merged = UNet2DConditionModel.from_pretrained("out/unet", local_files_only=True).eval()
    # The concepts of the page have not been trained, so that all of these compute what the base does.
    for folder in ("out/lora", "out/concepts/cat"):
        base = UNet2DConditionModel.from_pretrained("out/unet", local_files_only=True)
        with torch.no_grad():
            again = PeftModel.from_pretrained(base, folder)(**scope["inputs"]).sample
            assert torch.equal(again, merged(**scope["inputs"]).sample)
