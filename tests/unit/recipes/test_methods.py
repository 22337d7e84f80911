"""From a recipe's method and settings to a PEFT configuration, and what does not suit a model."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from pydantic import BaseModel
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config, DebertaV2ForSequenceClassification

from rankbits import BottleneckConfig, DyloraConfig, MoraConfig, SboraConfig, tasks
from rankbits.accounting import mora as counted
from rankbits.errors import ModelError, RecipeError
from rankbits.recipes import four_bits, models
from rankbits.recipes.catalogue import METHODS as DESCRIBED
from rankbits.recipes.catalogue import method_names
from rankbits.recipes.load import load
from rankbits.recipes.method_settings import BottleneckSettings
from rankbits.recipes.methods import METHODS, WITHOUT_ADAPTERS, attach
from rankbits.recipes.run_folder import METHOD_SECTIONS, work_of
from rankbits.recipes.schema import AdapterSection
from rankbits.records import recipe_hash
from rankbits.tuners.mora.update import NUMBERED

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
FROZEN = {
    ("quickstart",): "3a1b9886f5f0b56edbe34e0ce1a59af646ae01ebccafc5948ac5ac5c47b7c6f5",
    ("quickstart", "method=lora"): "2086929b0a9cca303078591e160ee356394a8f1de6e8d64ee64b23e58fbb7138",
    ("glue/minilm/stsb", "method=lora"): "31353fb07b209cdbcc78df1446854ca7510df25b614adc83ad7a5df9ad7bd628",
    ("glue/minilm-budget/mrpc",): "01cfd8e38947301db464d1c5772b8637775b52073d8b9971d5f19dc827c998e1",
    ("e2e_nlg-smollm2",): "b1d8915d95eec983d6f1f10ca3dadad79ee3bc0cbd850a914a8d8d7531e3c2cd",
}
"""Hashes of recipes without settings of single methods: they move with keys that all have, and with what they say."""


def _model() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(vocab_size=20, **SIZES))


def _config(method: str, *changes: str):
    recipe = load("quickstart", [f"method={method}", "adapter.r=4", "adapter.targets=[query]", *changes])
    return METHODS[method].config(recipe, _model())


def _fields(config, *names: str) -> list:
    return [getattr(config, name) for name in names]


def test_what_is_described_can_be_attached() -> None:
    assert [*METHODS, *WITHOUT_ADAPTERS] == method_names()
    sections = {name for name, value in AdapterSection() if isinstance(value, BaseModel)}
    assert sections == METHOD_SECTIONS
    assert all(known.merges and known.exports and known.paper for known in DESCRIBED)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in {"prefix", "prompt"}])
def test_attaching_leaves_the_recipe_as_it_was(method: str) -> None:
    changes = [f"method={method}", "adapter.r=2", "adapter.targets=[query]", "adapter.modules_to_save=[pooler]"]
    recipe = load("quickstart", changes)
    config = METHODS[method].config(recipe, _model())
    config.task_type = "SEQ_CLS"
    get_peft_model(_model(), config)
    # PEFT adds the names of the classifier to the list that it is given.
    assert recipe.adapter.modules_to_save == ["pooler"]


@pytest.mark.parametrize(
    ("method", "rslora", "dora"),
    [
        ("lora", False, False),
        ("rslora", True, False),
        ("dora", False, True),
        ("qlora", False, False),
        ("qdora", False, True),
    ],
)
def test_variants_of_lora(method: str, rslora: bool, dora: bool) -> None:
    config = _config(method, "adapter.alpha=3", "adapter.dropout=0.25", "adapter.modules_to_save=[pooler]")
    assert isinstance(config, LoraConfig)
    assert _fields(config, "r", "lora_alpha", "lora_dropout", "target_modules") == [4, 3, 0.25, {"query"}]
    assert _fields(config, "use_rslora", "use_dora", "modules_to_save") == [rslora, dora, ["pooler"]]


def test_keys_of_mora() -> None:
    usual = _config("mora")
    assert isinstance(usual, MoraConfig)
    assert _fields(usual, "r", "mora_type", "rounding", "fold", "dropout") == [4, None, "nearest", False, 0.0]
    config = _config(
        "mora",
        "adapter.mora.type=decoupling",
        "adapter.mora.rounding=floor",
        "adapter.mora.fold=true",
        "adapter.dropout=0.5",
    )
    assert _fields(config, "mora_type", "rounding", "fold", "dropout") == ["decoupling", "floor", True, 0.5]


@pytest.mark.parametrize("number", NUMBERED)
def test_numbers_of_mora_s_code_stand_for_names(number: int) -> None:
    recipe = load("quickstart", ["method=mora", f"adapter.mora.type={number}"])
    assert recipe.adapter.mora.type == NUMBERED[number].value == counted.NUMBERED[number]
    assert recipe == load("quickstart", ["method=mora", f"adapter.mora.type={NUMBERED[number].value}"])


@pytest.mark.parametrize(
    ("method", "given", "variant"),
    [
        ("sbora-fa", "null", "fa"),
        ("sbora-fb", "null", "fb"),
        ("qsbora", "null", "fa"),
        ("qsbora", "fb", "fb"),
        ("sbora-fb", "fb", "fb"),
        ("multi-sbora", "null", "fa"),
        ("multi-sbora", "fb", "fb"),
    ],
)
def test_keys_of_sbora(method: str, given: str, variant: str) -> None:
    changes = ["seed=7", "first=3", "disjoint=true", f"variant={given}"]
    config = _config(method, "adapter.alpha=5", *(f"adapter.sbora.{change}" for change in changes))
    assert isinstance(config, SboraConfig)
    assert _fields(config, "r", "alpha", "variant", "seed", "first", "disjoint") == [4, 5, variant, 7, 3, True]
    # What makes several tasks of it is that none takes what another has, whether the recipe repeats that or not.
    assert _config(method).disjoint == (method == "multi-sbora")


def test_keys_of_dylora() -> None:
    config = _config(
        "dylora", "adapter.dylora.mode=prefix", "adapter.dylora.strict=false", "adapter.dylora.evaluation_rank=2"
    )
    assert isinstance(config, DyloraConfig)
    assert _fields(config, "r", "train_mode", "strict", "evaluation_rank") == [4, "prefix", False, 2]


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_keys_of_bottlenecks(method: str) -> None:
    usual = _config(method)
    assert isinstance(usual, BottleneckConfig)
    # The layers of another method's targets are not the ends of sub-layers.
    assert _fields(usual, "kind", "bottleneck_size", "target_modules", "init_weights") == [method, None, None, "zero"]
    changes = ["reduction_factor=3", "non_linearity=tanh", "scaling=2", "init=random"]
    config = _config(method, "adapter.dropout=0.1", *(f"adapter.bottleneck.{change}" for change in changes))
    wanted = [10, "tanh", 2, False, 0.1]
    assert _fields(config, "bottleneck_size", "non_linearity", "scaling", "init_weights", "dropout") == wanted
    assert _config(method, "adapter.bottleneck.size=5").bottleneck_size == 5


def test_keys_of_virtual_tokens() -> None:
    prefix = _config("prefix", "adapter.prefix.virtual_tokens=6", "adapter.modules_to_save=[pooler]")
    assert isinstance(prefix, PrefixTuningConfig)
    assert _fields(prefix, "num_virtual_tokens", "modules_to_save", "init_weights") == [6, ["pooler"], None]
    assert _config("prefix", "adapter.prefix.init=zero").init_weights == "zero"
    changes = ["virtual_tokens=5", "init=text", "text=good"]
    prompt = _config("prompt", *(f"adapter.prompt.{change}" for change in changes))
    assert isinstance(prompt, PromptTuningConfig)
    assert _fields(prompt, "num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text") == [5, "TEXT", "good"]
    assert prompt.tokenizer_name_or_path


def test_keys_of_a_base_in_four_bits() -> None:
    pytest.importorskip("bitsandbytes")
    usual = four_bits.quantization(load("quickstart", ["method=qlora", "adapter.modules_to_save=[pooler]"]))
    assert usual is not None
    names = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    assert _fields(usual, *names) == [True, "nf4", True]
    assert str(usual.bnb_4bit_compute_dtype) == "torch.float32"
    assert {".*classifier", ".*lm_head", ".*pooler"} <= set(usual.llm_int8_skip_modules)
    changes = ["adapter.nf4.double_quantization=false", "adapter.nf4.compute_dtype=bfloat16"]
    other = four_bits.quantization(load("quickstart", ["method=qsbora", *changes]))
    assert other is not None
    assert not other.bnb_4bit_use_double_quant
    assert str(other.bnb_4bit_compute_dtype) == "torch.bfloat16"
    assert four_bits.quantization(load("quickstart", ["method=dora"])) is None


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_a_base_in_four_bits_evaluates_what_it_trains(method: str, tmp_path: Path) -> None:
    """PEFT's DoRA reads the weight in each pass, evaluated or not, whatever kernel bitsandbytes has for the CPU."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    recipe = load("quickstart", [f"method={method}", "adapter.targets=all-linear"])
    base = models.load_model(str(tmp_path), tasks.get("mrpc"), four_bits.quantization(recipe))
    model = attach(recipe, base)
    ids = torch.arange(20)[None]
    trained = model.train()(input_ids=ids).logits.detach()
    with torch.no_grad():
        evaluated = [model.eval()(input_ids=ids).logits for _ in range(2)]
    for logits in evaluated:
        torch.testing.assert_close(logits, trained, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.train()(input_ids=ids).logits.detach(), trained)


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bits, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"qlora holds the base in 4 bits.*pip install 'rankbits\[quantized\]'"):
        four_bits.quantization(load("quickstart", ["method=qlora"]))


