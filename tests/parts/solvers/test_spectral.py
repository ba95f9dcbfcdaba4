"""The spectral solver against dense solves: blocks, zeros, signs, dampings."""

import warnings

import pytest
import torch
from attrs import define
from dattri_parts.curvatures.spectrum import Kronecker, KroneckerBasis, KroneckerSpectrum
from dattri_parts.solvers.spectral import Spectral
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.dense import factored, matrix_space, rows_of, symmetric

from dattri_core import (
    Damping,
    DenseBlock,
    MemoryBudgetError,
    NumericsError,
    Rows,
    SpecError,
    SpectralInverse,
    SpectralOperator,
)
from dattri_core.space import BlockSpec, Space
from dattri_core.testing import ToyOperator

CPU = torch.device("cpu")


def operator(matrix, dtype=torch.float64):
    return ToyOperator(matrix_space(len(matrix)), matrix, dtype)


def solved(matrix, damping, flat):
    shifted = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.solve(shifted, flat.double().mT).mT


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks_of(*eigenvalues):
    """Return a block diagonal matrix in `matrix_space` of 2 x 3 and 2 entries."""
    first, second = (torch.tensor(values).double() for values in eigenvalues)
    assert (len(first), len(second)) == (6, 2)
    return torch.block_diag(symmetric(first, 1), symmetric(second, 2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-2, 5).filter(lambda mu: abs(mu + 0.25) > 1e-2), min_size=3, max_size=12),
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_equals_a_dense_solve_definite_or_not_full_or_not(eigenvalues, zeros, count, seed):
    values = torch.tensor([*eigenvalues, *[0.0] * zeros]).double()
    values = values.where(values.abs() > 1e-6, 0)
    matrix = symmetric(values, seed)
    flat = normal(count, len(matrix), seed=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inverse = Spectral(damping=0.25).solve_for(operator(matrix), CPU)
    rows = rows_of(flat)
    answer = inverse.apply(rows)
    torch.testing.assert_close(answer.flat(), solved(matrix, 0.25, flat), rtol=1e-8, atol=1e-8)
    assert answer.space == rows.space
    assert torch.equal(answer.index, rows.index)
    assert torch.equal(answer.aux["a"], rows.aux["a"])
    negative = int((values + 0.25 < 0).sum())
    assert inverse.stats["negative_eigenvalues"] == negative
    assert len([w for w in caught if w.category is RuntimeWarning]) == bool(negative)
    assert inverse.stats["damping"] == 0.25
    assert inverse.stats["minimum_eigenvalue"] == pytest.approx(float(values.min()), abs=1e-12)
    assert inverse.stats["maximum_eigenvalue"] == pytest.approx(float(values.max()), abs=1e-12)
    shifted = (values + 0.25).abs()
    assert inverse.stats["condition"] == pytest.approx(float(shifted.max() / shifted.min()))


def test_another_damping_needs_nothing_but_the_spectrum():
    matrix = symmetric(torch.linspace(0, 3, 8), 3)

    @define(eq=False)
    class Counting(ToyOperator):
        calls = 0

        def apply(self, rows):
            raise AssertionError

        dense = apply

    held = Counting(matrix_space(8), matrix)
    rows = rows_of(normal(3, 8))
    inverse = Spectral(damping=1.0).solve_for(held, CPU)
    for damping in (1e-3, 0.5, 30.0):
        moved = inverse.with_damping(Damping(damping))
        torch.testing.assert_close(moved.apply(rows).flat(), solved(matrix, damping, rows.flat()))
        assert moved.stats["damping"] == damping
    torch.testing.assert_close(inverse.apply(rows).flat(), solved(matrix, 1.0, rows.flat()))


# --- blocks -------------------------------------------------------------------------------------
def test_blocks_are_inverted_apart_and_may_come_alone():
    matrix = blocks_of([0.0, 0.0, 1.0, 2.0, 3.0, 4.0], [0.1, 5.0])
    inverse = Spectral(damping=0.3).solve_for(operator(matrix), CPU)
    assert inverse.blockwise
    rows = rows_of(normal(4, 8))
    want = rows_of(solved(matrix, 0.3, rows.flat()))
    assert not Spectral().solve_for(operator(symmetric(torch.arange(8) + 1, 0)), CPU).blockwise
    for given_rows in (rows, factored(rows)):
        for name, block in given_rows.blocks.items():
            part = Rows(rows.space.select([name]), {name: block}, rows.index)
            got = inverse.apply(part)
            assert got.space.names == (name,)
            assert isinstance(got.blocks[name], DenseBlock)
            torch.testing.assert_close(got.flat(), want.blocks[name].flat())


def test_relative_damping_is_of_each_block_and_its_mean_and_range_are_recorded():
    matrix = blocks_of([0.0, 0.0, 1.0, 2.0, 3.0, 6.0], [10.0, 30.0])  # means 2 and 20
    inverse = Spectral(damping={"relative": 0.1}).solve_for(operator(matrix), CPU)
    rows = rows_of(normal(3, 8))
    got = inverse.apply(rows).flat()
    want = [
        solved(matrix[:6, :6], 0.2, rows.flat()[:, :6]),
        solved(matrix[6:, 6:], 2.0, rows.flat()[:, 6:]),
    ]
    torch.testing.assert_close(got, torch.cat(want, 1))
    assert inverse.stats["damping_minimum"] == pytest.approx(0.2)
    assert inverse.stats["damping_maximum"] == pytest.approx(2.0)
    assert inverse.stats["damping"] == pytest.approx((6 * 0.2 + 2 * 2.0) / 8)
    absolute = Spectral(damping=0.1).solve_for(operator(matrix), CPU)
    assert "damping_minimum" not in absolute.stats


def test_a_block_without_curvature_takes_the_mean_of_all():
    matrix = blocks_of([0.0] * 6, [4.0, 12.0])  # the mean of all eight is 2
    inverse = Spectral(damping={"relative": 0.5}).solve_for(operator(matrix), CPU)
    rows = rows_of(normal(3, 8))
    torch.testing.assert_close(inverse.apply(rows).flat()[:, :6], rows.flat()[:, :6] / 1.0)
    assert inverse.stats["damping_minimum"] == pytest.approx(1.0)


def test_a_curvature_of_zeros_is_refused_with_relative_damping_and_divided_by_an_absolute_one():
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    with pytest.raises(NumericsError, match=r"mean eigenvalue 0.*absolute damping"):
        Spectral(damping={"relative": 0.5}).solve_for(operator(matrix), CPU)
    rows = rows_of(normal(3, 8))
    inverse = Spectral(damping=0.5).solve_for(operator(matrix), CPU)
    torch.testing.assert_close(inverse.apply(rows).flat(), rows.flat() / 0.5)


# --- the root -----------------------------------------------------------------------------------
@pytest.mark.parametrize("damping", [0.25, {"relative": 0.1}])
@pytest.mark.parametrize(
    "matrix",
    [
        symmetric(torch.linspace(0.1, 4, 8), 0),
        symmetric(torch.tensor([0.0, 0, 0, 1, 2, 3, 4, 5]), 0),
        blocks_of([0.0, 0.0, 1.0, 2.0, 3.0, 6.0], [10.0, 30.0]),
    ],
    ids=["full", "singular", "blocks"],
)
def test_the_root_is_the_symmetric_root_of_the_inverse(matrix, damping):
    root = Spectral(damping=damping).root_for(operator(matrix), CPU)
    inverse = Spectral(damping=damping).solve_for(operator(matrix), CPU)
    rows = rows_of(torch.eye(8, dtype=torch.float64))
    half = root.apply(rows).flat()
    torch.testing.assert_close(half, half.mT)
    torch.testing.assert_close(half @ half, inverse.apply(rows).flat(), rtol=1e-9, atol=1e-9)
    assert float(torch.linalg.eigvalsh(half)[0]) > 0
    assert root.stats == inverse.stats
    moved = root.with_damping(Damping(2.0)).apply(rows).flat()
    want = Spectral(damping=2.0).root_for(operator(matrix), CPU).apply(rows).flat()
    assert torch.equal(moved, want)


def test_an_indefinite_curvature_has_no_root():
    matrix = symmetric(torch.tensor([-1.5, -0.7, 0.2, 3.0]).double(), 1)
    with pytest.raises(NumericsError, match=r"\^-1/2 does not exist: 2 eigenvalues.*'one-sided'"):
        Spectral(damping=0.1).root_for(operator(matrix), CPU)


# --- signs and singular spectra -----------------------------------------------------------------
def test_negative_eigenvalues_are_inverted_exactly_and_said():
    matrix = symmetric(torch.tensor([-1.5, -0.7, 0.2, 3.0]).double(), 1)
    with pytest.warns(RuntimeWarning, match=r"2 eigenvalues.*smallest is -1.5.*'ggn'"):
        inverse = Spectral(damping=0.1).solve_for(operator(matrix), CPU)
    rows = rows_of(normal(2, 4))
    torch.testing.assert_close(inverse.apply(rows).flat(), solved(matrix, 0.1, rows.flat()))


@pytest.mark.filterwarnings("ignore:solver 'spectral'")
@pytest.mark.parametrize(
    ("eigenvalues", "damping"),
    [
        ([0.0, 1.0, 2.0], 0.0),  # an eigenvalue of zero that nothing damps
        ([-0.5, 1.0, 2.0], 0.5),  # an eigenvalue on -damping
    ],
)
def test_singular_is_refused_with_the_block_and_the_cure(eigenvalues, damping):
    matrix = symmetric(torch.tensor(eigenvalues).double(), 0)
    with pytest.raises(NumericsError, match=r"singular.*in block 'all'.*give a damping above"):
        Spectral(damping=damping).solve_for(operator(matrix), CPU)


def test_below_what_squares_of_rounded_numbers_can_tell_from_zero_is_singular():
    class Listing(ToyOperator):
        """Lists the diagonal, whatever is in it."""

        complete = True

        @property
        def eigenvalues(self):
            parts = self.matrix.diagonal().split([spec.size for spec in self.space])
            return dict(zip(self.space.names, parts, strict=True))

    held = Listing(matrix_space(3), torch.diag(torch.tensor([1e-30, 1.0, 2.0]).double()))
    with pytest.raises(NumericsError, match=r"singular.*in block 'm'"):
        Spectral(damping=0.0).solve_for(held, CPU)


def test_small_eigenvalues_of_squares_are_signal_far_below_the_precision():
    # A sum of squares in float32 is known to about 1e-10 of the largest, not to 1e-7.
    matrix = torch.diag(torch.tensor([1e-8, 0.5, 1.0]).double())
    rows = rows_of(normal(2, 3))
    inverse = Spectral(damping=0.0).solve_for(operator(matrix, torch.float32), CPU)
    torch.testing.assert_close(inverse.apply(rows).flat(), solved(matrix, 0.0, rows.flat()))
    saddle = torch.diag(torch.tensor([-1e-8, 0.5, 1.0]).double())
    one = ToyOperator(matrix_space(2), saddle[:2, :2], torch.float32)
    with pytest.raises(NumericsError, match="singular"):
        Spectral(damping=0.0).solve_for(one, CPU)


def test_eigenvalues_that_are_not_finite_are_refused():
    class Broken(ToyOperator):
        @property
        def eigenvalues(self):
            return {name: values * torch.inf for name, values in super().eigenvalues.items()}

    held = operator(symmetric(torch.arange(4) + 1, 0))
    with pytest.raises(NumericsError, match=r"eigenvalues of \['all'\] are not finite"):
        Spectral().solve_for(Broken(held.space, held.matrix), CPU)


# --- rows ---------------------------------------------------------------------------------------
def test_rows_keep_their_dtype_and_may_be_factors():
    matrix = symmetric(torch.linspace(0.5, 3, 6), 5)
    inverse = Spectral(damping=0.1).solve_for(operator(matrix), CPU)
    rows = rows_of(normal(3, 6))
    want = solved(matrix, 0.1, rows.flat())
    torch.testing.assert_close(inverse.apply(factored(rows)).flat(), want)
    single = inverse.apply(rows.to(dtype=torch.float32))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.flat().double(), want, rtol=1e-5, atol=1e-5)


