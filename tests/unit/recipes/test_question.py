"""What an estimate is asked: questions from recipes and from keys, their defaults, and everything that is refused."""

import json
from pathlib import Path

import pytest

from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.budget import Budget, Quantity
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.errors import ModelError, RecipeError, UnknownArchitectureError
from rankbits.recipes.load import load
from rankbits.recipes.question import NAMES, USED_BY, config_of, from_keys, from_recipe
from rankbits.recipes.schema import QUANTIZER_SITES
from rankbits.records import CountOptions

SEVEN = tuple(site for site in QUANTIZER_SITES if site != "input")
LENGTH = "sequence_length=16"
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 20}
BERT = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 48, **SIZES}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, **SIZES}
DISTILBERT = {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50}


@pytest.fixture
def model(tmp_path: Path):
    """Writes a config.json with changes and gives its folder."""

    def model(config: dict, **changes: object) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        return str(tmp_path)

    return model


def _problems(*overrides: str, model: str = "bert-base") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        from_keys(model, overrides)
    first, *problems = str(caught.value).splitlines()
    assert first == f"the estimate of {model} has {'a problem' if len(problems) == 1 else f'{len(problems)} problems'}:"
    return [problem.strip() for problem in problems]


# From a recipe.


def test_a_recipe_asks_what_its_run_will_do():
    question = from_recipe(load("quickstart"))
    assert question.title == "recipe quickstart: minilm, bayesian-lora"
    assert question.shape == read_shape(config_of("minilm"), name="minilm", head=Head.CLASSIFICATION, num_labels=2)
    assert question.spec == MethodSpec(
        Method.BAYESIAN_LORA,
        rank=8,
        targets=("query", "key", "value"),
        sites=SEVEN,
        learn_rank=True,
        trained_in_full=("classifier",),
    )
    assert question.settings == TrainingSettings(batch=32, sequence_length=64, precision="fp32", base="fp32")
    assert question.options == CountOptions(query_len=64, key_len=64)
    assert question.budget is None


def test_every_key_of_a_recipe_that_costs_something_is_asked():
    changes = (
        "task.max_length=32 training.batch_size=4 training.precision=bf16 training.gradient_checkpointing=true "
        "adapter.r=3 adapter.targets=all-linear adapter.learn_rank=false adapter.quantizers=[output,input,weight] "
        "adapter.modules_to_save=[pooler]"
    )
    question = from_recipe(load("quickstart", changes.split()), "bytes=0.3")
    assert (question.options.query_len, question.options.key_len) == (32, 32)
    assert question.settings == TrainingSettings(
        batch=4, sequence_length=32, precision="bf16", base="fp32", checkpointing=True
    )
    assert question.spec == MethodSpec(
        Method.BAYESIAN_LORA,
        rank=3,
        targets="all-linear",
        sites=("weight", "output", "input"),
        learn_rank=False,
        trained_in_full=("pooler", "classifier"),
    )
    assert question.budget == Budget(Quantity.BYTES, 0.3)


@pytest.mark.parametrize("change", ["method=lora", "adapter.learn_bits=false", "adapter.quantizers=[]"])
def test_a_recipe_that_learns_no_bits_asks_for_no_quantizers(change: str):
    assert from_recipe(load("quickstart", [change])).spec.sites == ()


@pytest.mark.parametrize(("task", "outputs"), [("stsb", 1), ("mnli", 3), ("sst2", 2)])
def test_the_task_decides_the_outputs_of_the_head(task: str, outputs: int):
    shape = from_recipe(load(f"glue/minilm/{task}")).shape
    assert [linear.d_out for linear in shape.linears() if linear.name == "classifier"] == [outputs]


def test_a_recipe_of_a_model_whose_files_are_quantized_is_refused(model):
    recipe = load("quickstart", [f"model={model(BERT, quantization_config={'bits': 4})}"])
    with pytest.raises(RecipeError, match=r"recipe quickstart: .*quantized already.*by its own name, with base=nf4"):
        from_recipe(recipe)


