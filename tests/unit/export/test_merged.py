"""A merged folder: transformers alone computes the same with it, and the model it was made of has not changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from tiny_adapters import snapshot, unchanged
from torch import nn
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import rankbits
from rankbits import BayesianLoraConfig, BottleneckConfig, DyloraConfig, GateSchedule, MoraConfig, SboraConfig, harden
from rankbits.errors import ExportError
from rankbits.tuners.bayesian_lora import adapted_layers

ROUNDED = {"learn_rank": False, "calibration_passes": 1, "init_weights": False}
BERT = {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}
GPT2 = {"target_modules": ["c_attn", "c_proj"]}


def configs(targets: dict) -> dict[str, PeftConfig]:
    """Methods whose update is one of weights, the ones without plain LoRA among them."""
    transposed = "c_attn" in targets["target_modules"]
    return {
        "dylora": DyloraConfig(r=4, evaluation_rank=3, init_weights=False, **targets),
        "sbora fa": SboraConfig(r=3, variant="fa", init_weights=False, **targets),
        "sbora fb": SboraConfig(r=3, variant="fb", init_weights=False, **targets),
        "mora rotation": MoraConfig(r=2, mora_type=6, init_weights=False, **targets),
        "mora sharing": MoraConfig(r=2, mora_type=1, init_weights=False, **targets),
        "bits beside": BayesianLoraConfig(quantizers=["weight", "down", "up"], r=4, **ROUNDED, **targets),
        "bits of the sum": BayesianLoraConfig(quantizers=["weight"], placement="merged", r=4, **ROUNDED, **targets),
        "lora": LoraConfig(r=4, init_lora_weights=False, fan_in_fan_out=transposed, **targets),
    }


NAMES = list(configs(BERT))
ROUNDINGS = 2 * 9
"""One product in place of two in each of up to nine adapted layers: how sums are ordered depends on the processor."""
RELOAD = """
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

