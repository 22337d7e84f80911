"""`rankbits estimate`: what it prints, as tables and as JSON, and how it ends."""

import json
import re
from pathlib import Path

import pytest
from transformers import GPTNeoXConfig, GPTNeoXModel
from typer.testing import CliRunner

from rankbits.accounting.measure import cost
from rankbits.cli.main import app
from rankbits.recipes.estimate import as_json, estimate
from rankbits.recipes.load import load
from rankbits.recipes.question import from_keys, from_recipe

LENGTH = "sequence_length=16"
NEOX = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GIGABYTE = 10**9


def _run(*arguments: str):
    return CliRunner().invoke(app, ["estimate", *arguments])


def _refused(*arguments: str) -> str:
    result = _run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    return result.stderr


def _section(text: str, title: str) -> dict[str, str]:
    """Names and values of the lines below a title."""
    block = text.split(f"\n{title}", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return dict(re.split(r"\s{2,}", line.strip()) for line in block)


def _gigabytes(section: dict[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in section.items()}


@pytest.fixture
def unknown(tmp_path: Path) -> str:
    """A folder with the config of an architecture that no formula knows."""
    GPTNeoXConfig(**NEOX, max_position_embeddings=64).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_recipe_needs_nothing_else():
    result = _run("quickstart")
    assert (result.exit_code, result.stderr) == (0, "")
    answer = estimate(from_recipe(load("quickstart")))
    counts = answer.counts
    assert result.stdout.startswith("recipe quickstart: minilm, bayesian-lora\n")
    assert _section(result.stdout, "Parameters") == {
        "base model": f"{answer.base_parameters:,}",
        "trained": f"{counts.trainable:,}",
        "adapter matrices": f"{counts.adapter:,}",
        "diagonals E": f"{counts.diagonal:,}",
        "gates": f"{counts.gates:,}",
        "ranges": f"{counts.ranges:,}",
        "head, in full": f"{counts.head:,}",
        "effective, unmerged": f"{answer.effective['unmerged']:,}",
        "effective, merged": f"{answer.effective['merged']:,}",
    }
    files = _section(result.stdout, "Files, bytes, before hardening")
    assert files == {name: f"{number:,}" for name, number in answer.artefacts.items()}


def test_memory_is_printed_by_part_in_gigabytes_with_what_it_depends_on():
    keys = [LENGTH, "batch_size=3", "precision=bf16", "method=lora"]
    answer = estimate(from_keys("smollm2-135m", keys))
    out = _run("smollm2-135m", *keys).stdout
    assert "\nMemory of training on cpu, GB: batch 3, 16 tokens, bf16, base in bf16\n" in out
    for title, held in (("Memory of training", answer.training), ("Memory of inference", answer.inference)):
        printed = _gigabytes(_section(out, title))
        assert printed.pop("at the peak") == pytest.approx(held.total / GIGABYTE, abs=6e-4)
        expected = {name: number / GIGABYTE for name, number in held.items.items() if number}
        if held is answer.inference:
            expected["key-value cache"] = expected.pop("activations")
        assert printed == pytest.approx(expected, abs=6e-4)


def test_a_paged_optimizer_shows_what_may_leave_the_device():
    keys = [LENGTH, "method=qlora", "targets=all-linear", "r=64", "optimizer=paged-adamw-8bit", "device=cuda"]
    answer = estimate(from_keys("llama3-8b", keys))
    training = _gigabytes(_section(_run("llama3-8b", *keys).stdout, "Memory of training on cuda"))
    assert training["on the host, if paged out"] == pytest.approx(answer.training.host / GIGABYTE, abs=6e-4)
    assert training["on the host, if paged out"] > 0.1
    assert "on the host" not in _run("llama3-8b", LENGTH, "method=lora").stdout


def test_costs_are_printed_merged_and_beside_with_their_conditions():
    out = _run("bert-base", LENGTH, "method=lora").stdout
    words = " ".join(out.split())
    assert re.search(r"^ ?beside +1\.\d+ G", out, re.MULTILINE)
    assert re.search(r"^ ?merged +1\.\d+ G", out, re.MULTILINE)
    assert "All percentages are of one base, the merged base model" in words
    assert "Counted for beside: 16 query and 16 key tokens, batch 1" in words
    assert "Products counted for merged: linear 73, scores 12, context 12, head 1." in words


def test_a_method_that_never_merges_is_printed_beside_alone():
    out = _run("bert-base", LENGTH, "method=houlsby").stdout
    assert "effective, merged" not in out
    assert not re.search(r"^ ?merged +\d", out, re.MULTILINE)
    assert re.search(r"^ ?beside +\d", out, re.MULTILINE)


def test_only_groups_that_exist_are_printed():
    full = _section(_run("bert-base", LENGTH, "method=full").stdout, "Parameters")
    assert list(full) == ["base model", "trained", "base weights", "effective, unmerged", "effective, merged"]
    indices = _section(_run("bert-base", LENGTH, "method=sbora-fa").stdout, "Parameters")
    assert indices["stored indices"] == "192"


def test_products_are_broken_down_where_asked():
    short = _run("bert-base", LENGTH, "method=lora").stdout
    long = _run("bert-base", LENGTH, "method=lora", "--products").stdout
    assert long.startswith(short)
    added = long.removeprefix(short)
    assert added.count("by module") == 2
    assert added.index("\nbeside\n") < added.index("lora_down") < added.index("\nmerged\n")
    assert "lora_down" not in added.split("\nmerged\n")[1]


@pytest.mark.parametrize(
    ("arguments", "question"),
    [
        (["quickstart", "adapter.r=4"], lambda: from_recipe(load("quickstart", ["adapter.r=4"]))),
        (["llama3-8b", LENGTH, "method=qlora"], lambda: from_keys("llama3-8b", [LENGTH, "method=qlora"])),
        (["bert-base", LENGTH, "--budget", "bops=2"], lambda: from_keys("bert-base", [LENGTH], "bops=2")),
    ],
)
def test_json_is_the_whole_answer_and_nothing_else(arguments, question):
    result = _run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == as_json(estimate(question()))


@pytest.mark.parametrize(
    ("budget", "title", "expected"),
    [
        (
            "bits=4",
            "Budget bits=4: mean bits of the adapted layers' weights",
            {
                "reachable from": "2",
                "with all gates open": "32",
                "mean bits, if all share one width": "4.00",
                "mean rank": "8.00",
            },
        ),
        (
            "rank=2.5",
            "Budget rank=2.5: mean rank",
            {
                "reachable from": "1",
                "with all gates open": "8",
                "mean bits, if all share one width": "not limited",
                "mean rank": "2.50",
            },
        ),
    ],
)
def test_a_budget_says_what_it_means(budget: str, title: str, expected: dict[str, str]):
    result = _run("quickstart", "--budget", budget)
    assert result.exit_code == 0
    assert _section(result.stdout, title) == expected


@pytest.mark.parametrize(("budget", "share"), [("bops=0.5", "bit operations"), ("bytes=0.3", "bytes")])
def test_a_share_of_the_base_is_called_one(budget: str, share: str):
    result = _run("quickstart", "--budget", budget)
    assert re.search(f"\nBudget {budget}: {share} of the adapted layers.*as a share of the", result.stdout)
    assert "\nBudget" not in _run("quickstart").stdout


@pytest.mark.parametrize("budget", ["bits=1", "bops=0.0001", "bytes=0.01", "rank=0.5"])
def test_a_budget_out_of_reach_is_exit_2_with_the_interval(budget: str):
    message = _refused("quickstart", "--budget", budget)
    reachable = r"rank 1 everywhere it is [\d.]+, with all gates open [\d.]+;"
    assert re.search(rf"budget {budget} cannot be met: with .*{reachable}", message)


@pytest.mark.parametrize("budget", ["", "bits", "speed=3"])
def test_a_budget_that_is_none_is_refused(budget: str):
    assert f"budget: given '{budget}', expected one of bops, bytes, bits, rank" in _refused(
        "quickstart", "--budget", budget
    )


# Where no formula knows the architecture.


def test_an_unknown_architecture_is_counted_as_it_runs(unknown: str):
    result = _run(unknown, "sequence_length=8")
    assert result.exit_code == 0
    live = GPTNeoXModel(GPTNeoXConfig(**NEOX, max_position_embeddings=64))
    parameters = sum(parameter.numel() for parameter in live.parameters())
    assert result.stdout.startswith(f"{unknown}: no formula knows this architecture, so it was built without weights")
    assert "Base model only; memory of activations and the cost of adapters are not known." in result.stdout
    assert _section(result.stdout, "Parameters") == {
        "base model": f"{parameters:,}",
        "bytes in fp32": f"{4 * parameters:,}",
        "bytes in bf16": f"{2 * parameters:,}",
    }
    assert "attention.query_key_value" in result.stdout
    told = json.loads(_run(unknown, "sequence_length=8", "--json").stdout)
    assert told["asked"] == unknown
    assert told["model"] == {"parameters": parameters}
    assert told["costs"]["live"]["macs"] == cost(live, sequence_length=8).macs


def test_a_budget_for_an_unknown_architecture_is_refused_and_not_forgotten(unknown: str):
    assert "model_type: given 'gpt_neox', expected one of" in _refused(unknown, LENGTH, "--budget", "bits=4")


def test_a_recipe_of_an_unknown_architecture_is_refused_and_not_counted(unknown: str, tmp_path: Path):
    assert "model_type: given 'gpt_neox', expected one of" in _refused("quickstart", f"model={unknown}")
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: quickstart\nmodel: {unknown}\n", encoding="utf-8")
    assert "model_type: given 'gpt_neox'" in _refused(str(own))


def test_what_transformers_does_not_know_either_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "of-my-own"}', encoding="utf-8")
    assert "model_type: given 'of-my-own', expected one of bart, bert" in _refused(str(tmp_path), LENGTH)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bert-bose", LENGTH], "model: no config of 'bert-bose' on this machine: expected perhaps bert-base"),
        (["bert-base"], "sequence_length: given nothing"),
        (["bert-base", "sequence_length=513"], "sequence length 513: bert-base has 512 positions, so at most those"),
        (["bert-base", "sequence_length=-1", "r=0"], "the estimate of bert-base has 2 problems:"),
        (["quickstart", "adapter.r=0"], "recipe quickstart has a problem:"),
        (["quickstart", LENGTH], "sequence_length: unknown key"),
        (["quickstart", "task.max_length=513"], "sequence length 513: minilm has 512 positions"),
        (["quickstart.yml"], "no recipe 'quickstart.yml'"),
        (["no-such.yaml"], "no recipe 'no-such.yaml'"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_2(arguments: list[str], message: str):
    assert message in _refused(*arguments)


def test_a_file_that_is_no_config_is_exit_2(tmp_path: Path):
    file = tmp_path / "README.md"
    file.write_text("# A page", encoding="utf-8")
    assert "README.md is not JSON" in _refused(str(file), LENGTH)


def test_nothing_to_estimate_is_a_question_of_use():
    assert _run().exit_code == 2


def test_the_lectures_worked_examples_as_they_are_shown():
    def training(*keys: str) -> dict[str, float]:
        return _gigabytes(_section(_run("llama3-8b", "sequence_length=64", *keys).stdout, "Memory of training"))

    fp32 = _run("llama3-8b", "sequence_length=64", "method=full").stdout
    assert _section(fp32, "Parameters")["base model"] == "8,030,261,248"
    assert training("method=full")["weights"] == 32.121
    full = training("method=full", "precision=bf16", "master_weights=true")
    assert full["weights"] + full["gradients"] + full["optimizer"] == pytest.approx(128.484, abs=2e-3)
    assert full["at the peak"] > 120
    small = training("method=qlora")
    assert small["weights"] + small["gradients"] + small["optimizer"] < 14


def test_a_recipe_that_is_misspelt_is_answered_with_the_one_that_was_meant():
    assert "no config of 'quickstrt' on this machine" in (message := _refused("quickstrt"))
    assert message.rstrip().endswith("nearest recipes: quickstart")