def test_an_unknown_architecture_has_an_error_of_its_own(model):
    unknown = model(LLAMA, model_type="gpt_neox")
    for ask in (lambda: from_recipe(load("quickstart", [f"model={unknown}"])), lambda: from_keys(unknown, [LENGTH])):
        with pytest.raises(UnknownArchitectureError, match="model_type: given 'gpt_neox', expected one of bart, bert"):
            ask()


# From keys.


def test_a_model_and_its_length_are_enough():
    question = from_keys("bert-base", ["sequence_length=128"])
    assert question.title == "bert-base, bayesian-lora"
    assert question.shape == read_shape(find_config("bert-base"), name="bert-base", head=Head.CLASSIFICATION)
    assert question.spec == MethodSpec(
        Method.BAYESIAN_LORA, rank=8, targets=None, sites=SEVEN, trained_in_full=("classifier",)
    )
    assert question.settings == TrainingSettings(batch=1, sequence_length=128)
    assert question.options == CountOptions(query_len=128, key_len=128, head="out")


def test_every_key_is_asked():
    keys = (
        "method=lora r=3 targets=[q_proj,o_proj] modules_to_save=[embed_tokens] sequence_length=100 cache_length=28 "
        "batch_size=5 precision=bf16 base=nf4 optimizer=paged-adamw-8bit master_weights=true "
        "gradient_checkpointing=true attention=eager device=cuda"
    )
    question = from_keys("smollm2-135m", keys.split(), "rank=2")
    assert question.shape == read_shape(find_config("smollm2-135m"), name="smollm2-135m", head=Head.LANGUAGE_MODEL)
    assert question.spec == MethodSpec(
        Method.LORA, rank=3, targets=("q_proj", "o_proj"), trained_in_full=("embed_tokens",)
    )
    assert question.settings == TrainingSettings(
        batch=5,
        sequence_length=100,
        precision="bf16",
        base="nf4",
        optimizer="paged-adamw-8bit",
        checkpointing=True,
        master_weights=True,
        attention="eager",
        device="cuda",
    )
    assert question.options == CountOptions(query_len=100, key_len=128, head="all")
    assert question.budget == Budget(Quantity.RANK, 2.0)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("method=houlsby width=7", "width", 7),
        ("method=prefix virtual_tokens=7", "virtual_tokens", 7),
        ("method=top-layer layers=2", "layers", 2),
        ("learn_rank=false", "learn_rank", False),
        ("quantizers=[up,weight]", "sites", ("weight", "up")),
        ("targets=all-linear", "targets", "all-linear"),
    ],
)
def test_what_only_some_methods_have_is_asked_of_these(override: str, name: str, value: object):
    assert getattr(from_keys("bert-base", [LENGTH, *override.split()]).spec, name) == value


def test_two_stacks_have_two_lengths_and_train_at_the_longer():
    question = from_keys("t5-base", [LENGTH, "source_length=40"])
    assert question.options == CountOptions(query_len=16, key_len=16, source_len=40, head="all")
    assert question.settings.sequence_length == 40


@pytest.mark.parametrize(
    ("name", "keys", "head", "last", "options_head"),
    [
        ("bert-base", [], Head.CLASSIFICATION, ("classifier", 2), "out"),
        ("bert-base", ["num_labels=5"], Head.CLASSIFICATION, ("classifier", 5), "out"),
        ("smollm2-135m", [], Head.LANGUAGE_MODEL, ("lm_head", 49152), "all"),
        ("smollm2-135m", ["head=classification"], Head.CLASSIFICATION, ("score", 2), "out"),
    ],
)
def test_the_head_is_the_one_asked_for_or_the_architectures_usual_one(name, keys, head, last, options_head):
    question = from_keys(name, [LENGTH, *keys])
    labels = 5 if "num_labels=5" in keys else 2
    assert question.shape == read_shape(find_config(name), name=name, head=head, num_labels=labels)
    assert (question.shape.linears()[-1].name, question.shape.linears()[-1].d_out) == last
    assert question.options.head == options_head


