"""Functions count by what their source says, where it is what runs; the same under every Python."""

from __future__ import annotations

import ast
import asyncio
import copy
import dis
import functools
import hashlib
import importlib.util
import json
import linecache
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path
from types import CodeType, FunctionType

import attrs
import pytest
import torch
import written_models
from dattri_parts.training import source, syntax
from dattri_parts.training.description import Description
from dattri_parts.training.source import source_of
from torch import nn

HERE = Path(__file__).parent
WRITTEN = HERE / "written_models.py"
VERSIONS = [f"python3.{minor}" for minor in range(10, 20) if minor != sys.version_info[1]]
PRINTED = """
import ast, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("syntax", sys.argv[1])
syntax = importlib.util.module_from_spec(spec)
spec.loader.exec_module(syntax)
for path in sys.argv[2:]:
    for node in ast.walk(ast.parse(open(path, encoding="utf-8").read())):
        if isinstance(node, syntax.FUNCTIONS):
            print(json.dumps([syntax.digest(node, "Own"), syntax.reads(node, (), "Own")]))
"""


def described(value):
    return json.dumps(Description().of(value))


def hashed(value):
    return hashlib.sha256(described(value).encode()).hexdigest()


def function_of(text):
    return next(node for node in ast.walk(ast.parse(text)) if isinstance(node, syntax.FUNCTIONS))


def said(text):
    return syntax.digest(function_of(text))


# --- what source says -----------------------------------------------------------------------------
def test_descriptions_are_those_that_other_versions_of_python_recorded():
    """With Python 3.10 to 3.13 and torch 2.11 and 2.13; 3.10 cannot tell who wrote a method."""
    assert '"cpython"' not in described(written_models.VALUES)
    before = "e8910cbb", "b8947979"
    assert hashed(written_models.VALUES)[:8] == before[sys.version_info >= (3, 11)]


@pytest.mark.parametrize("python", VERSIONS)
def test_other_versions_of_python_read_the_same(python):
    files = [*sorted(HERE.glob("*.py")), ast.__file__, functools.__file__]
    script = ["-c", PRINTED, syntax.__file__, *map(str, files)]

    def run(name):
        made = subprocess.run([name, *script], capture_output=True, text=True, check=False)
        return made.stdout if made.returncode == 0 else None

    there = run(python) if shutil.which(python) else None
    if there is None:
        pytest.skip(f"{python} is not here")
    assert there == run(sys.executable)
    assert len(there.splitlines()) > 500


@pytest.mark.parametrize(
    "other",
    [
        'def f(x, y=1):\n    """Say."""\n    return x + f"{y}ab"',
        "def f(x, y=1):\n\n    # why\n    return (x +\n            f'{y}ab')  # what",
        "@decorated\ndef other(x: int, y: int = 2) -> int:\n  return x + f'{y}' 'a' 'b'",
        "class A:\n def f(x, y): return x + f'{y:}ab'",
    ],
)
def test_comments_layout_docstrings_and_what_defines_it_say_nothing(other):
    assert said(other) == said("def f(x, y=1): return x + f'{y}ab'")


def test_where_a_version_cuts_a_formatted_text_says_nothing():
    whole, cut = (function_of("lambda x: f'ab{x}c'") for _ in range(2))
    _, value, last = cut.body.values
    pieces = [ast.Constant("a"), ast.JoinedStr([ast.Constant("b"), value]), last, ast.Constant("")]
    cut.body.values = pieces
    assert syntax.digest(cut) == syntax.digest(whole)