def test_the_paged_optimizer_is_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("quickstart", ["method=qlora"])
    monkeypatch.setattr(four_bits.torch.cuda, "is_available", lambda: True)
    assert four_bits.optimizer(recipe) == ("paged_adamw_32bit", "")
    monkeypatch.setattr(four_bits.torch.cuda, "is_available", lambda: False)
    name, said = four_bits.optimizer(recipe)
    assert name is None
    assert "CUDA alone" in said
    assert four_bits.optimizer(load("quickstart", ["method=lora"])) == (None, "")


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora"])
def test_a_rank_that_a_matrix_cannot_have_is_refused(method: str) -> None:
    recipe = load("quickstart", [f"method={method}", "adapter.r=33", "adapter.targets=[query]"])
    with pytest.raises(ModelError, match=r"query' would have rank \d\d, but its weight is \[32, 32\]; .* at most 32"):
        attach(recipe, _model())


def test_attention_that_takes_no_prefix_is_refused() -> None:
    model = DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=20, type_vocab_size=0, **SIZES))
    with pytest.raises(ModelError, match=r"prefix cannot be attached .* \(DebertaV2Model\) takes no keys and values"):
        attach(load("quickstart", ["method=prefix"]), model)


def test_targets_of_other_methods_are_not_looked_for() -> None:
    recipe = load("quickstart", ["method=pfeiffer", "adapter.targets=[nowhere]", "adapter.bottleneck.size=2"])
    assert attach(recipe, _model()).active_peft_config.target_modules != {"nowhere"}
    with pytest.raises(ModelError, match=r"adapter\.targets: 'nowhere' matches no module"):
        attach(load("quickstart", ["method=mora", "adapter.targets=[nowhere]"]), _model())
    with pytest.raises(ModelError, match=r"adapter\.modules_to_save: 'nowhere' matches no module"):
        attach(load("quickstart", ["method=prompt", "adapter.modules_to_save=[nowhere]"]), _model())


