from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_moe_compat import ExpertLora, LayoutError
from peft_moe_compat.layout import ORIENTATIONS, PACKINGS, concat, flat, from_flat, to_flat

sizes = st.integers(1, 6)
# Square half of the time, where a flipped layout would still fit.
shapes = st.one_of(
    st.tuples(sizes, sizes, sizes, sizes), sizes.flatmap(lambda n: st.tuples(sizes, sizes, st.just(n), st.just(n)))
)


def flat_pair(E, r, features_in, features_out, orientation):
    p, q = (features_in, features_out) if orientation == "linear" else (features_out, features_in)
    return torch.randn(E * r, p, dtype=torch.float64), torch.randn(q, r * E, dtype=torch.float64)


def delta_by_hand(lora_A, lora_B, e, E, r, orientation, packing, scaling):
    """Of one expert, "out in": rows and columns of the flat pair picked one by one, as the packings are defined."""
    rows = lora_A[[e * r + i for i in range(r)]]
    columns = lora_B[:, [i * E + e if packing == "rank_major" else e * r + i for i in range(r)]]
    product = scaling * columns @ rows
    return product if orientation == "linear" else product.T


@given(shapes, st.sampled_from(ORIENTATIONS), st.sampled_from(PACKINGS), st.floats(0.1, 8))
def test_from_flat_is_the_definition(shape, orientation, packing, scaling):
    E, r, features_in, features_out = shape
    A, B = flat_pair(*shape, orientation)
    lora = from_flat(A, B, E, orientation=orientation, packing=packing, scaling=scaling)
    assert (lora.num_experts, lora.rank, lora.in_features, lora.out_features) == (E, r, features_in, features_out)
    expected = torch.stack([delta_by_hand(A, B, e, E, r, orientation, packing, scaling) for e in range(E)])
    torch.testing.assert_close(lora.delta(), expected)
    assert lora.A.untyped_storage().data_ptr() in {A.untyped_storage().data_ptr(), B.untyped_storage().data_ptr()}


@given(shapes, st.sampled_from(ORIENTATIONS), st.sampled_from(PACKINGS))
def test_there_and_back_is_bit_identical(shape, orientation, packing):
    A, B = flat_pair(*shape, orientation)
    back = to_flat(
        from_flat(A, B, shape[0], orientation=orientation, packing=packing), orientation=orientation, packing=packing
    )
    assert torch.equal(back[0], A)
    assert torch.equal(back[1], B)


@given(shapes, *[st.sampled_from(ORIENTATIONS)] * 2, *[st.sampled_from(PACKINGS)] * 2)
def test_every_flat_form_holds_the_same_update(shape, orientation, other_orientation, packing, other_packing):
    A, B = flat_pair(*shape, orientation)
    lora = from_flat(A, B, shape[0], orientation=orientation, packing=packing)
    there = to_flat(lora, orientation=other_orientation, packing=other_packing)
    again = from_flat(*there, shape[0], orientation=other_orientation, packing=other_packing)
    assert torch.equal(again.A, lora.A)
    assert torch.equal(again.B, lora.B)


def test_the_flip_is_no_transpose_of_the_flat_matrices():
    A, B = flat_pair(3, 2, 4, 4, "linear")
    flipped = to_flat(from_flat(A, B, 3, orientation="linear"), orientation="reversed")
    assert not torch.equal(flipped[0], B.T)
    twice = to_flat(from_flat(*flipped, 3, orientation="linear"), orientation="reversed")
    assert torch.equal(twice[0], A)
    assert torch.equal(twice[1], B)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_gradients_flow_both_ways(orientation, packing):
    A, B = (t.requires_grad_() for t in flat_pair(3, 2, 4, 5, orientation))
    assert torch.autograd.gradcheck(
        lambda a, b: from_flat(a, b, 3, orientation=orientation, packing=packing, scaling=1.5).delta(), (A, B)
    )
    canonical = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: to_flat(ExpertLora(a, b), orientation=orientation, packing=packing),
        tuple(t.requires_grad_() for t in canonical),
    )


@given(sizes, sizes, sizes, st.lists(st.tuples(sizes, st.floats(0.1, 4)), min_size=1, max_size=4))
def test_concat_is_the_sum_of_the_updates(E, features_in, features_out, adapters):
    loras = [
        ExpertLora(
            torch.randn(E, r, features_in, dtype=torch.float64), torch.randn(E, features_out, r, dtype=torch.float64), s
        )
        for r, s in adapters
    ]
    joined = concat(loras)
    assert joined.rank == sum(r for r, _ in adapters)
    torch.testing.assert_close(joined.delta(), sum(lora.delta() for lora in loras))


def test_concat_keeps_the_higher_precision():
    low = ExpertLora(torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 5, 3).bfloat16())
    high = ExpertLora(torch.randn(2, 3, 4), torch.randn(2, 5, 3))
    assert concat([low, high]).A.dtype == torch.float32


@pytest.mark.parametrize(
    ("A", "B", "E", "message"),
    [
        ((8, 3), (4, 8), 0, "num_experts is 0"),
        ((8, 3), (4, 8), -1, "num_experts is -1"),
        ((8, 3), (4, 6), 4, r"8 rows.*6 columns"),
        ((8, 3), (4, 8), 3, "3 experts cannot share"),
        ((0, 3), (4, 0), 3, "cannot share"),
        ((2, 4, 3), (4, 8), 2, "two matrices"),
    ],
)
def test_impossible_shapes_are_refused_with_what_was_expected(A, B, E, message):
    with pytest.raises(LayoutError, match=message):
        from_flat(torch.zeros(A), torch.zeros(B), E, orientation="linear")


def test_unknown_names_are_refused():
    with pytest.raises(LayoutError, match="orientation is 'flipped'"):
        from_flat(torch.zeros(2, 2), torch.zeros(2, 2), 1, orientation="flipped")
    with pytest.raises(LayoutError, match="packing is 'weird'"):
        to_flat(ExpertLora(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)), orientation="linear", packing="weird")


def test_factors_that_do_not_fit_are_refused():
    lora = ExpertLora(torch.zeros(2, 3, 4), torch.zeros(2, 5, 3))
    lora.check(2, 5, 4)
    with pytest.raises(LayoutError, match=r"E=2, out=4, in=5.*another PEFT release"):
        lora.check(2, 4, 5)
    with pytest.raises(LayoutError, match="needs at least one"):
        concat([])
    with pytest.raises(LayoutError, match="the stack of the first adapter"):
        concat([lora, ExpertLora(torch.zeros(2, 3, 5), torch.zeros(2, 4, 3))])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_flat_pair_by_address_is_its_canonical_form(orientation, packing):
    lora = flat(torch.randn(6, 4), torch.randn(5, 6), 3, orientation=orientation, packing=packing, scaling=1.5)
    canonical = lora.canonical()
    for form in (lora, canonical):
        for factor, expected in zip(form.factors(), (canonical.A, canonical.B.transpose(1, 2)), strict=True):
            tensor, rank, *strides, _ = factor
            assert rank == lora.rank == canonical.rank
            assert torch.equal(tensor.as_strided(expected.shape, strides), expected)
        assert [factor.scaling for factor in form.factors()] == [1.0, 1.5]
    lora.check(3, canonical.out_features, canonical.in_features)
    with pytest.raises(LayoutError, match="E=4"):
        lora.check(4, canonical.out_features, canonical.in_features)
    with pytest.raises(LayoutError, match="do not fit"):
        lora.check(3, canonical.in_features, canonical.out_features)