def test_everything_else_says_something():
    bodies = [
        *("return x", "return y", "x", "return", "pass", "yield x", "yield from x", "raise x"),
        *("return 1", "return True", "return 1.0", "return '1'", "return b'1'", "return 1j"),
        *("return None", "return ...", "return 0.0", "return -0.0", f"return {2**70}"),
        *("return f'{x}'", "return f'{x!r}'", "return f'{x:3}'", "return f'{x=}'", "return 'x'"),
        *("return x.a", "return x.b", "return x(a=1)", "return x(b=1)", "return x(1)"),
        *("global x", "global y", "nonlocal x", "import x", "import y", "import x as y"),
        *("from . import x", "from .. import x", "from .x import x", "x += 1", "x = 1", "x: a = 1"),
        *("(x): a = 1", "return [x for x in y]", "return {x for x in y}", "return (x for x in y)"),
        *("return [x for x in y if x]", "return {**x}", "return {x: x}", "return [*x]"),
        *("if x: y\n else: z", "if x: y\n z", "while x: y", "for x in y: z", "with x: y"),
        *("match x:\n  case None: y", "match x:\n  case True: y", "match x:\n  case _: y"),
        *("def g(): pass", "def g(): return 1", "def h(): pass", "def g(x): pass"),
        *("def g(x=1): pass", "def g(*x): pass", "def g(*, x): pass", "def g(x, /): pass"),
        *("def g(*, x=1): pass", "def g(x: int): pass", "@x\n def g(): pass", "class g: pass"),
        *("class g:\n  x: int", "class g:\n  y: int", "return lambda: x", "return lambda x: x"),
        *("return x[1]", "return x[1:]", "return x[:1]", "return x < y", "return x <= y"),
        *("return x < y < z", "return x and y", "return x or y", "return (x := y)", "del x"),
    ]
    texts = [f"def f(a):\n {body}" for body in bodies]
    texts += ["def f(b): return x", "def f(*a): return x", "def f(**a): return x"]
    texts += ["def f(a, /): return x", "def f(*, a): return x", "def f(): return x"]
    texts += ["async def f(a): return x", "lambda a: x"]
    assert len({said(text) for text in texts}) == len(texts)


def test_a_private_name_counts_with_the_class_that_it_belongs_to():
    private, plain = (function_of(f"def f(self): return self.{name}") for name in ("__x", "x__"))
    assert syntax.digest(private, "A") != syntax.digest(private, "B")
    assert syntax.digest(plain, "A") == syntax.digest(plain, "B")


# --- what source reads ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("def f(x): return x + y", "y"),
        ("def f(x, y=z): return x", ""),
        ("def f(x: y) -> z: w: v = x", ""),
        ("def f(*x, **y): return x, y, a.b.c(d.e)", "a.b.c d.e"),
        ("def f(): a.b.c = d[e].f", "a.b d e"),
        ("def f():\n global n\n n += 1\n m = 2", "n"),
        ("def f():\n n = 1\n def g():\n  nonlocal n\n  n = m\n return g", "m"),
        ("def f():\n n = 1\n def g():\n  global n\n  return n\n return g", "n"),
        ("def f(): return [x for x in y], x", "x y"),
        ("def f(): return [(z := x) for x in y], z", "y"),
        ("def f(): return [z for x in y for z in x if w(z)]", "w y"),
        ("def f():\n x = [x for _ in y]\n return x", "y"),
        ("def f(): return lambda x, y=z: x + y + w", "w z"),
        ("def f():\n @a\n def g(x=b): return x, g\n return g", "a b"),
        ("def f():\n class A(B, m=C):\n  d = e\n  def g(self): return d, A", "B C d e"),
        ("def f():\n import a.b, c as d\n from e import g\n return a, c, d, g", "c"),
        ("def f():\n try: pass\n except E as e: e\n with A() as b: b", "A E"),
        ("def f():\n for x in y: x\n else: z", "y z"),
        ("def f(x):\n match x:\n  case A(b=[c, *d], e=v.w) | {'k': c, **g}: c, d, g", "A v.w"),
        ("def f():\n global n\n return [(n := n + 1) for _ in y]", "n y"),
        ("def f(n):\n class A:\n  nonlocal n\n  n = n", ""),
        ("def f():\n if 0: a\n return\n b", "a b"),
        ("def f(): return f'{a!r:{b}}' f'{c=}'", "a b c"),
    ],
)
def test_the_globals_that_source_reads(text, names):
    assert [".".join(name) for name in syntax.reads(function_of(text), ())] == names.split()
    free = tuple(name.partition(".")[0] for name in names.split())
    assert syntax.reads(function_of(text), free) == [["n"]] * ("global n" in text)


def test_a_class_reads_a_global_before_it_sets_its_own():
    node = function_of(
        "def f():\n class A:\n  n = n\n  m = [n for _ in n]\n  def g(self): return n"
    )
    assert syntax.reads(node, ("n",)) == syntax.reads(node, ()) == [["n"]]


def test_private_names_are_read_under_the_name_that_python_gives_them():
    node = function_of("def f(self): return __x, __y__, a.__b, C")
    expected = [["C"], ["_Own__x"], ["__y__"], ["a", "_Own__b"]]
    assert syntax.reads(node, (), "_Own") == expected


def _codes(code):
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return [code, *(deeper for each in inner for deeper in _codes(each))]


