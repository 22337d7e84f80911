"""The points of benchmarks/decoder and what they are called; nothing is trained."""

import pytest
import torch

from rankbits.recipes.load import load

GRIDS = ("", "-group32", "-group8-scale8")


@pytest.fixture
def run(modules_of):
    """The benchmark's command as a module."""
    return modules_of("decoder")("run")


def test_a_name_means_its_own_point_though_others_contain_it(run) -> None:
    assert [point.name for point in run.chosen("e2e_nlg-ptq-bits3")] == ["e2e_nlg-ptq-bits3"]
    part = {point.name for point in run.chosen("nlg-ptq-bits3")}
    assert part == {f"e2e_nlg-ptq-bits{bits}{grid}" for bits in ("3", "3.5") for grid in GRIDS}
    assert run.chosen("no-such-point") == []


def test_names_are_unique_and_say_the_group_and_the_budget_of_the_recipe(run) -> None:
    names = [point.name for point in run.POINTS]
    assert len(set(names)) == len(names)
    fitted = [p for p in run.POINTS if isinstance(p, run.Trained) and "bayesian-lora" in p.name]
    assert len(fitted) == 24
    for point in fitted:
        recipe = load(f"{point.task}-smollm2", list(point.overrides))
        size = "" if recipe.adapter.group_size == 64 else f"-group{recipe.adapter.group_size}"
        size += "" if recipe.adapter.scale_bits == 32 else f"-scale{recipe.adapter.scale_bits}"
        codes = "-full" if recipe.adapter.code_range == "full" else ""
        assert point.name == f"{point.task}-bayesian-lora-{recipe.gates.budget.replace('=', '')}{size}{codes}"


@pytest.mark.parametrize("task", ["e2e_nlg", "gsm8k"])
def test_the_shipped_recipe_is_the_one_whose_results_are_stored(run, task) -> None:
    (point,) = run.chosen(f"{task}-bayesian-lora-bits3.5-group8-scale8-full")
    studied = load(f"{task}-smollm2", [*point.overrides, f"training.max_steps={run.STEPS}"])
    shipped = load(f"{task}-smollm2-budget")
    for section in ("model", "method", "task", "adapter", "gates", "training"):
        assert getattr(shipped, section) == getattr(studied, section)


def test_rounding_after_training_uses_all_codes_on_the_side_that_needs_them(modules_of) -> None:
    rounding, grid = modules_of("decoder")("rounding"), modules_of("decoder")("points").Grid
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [-1.0, 0.0, 1.0, 2.0]])
    torch.testing.assert_close(rounding.rounded(weight, 2, grid(4)), weight)
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    for bits in (2, 3, 4):
        mirrored = rounding.rounded(-weight, bits, grid(32))
        torch.testing.assert_close(mirrored, -rounding.rounded(weight, bits, grid(32)))


def test_rounding_after_training_has_the_scales_that_are_counted(modules_of) -> None:
    rounding, points = modules_of("decoder")("rounding"), modules_of("decoder")("points")
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    exact = (rounding.rounded(weight, 4, points.Grid(8)) - weight).square().mean()
    narrow = (rounding.rounded(weight, 4, points.FINEST) - weight).square().mean()
    assert exact < narrow < 1.3 * exact
    assert [rounding.stored_bytes(64, 4, grid) for grid in (points.COARSE, points.FINE, points.FINEST)] == [36, 40, 40]


def test_the_table_counts_the_scales_of_a_run_at_their_width(run) -> None:
    products = [{"module": "q", "op": "linear", "k": 16, "n": 4}, {"module": "lm_head", "op": "head", "k": 16, "n": 9}]
    result = {"costs": {"products": products}, "modules": [{"name": "q", "bits": {"weight": 4}}]}
    sizes = {8: (4.0, 40.0), 32: (4.0, 64.0)}
    for scale_bits, size in sizes.items():
        assert run._size(result | {"recipe": {"adapter": {"group_size": 8, "scale_bits": scale_bits}}}) == size
    assert run._size(result | {"recipe": {"adapter": {"group_size": 8}}}) == sizes[32], "older records have floats"