def test_a_bare_model_has_no_head_to_train():
    question = from_keys("bert-base", [LENGTH, "head=none"])
    assert question.shape == read_shape(find_config("bert-base"), name="bert-base")
    assert question.spec.trained_in_full == ()


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ([], ("score",)),
        (["modules_to_save=[score]"], ("score",)),
        (["modules_to_save=[embed_tokens]"], ("embed_tokens", "score")),
    ],
)
def test_a_classifier_of_sequences_is_trained_once_and_without_being_named(keys: list[str], trained: tuple[str, ...]):
    assert from_keys("smollm2-135m", [LENGTH, "head=classification", *keys]).spec.trained_in_full == trained


def test_a_name_means_every_module_that_ends_with_it(model):
    assert from_keys(model(DISTILBERT), [LENGTH]).spec.trained_in_full == ("pre_classifier", "classifier")
    llama = from_keys("smollm2-135m", [LENGTH, "modules_to_save=[norm]"]).spec.trained_in_full
    assert llama == ("input_layernorm", "post_attention_layernorm", "norm")


@pytest.mark.parametrize(
    ("keys", "base"),
    [
        ([], "fp32"),
        (["precision=bf16"], "bf16"),
        (["method=lora"], "fp32"),
        (["method=qlora"], "nf4-double"),
        (["method=qdora", "precision=bf16"], "nf4-double"),
        (["method=qsbora-fa"], "nf4-double"),
        (["method=qlora", "base=nf4"], "nf4"),
        (["base=fp16"], "fp16"),
    ],
)
def test_the_base_is_held_as_asked_or_as_the_method_wants(keys: list[str], base: str):
    assert from_keys("bert-base", [LENGTH, *keys]).settings.base == base


def test_files_that_are_quantized_need_a_base(model):
    quantized = model(BERT, quantization_config={"quant_method": "gptq"})
    with pytest.raises(RecipeError, match=r"quantized already.* say base=nf4, nf4-double, bf16, fp16 or fp32"):
        from_keys(quantized, [LENGTH])
    assert from_keys(quantized, [LENGTH, "base=fp16"]).settings.base == "fp16"


def test_bits_are_those_of_every_quantizer_of_every_adapted_layer():
    widths = from_keys("bert-base", [LENGTH, "bits=4", "targets=[query]", "quantizers=[weight,up]"]).spec.widths
    assert len(widths) == 12
    assert set(widths) == {f"bert.encoder.layer.{layer}.attention.self.query" for layer in range(12)}
    assert all(sites == {"weight": 4, "up": 4} for sites in widths.values())
    assert from_keys("bert-base", [LENGTH, "bits=32"]).spec.widths == {}


def test_bits_are_those_of_a_quantized_attention_too():
    keys = [LENGTH, "bits=4", "targets=[query,key,value]", "quantizers=[weight]", "quantize_attention=true"]
    widths = from_keys("bert-base", keys).spec.widths
    block = "bert.encoder.layer.0.attention.self"
    assert widths[f"{block}.query"] == widths[f"{block}.key"] == {"weight": 4, "output": 4}
    assert widths[f"{block}.value"] == {"weight": 4, "output": 4, "probabilities": 4}


def test_bits_are_those_of_a_quantized_head_too():
    keys = [LENGTH, "bits=4", "targets=[query]", "modules_to_save=[pooler]", "quantize_head=true"]
    widths = from_keys("bert-base", [*keys, "head=classification"]).spec.widths
    assert widths["bert.pooler.dense"] == widths["classifier"] == {"weight": 4, "input": 4}
    assert len(widths) == 14


def test_a_head_that_cannot_be_quantized_is_refused():
    with pytest.raises(ModelError, match="no linear layer of bert-base is trained in full"):
        from_keys("bert-base", [LENGTH, "quantize_head=true", "head=none"])
    with pytest.raises(RecipeError, match="none with method=lora: only bayesian-lora can use it"):
        from_keys("bert-base", [LENGTH, "method=lora", "quantize_head=true"])
    with pytest.raises(RecipeError, match=r"adapter.quantize_head: given true, expected false where adapter.learn"):
        load("quickstart", ["adapter.quantize_head=true", "adapter.learn_bits=false"])


