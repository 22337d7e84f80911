"""The closing table: what its cells say, and how runs are told apart."""

from rankbits.records import RunRecord
from rankbits.reports.sections import modules, tiles
from rankbits.reports.tables import COLUMNS, labels, run_table


def test_a_row_has_a_cell_for_each_column(gated_run: RunRecord, lora_run: RunRecord) -> None:
    assert [len(row) for row in run_table([gated_run, lora_run])] == [len(COLUMNS)] * 2


def test_learned_ranks_and_bits_are_means(gated_run: RunRecord) -> None:
    (row,) = run_table([gated_run])
    assert row == ["bayesian-lora", "78.12 accuracy", "4.39", "7.00", "7.30", "260,000", "2.4"]


def test_plain_lora_has_a_fixed_rank_and_full_precision(lora_run: RunRecord) -> None:
    (row,) = run_table([lora_run])
    assert row == ["lora", "78.50 accuracy", "8.00 (fixed)", "full", "full", "259,000", "2.4"]


def test_weights_of_a_base_that_was_loaded_in_few_bits_are_not_in_full_precision(gated_run: RunRecord) -> None:
    kept = [
        module.model_copy(
            update={"quantized_base": True, "bits": {site: b for site, b in module.bits.items() if site != "weight"}}
        )
        for module in gated_run.modules
    ]
    record = gated_run.model_copy(update={"modules": kept})
    (row,) = run_table([record])
    assert row[3:5] == ["as loaded", "7.30"]
    assert ("bits of W0, mean", "as loaded") in tiles(record)
    told = modules(record)
    column = told["columns"].index("bits of W0")
    assert {line[column] for line in told["rows"]} == {"as loaded"}


def test_a_pruned_rank_is_not_fixed(pruned_run: RunRecord) -> None:
    assert run_table([pruned_run])[0][2] == "3.50"


def test_a_run_without_adapters_has_no_rank(lora_run: RunRecord) -> None:
    (row,) = run_table([lora_run.model_copy(update={"modules": []})])
    assert row[2] == "none"


def test_methods_alone_name_runs_that_differ_in_method(gated_run: RunRecord, lora_run: RunRecord) -> None:
    assert labels([gated_run, lora_run]) == ["bayesian-lora", "lora"]


def test_tasks_name_runs_of_one_method(lora_run: RunRecord, gated_run: RunRecord) -> None:
    other = lora_run.model_copy(update={"data": lora_run.data.model_copy(update={"task": "rte"}), "seed": 43})
    assert labels([lora_run, other]) == ["lora, film-reviews", "lora, rte"]
    assert labels([lora_run, other, gated_run])[2] == "bayesian-lora, film-reviews"


def test_task_and_seed_name_runs_where_neither_suffices(lora_run: RunRecord) -> None:
    tasks = [lora_run.data.model_copy(update={"task": task}) for task in ("mrpc", "rte")]
    again = [lora_run.model_copy(update={"data": data, "seed": seed}) for data in tasks for seed in (1, 2)]
    assert labels(again) == ["lora, mrpc, seed 1", "lora, mrpc, seed 2", "lora, rte, seed 1", "lora, rte, seed 2"]


def test_seeds_name_runs_of_one_method(lora_run: RunRecord) -> None:
    again = lora_run.model_copy(update={"seed": 43})
    assert labels([lora_run, again]) == ["lora, seed 42", "lora, seed 43"]


def test_names_tell_runs_of_one_method_and_seed_apart(lora_run: RunRecord) -> None:
    other = lora_run.model_copy(update={"name": "stsb"})
    assert labels([lora_run, other]) == ["lora, quickstart", "lora, stsb"]


def test_name_and_seed_are_both_said_where_neither_suffices(lora_run: RunRecord) -> None:
    runs = [lora_run.model_copy(update={"name": name, "seed": seed}) for name in ("a", "b") for seed in (1, 2)]
    assert labels(runs) == ["lora, a, seed 1", "lora, a, seed 2", "lora, b, seed 1", "lora, b, seed 2"]


def test_the_same_run_twice_is_numbered(lora_run: RunRecord) -> None:
    assert labels([lora_run, lora_run]) == ["lora, quickstart, seed 42 (1)", "lora, quickstart, seed 42 (2)"]
