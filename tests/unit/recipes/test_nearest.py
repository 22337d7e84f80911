"""A mistyped name finds the one that was meant."""

from rankbits.recipes.nearest import nearest


def test_a_misspelt_name_finds_the_name():
    assert nearest("bayesan-lora", ["lora", "bayesian-lora"]) == ["bayesian-lora"]


def test_the_last_part_is_enough():
    known = ["training.epochs", "training.seed", "glue/minilm/stsb", "glue/deberta-v3-base/stsb"]
    assert nearest("epohcs", known) == ["training.epochs"]
    assert set(nearest("stsb", known, count=3)) == {"glue/minilm/stsb", "glue/deberta-v3-base/stsb"}


def test_no_more_names_than_asked_for():
    assert len(nearest("lora", ["lora", "lora1", "lora2"], count=2)) == 2


def test_nothing_close_gives_nothing():
    assert nearest("zzz", ["lora", "training.epochs"]) == []
