"""A plain LoRA folder: PEFT alone computes the same with it, and its factors are the update of the formulas."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_adapters import configs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankbits
from rankbits import BayesianLoraConfig, BottleneckConfig, DyloraConfig, MoraConfig, SboraConfig, harden, set_rank
from rankbits.errors import ExportError
from rankbits.tuners.bayesian_lora import adapted_layers

CONFIGS = configs()
CASES = [(kind, name) for kind in ("linear", "conv1d") for name in CONFIGS]
RELOAD = """
import json
from pathlib import Path
import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

for folder in sorted(Path().iterdir()):
    Layer = nn.Linear if folder.name.startswith("linear") else lambda inputs, outputs: Conv1D(outputs, inputs)
    base = nn.Sequential(Layer(12, 10), nn.Tanh(), Layer(10, 16))
    saved = torch.load(folder / "given.pt")
    base.load_state_dict(saved["base"])
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        torch.save(model(saved["x"]), folder / "loaded.pt")
"""


@pytest.fixture(scope="module")
def reloaded(
    tmp_path_factory: pytest.TempPathFactory, base: Callable, trained: Callable, without_rankbits: Callable
) -> Callable[[str, str], SimpleNamespace]:
    """Every method on every kind of layer, exported, and loaded in one process without rankbits."""
    root = tmp_path_factory.mktemp("lora")
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(7))
    expected = {}
    for kind, name in CASES:
        folder = root / f"{kind} {name}"
        folder.mkdir()
        layers = base(kind)
        torch.save({"base": layers.state_dict(), "x": x}, folder / "given.pt")
        plain = layers(x).detach()
        model = trained(layers, configs()[name])
        rankbits.export(model, folder / "adapter", to="lora")
        expected[kind, name] = SimpleNamespace(folder=folder / "adapter", plain=plain, output=model(x).detach())
    without_rankbits(RELOAD, root)
    for kind, name in CASES:
        expected[kind, name].loaded = torch.load(root / f"{kind} {name}" / "loaded.pt")
    return lambda kind, name: expected[kind, name]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_peft_alone_computes_the_same(reloaded: Callable, kind: str, name: str) -> None:
    case = reloaded(kind, name)
    size = case.output.abs().max()
    # Both sum the same products in another order: 1e-6 of the largest output, some ten roundings in float32.
    assert (case.loaded - case.output).abs().max() <= 1e-6 * size
    assert (case.plain - case.output).abs().max() > 0.01 * size


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_folder_is_plain_lora(reloaded: Callable, kind: str, name: str) -> None:
    folder = reloaded(kind, name).folder
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["fan_in_fan_out"] is (kind == "conv1d")
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{n}.lora_{m}.weight" for n in (0, 2) for m in "AB"}


def _read(folder: Path) -> dict[str, Tensor]:
    """The update of every layer that a plain LoRA folder stands for, alpha / r * B A, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    updates = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        r, alpha = config["r"], config["lora_alpha"]
        for pattern, value in config["rank_pattern"].items():
            r = value if re.match(pattern + "$", name) else r
        for pattern, value in config["alpha_pattern"].items():
            alpha = value if re.match(pattern + "$", name) else alpha
        assert r == len(down)
        updates[name] = alpha / r * up @ down
    return updates


def _formula(layer: nn.Module, config: object) -> Tensor:
    """The update of one layer as its paper writes it, densely and in float64."""
    if isinstance(config, DyloraConfig):
        b = config.evaluation_rank
        return config.alpha / b * layer.dylora_up["default"][:, :b] @ layer.dylora_down["default"][:b]
    if isinstance(config, BayesianLoraConfig):
        diagonal = torch.diag(layer.bayesian_lora_diagonal["default"])
        product = layer.bayesian_lora_up["default"] @ diagonal @ layer.bayesian_lora_down["default"]
        return config.alpha / config.r * product
    update = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    if isinstance(config, SboraConfig):
        for place, index in enumerate(layer.sbora_indices["default"].tolist()):
            if config.variant == "fa":
                update[:, index] = config.alpha / config.r * layer.sbora_up["default"][:, place]
            else:
                update[index] = config.alpha / config.r * layer.sbora_down["default"][place]
        return update
    side = len(layer.mora_M["default"])
    inputs, outputs = (_groups(config.mora_type, n, side, which) for n, which in zip(update.T.shape, "io", strict=True))
    for row, out_group in enumerate(outputs):
        for column, in_groups in enumerate(inputs):
            if out_group:
                update[row, column] = sum(layer.mora_M["default"][out_group[0], g] for g in in_groups)
    return update