for folder in sorted(Path().iterdir()):
    Auto = AutoModelForSequenceClassification if folder.name.startswith("bert") else AutoModelForCausalLM
    model = Auto.from_pretrained(folder / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.save(model(torch.load(folder / "ids.pt")).logits, folder / "loaded.pt")
assert "peft" not in sys.modules
"""


def _learned(model: nn.Module, ids: dict) -> None:
    """Fix ranges and different widths in all layers of a model that learns them."""
    layers = list(adapted_layers(model))
    if not layers:
        return
    with torch.no_grad():
        model.train()(**ids)
        GateSchedule(model, 10).step()
        for index, (_, layer) in enumerate(layers):
            for row, logits in enumerate(layer.gates_of("default").bit_logits):
                logits[(index + row) % 3 + 1 :] = -3.0
    harden(model)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory, without_rankbits: Callable) -> Callable:
    """Every method on both models, exported, and loaded in one process without rankbits."""
    root = tmp_path_factory.mktemp("merged")
    ids = {"input_ids": torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(6))}
    cases = {}
    for base, targets in (("bert", BERT), ("gpt2", GPT2)):
        for name, config in configs(targets).items():
            torch.manual_seed(9)
            model = get_peft_model(_tiny(base), config)
            _learned(model, ids)
            model.eval()
            before = snapshot(model)
            folder = root / f"{base} {name}"
            rankbits.export(model, folder / "model", to="merged")
            torch.save(ids["input_ids"], folder / "ids.pt")
            same = unchanged(before, model)
            with torch.no_grad(), model.disable_adapter():
                plain = model(**ids).logits
            output = model(**ids).logits.detach()
            cases[base, name] = SimpleNamespace(folder=folder / "model", output=output, plain=plain, same=same)
    without_rankbits(RELOAD, root)
    for (base, name), case in cases.items():
        case.loaded = torch.load(root / f"{base} {name}" / "loaded.pt")
    return lambda base, name: cases[base, name]


def _tiny(kind: str) -> nn.Module:
    from transformers import BertConfig, GPT2Config

    torch.manual_seed(4)
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        config = BertConfig(vocab_size=50, **sizes, initializer_range=0.3, num_labels=3, attn_implementation="eager")
        return BertForSequenceClassification(config)
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, attn_implementation="eager"
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("base", ["bert", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_alone_computes_the_same(reloaded: Callable, base: str, name: str) -> None:
    case = reloaded(base, name)
    size = case.output.abs().max()
    assert (case.loaded - case.output).abs().max() <= ROUNDINGS * torch.finfo(torch.float32).eps * size
    assert (case.plain - case.output).abs().max() > 0.003 * size


@pytest.mark.parametrize("base", ["bert", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_stays_as_it_is(reloaded: Callable, base: str, name: str) -> None:
    assert reloaded(base, name).same


def test_the_folder_is_a_plain_model(reloaded: Callable) -> None:
    folder = reloaded("bert", "sbora fa").folder
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert not list(folder.glob("adapter*"))


def test_a_trained_head_is_the_head(bert, ids, tmp_path) -> None:
    model = get_peft_model(bert, DyloraConfig(r=2, target_modules=["query"], init_weights=False, task_type="SEQ_CLS"))
    with torch.no_grad():
        head = model.get_base_model().classifier.modules_to_save["default"]
        head.weight.normal_()
    exported = rankbits.export(model, tmp_path / "model", to="merged", example_inputs=ids)
    assert exported.verification.holds
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.classifier.weight, head.weight)


def test_merging_is_safe_while_the_model_trains(bert, ids, tmp_path) -> None:
    model = get_peft_model(bert, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)).train()
    model(**ids, labels=torch.tensor([0, 1, 2])).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = snapshot(model)
    rankbits.export(model, tmp_path / "model", to="merged", example_inputs=ids)
    assert unchanged(before, model)
    assert gradients
    assert all(torch.equal(gradients[n], p.grad) for n, p in model.named_parameters() if p.grad is not None)


def _refused(model: nn.Module, tmp_path: Path, reason: str, ids: dict | None = None) -> None:
    before = snapshot(model)
    with pytest.raises(ExportError, match=reason):
        rankbits.export(model, tmp_path / "new" / "model", to="merged", example_inputs=ids)
    assert unchanged(before, model)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("placement", ["separate", "merged"])
def test_activations_on_a_grid_are_refused(bert, ids, tmp_path, placement: str) -> None:
    config = BayesianLoraConfig(
        r=2, target_modules=["query"], quantizers=["weight", "input"], placement=placement, **ROUNDED
    )
    model = get_peft_model(bert, config)
    _learned(model, ids)
    _refused(model, tmp_path, r"query'.*activations \['input'\]")


def test_bottleneck_adapters_are_refused(bert, tmp_path) -> None:
    _refused(get_peft_model(bert, BottleneckConfig()), tmp_path, "no single weight can do")


def test_prompts_are_refused(gpt2, tmp_path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    _refused(get_peft_model(gpt2, config), tmp_path, "no update of a weight")


def test_a_model_that_is_not_of_transformers_is_refused(base, tmp_path) -> None:
    model = get_peft_model(base("linear"), DyloraConfig(target_modules=["0"], r=2))
    _refused(model, tmp_path, "base is a Sequential: use to='lora'")


def test_numbers_that_are_not_finite_are_refused(bert, tmp_path) -> None:
    model = get_peft_model(bert, DyloraConfig(r=2, target_modules=["query"], init_weights=False))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "dylora_up" in n)[0] = torch.inf
    _refused(model, tmp_path, "cannot be merged: NaNs detected")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_a_tied_weight_is_refused(tmp_path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, tie_word_embeddings=True))
    model = get_peft_model(base, DyloraConfig(r=2, target_modules=["lm_head"], init_weights=False))
    _refused(model, tmp_path, "'lm_head' shares its weight with 'model.embed_tokens'")


def test_a_quantized_base_is_refused(bert, tmp_path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    query = bert.bert.encoder.layer[0].attention.self
    query.query = bnb.nn.Linear4bit(16, 16, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    model = get_peft_model(bert, DyloraConfig(r=2, target_modules=["query"], init_weights=False))
    _refused(model, tmp_path, "base is quantized.*Use to='lora'")
