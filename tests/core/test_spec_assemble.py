"""Assembling: names and mappings to parts, extra keys and overrides to the one field meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import part_fakes as fakes
import pytest

from dattri_core import Damping, SpecError, assemble
from dattri_core.registry import using
from dattri_core.stages import CurvatureInverse


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    with using(fakes.fake_registry()):
        yield


def test_a_part_is_a_name_a_mapping_or_itself() -> None:
    part = fakes.FakeSketch(rank=3)
    assert assemble.build_part("projector", "sketch") == fakes.FakeSketch()
    assert assemble.build_part("projector", {"name": "sketch", "rank": 3}) == part
    assert assemble.build_part("projector", part) is part


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("scorer", "dott", "no scorer 'dott'; did you mean 'dot'"),
        (
            "scorer",
            {"name": "dot", "pwer": 1},
            "scorer 'dot': no field 'pwer'; did you mean 'power'",
        ),
        ("scorer", {"power": 1}, "has no name"),
        ("scorer", {"name": 3}, "has no name"),
        ("scorer", 3, r"got 3 \(int\), which has no finish, locality, needs, pair"),
        ("scorer", None, "got None"),
        ("scorer", fakes.FakeScorer, r"got the class FakeScorer.*call it"),
        ("scorer", {"unregistered": "m:Mine"}, "'m:Mine', not registered when it was written"),
        ("inverse_hessian", {"curvature": "hessian"}, "needs a value for 'solver'"),
        ("inverse_hessian", {"curvature": "hesian", "solver": "cg"}, "did you mean 'hessian'"),
    ],
)
def test_what_is_no_part_is_refused(kind: str, value: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        assemble.build_part(kind, value)


def test_curvature_and_solver_make_an_inverse_hessian_without_a_name() -> None:
    made = assemble.build_inverse_hessian({"curvature": "hessian", "solver": "cg"})
    assert made == CurvatureInverse(fakes.FakeCurvature(), fakes.FakeSolver())
    assert assemble.describe_part(made) == {"curvature": "hessian", "solver": "cg"}


def test_extra_keys_go_to_the_one_part_that_has_the_field() -> None:
    made = assemble.build_inverse_hessian(
        {"curvature": {"name": "hessian", "seed": 4}, "solver": "cg", "damping": 0.1, "samples": 3}
    )
    assert made == CurvatureInverse(
        fakes.FakeCurvature(samples=3, seed=4), fakes.FakeSolver(damping=0.1)
    )


def test_an_extra_key_that_two_parts_have_lists_the_dotted_spellings() -> None:
    spec = {"curvature": "hessian", "solver": "cg", "seed": 1}
    with pytest.raises(SpecError) as caught:
        assemble.build_inverse_hessian(spec)
    assert "'curvature.seed', 'solver.seed'" in str(caught.value)
    dotted = assemble.build_inverse_hessian(
        {"curvature": "hessian", "solver": "cg", "solver.seed": 1}
    )
    assert dotted == CurvatureInverse(fakes.FakeCurvature(), fakes.FakeSolver(seed=1))


def test_an_unknown_extra_key_lists_the_valid_ones() -> None:
    with pytest.raises(SpecError) as caught:
        assemble.build_inverse_hessian({"curvature": "hessian", "solver": "cg", "dampign": 1})
    message = str(caught.value)
    assert "did you mean 'damping'" in message
    assert "solver.damping" in message
    assert "curvature.samples" in message


def test_stages_are_spelled_in_any_order() -> None:
    inverse = {"curvature": "hessian", "solver": "cg"}
    made = assemble.build_stages([{"inverse_hessian": inverse}, {"projector": "sketch"}])
    assert [type(stage) for stage in made] == [CurvatureInverse, fakes.FakeSketch]
    assert assemble.build_stages(made) == made
    for wrong in (
        "sketch",
        {"projector": "sketch"},
        ["sketch"],
        [{"projector": "sketch", "inverse_hessian": inverse}],
        [{"scorer": "dot"}],
        [3],
    ):
        with pytest.raises(SpecError, match="stages"):
            assemble.build_stages(wrong)


def overridden(name: str, **overrides: Any) -> dict[str, Any]:
    return assemble.method_spec(name, overrides)


def test_a_recipe_fills_the_slots_that_it_leaves_out() -> None:
    parts = overridden("if-cg")
    assert set(parts) == set(assemble.SLOTS)
    assert parts["inverse_hessian"].solver == fakes.FakeSolver(damping=0.5)
    assert (parts["scorer"], parts["seed"]) == (fakes.FakeScorer(), 0)


def test_overrides_replace_slots_then_inner_parts_then_fields() -> None:
    assert overridden("if-cg", projector="sketch")["projector"] == fakes.FakeSketch()
    assert overridden("if-cg", damping=1)["inverse_hessian"].solver.damping == Damping(1.0)
    # "damping" is the new solver's, whichever comes first in the call.
    for keys in ({"damping": 2.0, "solver": "cholesky"}, {"solver": "cholesky", "damping": 2.0}):
        made = overridden("if-cg", **keys)["inverse_hessian"]
        assert made == CurvatureInverse(fakes.FakeCurvature(), fakes.FakeExplicit(damping=2.0))
    sketched = overridden("if-cg", rank=3, projector="sketch", samples=5)
    assert sketched["projector"].rank == 3
    assert sketched["inverse_hessian"].curvature.samples == 5
    # What is not named stays as the recipe has it.
    assert sketched["inverse_hessian"].solver == fakes.FakeSolver(damping=0.5)


def test_a_whole_slot_name_wins_over_a_field_of_the_same_name() -> None:
    assert overridden("if-cg", seed=3)["seed"] == 3
    assert overridden("if-cg", **{"solver.seed": 3})["inverse_hessian"].solver.seed == 3


def test_dotted_overrides_name_as_much_of_the_path_as_is_needed() -> None:
    pair = {"name": "pair", "first": "sketch", "second": "sketch"}
    with pytest.raises(SpecError) as caught:
        overridden("if-cg", projector=pair, rank=2)
    assert "'projector.first.rank', 'projector.second.rank'" in str(caught.value)
    for key in ("second.rank", "projector.second.rank"):
        made = overridden("if-cg", projector=pair, **{key: 2})["projector"]
        assert made == fakes.FakePair(fakes.FakeSketch(), fakes.FakeSketch(rank=2))


def test_a_tuple_of_parts_is_spelled_as_a_list_and_its_parts_take_overrides() -> None:
    first, second = fakes.FakeSketch(), fakes.FakeSketch(rank=2)
    spec = {"name": "series", "parts": ["sketch", {"name": "sketch", "rank": 2}]}
    made = assemble.build_part("projector", spec)
    assert made == fakes.FakeSeries((first, second))
    assert assemble.describe_part(made) == spec
    assert assemble.build_part("projector", {"name": "series", "parts": (first, second)}) == made
    nested = {"name": "series", "parts": [spec, "sketch"]}
    assert assemble.build_part("projector", nested) == fakes.FakeSeries((made, first))
    for key in ("parts.1.rank", "projector.parts.1.rank"):
        changed = overridden("if-cg", projector=spec, **{key: 5})["projector"]
        assert changed == fakes.FakeSeries((first, fakes.FakeSketch(rank=5)))
    with pytest.raises(SpecError) as caught:
        overridden("if-cg", projector=spec, rank=5)
    assert "'projector.parts.0.rank', 'projector.parts.1.rank'" in str(caught.value)
    alone = {"name": "series", "parts": ["sketch"], "rank": 5}
    assert assemble.build_part("projector", alone).parts == (fakes.FakeSketch(rank=5),)
    replaced = overridden("if-cg", projector=spec, rank=5, parts=["sketch"])["projector"]
    assert replaced.parts == (fakes.FakeSketch(rank=5),)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("sketch", r"field 'parts' got 'sketch' \(str\), expected list of Projector"),
        (["skech"], "no projector 'skech'; did you mean 'sketch'"),
        ([{"name": "sketch", "rnk": 1}], "no field 'rnk'; did you mean 'rank'"),
        ([3], r"projector: got 3 \(int\), which has no"),
    ],
)
def test_what_is_no_tuple_of_parts_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        assemble.build_part("projector", {"name": "series", "parts": parts})


def test_fields_of_spelled_stages_are_overridden_too() -> None:
    made = overridden("staged", damping=0.25, rank=2)["stages"]
    assert made[0].solver == fakes.FakeSolver(damping=0.25)
    assert made[1] == fakes.FakeSketch(rank=2)
    with pytest.raises(SpecError, match=r"no slot 'projector', since it spells its stages"):
        overridden("staged", projector="sketch")


def test_stages_replace_both_slots_of_a_recipe() -> None:
    made = overridden("if-cg", stages=[{"projector": "sketch"}])
    assert made["stages"] == (fakes.FakeSketch(),)
    assert not {"projector", "inverse_hessian"} & set(made)


def test_attributors_take_overrides_of_their_fields_only() -> None:
    made = overridden("random", **{"attributor.seed": 3, "damping": 0.1})["attributor"]
    assert made == fakes.FakeAttributor(seed=3, solver=fakes.FakeSolver(damping=0.1))
    with pytest.raises(SpecError, match=r"'attributor\.seed', 'attributor\.solver\.seed'"):
        overridden("random", seed=3)
    with pytest.raises(SpecError, match="is not made of parts and has no slot 'scorer'"):
        overridden("random", scorer="dot")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dampign": 1.0}, "did you mean 'damping'"),
        ({"scorrer": "dot"}, "did you mean 'scorer'"),
        ({"damping": "much"}, "damping"),
        ({"iterations": 1.5}, r"part 'cg': field 'iterations' got 1.5 \(float\), expected int"),
        ({"solver": "gc"}, "no solver 'gc'; did you mean 'cg'"),
        ({"seed": "one"}, r"seed got 'one' \(str\), expected int"),
        ({"seed": True}, r"seed got True \(bool\), expected int"),
        ({"scorer": None}, "scorer: got None"),
    ],
)
def test_overrides_that_fit_nothing_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        overridden("if-cg", **overrides)


def test_unknown_method_and_slot_offer_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"no method 'if-gc'; did you mean 'if-cg'"):
        overridden("if-gc")
    with pytest.raises(SpecError, match=r"no slot 'scorrer'; did you mean 'scorer'"):
        assemble.build_slots({"scorrer": "dot"})


def test_descriptions_name_parts_that_nobody_registered_and_refuse_to_read_them_back() -> None:
    data = assemble.describe_part(fakes.Unregistered(power=2.0))
    assert data == {"unregistered": "part_fakes:Unregistered", "power": 2.0}
    with pytest.raises(SpecError, match="not registered when it was written"):
        assemble.build_part("scorer", data)
    # An override of a method that holds such a part keeps the part.
    slots = assemble.build_slots({"scorer": fakes.Unregistered(power=2.0)})
    assert assemble.override(slots, {"power": 3.0})["scorer"] == fakes.Unregistered(power=3.0)


def test_who_provides_lists_the_parts_that_do() -> None:
    assert assemble.who_provides("source", {"label"}) == "these do: per-example"
    assert assemble.who_provides("source", {"residual"}) == "no registered source does"


def test_method_has_the_defaults_that_specs_are_filled_with() -> None:
    from dattri_core.methods import Method

    defaults = {a.name: a.default for a in attrs.fields(Method)}
    assert {slot: defaults[slot] for slot in assemble.DEFAULTS} == assemble.DEFAULTS
    assert set(defaults) == set(assemble.SLOTS)
