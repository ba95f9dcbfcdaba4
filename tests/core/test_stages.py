"""Stages: chains of projectors and inverse Hessians against dense algebra, in any order."""

import pytest
import torch
from oracles.toy_parts import FlatSketch, Gram, HessianColumns, inverse
from oracles.toy_tasks import cross_entropies, flat_gradients, world

from dattri_core import Method, SpecError, snapshot
from dattri_core.assemble import build_part
from dattri_core.protocols import RandomStream
from dattri_core.snapshot import fit_checkpoint
from dattri_core.stages import check_stages, example_space
from dattri_core.stream import Examples

DAMPING = 1e-2


def fitted(stages, memory=2**28, seed=3):
    task, train, test = world()
    checkpoint = fit_checkpoint(
        build_part("source", "per-example"),
        stages,
        seed,
        task,
        task.checkpoints[0],
        Examples.of(train, "train"),
        memory,
    )
    return checkpoint.chain, task, train, test


@pytest.fixture(autouse=True)
def computed(monkeypatch):
    """Compute train rows whenever they are asked for: the tests below ask the source itself."""
    monkeypatch.setattr(snapshot, "HELD_SHARE", 2**40)


def matrices(task, batch):
    """Return gradients in the order of the parameters: that of the blocks of this MLP."""
    return flat_gradients(task.model, cross_entropies(batch))


def in_space(chain, batch, role="train"):
    blocks = {}
    chain.source.stream(batch, role, blocks.__setitem__)
    from dattri_core import Rows

    return Rows(chain.source.space, blocks, torch.arange(len(batch[1])))


def raw_rows(chain, batch, role="train"):
    """Return flat rows as the source gives them, before a sketch that it takes by itself."""
    blocks = {}
    chain.source.source.stream(batch, role, blocks.__setitem__)
    return torch.cat([blocks[name].flat() for name in chain.source.source.space.names], dim=1)


def sketch_matrix(space, size=5, seed=3, role="projector"):
    stream = RandomStream(seed, role, 0)
    return FlatSketch(size).build(space, stream=stream, device=torch.device("cpu")).matrix


def solve(gram, rows):
    damped = gram + DAMPING * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(damped, rows.T).T


def test_no_stage_leaves_rows_as_they_are():
    chain, _, train, test = fitted([])
    rows, queries = in_space(chain, train), in_space(chain, test)
    assert torch.equal(chain.train(rows).flat(), rows.flat())
    assert torch.equal(chain.test(queries).flat(), queries.flat())
    assert chain.blockwise
    assert chain.space == chain.source.space


def test_a_projector_acts_on_both_sides_and_an_inverse_on_the_test_side():
    """P then H: <P g, (P C P^T + damping)^-1 P h> with C the Gram of all train rows."""
    chain, _, train, test = fitted([FlatSketch(), inverse(Gram(), DAMPING)])
    g, h = raw_rows(chain, train), raw_rows(chain, test)
    p = sketch_matrix(chain.source.source.space)
    gram = p @ (g.T @ g / len(g)) @ p.T
    assert (chain.train(in_space(chain, train)).flat() - g @ p.T).abs().max() < 1e-12
    got = chain.test(in_space(chain, test)).flat()
    assert (got - solve(gram, h @ p.T)).abs().max() < 1e-10
    assert chain.space.dim == chain.source.space.dim == 5


def test_the_inverse_before_the_projector_sees_whole_rows():
    """H then P: <P g, P (C + damping)^-1 h>."""
    chain, _, train, test = fitted([inverse(Gram(), DAMPING), FlatSketch()])
    g, h = in_space(chain, train).flat(), in_space(chain, test).flat()
    p = sketch_matrix(chain.source.space)
    assert (chain.train(in_space(chain, train)).flat() - g @ p.T).abs().max() < 1e-12
    got = chain.test(in_space(chain, test)).flat()
    assert (got - solve(g.T @ g / len(g), h) @ p.T).abs().max() < 1e-10


def test_two_inverses_and_two_projectors_compose_in_their_order():
    stages = [inverse(Gram(), DAMPING), FlatSketch(9), FlatSketch(5), inverse(Gram(), DAMPING)]
    chain, _, train, test = fitted(stages)
    g, h = in_space(chain, train).flat(), in_space(chain, test).flat()
    first = sketch_matrix(chain.source.space, 9)
    second = sketch_matrix(FlatSketch(9).out_space(chain.source.space), 5, role="projector 1")
    p = second @ first
    got = chain.test(in_space(chain, test)).flat()
    want = solve(p @ (g.T @ g / len(g)) @ p.T, solve(g.T @ g / len(g), h) @ p.T)
    assert (got - want).abs().max() < 1e-9 * want.abs().max()
    assert len(chain.maps) == len(chain.inverses) == 2


@pytest.mark.parametrize("after_sketch", [False, True])
def test_another_damping_is_a_chain_that_shares_the_fit(after_sketch):
    hessian = HessianColumns()
    stages = [FlatSketch()] * after_sketch + [inverse(hessian, 1.0)]
    chain, _, _, test = fitted(stages)
    fresh, *_ = fitted([FlatSketch()] * after_sketch + [inverse(HessianColumns(), 0.1)])
    from dattri_core import Damping

    changed = chain.with_damping([None] * after_sketch + [Damping(0.1)])
    queries = in_space(chain, test)
    assert torch.equal(changed.test(queries).flat(), fresh.test(queries).flat())
    assert hessian.counts["fit"] == 1
    assert not torch.equal(changed.test(queries).flat(), chain.test(queries).flat())


# --- checking without a tensor ------------------------------------------------------------------
def test_the_space_at_the_end_of_a_chain_is_known_without_a_tensor():
    space = example_space()
    assert check_stages([], space) == space
    assert check_stages([inverse(Gram())], space) == space
    assert check_stages([inverse(Gram()), FlatSketch(7)], space).dim == 7
    assert {block.kind for block in space} == {"outer", "dense"}


def test_a_method_checks_against_a_space_that_it_is_given():
    task, *_ = world()
    space = build_part("source", "per-example").bind(task, task.checkpoints[0], world()[1]).space
    Method(projector=FlatSketch()).check(space)


def test_a_solver_without_its_operator_is_refused():
    from oracles.toy_parts import SpectralSolve

    from dattri_core import CurvatureInverse

    with pytest.raises(SpecError, match=r"it gives \['apply', 'dense'\]"):
        check_stages([CurvatureInverse(Gram(), SpectralSolve())], example_space())
