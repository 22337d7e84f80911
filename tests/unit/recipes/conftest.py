"""Makes the small models of tests/tiny importable from here, and asks what is wrong with a recipe."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rankbits.errors import RecipeError
from rankbits.recipes.load import load

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tiny"))


@pytest.fixture
def problems_of() -> Callable[..., list[str]]:
    """From changes to the quickstart recipe to what its reader refuses about them, a line each."""

    def ask(*changes: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load("quickstart", changes)
        return [line.strip() for line in str(caught.value).splitlines()[1:]]

    return ask
