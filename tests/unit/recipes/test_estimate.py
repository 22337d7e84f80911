"""The answer to a question: its numbers are those of its parts, every method has one, and it is plain JSON."""

import json

import pytest

from rankbits.accounting.artefacts import artefact_bytes, checkpoint_bytes
from rankbits.accounting.budget import expectation
from rankbits.accounting.memory import inference_memory, training_memory
from rankbits.accounting.params import base_parameters, count
from rankbits.accounting.predict import predict
from rankbits.errors import ModelError, RecipeError
from rankbits.recipes.estimate import as_json, estimate, totals_as_json
from rankbits.recipes.load import load
from rankbits.recipes.question import NAMES, from_keys, from_recipe

LENGTH = "sequence_length=16"
BESIDE_ONLY = {"houlsby", "pfeiffer", "parallel", "prefix", "prompt"}
WITHOUT_ADAPTERS = {"full", "top-layer", "feature-based"}


def _answer(model: str, *keys: str, budget: str | None = None):
    return estimate(from_keys(model, [LENGTH, *keys], budget))


def test_the_numbers_are_those_of_the_formulas():
    question = from_recipe(load("quickstart"), "bits=4")
    answer = estimate(question)
    shape, spec, settings = question.shape, question.spec, question.settings
    beside = question.options.model_copy(update={"adapters": "unmerged"})
    assert answer.question is question
    assert answer.base_parameters == base_parameters(shape)
    assert answer.counts == count(shape, spec)
    assert answer.training == training_memory(shape, spec, settings)
    assert answer.inference == inference_memory(shape, spec, settings)
    assert answer.merged == predict(shape, question.options, spec)
    assert answer.unmerged == predict(shape, beside, spec)
    assert answer.artefacts == {
        "weights": artefact_bytes(shape, spec),
        "checkpoint": checkpoint_bytes(shape, spec, settings),
    }
    assert answer.expected == expectation(shape, spec, beside, question.budget)


def test_the_merged_and_the_unmerged_cost_are_told_apart():
    answer = _answer("bert-base", "method=lora", "r=4")
    # r (d_in + d_out) per token and layer, for query and value of twelve layers.
    assert answer.unmerged.macs - answer.merged.macs == 16 * 12 * 2 * 4 * (768 + 768)
    assert (answer.merged.options.adapters, answer.unmerged.options.adapters) == ("merged", "unmerged")
    assert answer.merged.reference_macs == answer.unmerged.reference_macs == answer.merged.macs


@pytest.mark.parametrize("method", NAMES)
def test_only_methods_that_become_part_of_the_weights_have_a_merged_cost(method: str):
    answer = _answer("bert-base", f"method={method}")
    assert (answer.merged is None) == (method in BESIDE_ONLY)
    assert set(answer.effective) == ({"unmerged"} if method in BESIDE_ONLY else {"unmerged", "merged"})
    assert set(as_json(answer)["costs"]) == set(answer.effective)


@pytest.mark.parametrize(
    ("method", "added"),
    [
        ("full", 0),
        ("feature-based", 0),
        ("lora", 24 * 8 * (768 + 768)),
        ("bayesian-lora", 24 * (8 * (768 + 768) + 8)),
        ("dora", 24 * (8 * (768 + 768) + 768)),
        ("sbora-fa", 24 * (8 * 768 + 8)),
        ("houlsby", 24 * (2 * 768 * 48 + 48 + 768)),
        ("prefix", 12 * 2 * 20 * 768),
        ("prompt", 20 * 768),
    ],
)
def test_effective_parameters_are_the_model_and_what_runs_beside_it(method: str, added: int):
    answer = _answer("bert-base", f"method={method}")
    assert answer.effective["unmerged"] == answer.base_parameters + added
    assert answer.effective.get("merged", answer.base_parameters) == answer.base_parameters


def test_gates_and_ranges_train_but_do_not_run():
    answer = _answer("bert-base")
    counts = answer.counts
    assert min(counts.gates, counts.ranges, counts.head) > 0
    running = answer.effective["unmerged"] - answer.base_parameters
    assert running == counts.trainable - counts.gates - counts.ranges - counts.head


@pytest.mark.parametrize("model", ["bert-base", "smollm2-135m"])
@pytest.mark.parametrize("method", NAMES)
def test_every_method_answers_in_strict_json(model: str, method: str):
    answer = _answer(model, f"method={method}", *(["head=classification"] if model != "bert-base" else []))
    told = json.loads(json.dumps(as_json(answer), allow_nan=False))
    assert told == as_json(answer)
    assert told["method"] == method
    assert told["model"] == {
        "name": model,
        "type": answer.question.shape.model_type,
        "parameters": answer.base_parameters,
    }
    assert told["parameters"]["trainable"] == answer.counts.trainable > 0
    for part in ("training_bytes", "inference_bytes"):
        total = told[part].pop("total")
        assert total == sum(told[part].values()) > 0
    assert told["training_bytes"]["optimizer"] >= 8 * answer.counts.trainable
    assert told["artefact_bytes"]["checkpoint"] > told["artefact_bytes"]["weights"] > 0
    assert (answer.counts.adapter == 0) == (method in WITHOUT_ADAPTERS)


