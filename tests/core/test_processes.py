"""Parts of a train set and sums over them, without a second process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dattri_core import ModelProblem, PartedRows, SharedProblem, assemble, summed
from dattri_core.laws.parted import PartedProblem
from dattri_core.laws.problems import problem_of
from dattri_core.laws.worlds import network
from dattri_core.processes import Processes, failing_together, processes_now
from dattri_core.top import ExtremeRows, extreme_rows


@given(st.integers(0, 200), st.integers(1, 40))
def test_parts_cover_the_train_set_once_in_order_and_evenly(count, size):
    parts = [Processes(None, rank, size, frozenset()).part(count) for rank in range(size)]
    assert [at for part in parts for at in range(*part)] == list(range(count))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


def moment(problem):
    return {"sum": sum(rows.flat().T @ rows.flat() for rows in problem.rows())}


def test_a_sum_is_that_of_the_whole_train_set_in_one_process_and_in_parts():
    whole = problem_of(network())
    parted = PartedProblem(whole)
    assert not isinstance(whole, SharedProblem)
    assert isinstance(parted, SharedProblem)
    assert all(isinstance(problem, ModelProblem) for problem in (whole, parted))
    seen = []

    def read(problem):
        seen.append(sum(len(rows) for rows in problem.rows()))
        assert problem.n_train == whole.n_train
        return moment(problem) if seen[-1] else {}

    alone = summed(whole, read)["sum"]
    torch.testing.assert_close(summed(parted, read)["sum"], alone)
    assert seen == [9, 4, 0, 5]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_extremes_of_parts_are_those_of_all(count, k, seed, largest):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 4, (count, 3), generator=generator).double()  # ties
    border = int(torch.randint(0, count + 1, (1,), generator=generator))
    sides = []
    for start, stop in ((0, border), (border, count)):
        side = ExtremeRows(k, largest)
        if stop > start:
            side.add(start, values[start:stop])
        sides.append(side)
    joined = ExtremeRows.joined(sides)
    positions, found = extreme_rows([(0, values)], k, largest=largest)
    assert torch.equal(joined.positions, positions)
    assert torch.equal(joined.values, found)


def test_alone_a_call_fails_as_it_is():
    assert processes_now() is None
    with pytest.raises(ZeroDivisionError):
        failing_together(lambda: 1 / 0)()


@pytest.mark.parametrize("curvature", ["fisher", "gauss-newton", "ggn", "leading-ggn"])
def test_rows_may_be_read_in_parts_and_one_process_reads_them_all(curvature):
    part = assemble.build_part("curvature", curvature)
    for problem in (problem_of(network()), PartedProblem(problem_of(network()))):
        operator = part.fit(problem)
        assert isinstance(operator, PartedRows)
        assert operator.own_part() is operator
