"""Merging touches the chosen rows or columns and no other bit; adapters come out again in any order."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankbits import SboraConfig
from rankbits.tuners.sbora import SboraLinear, sbora_layers
from rankbits.tuners.sbora.config import Variant

VARIANTS = ["fa", "fb"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """The weight as integers: -0.0 and 0.0 differ, and NaN equals itself."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().clone().contiguous().view(integers)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [_bits(layer.oriented(layer.get_base_layer().weight)) for _, layer in sbora_layers(model)]


def _layer(variant: str, dtype: torch.dtype, base: str = "linear", **settings) -> SboraLinear:
    torch.manual_seed(0)
    plain = Conv1D(10, 12) if base == "conv1d" else nn.Linear(12, 10)
    plain = plain.to(dtype)
    with torch.no_grad():
        # What a round trip through another dtype, or adding zero, would change.
        plain.weight.view(-1)[::7] = -0.0
        plain.weight.view(-1)[3] = float("nan")
    config = SboraConfig(**{"r": 3, "variant": variant, "init_weights": False, "disjoint": True} | settings)
    return SboraLinear(plain, "a", config, "layer", {})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_all_but_the_chosen_keep_their_bits_and_unmerging_restores_all(variant, dtype, base) -> None:
    layer = _layer(variant, dtype, base)
    before = _bits(layer.oriented(layer.weight))
    layer.merge()
    merged = _bits(layer.oriented(layer.weight))
    dim, chosen = int(variant == "fa"), layer.indices_of("a")
    others = [i for i in range(before.shape[dim]) if i not in chosen]
    assert torch.equal(merged.index_select(dim, torch.tensor(others)), before.index_select(dim, torch.tensor(others)))
    assert all(not torch.equal(merged.select(dim, i), before.select(dim, i)) for i in chosen)
    assert layer.weight.dtype == dtype
    layer.unmerge()
    assert torch.equal(_bits(layer.oriented(layer.weight)), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_chosen_hold_the_sum_rounded_once(dense_update, variant, dtype) -> None:
    layer = _layer(variant, dtype)
    with torch.no_grad():
        layer.weight.nan_to_num_(0.25)
    wide = torch.promote_types(dtype, torch.float32)
    update = dense_update(layer, "a").to(wide)
    expected = (layer.weight.detach().to(wide) + update).to(dtype)
    layer.merge()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(layer.weight, expected, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_merged_equals_unmerged_whatever_the_mode_and_dropout(pick, mlp, rows, variant, training) -> None:
    model = pick(mlp, variant=variant, target_modules=["0", "2"], dropout=0.5).eval()
    expected, before = model(rows), _weights(model)
    model.train(training)
    model.merge_adapter(safe_merge=training)
    model.eval()
    torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(model), strict=True))
    assert torch.equal(model(rows), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_and_unload_unload_and_disable(pick, mlp, rows, variant) -> None:
    plain, base = mlp(rows), [mlp[0], mlp[2]]
    model = pick(mlp, variant=variant, target_modules=["0", "2"])
    expected = model(rows)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(rows), plain)
    assert [mlp[0], mlp[2]] != base
    unloaded = copy.deepcopy(model).unload()
    assert torch.equal(unloaded(rows), plain)
    merged = model.merge_and_unload(safe_merge=True)
    assert [merged[0], merged[2]] == base
    torch.testing.assert_close(merged(rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_merged_is_taken_out_though_the_adapter_has_learned_since(variant) -> None:
    layer = _layer(variant, torch.float32)
    layer.update_layer("b", SboraConfig(r=2, variant=variant, init_weights=False, disjoint=True), "layer")
    before = _bits(layer.weight)
    layer.merge(adapter_names=["a", "b"])
    both = _bits(layer.weight)
    with torch.no_grad():
        for parameter in [*layer.sbora_up.values(), *layer.sbora_down.values()]:
            parameter.add_(1.0)
    layer.unmerge(["a"])
    dim, kept = int(variant == "fa"), torch.tensor(layer.indices_of("b"))
    assert torch.equal(_bits(layer.weight).index_select(dim, kept), both.index_select(dim, kept))
    layer.unmerge()
    assert torch.equal(_bits(layer.weight), before)


@st.composite
def _work(draw: st.DrawFn) -> tuple[list[tuple[str, int]], torch.dtype, list[str], bool, bool]:
    mixed, disjoint = draw(st.booleans()), draw(st.booleans())
    first = draw(st.sampled_from(VARIANTS))
    tasks = []
    for _ in range(draw(st.integers(1, 4))):
        variant = draw(st.sampled_from(VARIANTS)) if mixed and not disjoint else first
        tasks.append((variant, draw(st.integers(1, 2))))
    names = [str(number) for number in range(len(tasks))]
    order = draw(st.permutations(names))
    return tasks, draw(st.sampled_from(DTYPES)), order[: draw(st.integers(0, len(order)))], disjoint, mixed


@given(_work())
def test_any_subset_comes_out_in_any_order_and_leaves_what_the_others_alone_would_be(work) -> None:
    tasks, dtype, removed, disjoint, _ = work
    torch.manual_seed(0)
    layer: SboraLinear | None = None
    base = nn.Linear(11, 9).to(dtype)
    for number, (variant, rank) in enumerate(tasks):
        config = SboraConfig(
            r=rank, variant=variant, init_weights=False, disjoint=disjoint, seed=number * (not disjoint)
        )
        if layer is None:
            layer = SboraLinear(base, "0", config, "l", {})
        else:
            layer.update_layer(str(number), config, "l")
    assert layer is not None
    names = [str(number) for number in range(len(tasks))]
    alone = copy.deepcopy(layer)
    before = _bits(layer.weight)
    layer.merge(adapter_names=names)
    for name in removed:
        layer.unmerge([name])
    kept = [name for name in names if name not in removed]
    assert layer.merged_adapters == kept
    alone.merge(adapter_names=kept)
    assert torch.equal(_bits(layer.weight), _bits(alone.weight))
    for name in kept:
        layer.unmerge([name])
    assert torch.equal(_bits(layer.weight), before)
    assert not layer.merged


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_tasks_are_the_base_outside_their_union_and_each_its_own_single_merge_inside(variant, dtype) -> None:
    layer = _layer(variant, dtype)
    for name in ("b", "c"):
        layer.update_layer(name, SboraConfig(r=2, variant=variant, init_weights=False, disjoint=True), "layer")
    before, dim = _bits(layer.weight), int(variant == "fa")
    singles = {}
    for name in ("a", "b", "c"):
        layer.merge(adapter_names=[name])
        singles[name] = _bits(layer.weight)
        layer.unmerge()
    results = []
    for order in itertools.permutations(singles):
        layer.merge(adapter_names=list(order))
        results.append(_bits(layer.weight))
        layer.unmerge()
    expected = before.clone()
    for name, single in singles.items():
        chosen = torch.tensor(layer.indices_of(name))
        expected.index_copy_(dim, chosen, single.index_select(dim, chosen))
    assert all(torch.equal(result, expected) for result in results)
    assert len({i for name in singles for i in layer.indices_of(name)}) == 7


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_disjoint_updates_vanish(variant) -> None:
    """Delta_i Delta_j^T = 0 for disjoint columns, Delta_i^T Delta_j = 0 for disjoint rows."""
    layer = _layer(variant, torch.float64)
    layer.update_layer("b", SboraConfig(r=2, variant=variant, init_weights=False, disjoint=True), "layer")
    a, b = layer.get_delta_weight("a"), layer.get_delta_weight("b")
    product = a @ b.T if variant == "fa" else a.T @ b
    assert not product.any()
    assert a.any()
    assert b.any()


def test_all_tasks_active_together_add_to_the_same_outputs(pick, mlp, rows) -> None:
    """Disjoint columns are no isolation: what one task adds is read by whatever reads the layer's output."""
    model = pick(mlp, target_modules=["0"], disjoint=True)
    model.add_adapter("second", SboraConfig(r=2, target_modules=["0"], init_weights=False, disjoint=True))
    model.base_model.set_adapter(["default", "second"])
    both = model(rows)
    model.base_model.set_adapter(["default"])
    assert not torch.allclose(model(rows), both)
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    torch.testing.assert_close(model(rows), both, rtol=1e-5, atol=1e-6)


def test_tasks_of_a_model_come_out_one_by_one(pick, mlp, rows) -> None:
    model = pick(mlp, target_modules=["0", "2"], disjoint=True, variant="fb", r=2)
    model.add_adapter("second", SboraConfig(r=2, variant="fb", target_modules=["0"], init_weights=False, disjoint=True))
    base, outputs = _weights(model), {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = model(rows)
    model.merge_adapter(["default", "second"])
    with pytest.raises(
        ValueError, match=r"adapters \['third'\] cannot be unmerged: merged are \['default', 'second'\]"
    ):
        model.unmerge_adapter(["third", "second"])
    model.unmerge_adapter(["default"])
    assert torch.equal(_weights(model)[1], base[1])
    torch.testing.assert_close(model(rows), outputs["second"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("second")
    model.unmerge_adapter(["second"])
    assert all(torch.equal(a, b) for a, b in zip(base, _weights(model), strict=True))
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("variant", VARIANTS)
def test_safe_merge_refuses_a_broken_adapter_before_anything_is_stored(variant) -> None:
    layer = _layer(variant, torch.float16)
    with torch.no_grad():
        layer.weight.nan_to_num_(0.25)
    layer.update_layer("b", SboraConfig(r=2, variant=variant, init_weights=False, disjoint=True), "layer")
    before = _bits(layer.weight)
    with torch.no_grad():
        (layer.sbora_up if variant == "fa" else layer.sbora_down)["b"].fill_(6e4)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter b seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["a", "b"])
    assert torch.equal(_bits(layer.weight), before)
    assert layer.merged_adapters == []
    layer.merge(safe_merge=True, adapter_names=["a"])
    assert layer.merged_adapters == ["a"]


def test_merging_what_is_merged_changes_nothing() -> None:
    layer = _layer("fa", torch.float32)
    layer.merge()
    once = _bits(layer.weight)
    with pytest.warns(UserWarning, match="lready"):
        layer.merge()
    assert torch.equal(_bits(layer.weight), once)
    assert layer.merged_adapters == ["a"]
    assert layer.variant == {"a": Variant.FA}


def test_a_copy_of_a_merged_layer_unmerges_by_itself() -> None:
    layer = _layer("fb", torch.float32)
    before = _bits(layer.weight)
    layer.merge()
    merged = _bits(layer.weight)
    other = copy.deepcopy(layer)
    other.unmerge()
    assert torch.equal(_bits(other.weight), before)
    assert torch.equal(_bits(layer.weight), merged)
    assert layer.merged_adapters == ["a"]
