"""PEFT's own tests over MoRA: by blocks with rotation, and with shared rows and columns."""

from __future__ import annotations

from collections.abc import Iterator

import cases
import mora
import pytest

globals().update(cases.classes("MoraRotation", mora.ROTATION))
globals().update(cases.classes("MoraSharing", mora.SHARING))


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    """Upstream's models, wide enough for a square matrix, for the tests of this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        mora.widen(patch)
        yield