def test_the_json_has_the_question_the_groups_and_the_budget():
    told = as_json(_answer("bert-base", "batch_size=3", budget="bits=4"))
    assert told["asked"] == "bert-base, bayesian-lora"
    assert (told["settings"]["batch"], told["settings"]["sequence_length"]) == (3, 16)
    groups = ("adapter", "diagonal", "gates", "ranges", "head", "base")
    assert sum(told["parameters"][group] for group in groups) == told["parameters"]["trainable"]
    given = {"quantity": "bits", "limit": 4.0, "reference_bits": 16}
    assert told["budget"] == given | {"sequence_length": None, "scope": "adapted"}
    assert told["expected"]["mean_bits"] == pytest.approx(4)
    assert told["expected"]["low"] < 4 < told["expected"]["high"]


def test_without_a_budget_nothing_is_expected():
    told = as_json(_answer("bert-base"))
    assert (told["budget"], told["expected"]) == (None, None)


def test_the_totals_of_a_cost_are_those_of_its_record():
    cost = _answer("bert-base", "bits=8").unmerged
    told = totals_as_json(cost)
    assert told["options"] == cost.options.model_dump(mode="json")
    assert told["products"] == cost.counted()
    for name in ("macs", "reference_macs", "bops", "executable_bops", "integer_share", "element_operations"):
        assert told[name] == getattr(cost, name)
    assert told["weight_bytes"] == cost.weight_bytes
    assert told["percent_of_16_bit_base"] == 100 * cost.bops / (256 * cost.reference_macs)
    assert told["percent_of_32_bit_base"] == 100 * cost.bops / (1024 * cost.reference_macs)
    assert told["executable_percent_of_16_bit_base"] == 100 * cost.executable_bops / (256 * cost.reference_macs)
    assert told["executable_percent_of_32_bit_base"] == 100 * cost.executable_bops / (1024 * cost.reference_macs)


def test_narrow_quantizers_make_fewer_bit_operations():
    bops = [_answer("bert-base", f"bits={bits}").unmerged.bops for bits in (2, 4, 8, 16, 32)]
    assert bops == sorted(set(bops))


@pytest.mark.parametrize(
    ("keys", "bytes_each"), [(["base=bf16"], 2), (["base=fp16"], 2), (["precision=bf16"], 2), (["base=fp32"], 4)]
)
def test_a_model_that_is_trained_in_full_is_saved_as_wide_as_it_is_held(keys: list[str], bytes_each: int):
    answer = _answer("bert-base", "method=full", *keys)
    header = answer.artefacts["weights"] - bytes_each * answer.base_parameters
    # A name, a type and two offsets for each of some 200 tensors.
    assert 0 < header < 200 * 150
    # Two states of Adam for each parameter.
    assert answer.artefacts["checkpoint"] - answer.artefacts["weights"] == 2 * bytes_each * answer.base_parameters


def test_the_lectures_worked_examples():
    fp32 = _answer("llama3-8b", "method=full")
    assert fp32.training.weights == 4 * 8_030_261_248
    # Half-precision weights and gradients, fp32 copies and two fp32 states: 2 + 2 + 4 + 8 bytes a parameter.
    full = _answer("llama3-8b", "method=full", "precision=bf16", "master_weights=true").training
    assert full.weights + full.gradients + full.optimizer == 16 * 8_030_261_248 > 120e9
    qlora = _answer("llama3-8b", "method=qlora", "targets=all-linear", "r=16", "optimizer=paged-adamw-8bit").training
    assert 4e9 < qlora.weights + qlora.gradients + qlora.optimizer < 14e9


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("bert-base", ["sequence_length=513"], "sequence length 513: bert-base has 512 positions"),
        ("smollm2-135m", ["sequence_length=8000", "cache_length=193"], "8193: smollm2-135m has 8192 positions"),
        ("bert-base", ["method=prompt", "virtual_tokens=500"], "16 and 500 virtual tokens: bert-base has 512"),
        ("bert-base", ["cache_length=4"], "bert-base is an encoder, which has no cache"),
        ("bert-base", ["source_length=4"], "source_len 4: bert-base has one stack"),
        ("t5-base", [], "t5-base has an encoder and a decoder: source_len, the encoder's tokens, is missing"),
        ("bert-base", ["targets=[nope]"], "targets: 'nope' matches no linear layer of bert-base; it has classifier"),
        ("bert-base", ["targets=[embeddings.LayerNorm]"], "matches no linear layer of bert-base"),
        ("bert-base", ["modules_to_save=[nope]"], "'nope' matches no module of bert-base; it has LayerNorm"),
        ("bert-base", ["r=769"], "rank: given 769 for bayesian-lora on bert.encoder.layer.0"),
        ("bert-base", ["method=top-layer", "layers=13"], "layers: given 13 top blocks of bert-base, expected 0 to 12"),
        ("bert-base", ["method=feature-based", "head=none"], "trains the head, which bert-base does not have"),
        ("bert-base", ["method=mora", "r=768"], "MoRA's matrix in bert.encoder.layer.0"),
    ],
)
def test_what_does_not_suit_the_model_is_refused(model: str, keys: list[str], message: str):
    with pytest.raises(ModelError) as caught:
        _answer(model, *keys)
    assert message in str(caught.value)


def test_a_budget_out_of_reach_is_refused_with_what_can_be_reached():
    with pytest.raises(RecipeError, match=r"bits=1 cannot be met: with 2 bits and rank 1 everywhere it is 2, .* 32;"):
        _answer("bert-base", budget="bits=1")


def test_a_budget_on_bits_needs_quantizers():
    with pytest.raises(RecipeError, match="lora has no quantizers"):
        _answer("bert-base", "method=lora", budget="bits=4")
    assert _answer("bert-base", "method=lora", budget="rank=2").expected.mean_rank == 2
