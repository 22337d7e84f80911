"""MoRA's update against the paper's formulas with dense matrices in float64, for every type and awkward shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rankbits.tuners.mora import compress
from rankbits.tuners.mora.blocks import rotate
from rankbits.tuners.mora.update import BLOCKWISE, NUMBERED, Form, MoraType, delta_weight, lora_factors, update_output

SHAPES = [(12, 12, 4), (13, 12, 4), (12, 13, 6), (30, 11, 8), (11, 30, 8), (7, 40, 6), (40, 7, 6), (9, 9, 8), (8, 8, 8)]
"""(in_features, out_features, side): divisible and not, wider and narrower, one block and many."""
FORMS = [Form(kind, *shape) for kind in MoraType for shape in SHAPES]
FORMS += [Form(kind, *shape, fold=True) for kind in sorted(BLOCKWISE) for shape in SHAPES]


def _name(form: Form) -> str:
    return f"{form.kind.value}-{form.in_features}-{form.out_features}-{form.side}{'-fold' if form.fold else ''}"


every_form = pytest.mark.parametrize("form", FORMS, ids=_name)


def _matrix(form: Form, seed: int = 0) -> torch.Tensor:
    return torch.randn(form.side, form.side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_form
def test_the_weight_is_that_of_the_paper(form, dense_update) -> None:
    matrix = _matrix(form)
    expected = dense_update(form.kind.value, matrix, form.out_features, form.in_features, fold=form.fold)
    found = delta_weight(matrix, form)
    assert found.shape == (form.out_features, form.in_features)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_form
@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (0,)])
def test_the_output_is_the_weight_times_the_input(form, rows, dense_update) -> None:
    matrix, x = _matrix(form), torch.randn(*rows, form.in_features, dtype=torch.float64)
    expected = x @ dense_update(form.kind.value, matrix, form.out_features, form.in_features, fold=form.fold).T
    torch.testing.assert_close(update_output(x, matrix, form), expected, rtol=1e-12, atol=1e-12)


@every_form
def test_gradcheck(form) -> None:
    x = torch.randn(2, form.in_features, dtype=torch.float64, requires_grad=True)
    matrix = _matrix(form).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, m: update_output(x, m, form), (x, matrix))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(MoraType), st.integers(1, 40), st.integers(1, 40), st.data())
def test_output_and_weight_agree_for_any_shape(kind, in_features, out_features, data) -> None:
    side = data.draw(st.integers(1, min(in_features, out_features)))
    side -= side % 2 if kind is MoraType.ROTATION else 0
    if not side:
        return
    form = Form(kind, in_features, out_features, side, fold=kind in BLOCKWISE and data.draw(st.booleans()))
    matrix, x = _matrix(form), torch.randn(3, in_features, dtype=torch.float64)
    torch.testing.assert_close(update_output(x, matrix, form), x @ delta_weight(matrix, form).T, rtol=1e-10, atol=1e-10)


@given(
    st.sampled_from(
        [
            (compress.sum_strided, compress.tile_wrapped),
            (compress.sum_adjacent, compress.repeat_adjacent),
            (compress.truncate, compress.pad_with_zeros),
        ]
    ),
    st.integers(1, 50),
    st.data(),
)
def test_each_compression_has_its_transpose(pair, length, data) -> None:
    side = data.draw(st.integers(1, length))
    down, back = pair
    x, v = torch.randn(length, dtype=torch.float64), torch.randn(side, dtype=torch.float64)
    torch.testing.assert_close(down(x, side) @ v, x @ back(v, length), rtol=1e-10, atol=1e-10)


def test_examples_by_hand() -> None:
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    assert compress.sum_strided(x, 2).tolist() == [10101.0, 1011.0]  # the tail wraps: x0 + x2 + x4, x1 + x3 + x0
    assert compress.sum_strided(x, 3).tolist() == [1001.0, 10010.0, 101.0]
    assert compress.sum_adjacent(x, 2).tolist() == [111.0, 11000.0]
    assert compress.sum_adjacent(x, 3).tolist() == [11.0, 1100.0, 10000.0]
    assert compress.truncate(x, 2).tolist() == [1.0, 10.0]
    v = torch.tensor([1.0, 2.0])
    assert compress.tile(v, 5).tolist() == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert compress.repeat_adjacent(v, 5).tolist() == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert compress.pad_with_zeros(v, 4).tolist() == [1.0, 2.0, 0.0, 0.0]


def test_rotation_is_that_of_rotary_embeddings() -> None:
    """Agreement with transformers' own, whose positions are our blocks."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    blocks = torch.randn(1, 1, 9, 16)
    config = LlamaConfig(hidden_size=16, num_attention_heads=1, head_dim=16)
    cos, sin = LlamaRotaryEmbedding(config)(blocks, torch.arange(9)[None])
    expected, _ = apply_rotary_pos_emb(blocks, blocks, cos, sin)
    torch.testing.assert_close(rotate(blocks), expected, rtol=1e-6, atol=1e-6)


