"""Parts that only spell: they answer the protocols and compute nothing."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from attrs import field, frozen

from dattri_core import capabilities, protocols, source_capabilities
from dattri_core.protocols import Damping, Fold, Projector, Solver
from dattri_core.registry import Registry


def as_damping(value: float | Damping) -> Damping:
    return value if isinstance(value, Damping) else Damping(float(value))


def members(module: Any) -> set[str]:
    """Return the names that the protocols of a module ask for."""
    own = (c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__)
    return {name for c in own for name in vars(c) if not name.startswith("_")}


BESIDES = (members(capabilities) | members(source_capabilities)) - members(protocols)


class Silent:
    """Answers every function of a part's own protocol with None, and nothing besides."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in BESIDES:
            raise AttributeError(name)
        return lambda *args, **kwargs: None


@frozen
class FakeSource(Silent):
    provides: ClassVar[frozenset[str]] = frozenset({"label"})


@frozen
class FakeIdentity(Silent):
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})
    needs: ClassVar[frozenset[str]] = frozenset()

    def out_space(self, space: Any) -> Any:
        return space

    def check(self, space: Any) -> None: ...

    def fit(self, problem: Any) -> Any: ...

    def build(self, space: Any, *, stream: Any, device: Any) -> Any: ...


@frozen
class FakeSketch:
    rank: int = 8
    seed: int = 0
    shape: tuple[int, ...] = ()
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space: Any) -> Any:
        return space

    def build(self, space: Any, *, stream: Any, device: Any) -> Any: ...


@frozen
class FakeSeries:
    """Sketches in a row: a part made of a tuple of parts."""

    parts: tuple[Projector, ...]
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space: Any) -> Any:
        return space

    def build(self, space: Any, *, stream: Any, device: Any) -> Any: ...


@frozen
class FakePair:
    """Two sketches: a part made of parts of its own kind."""

    first: Projector
    second: Projector
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space: Any) -> Any:
        return space

    def build(self, space: Any, *, stream: Any, device: Any) -> Any: ...


@frozen
class FakeInverse:
    damping: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, space: Any) -> None: ...

    def fit(self, problem: Any) -> Any: ...


@frozen
class FakeCurvature(Silent):
    samples: int = 1
    seed: int = 0
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def needs_for(self, asked: frozenset[str]) -> frozenset[str]:
        return self.needs

    def gives(self, space: Any) -> frozenset[str]:
        return frozenset({"apply"})


@frozen
class FakeSolver(Silent):
    damping: Damping = field(default=1e-3, converter=as_damping)
    iterations: int = 10
    tolerance: float | None = 1e-6
    seed: int = 0
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"apply"})


@frozen
class FakeExplicit(Silent):
    damping: Damping = field(default=1e-2, converter=as_damping)
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"apply"})


@frozen
class FakeScorer(Silent):
    power: float = 1.0
    label: str = ""
    mode: Literal["a", "b"] = "a"
    weights: tuple[float, ...] = ()
    flag: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()
    locality: ClassVar[Literal["tile", "column"]] = "tile"


@frozen
class FakeFold(Silent):
    inner: Fold | None = None
    order: ClassVar[Literal["forward", "reverse"]] = "forward"
    needs: ClassVar[frozenset[str]] = frozenset()


@frozen
class FakeAttributor:
    seed: int = 0
    solver: Solver = field(factory=FakeSolver)

    def attribute(self, task: Any, train: Any, test: Any, **settings: Any) -> Any: ...


@frozen
class Unregistered(Silent):
    power: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset()
    locality: ClassVar[Literal["tile", "column"]] = "tile"


def fake_registry() -> Registry:
    """Return a registry of these parts under the built-in names, without discovery."""
    registry = Registry()
    named = {
        ("source", "per-example"): "FakeSource",
        ("projector", "identity"): "FakeIdentity",
        ("projector", "sketch"): "FakeSketch",
        ("projector", "pair"): "FakePair",
        ("projector", "series"): "FakeSeries",
        ("inverse_hessian", "identity"): "FakeInverseIdentity",
        ("inverse_hessian", "damped"): "FakeInverse",
        ("curvature", "hessian"): "FakeCurvature",
        ("solver", "cg"): "FakeSolver",
        ("solver", "cholesky"): "FakeExplicit",
        ("scorer", "dot"): "FakeScorer",
        ("fold", "mean"): "FakeFold",
        ("attributor", "random"): "FakeAttributor",
    }
    for (kind, name), target in named.items():
        registry.part(kind, name, f"{__name__}:{target}")
    registry.part("inverse_hessian", "composed", "dattri_core.stages:CurvatureInverse")
    spec = {"inverse_hessian": {"curvature": "hessian", "solver": {"name": "cg", "damping": 0.5}}}
    registry.method("if-cg", spec, summary="s", formula="f", citation="c")
    stages = [{"inverse_hessian": spec["inverse_hessian"]}, {"projector": "sketch"}]
    registry.method("staged", {"stages": stages}, summary="s", formula="f", citation="c")
    registry.method("random", {"attributor": "random"}, summary="s", formula="f", citation="c")
    return registry


@frozen
class FakeInverseIdentity:
    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, space: Any) -> None: ...

    def fit(self, problem: Any) -> Any: ...
