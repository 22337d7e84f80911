"""A width survives only where all numbers stay on the grid: in-place writes, padding, parts of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankbits.accounting.measure.places import Places
from rankbits.accounting.measure.provenance import WIDEST, Mark, Provenance
from rankbits.accounting.measure.recorder import Recorder


def _after(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Mark:
    """Mark of what a function makes of q (8 bits, from the input), n (4 bits, not from it) and f (no grid)."""
    provenance = Provenance()
    q, n, f = torch.rand(4, 8), torch.rand(4, 8), torch.rand(4, 8)
    provenance.put(q, Mark("q", 8, tainted=True))
    provenance.put(n, Mark("k", 4))
    places = Places(nn.Identity(), provenance, {})
    with torch.no_grad(), places.followed(), Recorder(places, provenance, {}):
        return provenance.of(function(q, n, f))


def _written(target: Callable[[Tensor], Tensor], source: Tensor, q: Tensor) -> Tensor:
    target(q).copy_(source)
    return q


def _set_slice(q: Tensor, value: Tensor) -> Tensor:
    q[:, :2] = value
    return q


@pytest.mark.parametrize(
    ("function", "bits"),
    [
        (lambda q, n, f: _set_slice(q, f[:, :2]), WIDEST),
        (lambda q, n, f: _set_slice(q.clone(), f[:, :2]), WIDEST),
        (lambda q, n, f: _set_slice(q, n[:, :2]), 8),
        (lambda q, n, f: _set_slice(n, q[:, :2]), 8),
        (lambda q, n, f: q.copy_(f), WIDEST),
        (lambda q, n, f: q.copy_(n), 4),
        (lambda q, n, f: _written(lambda q: q.t(), f.t(), q), WIDEST),
        (lambda q, n, f: _written(lambda q: q.view(-1)[3], f[0, 0], q), WIDEST),
        (lambda q, n, f: torch.empty_like(q).copy_(q), 8),
        (lambda q, n, f: (torch.neg(n[:2], out=q[:2]), q)[1], 8),
        (lambda q, n, f: q.index_put_((torch.tensor([0]),), f[:1]), WIDEST),
        (lambda q, n, f: q.masked_fill_(q > 0.5, -0.3), WIDEST),
        (lambda q, n, f: q.fill_(0.3), WIDEST),
        (lambda q, n, f: q.scatter_(0, torch.zeros(1, 8, dtype=torch.long), f[:1]), WIDEST),
        (lambda q, n, f: (q[:2].add_(f[:2]), q)[1], WIDEST),
        (lambda q, n, f: nn.functional.pad(q, (0, 1)), 8),
        (lambda q, n, f: nn.functional.pad(q, (0, 1), value=0.3), WIDEST),
        (lambda q, n, f: q.mul_(2.5), 8),
    ],
)
def test_bits_after(function: Callable[[Tensor, Tensor, Tensor], Tensor], bits: int) -> None:
    assert _after(function).bits == bits


def test_a_part_that_is_written_joins_what_was_there() -> None:
    mixed = _after(lambda q, n, f: _set_slice(n, q[:, :2]))
    assert (mixed.name, mixed.tainted) == ("x", True)
    assert _after(lambda q, n, f: _set_slice(q, f[:, :2])).tainted
    assert _after(lambda q, n, f: _set_slice(q, q[:, 2:4])).name == "q"


def test_a_whole_that_is_written_is_what_was_written() -> None:
    copied = _after(lambda q, n, f: q.copy_(n))
    assert (copied.name, copied.tainted) == ("k", False)
