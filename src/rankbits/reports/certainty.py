"""How certain what a run learned is: expected against hardened, and the gates that nearly fell to the other side."""

from __future__ import annotations

from rankbits.records import DecidingGate, ModuleRecord, RunRecord
from rankbits.records.certainty import NEAR, RANK
from rankbits.reports.tables import SITE_LABELS

MOST_NAMED = 3
"""Gates named in the sentence; all of them stand in the table."""


def certainty_lines(record: RunRecord) -> list[str]:
    """Sentences about certainty; none where nothing was learned, or the record is older than that knowledge."""
    decided = _decided(record)
    if not decided:
        return []
    near = _near(record)
    sure = len(decided) - len(near)
    lines = [*_means(record), f"{sure} of {len(decided)} gates that decide are at least {NEAR:g} from their threshold."]
    if near:
        named = "; ".join(
            f"{module.name}: {decides(gate)} ({gate.probability:.2f})" for module, gate in near[:MOST_NAMED]
        )
        lines.append(f"Nearest to theirs, by probability of being open: {named}.")
    return lines


def near_gates(record: RunRecord) -> list[list[str]]:
    """The gates near their threshold, nearest first: matrix, what each decides, probability, threshold and state."""
    return [
        [
            module.name,
            decides(gate),
            f"{gate.probability:.3f}",
            f"{gate.threshold:.2f}",
            "on" if gate.is_open else "off",
        ]
        for module, gate in _near(record)
    ]


def decides(gate: DecidingGate) -> str:
    """What a gate decides: "rank 3", or "8 bits of W0"."""
    if gate.site == RANK:
        return f"rank {gate.level}"
    labels = {str(site): label for site, label in SITE_LABELS.items()}
    return f"{gate.level} bits of {labels[gate.site]}"


def _decided(record: RunRecord) -> list[tuple[ModuleRecord, DecidingGate]]:
    return [(module, gate) for module in record.modules for gate in module.deciding_gates()]


def _near(record: RunRecord) -> list[tuple[ModuleRecord, DecidingGate]]:
    near = [(module, gate) for module, gate in _decided(record) if gate.is_near]
    return sorted(near, key=lambda pair: pair[1].margin)


def _means(record: RunRecord) -> list[str]:
    """Expected against hardened means, over matrices for ranks and over their own quantizers for bits."""
    ranks = [(m.expected_rank, m.rank) for m in record.modules if m.expected_rank is not None]
    bits = [
        (module.expected_bits[site], width)
        for module in record.modules
        for site, width in module.own_bits().items()
        if site in module.bit_open_probabilities and site in module.expected_bits
    ]
    lines = []
    for what, pairs in (("rank", ranks), ("width in bits", bits)):
        if pairs:
            expected, hard = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            lines.append(f"Mean {what}: {hard:.2f} as delivered, {expected:.2f} expected under the gate probabilities.")
    return lines