@pytest.mark.parametrize("asked", FROZEN)
def test_settings_of_other_methods_are_not_part_of_the_work(asked: tuple[str, ...]) -> None:
    name, *changes = asked
    assert recipe_hash(work_of(load(name, changes))) == FROZEN[asked]
    others = ["adapter.mora.fold=true", "adapter.dylora.mode=prefix", "adapter.nf4.double_quantization=false"]
    assert recipe_hash(work_of(load(name, [*changes, *others]))) == FROZEN[asked]


def test_how_tensors_are_rounded_reaches_the_adapter_and_the_work() -> None:
    usual = {"placement": "separate", "rounding": "nearest", "code_range": "narrow", "scale_bits": 32}
    usual |= {"activation_ranges": "largest", "granularity": "tensor", "input_granularity": "tensor", "group_size": 64}
    names = tuple(usual)
    assert _fields(_config("bayesian-lora"), *names) == list(usual.values())
    asked = ("merged", "compensated", "full", 8, "fitted", "group", "group", 32)
    changes = [f"adapter.{name}={value}" for name, value in zip(names, asked, strict=True)]
    assert _fields(_config("bayesian-lora", *changes), *names) == list(asked)
    later = {"code_range": "full", "scale_bits": 16, "activation_ranges": "fitted", "input_granularity": "group"}
    for name, new in later.items():
        one, other = (
            load("quickstart", ["adapter.granularity=group", "adapter.quantizers=[input]", f"adapter.{name}={g}"])
            for g in (new, usual[name])
        )
        assert work_of(one)["adapter"].pop(name) == new
        assert name not in work_of(other)["adapter"]