def _groups(kind: str, n: int, side: int, which: str) -> list[list[int]]:
    """The entries of the square matrix that each input is summed into, or that each output is read from."""
    if kind == "truncation":
        return [[i] if i < side else [] for i in range(n)]
    adjacent = {
        "sharing": "",
        "sharing_adjacent": "io",
        "sharing_adjacent_inputs": "i",
        "sharing_adjacent_outputs": "o",
    }
    if which in adjacent[kind]:
        sizes = [n // side + (group < n % side) for group in range(side)]
        return [[group] for group, size in enumerate(sizes) for _ in range(size)]
    # Where the last stretch of inputs is short it goes on with the first inputs.
    wrapped = -(-n // side) * side if which == "i" else n
    return [[place % side for place in range(i, wrapped, n)] for i in range(n)]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "lora"])
def test_the_factors_are_the_formula(base, trained, tmp_path, kind: str, name: str) -> None:
    config = configs()[name]
    model = trained(base(kind).double(), config)
    rankbits.export(model, tmp_path / "adapter", to="lora")
    written = _read(tmp_path / "adapter")
    for layer_name in ("0", "2"):
        expected = _formula(model.get_submodule(f"base_model.model.{layer_name}"), config)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(written[layer_name], expected, rtol=1e-12, atol=1e-12)


def _nested() -> nn.Sequential:
    def pair() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    nested = nn.Sequential(nn.Linear(6, 6), pair(), pair()).eval()
    nested.add_module("1_0", nn.Linear(6, 6))
    return nested