def test_other_spaces_are_refused():
    for matrix in (symmetric(torch.arange(4) + 1, 0), blocks_of([1.0] * 6, [2.0, 3.0])):
        inverse = Spectral().solve_for(operator(matrix), CPU)
        with pytest.raises((SpecError, MemoryBudgetError), match="inverse Hessian: the spaces"):
            inverse.apply(rows_of(torch.zeros(1, len(matrix) + 1)))


def test_declared_facts_and_fields():
    assert isinstance(operator(torch.eye(4).double()), SpectralOperator)
    assert Spectral.needs == {"spectral"}
    assert Spectral.exact
    assert Spectral().damping == Damping(0.1, relative=True)
    for wrong in (-1.0, float("nan"), "x", {"relative": -1}):
        with pytest.raises(SpecError, match="damping"):
            Spectral(damping=wrong)


@settings(max_examples=20, deadline=None)
@given(share=st.sampled_from([0.05, 0.5, 3.0]), seed=st.integers(0, 20))
def test_the_leading_inverse_is_near_and_of_less_work(share, seed):
    space = Space((BlockSpec("w", "outer", (4, 6)), BlockSpec("v", "outer", (3, 5))))
    damping, sides, eigenvalues = 0.1, {}, {}
    for spec, left in zip(space, (True, False), strict=True):
        o, i = spec.shape
        outputs = torch.linalg.qr(normal(o, o, seed=seed))[0] if left else None
        sides[spec.name] = Kronecker(outputs, torch.linalg.qr(normal(i, i, seed=seed + 1))[0])
        falling = 10.0 ** -torch.arange(o).double().unsqueeze(1) * 10.0 ** -torch.arange(i).double()
        eigenvalues[spec.name] = 2 * falling
    spectrum = KroneckerSpectrum(KroneckerBasis(space, sides), eigenvalues, torch.float64, 2**20)
    whole = Spectral(damping=damping).solve_for(spectrum, CPU)
    _divides_by_what_it_says(whole, eigenvalues, damping)
    part = whole.leading(share)
    assert part.spectrum is None  # it has holes
    assert part.operator.basis.out_space.dim < space.dim / 2
    units = Rows.from_flat(space, torch.eye(space.dim).double(), torch.arange(space.dim))
    exact, found = whole.apply(units).flat(), part.apply(units).flat()
    torch.testing.assert_close(found, found.mT)
    # Eigenvalues of the leading one over those of the whole: 1 .. 1 + share.
    lower = torch.linalg.inv(torch.linalg.cholesky(exact))
    ratios = torch.linalg.eigvalsh(lower @ found @ lower.mT)
    assert float(ratios.min()) > 1 - 1e-10
    assert 1 + share / 100 < float(ratios.max()) < 1 + share + 1e-10
    assert torch.equal(whole.apply(units).flat(), exact)


def _divides_by_what_it_says(inverse, eigenvalues, damping):
    """In the basis an inverse with a spectrum is 1 / (L + damping), entry by entry."""
    assert isinstance(inverse, SpectralInverse)
    space = inverse.basis.out_space
    within = Rows.from_flat(space, normal(2, space.dim), torch.arange(2))
    answer = inverse.in_basis(within)
    assert set(inverse.spectrum) == set(space.names)
    for name, (values, told) in inverse.spectrum.items():
        assert told == damping
        assert torch.equal(values, eigenvalues[name])
        want = within.blocks[name].dense().values / (values + damping)
        torch.testing.assert_close(answer.blocks[name].dense().values, want)