def test_rotation_keeps_lengths_leaves_the_first_block_and_is_undone_by_its_inverse() -> None:
    blocks = torch.randn(2, 7, 10, dtype=torch.float64)
    turned = rotate(blocks)
    torch.testing.assert_close(turned.norm(dim=-1), blocks.norm(dim=-1))
    assert torch.equal(turned[:, 0], blocks[:, 0])
    assert not torch.allclose(turned[:, 1], blocks[:, 1])
    torch.testing.assert_close(rotate(turned, inverse=True), blocks)


def test_angles_are_not_rounded_to_half_precision() -> None:
    """Position 301 is 302 or 300 in bfloat16: the turn would be another one."""
    blocks = torch.zeros(320, 2)
    blocks[:, 0] = 1
    half = rotate(blocks.to(torch.bfloat16))
    torch.testing.assert_close(half.float(), rotate(blocks), rtol=0, atol=2**-8)


@pytest.mark.parametrize(("kind", "rank"), [(kind, 48 if kind in BLOCKWISE else 14) for kind in MoraType])
def test_rank_of_an_update_of_48_by_48(kind, rank) -> None:
    form = Form(kind, 48, 48, 14)  # r = 2
    assert int(torch.linalg.matrix_rank(delta_weight(_matrix(form), form))) == rank


def test_rotation_reads_few_inputs_of_a_wide_layer_unless_folded() -> None:
    form = Form(MoraType.ROTATION, 172, 64, 22)
    dead = (delta_weight(_matrix(form), form) == 0).all(dim=0)
    assert int(dead.sum()) == 106
    assert form.blocks == 3
    folded = Form(MoraType.ROTATION, 172, 64, 22, fold=True)
    assert not bool((delta_weight(_matrix(folded), folded) == 0).all(dim=0).any())
    assert folded.blocks == 8


@every_form
def test_a_lora_pair_is_the_update_exactly_or_refused(form) -> None:
    matrix = _matrix(form)
    if form.kind in BLOCKWISE:
        with pytest.raises(ValueError, match=f"type '{form.kind.value}' is no low-rank product.*merge it"):
            lora_factors(matrix, form)
        return
    down, up = lora_factors(matrix, form)
    assert (down.shape, up.shape) == ((form.side, form.in_features), (form.out_features, form.side))
    torch.testing.assert_close(up @ down, delta_weight(matrix, form), rtol=1e-12, atol=1e-12)
    assert bool((down == down.round()).all()), "the compression has no parameters: only counts"


def test_numbers_stand_for_the_types_of_the_papers_code() -> None:
    assert {number: kind.value for number, kind in NUMBERED.items()} == {
        1: "sharing",
        2: "sharing_adjacent",
        3: "sharing_adjacent_inputs",
        4: "sharing_adjacent_outputs",
        6: "rotation",
    }


class _LargestResult(TorchDispatchMode):
    """Remembers the most elements that any operation wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("kind", MoraType)
def test_a_pass_forms_nothing_as_large_as_the_weight(kind) -> None:
    form = Form(kind, 200, 200, 40)
    x = torch.randn(3, 200, dtype=torch.float64, requires_grad=True)
    with _LargestResult() as largest:
        update_output(x, _matrix(form).requires_grad_(), form).sum().backward()
    assert largest.elements <= 40 * 40
