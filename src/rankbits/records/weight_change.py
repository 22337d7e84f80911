"""How far fine-tuning had moved one weight matrix at one checkpoint, in magnitude and in direction."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rankbits.records.frozen import Frozen


class WeightChangeRecord(Frozen):
    """One matrix at one checkpoint (Liu et al. 2024, DoRA, Eqs. 3 and 4).

    Args:
        method: what trained it, under the name it is shown by.
        layer: name of the layer in the model without adapters.
        step: optimizer steps that were made before.
        magnitude: mean absolute change of the norms of its rows.
        direction: mean of one less the cosine between a row before and after, from 0 to 2 (and rounding).
    """

    method: str
    layer: str
    step: Annotated[int, Field(ge=0)]
    magnitude: Annotated[float, Field(ge=0)]
    direction: float

    @property
    def kind(self) -> str:
        """The last part of the layer's name: "query"."""
        return self.layer.rpartition(".")[2]