def test_a_start_at_the_mean_is_part_of_the_work_where_it_is_asked_for() -> None:
    one, other = (load("glue/minilm/stsb", [f"task.start_at_mean={given}"]) for given in ("true", "false"))
    assert work_of(one)["task"].pop("start_at_mean") is True
    assert "start_at_mean" not in work_of(other)["task"]
    assert recipe_hash(work_of(one)) != recipe_hash(work_of(other))


def test_settings_of_the_method_are_part_of_the_work() -> None:
    one, other = (load("quickstart", ["method=qsbora", f"adapter.sbora.seed={seed}"]) for seed in (1, 2))
    assert recipe_hash(work_of(one)) != recipe_hash(work_of(other))
    assert set(work_of(one)["adapter"]) & METHOD_SECTIONS == {"sbora", "nf4"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["method=lora", "gates.budget=bits=4"],
            "gates.budget: given 'bits=4', expected null with method=lora: only bayesian-lora learns",
        ),
        (["method=mora", "adapter.mora.fold=true", "adapter.mora.type=sharing"], "adapter.mora.fold: given true"),
        (
            ["adapter.input_granularity=group", "adapter.granularity=channel"],
            "adapter.input_granularity: given the text 'group', expected tensor with adapter.granularity=channel",
        ),
        (
            ["method=sbora-fa", "adapter.sbora.variant=fb"],
            "given the text 'fb', expected fa or null with",
        ),
        (["method=dylora", "adapter.dylora.evaluation_rank=9"], "adapter.dylora.evaluation_rank: given 9, expected at"),
        (["method=dylora", "adapter.dylora.evaluate_ranks=[2,9]"], "given [2, 9], expected at most r=8 each"),
        (["method=prefix", "training.gradient_checkpointing=true"], "training.gradient_checkpointing: given true"),
        (["task.start_at_mean=true"], "task.start_at_mean: given true, expected false with task 'film-reviews'"),
        (["adapter.mora.type=5"], "adapter.mora.type: given 5, expected truncation, sharing,"),
        (["adapter.mora.type=tiles"], "adapter.mora.type: given the text 'tiles', expected truncation, sharing,"),
        (["adapter.mora.kind=sharing"], "adapter.mora.kind: unknown key; nearest valid key: adapter.mora"),
        (["adapter.prompt.init=text"], "adapter.prompt.text: given nothing (the default), expected a text where"),
        (["adapter.prompt.text=film"], "adapter.prompt.text: given the text 'film', expected a text where"),
        (["adapter.bottleneck.size=2", "adapter.bottleneck.reduction_factor=2"], "adapter.bottleneck.size: given 2"),
    ],
)
def test_what_a_method_cannot_honour_is_refused(changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load("quickstart", changes)
    assert said in str(caught.value)


def test_settings_of_several_methods_may_stand_together() -> None:
    recipe = load("quickstart", ["method=lora", "adapter.mora.fold=true", "adapter.dylora.evaluate_ranks=[99]"])
    assert recipe.adapter.mora.fold
    assert recipe.adapter.bottleneck == BottleneckSettings()
