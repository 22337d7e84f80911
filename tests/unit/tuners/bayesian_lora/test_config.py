"""The configuration reports all that is wrong with it together, and survives being written and read."""

import pickle

import pytest
from peft import PeftConfig

from rankbits import BayesianLoraConfig
from rankbits.quant.grid import PER_TENSOR, Granularity, RangeLayout
from rankbits.tuners.bayesian_lora.config import PAPER_SITES, Site, Start, start_of


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ValueError, match="BayesianLoraConfig") as failure:
        BayesianLoraConfig(
            r=0,
            alpha=float("nan"),
            dropout=1.0,
            calibration_passes=2.5,
            group_size=8.0,
            weight_gradient_rows=3.5,
            initial_bit_logit=-2.0,
            rank_gate="soft",
            init_weights="gauss",
            quantizers=["weight", "wieght"],
            code_range="wide",
            scale_bits=8.0,
            input_granularity="channel",
            layers_pattern="layers",
        )
    expected = [
        "`r` must be a positive integer, got 0",
        "`alpha` must be > 0 and finite, got nan",
        "`dropout` must be in [0, 1), got 1.0",
        "`calibration_passes` must be an integer >= 0, got 2.5",
        "`group_size` must be a positive integer, got 8.0",
        "`weight_gradient_rows` must be a positive integer or None, got 3.5",
        "`initial_bit_logit` must exceed -0.9353, where gates open, got -2.0",
        "`rank_gate` must be one of ['ste', 'hard_concrete'], got 'soft'",
        "`init_weights` must be True, False, 'lora' or 'adalora', got 'gauss'",
        "`code_range` must be one of ['narrow', 'full'], got 'wide'",
        "`scale_bits` must be one of [32, 16, 8], got 8.0",
        "`input_granularity` must be one of ['tensor', 'group'], got 'channel'",
        "`quantizers` has unknown names ['wieght']",
        "`layers_pattern` needs `layers_to_transform`",
    ]
    message = str(failure.value)
    assert [text for text in expected if text not in message] == []
    assert message.count("; ") >= len(expected) - 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"alpha": -1.0}, "`alpha` must be > 0 and finite, got -1.0"),
        ({"alpha": float("inf")}, "`alpha` must be > 0 and finite, got inf"),
        ({"calibration_passes": -1}, "`calibration_passes` must be an integer >= 0, got -1"),
        ({"group_size": 0}, "`group_size` must be a positive integer, got 0"),
        ({"weight_gradient_rows": 0}, "`weight_gradient_rows` must be a positive integer or None, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(setting, said) -> None:
    with pytest.raises(ValueError, match=said):
        BayesianLoraConfig(**setting)


def test_groups_of_inputs_need_groups_of_the_weight() -> None:
    with pytest.raises(ValueError, match="`input_granularity`='group' needs granularity='group', got 'channel'"):
        BayesianLoraConfig(input_granularity="group", granularity="channel")
    config = BayesianLoraConfig(
        quantizers=["weight", "input"], input_granularity="group", granularity="group", group_size=4, scale_bits=8
    )
    assert config.layout_of(Site.INPUT) == RangeLayout(Granularity.GROUP, 4)
    assert config.layout_of(Site.WEIGHT) == RangeLayout(Granularity.GROUP, 4, 8)
    assert config.layout_of(Site.OUTPUT) == PER_TENSOR
    assert BayesianLoraConfig(granularity="group").layout_of(Site.INPUT) == PER_TENSOR


@pytest.mark.parametrize("setting", [{"activation_ranges": "affine"}, {"input_granularity": "group"}])
def test_what_is_about_inputs_needs_their_quantizer(setting) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"`{name}`='.*' is about inputs, .*: add 'input' to quantizers"):
        BayesianLoraConfig(granularity="group", quantizers=["weight"], **setting)
    BayesianLoraConfig(granularity="group", placement="merged", **setting)


@pytest.mark.parametrize(
    ("rank_gate", "logit", "r", "is_enough"),
    [
        # method of the check: sigma(logit)^(r - 1) > 1/2
        ("ste", 3.0, 15, True),
        ("ste", 3.0, 16, False),
        ("ste", 4.0, 16, True),
        ("ste", 6.0, 280, True),
        ("ste", 6.0, 282, False),
        ("ste", -5.0, 1, True),
        ("hard_concrete", -0.93, 64, True),
        ("hard_concrete", -0.94, 2, False),
    ],
)
def test_all_ranks_must_start_open(rank_gate, logit, r, is_enough) -> None:
    settings = {"r": r, "rank_gate": rank_gate, "initial_rank_logit": logit}
    if is_enough:
        assert BayesianLoraConfig(**settings).r == r
    else:
        with pytest.raises(ValueError, match=rf"`initial_rank_logit`={logit} leaves some of r={r} ranks closed"):
            BayesianLoraConfig(**settings)


def test_sites_are_the_seven_of_the_paper_unless_chosen() -> None:
    assert BayesianLoraConfig().sites == PAPER_SITES
    assert len(PAPER_SITES) == 7
    assert Site.INPUT not in PAPER_SITES
    assert BayesianLoraConfig(quantizers=["input", "up"]).sites == (Site.UP, Site.INPUT)
    assert BayesianLoraConfig(quantizers=[]).sites == ()
    assert BayesianLoraConfig(learn_bits=False).sites == ()


def test_what_learns_needs_a_schedule() -> None:
    assert BayesianLoraConfig().learns
    assert BayesianLoraConfig(learn_rank=False).learns
    assert BayesianLoraConfig(learn_bits=False).learns
    assert not BayesianLoraConfig(learn_bits=False, learn_rank=False).learns
    hardened = BayesianLoraConfig(hardened_ranks={"a": 1}, hardened_bits={"a": {}})
    assert hardened.hardened
    assert not hardened.learns


def test_starts_have_names() -> None:
    assert [start_of(name) for name in (True, "lora", "adalora", False)] == [
        Start.LORA,
        Start.LORA,
        Start.ADALORA,
        Start.RANDOM,
    ]
    with pytest.raises(ValueError, match="gauss"):
        start_of("gauss")


def test_a_configuration_survives_a_file_and_a_pickle(tmp_path) -> None:
    config = BayesianLoraConfig(
        r=3,
        target_modules=["b", "a"],
        exclude_modules=["c"],
        quantizers=["down", "input"],
        rank_gate="hard_concrete",
        hardened_ranks={"x.a": 2},
        hardened_bits={"x.a": {"down": 4}},
        unsigned_inputs=["x.a"],
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, BayesianLoraConfig)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.target_modules == {"a", "b"}
    assert pickle.loads(pickle.dumps(config)) == config