def test_ranks_that_differ_are_patterns_of_these_layers_alone(trained, tmp_path) -> None:
    torch.manual_seed(0)
    # "1.0" and "2.0" end like "0", and "1_0" is what the expression "1.0" would match, too.
    base = _nested()
    names = ["0", "1.0", "1_0"]
    expression = "|".join(re.escape(name) for name in names)
    config = BayesianLoraConfig(r=4, learn_bits=False, target_modules=expression, init_weights=False)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = trained(base, config)
    x = torch.randn(4, 6)
    rankbits.export(model, tmp_path / "adapter", to="lora", example_inputs={"input": x})
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["r"] == 4
    assert written["rank_pattern"] == {"^0": 2, r"^1\.0": 3}
    # One scale for all: a loader that ignores patterns scales rightly, too.
    assert written["lora_alpha"] == 16
    assert written["alpha_pattern"] == {"^0": 8, r"^1\.0": 12}

    fresh = _nested()
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    adapted = {n for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(names)
    expected = model(x).detach()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_names_are_listed_where_they_are_clear(bert, ids, trained, tmp_path) -> None:
    model = trained(bert, MoraConfig(r=2, mora_type="sharing", target_modules=["query", "intermediate.dense"]))
    rankbits.export(model, tmp_path / "adapter", to="lora", example_inputs=ids)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    ends = ("attention.self.query", "intermediate.dense")
    assert written["target_modules"] == sorted(f"bert.encoder.layer.{i}.{end}" for i in range(2) for end in ends)


def test_layers_without_a_rank_left_are_left_out(base, trained, rows, tmp_path) -> None:
    model = trained(base("linear"), configs()["bayesian-lora"])
    ((_, first), _) = adapted_layers(model)
    none = {"down": (0, 12), "diagonal": (0,), "up": (10, 0)}
    for factor, shape in none.items():
        getattr(first, f"bayesian_lora_{factor}")["default"] = nn.Parameter(torch.empty(shape))
    exported = rankbits.export(model, tmp_path / "adapter", to="lora", example_inputs={"input": rows})
    assert exported.verification.holds
    assert _read(tmp_path / "adapter").keys() == {"2"}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == ["2"]

    model.base_model.model[2] = first
    with pytest.raises(ExportError, match="all layers of adapter 'default' have rank 0"):
        rankbits.export(model, tmp_path / "none", to="lora")


def test_dylora_leaves_at_the_rank_it_is_used_at(base, trained, rows, tmp_path) -> None:
    model = trained(base("linear"), configs()["dylora"])
    for rank in (1, 4):
        set_rank(model, rank)
        exported = rankbits.export(model, tmp_path / str(rank), to="lora", example_inputs={"input": rows})
        assert exported.verification.holds
        written = json.loads((tmp_path / str(rank) / "adapter_config.json").read_text())
        assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (rank, 5, 0.5)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to False.*")
def test_a_head_travels_along_and_peft_finds_the_base_by_itself(bert, ids, trained, tmp_path) -> None:
    bert.save_pretrained(tmp_path / "base")
    base = type(bert).from_pretrained(tmp_path / "base")
    config = DyloraConfig(r=2, target_modules=["query"], init_weights=False, task_type="SEQ_CLS")
    model = trained(base, config)
    with torch.no_grad():
        head = model.get_base_model().classifier.modules_to_save["default"]
        head.weight.normal_()
    rankbits.export(model, tmp_path / "adapter", to="lora")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["task_type"] == "SEQ_CLS"
    assert sorted(written["modules_to_save"]) == ["classifier", "score"]
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    expected = model(**ids).logits.detach()
    assert torch.equal(loaded.get_base_model().classifier.modules_to_save["default"].weight, head.weight)
    torch.testing.assert_close(loaded(**ids).logits, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_the_active_adapter_leaves_by_whatever_name_it_has(base, trained, rows, tmp_path) -> None:
    for number, name in enumerate(("sbora fa", "lora")):
        model = get_peft_model(base("linear"), configs()[name], adapter_name="first")
        model.add_adapter("second", configs()[name])
        model.set_adapter("second")
        exported = rankbits.export(model.eval(), tmp_path / str(number), to="lora", example_inputs={"input": rows})
        assert exported.verification.holds
        assert not (tmp_path / str(number) / "second").exists()


def test_conv1d_and_linear_in_one_model(trained, tmp_path) -> None:
    torch.manual_seed(0)
    model = trained(nn.Sequential(Conv1D(8, 6), nn.Linear(8, 4)), DyloraConfig(r=2, target_modules=["0", "1"]))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        exported = rankbits.export(model, tmp_path / "a", to="lora", example_inputs={"input": torch.randn(3, 6)})
    assert exported.verification.holds


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MoraConfig(r=2, mora_type=6, target_modules=["0"]), "no low-rank product.*Try to='merged'"),
        (MoraConfig(r=2, mora_type="decoupling", target_modules=["0"]), "no low-rank product.*Try to='merged'"),
        (
            BayesianLoraConfig(r=2, target_modules=["0"], learn_rank=False, quantizers=["up"], calibration_passes=1),
            r"'0' has no exact plain LoRA: .*quantizes \['up'\].*learned grids.*Try to='merged'",
        ),
        (BottleneckConfig(target_modules=["0"]), "adapters of a BottleneckLinear are not exported as plain LoRA"),
        (LoraConfig(target_modules=["0"], use_dora=True), "'default' is DoRA, whose magnitudes have no place in plain"),
    ],
    ids=["mora 6", "mora decoupling", "learned bits", "bottleneck", "dora"],
)
def test_what_has_no_exact_lora_is_refused(base, rows, tmp_path, config, reason: str) -> None:
    model = get_peft_model(base("linear"), config).train()
    if isinstance(config, BayesianLoraConfig):
        with torch.no_grad():
            for _, layer in adapted_layers(model):
                layer.bayesian_lora_up["default"].normal_()
        model(rows)
        rankbits.GateSchedule(model, 10).step()
        harden(model)
    with pytest.raises(ExportError, match=reason):
        rankbits.export(model, tmp_path / "new" / "adapter", to="lora")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_refused(base, trained, tmp_path) -> None:
    model = trained(base("linear"), configs()["sbora fb"])
    with torch.no_grad():
        model.base_model.model[2].sbora_down["default"][1, 2] = torch.inf
    with pytest.raises(ExportError, match="the update of '2' has values that are NaN or infinite"):
        rankbits.export(model, tmp_path / "adapter", to="lora")
    assert list(tmp_path.iterdir()) == []


def test_a_base_in_4_bits(rows, trained, tmp_path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    model = trained(base, SboraConfig(r=4, target_modules=["0"], init_weights=False))
    x = torch.randn(3, 64)
    exported = rankbits.export(model, tmp_path / "adapter", to="lora", example_inputs={"input": x})
    assert exported.verification.largest_difference <= 1e-6 * exported.verification.largest_output
