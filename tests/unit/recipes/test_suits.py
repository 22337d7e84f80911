"""Quantizers of a recipe that have no tensor to round are refused when it is read, as the adapter would refuse them."""

import json
from itertools import product

import pytest

from rankbits import BayesianLoraConfig
from rankbits.recipes.load import load

CHOICES = {
    "placement": ("separate", "merged"),
    "rounding": ("nearest", "compensated"),
    "quantizers": (None, [], ["weight"], ["input"], ["down", "weight"], ["output", "input", "weight"]),
    "learn_bits": (True, False),
    "activation_ranges": ("fitted", "affine"),
    "granularity": ("channel", "group"),
    "input_granularity": ("tensor", "group"),
    "quantize_head": (False, True),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["adapter.placement=merged", "adapter.quantizers=[down]"],
            'adapter.quantizers: given ["down"], expected weight, output and input alone with '
            "adapter.placement=merged, which leaves nothing beside the weight [override adapter.quantizers=[down]]",
        ),
        (
            ["adapter.rounding=compensated", "adapter.quantizers=[input]"],
            "adapter.rounding: given the text 'compensated', expected nearest with adapter.quantizers=[\"input\"]: the "
            "weight has no quantizer [override adapter.rounding=compensated]",
        ),
        (
            ["adapter.rounding=compensated", "adapter.learn_bits=false"],
            "adapter.rounding: given the text 'compensated', expected nearest with adapter.learn_bits=false: the",
        ),
        (
            ["adapter.activation_ranges=affine"],
            "adapter.activation_ranges: given the text 'affine', expected largest or fitted with "
            "adapter.quantizers=null: no input has a quantizer [override adapter.activation_ranges=affine]",
        ),
        (
            ["adapter.granularity=group", "adapter.input_granularity=group", "adapter.quantizers=[weight]"],
            "adapter.input_granularity: given the text 'group', expected tensor with adapter.quantizers=[\"weight\"]: "
            "no input has a quantizer",
        ),
    ],
)
def test_quantizers_that_have_nothing_to_round_are_refused(problems_of, changes, said) -> None:
    (problem,) = problems_of(*changes)
    assert said in problem


def test_other_methods_have_no_quantizers_to_refuse() -> None:
    load("quickstart", ["method=lora", "adapter.placement=merged", "adapter.quantizers=[down]"])
    load("quickstart", ["method=lora", "adapter.rounding=compensated", "adapter.quantizers=[input]"])


def test_exactly_what_an_adapter_refuses_is_refused(problems_of) -> None:
    for chosen in product(*CHOICES.values()):
        asked = dict(zip(CHOICES, chosen, strict=True))
        changes = [f"adapter.{name}={json.dumps(value)}" for name, value in asked.items()]
        try:
            BayesianLoraConfig(**asked)
        except ValueError:
            assert problems_of(*changes)
        else:
            load("quickstart", changes)