def test_attention_that_cannot_be_quantized_is_refused_before_anything_is_loaded():
    with pytest.raises(ModelError, match="no attention of bert-base has its queries, keys and values all adapted"):
        from_keys("bert-base", [LENGTH, "quantize_attention=true"])
    with pytest.raises(ModelError, match=r"no attention of .* has its queries, keys and values all adapted"):
        from_recipe(load("quickstart", ["adapter.quantize_attention=true", "adapter.targets=[query,key]"]))
    with pytest.raises(RecipeError, match="none with method=lora: only bayesian-lora can use it"):
        from_keys("bert-base", [LENGTH, "method=lora", "quantize_attention=true"])
    with pytest.raises(
        RecipeError, match=r"adapter.quantize_attention: given true, expected false where adapter.learn"
    ):
        load("quickstart", ["adapter.quantize_attention=true", "adapter.learn_bits=false"])


@pytest.mark.parametrize("method", NAMES)
def test_every_method_of_the_family_can_be_asked(method: str):
    spec = from_keys("bert-base", [LENGTH, f"method={method}"]).spec
    assert spec.method.value == method
    assert bool(spec.sites) == (method == "bayesian-lora")


def test_an_embedded_model_a_file_and_a_folder_are_models(model):
    folder = model(BERT)
    assert from_keys("minilm", [LENGTH]).shape.layers == 6
    assert from_keys(folder, [LENGTH]).shape.parts == from_keys(f"{folder}/config.json", [LENGTH]).shape.parts


# What is refused.


def test_all_problems_are_listed_together():
    problems = _problems("abc", "r=-1", "sequence_length=0", "method=lora", "bits=4", "batch_size=[1", "foo=2")
    assert problems[:5] == [
        "given 'abc', expected key=value such as sequence_length=512",
        "batch_size: the value cannot be read: while parsing a flow sequence",
        "r: given -1, expected a whole number of at least 1: the maximum rank",
        "bits: given 4, expected none with method=lora: only bayesian-lora can use it",
        "sequence_length: given 0, expected a whole number of at least 1: tokens per sequence",
    ]
    assert problems[5].startswith("foo: unknown key; valid keys: method, r, targets,")
    assert len(problems) == 6


MISSING = "sequence_length: given nothing, expected a whole number of at least 1: tokens per sequence"
NO_PAIR = "expected key=value such as sequence_length=512"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], MISSING),
        (["sequence_length="], MISSING),
        # What cannot be read is not missing too.
        (["sequence_length=[1"], "sequence_length: the value cannot be read: while parsing a flow sequence"),
        ([LENGTH, "batch_sise=2"], "batch_sise: unknown key; nearest valid key: batch_size"),
        ([LENGTH, "r.x=2"], 'r: given {"x": 2}, expected a whole number of at least 1: the maximum rank'),
        ([LENGTH, "sequence_length"], f"given 'sequence_length', {NO_PAIR}"),
        ([LENGTH, "=4"], f"given '=4', {NO_PAIR}"),
        ([LENGTH, ""], f"given '', {NO_PAIR}"),
    ],
)
def test_one_problem_is_told_once(overrides: list[str], problem: str):
    assert _problems(*overrides) == [problem]


COUNTS = ["r", "width", "virtual_tokens", "num_labels", "sequence_length", "source_length", "batch_size"]


@pytest.mark.parametrize("value", ["0", "-3", "2.5", "four", "true", "[1]", "${x}"])
@pytest.mark.parametrize("key", COUNTS)
def test_sizes_are_whole_numbers_of_at_least_one(key: str, value: str):
    overrides = [override for override in (LENGTH, f"{key}={value}") if key != "sequence_length" or override != LENGTH]
    (problem,) = _problems(*overrides)
    assert problem.startswith(f"{key}: given ")
    assert ", expected a whole number of at least 1" in problem


