"""Names of shipped recipes and where recipes are found."""

from pathlib import Path

import pytest

from rankbits.errors import RecipeError
from rankbits.recipes import shipped


def test_runnable_recipes_and_bases_are_told_apart():
    assert "quickstart" in shipped.names()
    assert "glue/base-minilm" in shipped.bases()
    assert not set(shipped.names()) & set(shipped.bases())


def test_a_shipped_name_comes_before_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "quickstart").write_text("model: other")
    monkeypatch.chdir(tmp_path)
    assert shipped.find("quickstart").path == shipped.FOLDER / "quickstart.yaml"


def test_a_path_is_read_from_the_given_folder(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("")
    assert shipped.find("base.yaml", beside=tmp_path).path == tmp_path / "base.yaml"


@pytest.mark.parametrize(
    ("file", "name"), [("my recipe.yaml", "my-recipe"), (".hidden.yml", "hidden"), ("ä b.yaml", "ä-b")]
)
def test_a_file_s_name_becomes_a_recipe_s(tmp_path: Path, file: str, name: str):
    (tmp_path / file).write_text("")
    assert shipped.find(str(tmp_path / file)).name == name


def test_what_is_not_there_is_refused():
    with pytest.raises(RecipeError, match="rankbits list recipes"):
        shipped.find("zzzzz")
