"""What every tuner of linear layers shares: dtypes in and out, what is left when adapters go."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rankbits import BayesianLoraConfig, BottleneckConfig, DyloraConfig, MoraConfig, SboraConfig
from rankbits.tuners.bayesian_lora import adapted_layers

CONFIGS: dict[str, Callable[[list[str]], PeftConfig]] = {
    "bayesian-lora": lambda targets: BayesianLoraConfig(r=2, learn_bits=False, target_modules=targets),
    "dylora": lambda targets: DyloraConfig(r=2, target_modules=targets),
    "houlsby": lambda targets: BottleneckConfig(kind="houlsby", target_modules=targets),
    "mora": lambda targets: MoraConfig(r=1, mora_type="sharing", target_modules=targets),
    "sbora": lambda targets: SboraConfig(r=2, target_modules=targets),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"learn_bits": False}])
def test_the_output_has_the_dtype_of_the_input(mlp, rows, adapt, dtype, settings) -> None:
    model = adapt(mlp.to(dtype), target_modules=["0", "2"], **settings).train()
    for _ in range(3):
        assert model(rows.to(dtype)).dtype == dtype
    assert bool(torch.isfinite(model(rows.to(dtype))).all())


def test_unload_restores_the_base_model(mlp, rows, adapt, learn) -> None:
    expected, base = mlp(rows), [mlp[0], mlp[2]]
    model = adapt(mlp, target_modules=["0", "2"])
    learn(model, rows)
    plain = model.unload()
    assert [plain[0], plain[2]] == base
    assert torch.equal(plain(rows), expected)


def test_shapes_of_conv1d_are_read_the_right_way_round(adapt) -> None:
    from transformers.pytorch_utils import Conv1D

    model = adapt(nn.Sequential(Conv1D(6, 4)), r=2, target_modules=["0"])
    ((_, layer),) = adapted_layers(model)
    assert (layer.in_features, layer.out_features) == (4, 6)
    assert layer.bayesian_lora_down["default"].shape == (2, 4)
    assert layer.bayesian_lora_up["default"].shape == (6, 2)
    assert model(torch.randn(3, 4)).shape == (3, 6)


def test_a_new_adapter_that_is_not_active_is_frozen(mlp, adapt) -> None:
    model = adapt(mlp, target_modules=["0"])
    config = type(model.peft_config["default"])(r=2, target_modules=["2"])
    model.add_adapter("other", config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in trained if "other" in name]


def _adapters(model: nn.Module) -> dict[str, list[str]]:
    """Layers that have adapters, with the names of theirs."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name: sorted(layer._all_available_adapter_names()) for name, layer in layers.items()}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_target_that_cannot_be_adapted_leaves_the_model_as_it_was(mlp, rows, method) -> None:
    mlp.add_module("last", nn.Identity())
    before, expected = dict(mlp.named_modules()), mlp(rows)
    with pytest.raises(TypeError, match="'last' is a Identity, which cannot be adapted"):
        get_peft_model(mlp, CONFIGS[method](["0", "2", "last"]))
    assert dict(mlp.named_modules()) == before
    assert torch.equal(mlp(rows), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_weight_on_a_grid_that_peft_does_not_know_is_refused(mlp, method, dtype) -> None:
    first = mlp.get_submodule("0")
    first.weight = nn.Parameter(first.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=f"'0' is a Linear with a weight of {dtype}, .* expected a weight of torch.f"):
        get_peft_model(mlp, CONFIGS[method](["0"]))
    assert mlp.get_submodule("0") is first


@pytest.mark.parametrize("method", CONFIGS)
def test_a_second_adapter_that_cannot_be_added_leaves_the_first(mlp, rows, method) -> None:
    mlp.add_module("last", nn.Identity())
    model = get_peft_model(mlp, CONFIGS[method](["0"])).eval()
    adapters, expected = _adapters(model), model(rows)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(TypeError, match="'last' is a Identity"):
        model.add_adapter("second", CONFIGS[method](["0", "2", "last"]))
    assert _adapters(model) == adapters
    assert model.active_adapters == ["default"]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert torch.equal(model(rows), expected)


def _three(*widths: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.Tanh(), nn.Linear(widths[1], widths[2]))


@pytest.mark.filterwarnings("ignore:.*never stepped")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (_three(12, 14, 9), r"base_model\.model\.[02]\..* was saved as \[.*\] and is \[.*\] here"),
        (nn.Sequential(nn.Linear(12, 10), nn.Tanh()), r"base_model\.model\.2\..* is not in it"),
        (_three(12, 11, 8), r"base_model\.model\.[02]\..* was saved as \[.*\] and is \[.*\] here"),
    ],
    ids=["other widths", "fewer layers", "nearly the widths"],
)
def test_an_adapter_of_another_base_is_not_loaded_and_leaves_what_is_there(mlp, tmp_path, method, other, said) -> None:
    get_peft_model(mlp, CONFIGS[method](["0", "2"])).save_pretrained(tmp_path)
    model = get_peft_model(copy.deepcopy(other), CONFIGS[method](["0"]), adapter_name="present").eval()
    x = torch.randn(3, 12)
    expected = model(x)
    with pytest.raises(ValueError, match=f"adapter 'late' does not fit this model: {said}"):
        model.load_adapter(str(tmp_path), adapter_name="late")
    # A layer that the adapter alone was put into stays wrapped, as after PEFT's delete_adapter, and computes the same.
    assert {name for names in _adapters(model).values() for name in names} == set(model.peft_config) == {"present"}
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match=f"adapter 'late' does not fit this model: {said}"):
        PeftModel.from_pretrained(copy.deepcopy(other), str(tmp_path), adapter_name="late")


