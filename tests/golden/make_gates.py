"""Golden values of the gates in 50-digit decimals, from the formulas of the papers and without the package.

Run `python tests/golden/make_gates.py` to print the contents of gates.json.
"""

import json
from decimal import Decimal, localcontext

DIGITS = 17
TEMPERATURE = Decimal(2) / Decimal(3)
HIGH, LOW, THRESHOLD = Decimal("1.1"), Decimal("-0.1"), Decimal("0.34")
LOGITS = ("-6", "-4", "-2", "-0.5", "0", "0.5", "2", "4", "6")
NOISES = ("0.001", "0.1", "0.25", "0.5", "0.7", "0.95", "0.999")
GATED_WIDTHS = (4, 8, 16, 32)


def sigmoid(value: Decimal) -> Decimal:
    return 1 / (1 + (-value).exp())


def shift() -> Decimal:
    return TEMPERATURE * (-HIGH / LOW).ln()


def open_logit() -> Decimal:
    return -shift() - (THRESHOLD / (1 - THRESHOLD)).ln()


def stretched(concrete: Decimal) -> Decimal:
    return min(max(concrete * (HIGH - LOW) + LOW, Decimal(0)), Decimal(1))


def sample(logit: Decimal, noise: Decimal) -> Decimal:
    return stretched(sigmoid((noise.ln() - (1 - noise).ln() + logit) / TEMPERATURE))


def link_sum(probability: Decimal, links: int) -> Decimal:
    return sum((probability**i for i in range(1, links + 1)), Decimal(0))


def bits(probability: Decimal) -> Decimal:
    return 2 + sum(((width - width // 2) * probability ** (i + 1) for i, width in enumerate(GATED_WIDTHS)), Decimal(0))


def chain_kl_nats(probabilities: list[Decimal], strength: Decimal) -> Decimal:
    """Sum over every prefix that a chain can end with, of q log(q / p): no formula for one link is used."""
    prior = (-strength).exp()
    total, q, p = Decimal(0), Decimal(1), Decimal(1)
    for probability in probabilities:
        stop_q, stop_p = q * (1 - probability), p * (1 - prior)
        total += stop_q * (stop_q / stop_p).ln()
        q, p = q * probability, p * prior
    return total + q * (q / p).ln()


def table_row(logit: Decimal) -> dict[str, str]:
    closed, saturated = sigmoid(-logit - shift()), sigmoid(logit - shift())
    return {
        "logit": str(logit),
        "closed": text(closed),
        "saturated": text(saturated),
        "between": text(1 - closed - saturated),
        "mean": text(stretched(sigmoid(logit / TEMPERATURE))),
        "expected_bits": text(bits(1 - closed)),
    }


def text(value: Decimal) -> str:
    return str(round(value, DIGITS))


def golden() -> dict:
    with localcontext() as context:
        context.prec = 50
        start = sigmoid(6 + shift())
        kl_probabilities = [Decimal(p) for p in ("0.9", "0.35", "0.5", "0.08")]
        return {
            "shift": text(shift()),
            "open_logit": text(open_logit()),
            "table": [table_row(Decimal(logit)) for logit in LOGITS],
            "samples": [
                {"logit": logit, "noise": noise, "value": text(sample(Decimal(logit), Decimal(noise)))}
                for logit in LOGITS
                for noise in NOISES
            ],
            "penalty_of_one_quantizer_at_6": text(link_sum(start, 4)),
            "penalty_of_252_quantizers_at_6": text(252 * link_sum(start, 4)),
            "penalty_of_252_quantizers_at_2": text(252 * link_sum(sigmoid(2 + shift()), 4)),
            "penalty_of_36_ranks_of_8_at_6": text(36 * link_sum(sigmoid(Decimal(6)), 7)),
            "kl": {
                "probabilities": [str(p) for p in kl_probabilities],
                "nats_by_strength": {s: text(chain_kl_nats(kl_probabilities, Decimal(s))) for s in ("0.01", "1", "8")},
            },
        }


if __name__ == "__main__":
    print(json.dumps(golden(), indent=1))
