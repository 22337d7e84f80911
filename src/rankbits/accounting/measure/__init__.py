"""Counting a live model: one real forward pass, watched operation by operation."""

from rankbits.accounting.measure.cost import cost

__all__ = ["cost"]