@pytest.mark.filterwarnings("ignore:.*never stepped")
@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_of_fewer_layers_is_not_loaded(mlp, tmp_path, method) -> None:
    get_peft_model(mlp, CONFIGS[method](["0", "2"])).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"2"', '"4"').replace('"4"', '"2",\n"4"', 1)
    )
    deeper = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"does not fit this model: base_model\.model\.4\..* was not saved"):
        PeftModel.from_pretrained(deeper, str(tmp_path))


@pytest.mark.parametrize("method", CONFIGS)
def test_an_unknown_adapter_is_not_merged(mlp, rows, method) -> None:
    model = get_peft_model(mlp, CONFIGS[method](["0", "2"])).eval()
    with pytest.raises(ValueError, match=r"adapters \['other'\] cannot be merged: the model has \['default'\]"):
        model.merge_adapter(["default", "other"])
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))


@pytest.mark.parametrize(
    ("config", "saved", "other"),
    [
        (SboraConfig(r=2, target_modules=["0"]), (24, 12), (48, 12)),
        (SboraConfig(r=2, variant="fb", target_modules=["0"]), (24, 12), (24, 48)),
        (MoraConfig(r=1, mora_type="sharing", target_modules=["0"]), (24, 12), (12, 24)),
        (MoraConfig(r=1, mora_type="rotation", target_modules=["0"]), (24, 12), (18, 18)),
    ],
    ids=["sbora fa", "sbora fb", "mora sharing", "mora rotation"],
)
def test_tensors_of_the_same_shapes_do_not_make_another_base_fit(tmp_path, config, saved, other) -> None:
    get_peft_model(nn.Sequential(nn.Linear(*saved)), config).save_pretrained(tmp_path)
    said = rf"0\.weight was saved as \[{saved[1]}, {saved[0]}\] and is \[{other[1]}, {other[0]}\] here"
    with pytest.raises(ValueError, match=said):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(*other)), str(tmp_path))
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(*saved)), str(tmp_path), low_cpu_mem_usage=True)
    assert [b.tolist() for n, b in loaded.named_buffers() if "shape" in n] == [[saved[1], saved[0]]]


@pytest.mark.parametrize("rank", [2.5, "8", True, 0])
@pytest.mark.parametrize("config", [BayesianLoraConfig, DyloraConfig, MoraConfig, SboraConfig])
def test_a_rank_is_a_positive_whole_number(config, rank) -> None:
    with pytest.raises(ValueError, match=f"`r` must be a positive integer, got {rank!r}"):
        config(r=rank)


@pytest.mark.parametrize("size", [2.5, "8", 0])
def test_a_bottleneck_is_a_positive_whole_number_wide(size) -> None:
    with pytest.raises(ValueError, match=f"`bottleneck_size` must be a positive integer or None, got {size!r}"):
        BottleneckConfig(kind="houlsby", bottleneck_size=size)
