"""What parts declare in fixed words is refused when it is misspelt, before anything is computed."""

import pytest
from attrs import frozen
from oracles.toy_tasks import examples, mlp

import dattri_core as dattri
from dattri_core import Scored, SpecError
from dattri_core.words import WORDS


@frozen
class Pairing:
    """A scorer of inner products."""

    locality: str = "tile"
    kind: str = ""
    needs = frozenset()

    def pair(self, train, test):
        return train.inner(test)

    def finish(self, total, train, test):
        if self.kind == "tensor":
            return total
        if self.kind == "row":
            return Scored(total[:1])
        if self.kind == "weight":
            return Scored(total, total[:, 0][:1])
        if self.kind == "norm":
            return Scored(total / train.norm[:, None])
        if self.kind == "aux":
            return Scored(total * train.aux["residual"][:, None])
        if self.kind == "wrong":
            return Scored(total + "one")
        return Scored(total)


@frozen
class Adding:
    """A fold that adds up."""

    order: str = "forward"
    needs: frozenset = frozenset()
    kind: str = ""

    def update(self, state, scored, snapshot):
        if self.kind == "tensor":
            return scored.values
        if self.kind == "scored":
            return {"sum": scored}
        return {"sum": scored.values if state is None else state["sum"] + scored.values}

    def finish(self, state):
        return state["sum"][:1] if self.kind == "row" else state["sum"]


@frozen
class Projecting:
    """A projector that is never built."""

    gives: frozenset = frozenset({"adjoints"})

    def out_space(self, space):
        return space

    def build(self, space, *, stream, device):
        raise AssertionError


@frozen
class Bending:
    """A curvature that is never fitted."""

    needs: frozenset = frozenset({"row"})
    exact = True

    def gives(self, space):
        return frozenset({"apply"})

    def fit(self, problem):
        raise AssertionError


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"scorer": Pairing("columns")}, "scorer Pairing: its locality says 'columns'; did you"),
        ({"fold": Adding("backward")}, "fold Adding: its order says 'backward'"),
        ({"fold": Adding(needs=frozenset({"learning_rate"}))}, "did you mean 'learning-rate'"),
        ({"fold": Adding(needs=None)}, "fold Adding: its needs is None; give of learning-rate"),
        ({"projector": Projecting()}, "projector Projecting: its gives says 'adjoints'"),
        (
            {"inverse_hessian": {"curvature": Bending(), "solver": "cg"}},
            "curvature Bending: its needs says 'row'; did you mean 'rows'",
        ),
    ],
)
def test_a_misspelt_word_is_refused_when_the_method_is_made(slots, message):
    with pytest.raises(SpecError, match=message):
        dattri.Method(**slots)


def test_every_built_in_part_is_spelled_right():
    registry = dattri.default_registry()
    kinds = {key.partition(".")[0] for key in WORDS}
    parts = {"source", "scorer", "fold", "projector", "curvature", "solver", "inverse_hessian"}
    assert parts == kinds
    for kind in sorted(kinds - {"inverse_hessian"}):
        assert registry.names(kind)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"scorer": Pairing(kind="tensor")}, "finish gives a Tensor, expected dattri_core.Scored"),
        ({"scorer": Pairing(kind="row")}, r"finish gives \[1, 3\], expected \[7, 3\]"),
        ({"scorer": Pairing(kind="weight")}, r"finish, weight gives \[1\], expected \[7\]"),
        ({"fold": Adding(kind="row")}, r"fold 'Adding': finish gives \[1, 3\], expected \[7, 3\]"),
    ],
)
def test_scores_of_another_shape_are_refused_not_spread(slots, message):
    with pytest.raises(SpecError, match=message):
        dattri.Method(**slots).attribute(dattri.Task(mlp()), examples(7), examples(3, seed=9))


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"scorer": Pairing(kind="norm")}, r"finish fails .*it needs \[\]: .*norm.* needs ="),
        ({"scorer": Pairing(kind="aux")}, r"finish fails \(KeyError: 'residual'\).*aux has"),
        ({"fold": Adding(kind="tensor")}, "fold 'Adding': update gives a Tensor, expected tensors"),
        ({"fold": Adding(kind="scored")}, "update gives a dict that holds a Scored"),
    ],
)
def test_what_is_read_without_being_asked_for_or_is_no_state_is_named(slots, message):
    method = dattri.Method(**slots)
    with pytest.raises(SpecError, match=message):
        method.attribute(dattri.Task(mlp()), examples(7), examples(3, seed=9))
    with pytest.raises(SpecError, match=message):
        method.fit(dattri.Task(mlp()), examples(7)).self_influence()


def test_an_error_of_the_scorer_itself_is_left_as_it_is():
    with pytest.raises(TypeError, match="str"):
        dattri.Method(scorer=Pairing(kind="wrong")).attribute(
            dattri.Task(mlp()), examples(7), examples(3, seed=9)
        )
