"""A record of weight change knows the kind of its matrix and refuses what cannot be."""

import pytest
from pydantic import ValidationError

from rankbits.records import WeightChangeRecord

VALUES = {"method": "lora", "layer": "encoder.layer.0.query", "step": 20, "magnitude": 0.5, "direction": 1e-3}


def test_the_kind_is_the_last_part_of_the_name() -> None:
    assert WeightChangeRecord(**VALUES).kind == "query"
    assert WeightChangeRecord(**VALUES | {"layer": "0"}).kind == "0"


@pytest.mark.parametrize("wrong", [{"step": -1}, {"magnitude": -0.1}, {"direction": float("nan")}, {"seed": 1}])
def test_what_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(ValidationError):
        WeightChangeRecord(**VALUES | wrong)