@pytest.mark.parametrize("key", ["layers", "cache_length"])
def test_layers_and_cache_may_be_none_but_not_fewer(key: str):
    (problem,) = _problems(LENGTH, f"{key}=-1", "method=top-layer")
    assert problem.startswith(f"{key}: given -1, expected a whole number of at least 0")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method=lara", "one of full, top-layer, feature-based, houlsby,"),
        ("head=masked", "none, classification, language-model, or null"),
        ("precision=fp16", "fp32 or bf16"),
        ("base=int8", "fp32, bf16, fp16, nf4, nf4-double, or null"),
        ("optimizer=sgd", "adamw, adamw-8bit or paged-adamw-8bit"),
        ("attention=flash", "eager or sdpa"),
        ("device=tpu", "cpu or cuda"),
        ("bits=3", "2, 4, 8, 16 or 32"),
        ("learn_rank=maybe", "true or false"),
        ("master_weights=1", "true or false"),
        ("gradient_checkpointing=yes please", "true or false"),
        ("targets=[]", "a list of layer names, one pattern such as all-linear, or null"),
        ("targets=[1]", "a list of layer names, one pattern such as all-linear, or null"),
        ("modules_to_save=pooler", "a list of names of modules trained in full"),
        ("quantizers=[weigth]", "one of the known quantizer sites: "),
    ],
)
def test_closed_choices_and_lists_are_checked(override: str, expected: str):
    (problem,) = _problems(LENGTH, override)
    assert problem.startswith(f"{override.partition('=')[0]}: given ")
    assert f", expected {expected}" in problem


@pytest.mark.parametrize(
    "override",
    ["bits=4", "quantizers=[weight]", "learn_rank=false", "width=4", "virtual_tokens=3", "layers=1"],
)
def test_a_key_that_would_change_nothing_is_refused(override: str):
    key, _, value = override.partition("=")
    (problem,) = _problems(LENGTH, "method=lora", override)
    shown = '["weight"]' if value == "[weight]" else value
    assert problem == f"{key}: given {shown}, expected none with method=lora: only {', '.join(USED_BY[key])} can use it"


@pytest.mark.parametrize("override", ["r=4", "targets=[query]"])
def test_ranks_and_targets_are_of_methods_that_sit_on_layers(override: str):
    (problem,) = _problems(LENGTH, "method=prefix", override)
    assert "expected none with method=prefix: only lora, rslora, adalora, dylora," in problem


def test_where_the_method_is_wrong_no_other_key_is_blamed_for_it():
    (problem,) = _problems(LENGTH, "method=lara", "bits=4", "width=3")
    assert problem.startswith("method: given the text 'lara'")


@pytest.mark.parametrize("budget", ["", "bits", "bits=0", "latency=3"])
def test_a_budget_that_is_none_is_refused(budget: str):
    for ask in (lambda: from_keys("bert-base", [LENGTH], budget), lambda: from_recipe(load("quickstart"), budget)):
        with pytest.raises(RecipeError, match=f"budget: given '{budget}', expected one of bops, bytes, bits, rank"):
            ask()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, r"cannot read config\.json: No such file"),
        ("not json", r"config\.json is not JSON"),
        ("[1, 2]", r"config\.json is not the config of a transformers model: expected an object with a model_type"),
        ('{"hidden_size": 8}', r"config\.json is not the config of a transformers model"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str | None, expected: str):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=expected):
        from_keys(str(tmp_path), [LENGTH])


@pytest.mark.parametrize("size", [0, -4, "many", None])
def test_a_size_of_a_config_that_is_none_is_refused(model, size: object):
    with pytest.raises(ModelError, match="hidden_size: given"):
        from_keys(model(BERT, hidden_size=size), [LENGTH])


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("bert-bose", [], "no config of 'bert-bose' on this machine: expected perhaps bert-base"),
        ("bert-base", ["head=language-model"], "given 'bert' for a language-model head"),
    ],
)
def test_models_and_heads_that_are_none_are_refused(model: str, keys: list[str], message: str):
    with pytest.raises(ModelError, match=message):
        from_keys(model, [LENGTH, *keys])
