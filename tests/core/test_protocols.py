"""Protocols are structural: what ships answers its own, and what lacks one member does not."""

from __future__ import annotations

import types
from typing import Any, ClassVar

import pytest
import torch
from attrs import field, frozen
from torch import nn

import dattri_core as dattri
from dattri_core import capabilities, protocols, source_capabilities
from dattri_core.assemble import build_part
from dattri_core.stages import TwoSided

KINDS = {
    "source": protocols.Source,
    "projector": protocols.Projector,
    "inverse_hessian": protocols.InverseHessian,
    "curvature": protocols.Curvature,
    "solver": protocols.Solver,
    "scorer": protocols.Scorer,
    "fold": protocols.Fold,
    "attributor": protocols.Attributor,
}


def members(protocol: Any) -> list[str]:
    own = {name for base in protocol.__mro__ for name in vars(base) if base is not object}
    return sorted(n for n in own if not n.startswith("_"))


@frozen
class Recording:
    """The Hessian; keeps the problem that it was fitted on and the operator that it gave."""

    seen: list[Any] = field(factory=list, eq=False)
    needs: ClassVar[frozenset[str]] = frozenset({"hessian-product"})
    exact: ClassVar[bool] = True

    def gives(self, space: Any) -> frozenset[str]:
        return frozenset({"apply", "dense"})

    def fit(self, problem: Any) -> Any:
        operator = build_part("curvature", "hessian").fit(problem)
        self.seen[:] = [problem, operator]
        return operator


@pytest.fixture(scope="module")
def fitted() -> dict[str, Any]:
    """Everything that parts become in one run, by protocol."""
    torch.manual_seed(0)
    train = (torch.randn(12, 3), torch.randint(2, (12,)))
    task = dattri.Task(nn.Linear(3, 2))
    curvature = Recording()
    method = dattri.Method(inverse_hessian={"curvature": curvature, "solver": "cholesky"})
    method.fit(task, train)
    problem, operator = curvature.seen
    bound = method.source.bind(task, task.checkpoints[0], train)
    stream, device = dattri.RandomStream(0, "test"), torch.device("cpu")
    root = build_part("solver", "cholesky").root_for(operator, device)
    spectral = build_part("curvature", "diagonal").fit(problem)
    return {
        "BoundSource": bound,
        "OutputSource": bound,
        "LinearMap": method.projector.build(bound.space, stream=stream, device=device),
        "Problem": problem,
        "Operator": operator,
        "DenseOperator": operator,
        "Inverse": build_part("solver", "cholesky").solve_for(operator, device),
        "Attributor": method,
        "DataProjector": build_part("projector", "kronecker"),
        "InverseRoot": TwoSided(root, bound.space),
        "RootSolver": build_part("solver", "cholesky"),
        "PreconditionedSolver": build_part("solver", "cg"),
        "ReducingSolver": build_part("solver", "arnoldi"),
        "ReducedInverse": build_part("solver", "arnoldi").solve_for(operator, device),
        "SampledOperator": operator,
        "EachOperator": operator,
        "EachProblem": problem,
        "SpectralOperator": spectral,
        "RowsOperator": build_part("curvature", "gauss-newton").fit(problem),
        "IndexedRows": build_part("curvature", "gauss-newton").fit(problem),
        "ByUse": build_part("curvature", "ggn"),
        "SplitInverse": build_part("solver", "spectral").solve_for(spectral, device),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_registered_parts_answer_the_protocol_of_their_kind(kind: str) -> None:
    registry = dattri.default_registry()
    names = [n for n in registry.names(kind) if n != "composed"]
    assert names
    for name in names:
        spelled = {"name": name, "parts": ["identity"]} if name == "chain" else name
        assert isinstance(build_part(kind, spelled), KINDS[kind]), f"{kind} {name}"


@pytest.mark.parametrize(
    "name",
    [
        "BoundSource",
        "OutputSource",
        "LinearMap",
        "Problem",
        "Operator",
        "DenseOperator",
        "Inverse",
        "Attributor",
        "DataProjector",
        "InverseRoot",
        "RootSolver",
        "PreconditionedSolver",
        "ReducingSolver",
        "ReducedInverse",
        "SampledOperator",
        "EachOperator",
        "EachProblem",
        "SpectralOperator",
        "RowsOperator",
        "IndexedRows",
        "ByUse",
        "SplitInverse",
    ],
)
def test_what_parts_become_answers_its_protocol(name: str, fitted: dict[str, Any]) -> None:
    homes = (protocols, capabilities, source_capabilities)
    module = next(home for home in homes if hasattr(home, name))
    assert isinstance(fitted[name], getattr(module, name))


def test_the_composed_inverse_hessian_is_one() -> None:
    assert isinstance(dattri.method("if-cg").inverse_hessian, protocols.InverseHessian)


def test_an_operator_without_dense_is_no_dense_operator() -> None:
    plain = types.SimpleNamespace(**{n: lambda: None for n in members(protocols.Operator)})
    assert isinstance(plain, protocols.Operator)
    assert not isinstance(plain, protocols.DenseOperator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_lacks_a_member_is_refused_by_the_name_of_the_member(kind: str) -> None:
    wanted = members(KINDS[kind])
    said = {"needs": frozenset(), "gives": frozenset(), "order": "forward", "locality": "tile"}
    whole = types.SimpleNamespace(**{name: said.get(name) for name in wanted})
    assert build_part(kind, whole) is whole
    for lacking in wanted:
        part = types.SimpleNamespace(**{n: said.get(n) for n in wanted if n != lacking})
        with pytest.raises(dattri.SpecError, match=rf"has no {lacking};"):
            build_part(kind, part)


@pytest.mark.parametrize("name", ["ModelProblem", "SharedProblem", "EachProblem"])
def test_a_problem_is_asked_what_it_can_do_without_its_numbers(name: str) -> None:
    """A check reads no property, not even those that it names."""
    protocol = getattr(capabilities, name)
    asked = property(lambda self: pytest.fail("a property was read"))
    shown = dict.fromkeys((*members(protocol), "n_train"), asked)
    shown |= {m: lambda self: None for m in vars(protocol) if callable(vars(protocol)[m])}
    unknown = type("Unknown", (), {**shown, "__init__": object.__init__})
    assert isinstance(unknown(), protocol)