@pytest.mark.parametrize("module", ["dataclasses", "argparse", "typing", "inspect"])
def test_they_are_those_that_instructions_load(module):
    """But for the module's name, which the body of a class inside a function loads."""
    text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    places = source._written(text, 0)
    compared = 0
    for place in (place for lines in places.values() for place in lines.values()):
        if len(place.nodes) == len(place.codes) == 1:
            (node,), (code,) = place.nodes, place.codes
            found = {name[0] for name in syntax.reads(node.tree, code.co_freevars, node.private)}
            loaded = {
                step.argval
                for each in _codes(code)
                if each.co_name != "__annotate__"  # from Python 3.14 on
                for step in dis.get_instructions(each)
                if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
            }
            assert loaded - found <= {"__name__"}, place.codes
            assert found <= loaded, place.codes
            compared += 1
    assert compared > 30


# --- whether it is what runs ----------------------------------------------------------------------
BODY = "import torch\n\n\ndef act(x):\n    return 2 * torch.relu(x)\n"


@pytest.fixture
def loaded(tmp_path, request):
    """Return a function that writes a module, and loads it unless told not to."""
    path = tmp_path / f"own_{abs(hash(request.node.name))}.py"

    def load(text, run=True):
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        if run:
            exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
        return module

    return load


def test_a_file_that_was_edited_since_it_was_imported_is_not_believed(loaded):
    act = loaded(BODY).act
    before = described(act)
    assert '"source"' in before
    loaded(BODY.replace("2 *", "3 *"), run=False)
    assert source_of(act) is None
    assert '"cpython"' in described(act)
    assert described(loaded(BODY.replace("2 *", "3 *")).act) not in (before, described(act))
    loaded("\n# moved\n" + BODY.replace("    return", "    # why\n    return"), run=False)
    assert described(act) == before
    loaded("x = [\n", run=False)
    assert source_of(act) is None


def test_globals_that_source_reads_count_and_others_do_not(loaded):
    def described_with(by, more=0, at=1):
        text = f"import other\nBY = {by}\nMORE = {more}\n"
        text += "def act(x):\n    return [BY * y for y in x] + inner(x)\n"
        text += "def inner(x):\n    return other.deep.act(x)\n"
        other, deep = types.ModuleType("other"), types.ModuleType("deep")
        other.deep, deep.act, other.more = deep, at, more
        module = loaded(text.replace("import other\n", ""))
        module.other = other
        return described(module.act)

    assert described_with(1) == described_with(1, more=2)
    assert len({described_with(1), described_with(2), described_with(1, at=2)}) == 3
    assert '"cpython"' not in described_with(1)


def test_a_file_that_is_gone_leaves_the_instructions(loaded, tmp_path):
    module = loaded(BODY)
    for path in tmp_path.iterdir():
        path.unlink()
    assert source_of(module.act) is None
    assert '"cpython"' in described(module.act)


def test_a_name_relative_to_another_folder_is_read_by_what_loaded_the_module(loaded):
    module = loaded(BODY)
    code = module.act.__code__.replace(co_filename="elsewhere.py")
    assert source_of(FunctionType(code, {"__name__": module.__name__})) is None
    assert source_of(FunctionType(code, module.__dict__)) == source_of(module.act) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("2", "3"), ("1", "True"), ("0.0", "-0.0"), ("(1, 2)", "(1, 2.0)"), ("y", "z")),
        *(("'a'", "b'a'"), ("lambda: 1", "lambda: 2"), ("x in {1, 2}", "x in {1, 3}")),
        *(("[x]", "(x,)"), ("-x", "+x")),
    ],
)
def test_code_that_something_rewrote_is_not_believed(loaded, one, other):
    first = loaded(f"def act(x):\n    return {one}\n").act
    second = loaded(f"def act(x):\n    return {other}\n").act
    assert source_of(second) is not None
    second.__code__ = first.__code__
    assert source_of(second) is None


def test_what_is_no_part_of_equality_of_code_is_compared(loaded):
    act = loaded(
        "def act(x):\n    try:\n        return x\n    except ValueError:\n        pass\n"
    ).act
    assert source_of(act) is not None
    for change in ({"co_flags": act.__code__.co_flags | 0x100}, {"co_varnames": ("y",)}):
        changed = FunctionType(act.__code__.replace(**change), act.__globals__)
        assert source_of(changed) is None


