"""Specs: a method to TOML and JSON and back is the same method; files are never trusted."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import part_fakes as fakes
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dattri_core import Method, SpecError, StoreError, spec
from dattri_core.protocols import Damping
from dattri_core.registry import using
from dattri_core.stages import CurvatureInverse
from dattri_core.toml import read_toml, write_toml


@pytest.fixture(autouse=True, scope="module")
def registry() -> Iterator[None]:
    with using(fakes.fake_registry()):
        yield


FLOAT = st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
INTEGER = st.integers(-(2**62), 2**62)
SKETCH = st.builds(fakes.FakeSketch, INTEGER, INTEGER, st.lists(INTEGER, max_size=3).map(tuple))
PAIR = st.builds(fakes.FakePair, SKETCH, SKETCH)
SERIES = st.builds(fakes.FakeSeries, st.lists(SKETCH | PAIR, max_size=3).map(tuple))
PROJECTOR = st.one_of(st.builds(fakes.FakeIdentity), SKETCH, PAIR, SERIES)
DAMPING = st.builds(Damping, st.floats(0, 1e300), st.booleans())
SOLVER = st.one_of(
    st.builds(fakes.FakeSolver, DAMPING, INTEGER, FLOAT), st.builds(fakes.FakeExplicit, DAMPING)
)
INVERSE = st.one_of(
    st.builds(fakes.FakeInverseIdentity),
    st.builds(fakes.FakeInverse, FLOAT),
    st.builds(CurvatureInverse, st.builds(fakes.FakeCurvature, INTEGER), SOLVER),
)
SCORER = st.builds(
    fakes.FakeScorer,
    power=FLOAT,
    label=TEXT,
    mode=st.sampled_from("ab"),
    weights=st.lists(FLOAT, max_size=3).map(tuple),
    flag=st.booleans(),
)
FOLD = st.builds(fakes.FakeFold, st.one_of(st.none(), st.builds(fakes.FakeFold)))
SLOTTED = st.builds(
    Method, projector=PROJECTOR, inverse_hessian=INVERSE, scorer=SCORER, fold=FOLD, seed=INTEGER
)
STAGED = st.builds(
    Method,
    scorer=SCORER,
    stages=st.lists(st.one_of(SKETCH, st.builds(fakes.FakeInverse, FLOAT)), max_size=3),
)
METHOD = st.one_of(SLOTTED, STAGED, st.builds(fakes.FakeAttributor, INTEGER, SOLVER))


@settings(max_examples=60, deadline=None)
@given(METHOD)
def test_round_trip_is_identity(method: Any) -> None:
    assert spec.from_toml(spec.to_toml(method)) == method
    assert spec.from_json(spec.to_json(method)) == method
    data = spec.spec_of(method)
    assert spec.method_of(data) == method
    # Plain data all the way: what JSON gives back is what went in.
    assert json.loads(json.dumps(data)) == data


VALUE = st.recursive(
    st.one_of(st.booleans(), INTEGER, FLOAT, TEXT),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(TEXT, inner)),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(TEXT, VALUE))
@example({"\x7f": '\x7f\x00\n"\\', "a.b": {"": [{"c d": 1e-05}]}})
def test_toml_round_trip_of_any_data(data: dict[str, Any]) -> None:
    got = read_toml(write_toml(data))
    assert got == data
    assert repr(sort(got)) == repr(sort(data))  # 1 and 1.0 and True are told apart


def sort(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: sort(data[key]) for key in sorted(data)}
    return [sort(item) for item in data] if isinstance(data, list) else data


def test_toml_says_what_it_cannot_hold() -> None:
    with pytest.raises(SpecError, match=r"a\.b is None, for which TOML has no spelling"):
        write_toml({"a": {"b": None}})
    method = Method(inverse_hessian=CurvatureInverse(fakes.FakeCurvature(), SOLVER_NO_TOLERANCE))
    with pytest.raises(SpecError, match=r"inverse_hessian\.solver\.tolerance is None"):
        spec.to_toml(method)
    assert spec.from_json(spec.to_json(method)) == method
    assert math.isinf(read_toml(write_toml({"x": math.inf}))["x"])


SOLVER_NO_TOLERANCE = fakes.FakeSolver(tolerance=None)


def test_a_written_spec_hides_no_default() -> None:
    assert spec.spec_of(Method()) == {
        "source": "per-example",
        "projector": "identity",
        "inverse_hessian": "identity",
        "scorer": "dot",
        "fold": "mean",
        "seed": 0,
    }
    staged = Method(stages=[{"inverse_hessian": "damped"}, {"projector": "sketch"}])
    assert spec.spec_of(staged)["stages"] == [
        {"inverse_hessian": "damped"},
        {"projector": "sketch"},
    ]


def test_a_method_is_spelled_by_name_with_overrides_or_by_slots() -> None:
    named = spec.method_of({"name": "if-cg", "damping": 0.25})
    spelled = spec.from_toml(
        'scorer = "dot"\n[inverse_hessian]\ncurvature = "hessian"\nsolver = "cg"\ndamping = 0.25\n'
    )
    assert named == spelled
    assert named == attrs.evolve(spec.method_of("if-cg"), inverse_hessian=named.inverse_hessian)
    assert spec.method_of({"attributor": {"name": "random", "seed": 2}}) == fakes.FakeAttributor(2)
    for wrong in ({"name": 3}, 3, {"attributor": "random", "scorer": "dot"}, {"scorrer": "dot"}):
        with pytest.raises(SpecError):
            spec.method_of(wrong)


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_files_round_trip(suffix: str, tmp_path: Path) -> None:
    method = spec.method_of({"name": "if-cg", "damping": 0.25})
    spec.save_method(method, tmp_path / f"method{suffix}")
    assert spec.load_method(tmp_path / f"method{suffix}") == method
    assert [path.name for path in tmp_path.iterdir()] == [f"method{suffix}"]
    with pytest.raises(SpecError, match=r"end the name with \.toml or \.json"):
        spec.save_method(method, tmp_path / "method.yaml")


class Bomb:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def bad_files() -> dict[str, tuple[bytes, str]]:
    text = b'scorer = "dot"\n[inverse_hessian]\ncurvature = "hessian"\nsolver = "cg"\n'
    return {
        "truncated.toml": (text[:-3], "is no TOML, or is truncated"),
        "truncated.json": (b'{"scorer": "dot", "fold": ', "is no JSON, or is truncated"),
        "pickle.toml": (pickle.dumps(Bomb()), "pickle or a torch file.*never loaded"),
        "torch.json": (b"PK\x03\x04rest", "pickle or a torch file.*never loaded"),
        "latin.toml": ('scorer = "é"'.encode("latin-1"), "is not UTF-8 text"),
        "binary.toml": (bytes(range(128, 256)), "pickle|is not UTF-8 text"),
        "empty.toml": (b" \n", "is empty"),
        "list.json": (b"[1, 2]", "holds a list, expected names and values"),
        "prose.toml": (b"Dear reader,", "is no TOML"),
        "deep.json": (b"[" * 100_000, "is no JSON"),
        "spec.yaml": (b"a: 1", r"expected a file ending with \.toml or \.json"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_files_that_are_no_spec_say_so(name: str, tmp_path: Path) -> None:
    content, message = bad_files()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError, match=message) as caught:
        spec.load_method(tmp_path / name)
    assert name in str(caught.value)


def test_a_torch_file_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    torch.save({"scorer": "dot"}, tmp_path / "real.toml")
    with pytest.raises(StoreError, match="torch file"):
        spec.load_method(tmp_path / "real.toml")
    with pytest.raises(StoreError, match="cannot be read"):
        spec.load_method(tmp_path / "absent.toml")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_bytes(b'\xef\xbb\xbfscorer = "dot"\n')
    assert spec.load_method(tmp_path / "m.toml") == Method()


def test_a_foreign_spec_names_the_first_key_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    with pytest.raises(SpecError, match="no slot 'project'"):
        spec.load_method(tmp_path / "pyproject.toml")


def test_a_run_holds_method_setting_output_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'output = "scores"\nmemory = "1GiB"\n[method]\nname = "if-cg"\ndamping = 0.1\n'
        '[setting]\nname = "digits"\nseed = 3\n'
    )
    run = spec.read_run(path)
    assert (run.setting, run.setting_fields) == ("digits", {"seed": 3})
    assert (run.output, run.memory) == (Path("scores"), "1GiB")
    assert spec.method_of(run.method).inverse_hessian.solver.damping == Damping(0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('setting = "digits"', "has no 'method'; write e.g. method = \"if-cg\""),
        ('method = "if-cg"', "has no 'setting'"),
        ('method = "if-cg"\nseting = "digits"', "no key 'seting'; did you mean 'setting'"),
        ('method = "if-gc"\nsetting = "digits"', "no method 'if-gc'; did you mean 'if-cg'"),
        ('method = "if-cg"\nsetting = 3', "setting is 3, expected the name"),
        ('method = "if-cg"\nsetting = "digits"\noutput = 3', "output is 3, expected the path"),
        ('method = "if-cg"\n[setting]\nseed = 3', "expected the name of a setting"),
        ('method = 3\nsetting = "digits"', "got 3, expected a name or a mapping"),
    ],
)
def test_a_run_that_is_misspelt_is_refused_before_data_is_read(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(SpecError, match=message):
        spec.read_run(tmp_path / "run.toml")
