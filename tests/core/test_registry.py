"""The registry: names until used, fields checked by annotation, clashes named."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import ClassVar, Literal

import pytest
from attrs import field, frozen

from dattri_core import PluginError, SpecError
from dattri_core.discovery import Origin
from dattri_core.registry import Registry, default_registry, using

HERE = __name__


@frozen
class Nested:
    value: float
    relative: bool = False


def as_nested(value: float | Nested) -> Nested:
    if isinstance(value, Nested):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("a damping is a number")
    return Nested(float(value))


def positive(instance: object, attribute: object, value: int) -> None:
    if value < 1:
        raise ValueError(f"steps is {value}, expected 1 or more")


@frozen
class Part:
    steps: int = field(default=1, validator=positive)
    rate: float = 0.5
    flag: bool = False
    mode: Literal["fast", "exact"] = "fast"
    level: Literal[1, 2] = 1
    label: str | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "a")
    either: int | float = 0
    nested: Nested = Nested(1.0)
    damping: Nested = field(default=1e-3, converter=as_nested)
    gives: ClassVar[frozenset[str]] = frozenset()


@frozen
class Demanding:
    rank: int


class NotAttrs:
    pass


preset = Part(steps=7)
bare = NotAttrs()


def make_registry() -> Registry:
    registry = Registry()
    registry.part("scorer", "part", f"{HERE}:Part")
    registry.part("scorer", "other", f"{HERE}:Demanding")
    registry.part("fold", "part", f"{HERE}:Demanding")
    registry.part("metric", "preset", f"{HERE}:preset")
    registry.part("metric", "bare", f"{HERE}:bare")
    registry.part("fold", "plain", f"{HERE}:NotAttrs")
    registry.part("fold", "absent", f"{HERE}:Absent")
    registry.part("fold", "nowhere", "no_such_module_anywhere:Absent")
    return registry


def test_names_are_text_until_they_are_used() -> None:
    registry = Registry()
    registry.part("scorer", "lazy", "this.module.does.not.exist:Scorer")
    assert registry.names("scorer") == ["lazy"]
    assert "this" not in sys.modules
    with pytest.raises(PluginError, match=r"this\.module.*cannot be imported.*ModuleNotFoundError"):
        registry.make("scorer", "lazy")


def test_make_builds_the_named_class_of_the_named_kind() -> None:
    registry = make_registry()
    assert registry.make("scorer", "part", steps=3) == Part(steps=3)
    assert registry.make("fold", "part", rank=2) == Demanding(2)
    assert registry.make("metric", "preset") is preset
    assert registry.resolve("scorer", "part") is Part


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(
        SpecError, match=r"no scorer 'prat'; did you mean 'part'\? valid: other, pa"
    ):
        make_registry().make("scorer", "prat")


def test_misspelt_field_lists_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"scorer 'part': no field 'stepz'; did you mean 'steps'"):
        make_registry().make("scorer", "part", stepz=1)
    with pytest.raises(SpecError, match="takes no fields, got 'steps'"):
        make_registry().make("metric", "bare", steps=1)


def test_fields_of_a_value_are_changed_and_checked_like_those_of_a_class() -> None:
    registry = make_registry()
    assert registry.make("metric", "preset", rate=0.25, damping=2) == Part(
        steps=7, rate=0.25, damping=Nested(2.0)
    )
    assert preset == Part(steps=7)
    for given, message in (
        ({"stepz": 1}, "metric 'preset': no field 'stepz'; did you mean 'steps'"),
        ({"steps": "2"}, "field 'steps' got '2' .str., expected int"),
        ({"steps": 0}, "metric 'preset': steps is 0, expected 1 or more"),
    ):
        with pytest.raises(SpecError, match=message):
            registry.make("metric", "preset", **given)


def test_missing_field_is_named() -> None:
    with pytest.raises(SpecError, match="scorer 'other': needs a value for 'rank'"):
        make_registry().make("scorer", "other")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 2.0, "int"),
        ("steps", True, "int"),
        ("steps", "2", "int"),
        ("steps", None, "int"),
        ("rate", "0.1", "float"),
        ("rate", True, "float"),
        ("flag", 1, "bool"),
        ("mode", "slow", "one of 'fast', 'exact'"),
        ("level", True, "one of 1, 2"),
        ("label", 3, "str or None"),
        ("sizes", [1, "2"], "tuple"),
        ("sizes", 3, "tuple"),
        ("pair", [1], "tuple"),
        ("pair", ["a", 1], "tuple"),
        ("either", "x", "int or float"),
        ("nested", 3, "Nested"),
        ("damping", "much", "Nested or what converts to it"),
    ],
)
def test_wrong_type_names_part_field_got_and_expected(
    name: str, value: object, expected: str
) -> None:
    with pytest.raises(SpecError) as caught:
        make_registry().make("scorer", "part", **{name: value})
    message = str(caught.value)
    assert f"scorer 'part': field {name!r} got {value!r}" in message
    assert f"expected {expected}" in message


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("rate", 1, 1.0),
        ("label", None, None),
        ("label", "x", "x"),
        ("mode", "exact", "exact"),
        ("sizes", [1, 2], (1, 2)),
        ("pair", [1, "b"], (1, "b")),
        ("either", 1, 1),
        ("either", 1.5, 1.5),
        ("nested", {"value": 2}, Nested(2.0)),
        ("damping", 0.25, Nested(0.25)),
        ("damping", {"value": 2.0, "relative": True}, Nested(2.0, True)),
    ],
)
def test_right_type_is_taken_as_the_annotation_says(
    name: str, value: object, stored: object
) -> None:
    got = getattr(make_registry().make("scorer", "part", **{name: value}), name)
    assert got == stored
    assert type(got) is type(stored)


def test_refusals_of_the_class_become_spec_errors_that_name_the_part() -> None:
    with pytest.raises(SpecError, match=r"scorer 'part': steps is 0, expected 1 or more"):
        make_registry().make("scorer", "part", steps=0)
    with pytest.raises(SpecError, match="Nested: no field 'valu'; did you mean 'value'"):
        make_registry().make("scorer", "part", nested={"valu": 1.0})


def test_spec_of_holds_the_changed_fields_only_and_makes_the_same_part() -> None:
    registry = make_registry()
    assert registry.spec_of(Part()) == {"name": "part"}
    part = Part(steps=3, sizes=(1, 2), damping=Nested(0.1, True), nested=Nested(2.0))
    spec = registry.spec_of(part)
    assert spec == {
        "name": "part",
        "steps": 3,
        "sizes": [1, 2],
        "nested": {"value": 2.0},
        "damping": {"value": 0.1, "relative": True},
    }
    assert registry.make("scorer", spec.pop("name"), **spec) == part
    # A lone entry that the converter takes back is written as such.
    assert registry.spec_of(Part(damping=Nested(0.1))) == {"name": "part", "damping": 0.1}


def test_spec_of_refuses_what_is_not_registered() -> None:
    with pytest.raises(SpecError, match=rf"registry\.part\(kind, name, '{HERE}:Nested'\)"):
        make_registry().spec_of(Nested(1.0))


def test_a_target_must_be_there_and_be_an_attrs_class() -> None:
    registry = make_registry()
    with pytest.raises(PluginError, match="NotAttrs is no attrs class"):
        registry.make("fold", "plain")
    with pytest.raises(PluginError, match=rf"{HERE}:Absent.*cannot be imported.*AttributeError"):
        registry.make("fold", "absent")
    with pytest.raises(PluginError, match="no_such_module_anywhere"):
        registry.make("fold", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scorrer", "a", "m:A"), "did you mean 'scorer'"),
        (("scorer", "a", "m.A"), "not 'module:attr'"),
        (("scorer", "a", Part), "not 'module:attr'"),
        (("scorer", "a b", "m:A"), "a name is letters"),
        (("scorer", "part", "m:A"), "'part' is registered twice"),
    ],
)
def test_register_refuses_malformed_entries(arguments: tuple[str, str, str], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        make_registry().part(*arguments)


def test_a_clash_names_both_distributions_and_leaves_other_names_alone() -> None:
    def owned(distribution: str, *names: str) -> Registry:
        own = Registry(Origin(f"plugin_{distribution}", distribution, "1.0"))
        for name in names:
            own.part("scorer", name, f"{HERE}:Part")
        own.method("m", {"scorer": "x"}, summary="s", formula="f", citation="c")
        return own

    registry = Registry()
    registry.merge(owned("first-dist", "both", "mine"))
    registry.merge(owned("second-dist", "both", "yours"))
    assert registry.make("scorer", "mine") == registry.make("scorer", "yours") == Part()
    for use in (lambda: registry.make("scorer", "both"), lambda: registry.recipe("m")):
        with pytest.raises(PluginError) as caught:
            use()
        for word in ("first-dist 1.0", "second-dist 1.0", "DATTRI_PLUGINS=-plugin_second-dist"):
            assert word in str(caught.value)
    assert len(registry.clashes) == 2


def test_recipes_are_copied_so_that_a_plugin_cannot_change_them_later() -> None:
    registry, spec = Registry(), {"scorer": {"name": "part", "steps": 1}}
    registry.method("m", spec, summary="s", formula="f", citation="c")
    spec["scorer"]["steps"] = 2
    assert registry.recipe("m").spec == {"scorer": {"name": "part", "steps": 1}}
    with pytest.raises(PluginError, match="expected a mapping"):
        registry.method("n", ["dot"], summary="", formula="", citation="")


def test_using_replaces_the_default_registry_for_the_block_only() -> None:
    before = default_registry()
    with using(Registry()) as private:
        assert default_registry() is private
        assert default_registry().names("method") == []
    assert default_registry() is before


def test_every_built_in_target_exists_and_answers_its_name() -> None:
    registry = default_registry()
    assert registry.problems == ()
    assert registry.clashes == ()
    for entry in registry.entries():
        assert entry.origin.distribution
        assert entry.origin.version
        if entry.kind == "method":
            continue
        # Some rules serve optional dependencies: their class exists, the module they serve may not.
        assert registry.resolve(entry.kind, entry.name) is not None
        assert entry.summary, f"{entry.kind} {entry.name} has no summary"


def test_every_built_in_method_is_documented_and_assembles() -> None:
    spec = importlib.import_module("dattri_core.spec")
    for recipe in default_registry().recipes():
        assert min(map(len, (recipe.summary, recipe.formula, recipe.citation))) > 5
        assert hasattr(spec.method_of(recipe.name), "attribute")


def test_the_registry_and_its_names_import_no_torch() -> None:
    code = (
        "import sys, dattri_core as d; r = d.default_registry(); d.hookimpl, d.SpecError;"
        "assert r.names('method') and r.names('scorer');"
        "heavy = {'torch', 'numpy', 'scipy', 'safetensors'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_part_is_called_follows_what_is_named_and_merged_later() -> None:
    registry = Registry()
    assert registry.name_of(Part()) is None
    registry.part("scorer", "part", f"{HERE}:Part")
    assert registry.name_of(Part()) == registry.name_of(Part) == ("scorer", "part")
    registry.part("projector", "earlier", f"{HERE}:Part")  # the first name counts
    assert registry.name_of(Part()) == ("projector", "earlier")
    other = Registry()
    other.part("solver", "demanding", f"{HERE}:Demanding")
    assert registry.name_of(Demanding(1)) is None
    registry.merge(other)
    assert registry.name_of(Demanding(1)) == ("solver", "demanding")


def test_without_any_plugin_the_message_says_what_is_not_installed() -> None:
    with pytest.raises(SpecError, match=r"no scorer 'dot'.*not installed; pip install it"):
        Registry().resolve("scorer", "dot")