def test_cells_of_a_notebook_have_a_source():
    def cell(text, flags=0):
        name = f"<cell {hash(text)}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        space = {"__name__": "__main__", "nn": nn, "torch": torch}
        waits = eval(compile(text, name, "exec", flags, dont_inherit=True), space)
        if waits is not None:
            asyncio.run(waits)
        return space

    text = "class Net(nn.Module):\n    def forward(self, x):\n        def g(y: int): pass\n"
    text += "        return torch.relu(x)\n"
    first, second = cell(text)["Net"], cell(text.replace("relu", "tanh"))["Net"]
    assert '"cpython"' not in described(first)
    assert described(first) != described(second)
    futures = cell("# the same\n" + text, flags=0x1000000)["Net"]  # of an earlier cell
    assert described(futures) == described(first)
    awaits = "def act(x): return 2 * x\nimport asyncio\nawait asyncio.sleep(0)\n"
    assert source_of(cell(awaits, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)["act"]) is not None


def test_functions_of_one_line_are_told_apart_by_where_they_stand_in_it(loaded):
    text = "two = [lambda x: 2 * x, lambda x: 3 * x, lambda x: lambda y: x + y]\n"
    two = loaded(text + "same = [lambda: 6, lambda: 2 * 3]\n").two
    if sys.version_info >= (3, 11):
        alone = [f"one = {part}\n" for part in ("lambda x: 2 * x", "lambda x: 3 * x")]
        assert [source_of(act) for act in two[:2]] == [source_of(loaded(t).one) for t in alone]
        loaded(text, run=False)
        assert source_of(two[2]) is not None
        assert source_of(two[2](1)) is not None
    else:
        assert source_of(two[0]) is None
    same = loaded("same = [lambda: 6, lambda: 2 * 3]\n").same
    assert source_of(same[0]) is None  # either may be what was written
    assert len({described(act) for act in two}) == 3


def test_a_test_that_pytest_rewrote_has_no_source():
    def act(x):
        assert x
        return x

    assert source_of(act) is None
    assert '"cpython"' in described(act)


# --- members of classes ---------------------------------------------------------------------------
def _made(**fields):
    return attrs.make_class("Own", fields, frozen=True)


def test_classes_with_generated_methods_count_by_their_fields():
    make = written_models.made_dataclass
    one, other = (functools.partial(attrs.field, default=value) for value in (1, 2))
    made = [
        *(make(), make(1), make(frozen=True), make(order=True), make(eq=False)),
        *(_made(a=one()), _made(a=other()), _made(b=one()), _made(a=one(converter=float))),
        *(_made(a=one(converter=int)), _made(a=one(init=False)), _made(a=one(eq=False))),
        *(_made(a=one(eq=abs)), _made(a=one(), b=one()), attrs.make_class("Own", {"a": one()})),
        *(_made(a=one(validator=check)) for check in (lambda *_: 1, lambda *_: 2)),
    ]
    assert len({described(kind) for kind in made}) == len(made)
    assert described(make()) == described(make())
    assert described(_made(a=one())) == described(_made(a=one()))


def test_what_a_user_writes_under_the_name_of_a_generated_method_counts():
    def written(by):
        space = {"dataclass": __import__("dataclasses").dataclass, "__name__": __name__}
        body = f"@dataclass\nclass Own:\n x: int = 1\n def __init__(self): self.x = {by}\n"
        exec(body, space)
        return space["Own"]

    assert described(written(1)) != described(written(2))


def test_enums_count_by_members_and_methods():
    def made(value, by, key="ONE"):
        text = f"import enum\nclass Own(enum.Enum):\n {key} = {value}\n def go(self): return {by}\n"
        text += f" @classmethod\n def _missing_(cls, value): return {by}\n"
        space = {"__name__": __name__}
        exec(text, space)
        return space["Own"]

    kinds = [made(1, 1), made(2, 1), made(1, 2), made(1, 1, "TWO")]
    assert len({described(kind) for kind in kinds}) == 4
    assert described(made(1, 1)) == described(made(1, 1))


def test_a_first_object_changes_nothing_of_the_class_of_a_protocol():
    class Speaks(typing.Protocol):
        def go(self) -> int: ...

    class Lent(Speaks, nn.Linear):
        def go(self):
            return 3

    class Own(Speaks):
        def __init__(self):
            self.three = 3

    kinds = [Lent, Own]
    before = described(kinds)
    Lent(2, 2)
    Own()
    assert described(kinds) == before
    without = described(type("Own", (Speaks,), {"__module__": __name__}))
    assert described(Own) != without


def test_copying_and_running_change_nothing():
    value = [written_models.Own(2), written_models.Fancy(), written_models.Silent()]
    before = described(value)
    copy.deepcopy(value)
    copy.copy(value[2]).__reduce_ex__(2)
    assert described(value) == before
