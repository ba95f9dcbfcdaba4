"""Fits that are kept: the same numbers to the bit, computed once, never those of another fit."""

import threading
from pathlib import Path

import attrs
import pytest
import torch
from dattri_parts.curvatures import ekfac
from oracles.toy_tasks import examples, mlp, states
from torch import nn

import dattri_core as dattri
from dattri_core import NumericsError, SpecError, StoreError, Task, kept, kept_fits
from dattri_core.problem import TrainProblem
from dattri_core.spec import read_run

N, M = 14, 5
TRAIN, TEST = examples(N), examples(M, seed=300)
ARNOLDI = {"rank": 6, "iterations": 12, "damping": 0.1}
METHODS = {
    "if-kfac": {},
    "if-ekfac": {"fisher": "ggn"},
    "if-diagonal": {"draws": 2},
    "if-arnoldi": {**ARNOLDI, "damping": {"relative": 0.1}},
    "relatif-ekfac": {},
}
OTHERS = {
    "ggn": ("if-arnoldi", {"curvature": "ggn", **ARNOLDI}),
    "rows in a sketch": (
        "if-arnoldi",
        {"curvature": "gauss-newton", "projector": {"name": "gaussian", "dim": 8}, **ARNOLDI},
    ),
    "preconditioner": ("if-cg", {"preconditioner": {"curvature": "kfac", "solver": "spectral"}}),
}


def task(weights=None, model=None, **options):
    return Task(model or mlp(), checkpoints=weights or states(2), **options)


def scores(name, fields, folder=None, made=None, train=TRAIN):
    method = dattri.method(name, **fields)
    return method.attribute(made or task(), train, TEST, fits=folder).values


def files(folder):
    return sorted(path.name for path in Path(folder).glob("*.safetensors"))


@pytest.fixture
def no_reading(monkeypatch):
    """Return what makes every further reading of the train set by a fit an error."""

    def refuse(*_, **__):
        raise AssertionError("the fit reads the train set")

    def forbid():
        for name in ("rows", "stream", "product"):
            monkeypatch.setattr(TrainProblem, name, refuse)

    return forbid


CASES = {**{name: (name, fields) for name, fields in METHODS.items()}, **OTHERS}


@pytest.mark.parametrize("case", CASES)
def test_a_kept_fit_gives_the_same_scores_to_the_bit(case, tmp_path):
    name, fields = CASES[case]
    want = scores(name, fields)
    for _ in range(2):  # computed, then read
        assert torch.equal(scores(name, fields, tmp_path), want)
    assert files(tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_a_kept_fit_reads_no_train_example_at_any_damping(name, tmp_path, no_reading):
    method = dattri.method(name, **METHODS[name])
    one = task(states(1))
    method.fit(one, TRAIN, fits=tmp_path)
    want = method.fit(one, TRAIN).with_(damping=0.3).attribute(TEST).values
    there = files(tmp_path)
    no_reading()
    got = dattri.method(name, **{**METHODS[name], "damping": 0.3}).fit(one, TRAIN, fits=tmp_path)
    assert torch.equal(got.attribute(TEST).values, want)
    assert files(tmp_path) == there


class Normed(nn.Module):
    """A grouped convolution, an embedding and a norm: sides of groups, one-hot inputs, none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(7, 4)
        self.convolution = nn.Conv1d(4, 4, 3, groups=2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        found = self.convolution(self.embedding(tokens).mT).tanh().mean(-1)
        return self.head(self.norm(found))


@pytest.mark.parametrize("uncovered", ["diagonal", "identity", "drop"])
@pytest.mark.parametrize("name", ["if-kfac", "if-ekfac"])
def test_every_kind_of_layer_comes_back(name, uncovered, tmp_path):
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randint(0, 7, (n, 6), generator=generator), torch.randint(0, 3, (n,)))
        for n in (N, M)
    ]
    method = dattri.method(name, uncovered=uncovered, damping=1e-2)
    made = Task(Normed().double(), loss="cross-entropy")
    want = method.attribute(made, *data).values
    for _ in range(2):
        assert torch.equal(method.attribute(made, *data, fits=tmp_path).values, want)


def thinned():
    """Return a task whose model has a dropout module."""
    inner = mlp()
    inner.insert(1, nn.Dropout(0.3))
    return Task(inner.eval(), loss="cross-entropy")


def squares(model, batch):
    """Return another loss, which has no labels to draw."""
    return model(batch[0]).square().sum(1)


def other_label():
    """Return the train set with the label of one example changed that no sample holds."""
    labels = TRAIN[1].clone()
    labels[10] = (labels[10] + 1) % 3
    return TRAIN[0], labels


@pytest.mark.parametrize(
    "changed",
    [
        {"fields": {"fisher": "sampled", "draws": 2}},
        {"fields": {"fisher": "ggn"}},
        {"base": {"fisher": "sampled"}, "fields": {"fisher": "sampled", "seed": 1}},
        {
            "base": {"source": {"name": "dropout-ensemble", "members": 2}, "world": "thinned"},
            "fields": {"source": {"name": "dropout-ensemble", "members": 2, "seed": 1}},
        },
        {"fields": {"projector": {"name": "kronecker", "rank": 2}}},
        {
            "base": {"projector": {"name": "kronecker", "rank": 2}},
            "fields": {"projector": {"name": "kronecker", "rank": 2, "distribution": "normal"}},
        },
        {"fields": {"approximation": "reduce"}},
        {"made": lambda: task(states(1, seed=7))},
        {"made": lambda: task(loss=squares)},
        {"made": lambda: task(parameters=["0.*"])},
        {"train": other_label()},
        {"train": (TRAIN[0][:-1], TRAIN[1][:-1])},
    ],
    ids=lambda changed: "-".join(map(str, changed.get("fields", changed))),
)
def test_another_question_is_another_fit(changed, tmp_path):
    fields = {"fisher": "empirical", **changed.get("base", {})}
    world = thinned if fields.pop("world", "") else task
    scores("if-kfac", fields, tmp_path, world())
    before = files(tmp_path)
    made = changed.get("made", world)()
    given = {**fields, **changed.get("fields", {})}
    train = changed.get("train", TRAIN)
    want = scores("if-kfac", given, made=made, train=train)
    assert torch.equal(scores("if-kfac", given, tmp_path, made=made, train=train), want)
    assert set(files(tmp_path)) > set(before)


def test_methods_and_checkpoints_share_a_folder(tmp_path, no_reading):
    for name in METHODS:
        scores(name, METHODS[name], tmp_path)
    # K-FAC, eigenvectors and eigenvalues of two EK-FACs, the diagonal, Ritz pairs and a mean.
    assert len(files(tmp_path)) == 2 * (1 + 2 * 2 + 1 + 2)
    no_reading()
    for name in METHODS:
        dattri.method(name, **METHODS[name]).fit(task(), TRAIN, fits=tmp_path)


def test_a_fit_that_was_stopped_keeps_its_first_pass(tmp_path, monkeypatch):
    want = scores("if-ekfac", {}, made=task(states(1)))
    with monkeypatch.context() as patched:
        patched.setattr(ekfac.EKFAC, "_values", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scores("if-ekfac", {}, tmp_path, task(states(1)))
    assert [name.rpartition("-")[0] for name in files(tmp_path)] == ["ekfac-vectors"]
    monkeypatch.setattr(ekfac, "FactorReader", lambda *_: 1 / 0)
    assert torch.equal(scores("if-ekfac", {}, tmp_path, task(states(1))), want)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(bytes(data))


def swapped(path):
    other = next(p for p in path.parent.glob("*.safetensors") if p != path)
    path.write_bytes(other.read_bytes())


def pickled(path):
    torch.save({"a": torch.ones(2)}, path)


@pytest.mark.parametrize("damage", [truncated, one_bit, swapped, pickled])
def test_a_damaged_file_is_refused_by_name(damage, tmp_path):
    scores("if-kfac", {}, tmp_path)  # of two checkpoints
    path = tmp_path / files(tmp_path)[0]
    damage(path)
    why = "belongs to another fit" if damage is swapped else ""
    with pytest.raises(StoreError, match=f"{path.name}.*{why}.*delete it and run again"):
        scores("if-kfac", {}, tmp_path)
    path.unlink()
    assert torch.equal(scores("if-kfac", {}, tmp_path), scores("if-kfac", {}))


class Scaled(nn.Module):
    """A model whose code reads a number that no hash of weights sees."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs):
        return self.inner(inputs) * self.scale


def test_other_code_under_the_same_name_is_refused(tmp_path, monkeypatch):
    def fit():
        return dattri.method("if-kfac").fit(Task(Scaled()), TRAIN, fits=tmp_path)

    fit()
    fit()
    monkeypatch.setattr(Scaled, "scale", 1.1)
    with pytest.raises(StoreError, match="the loss, the code of the model or its settings changed"):
        fit()


SIGN = {"loss": 1.0}


def signed(model, batch):
    """Return a loss whose code reads a sign; rows of the other sign are as long."""
    return SIGN["loss"] * model(batch[0]).square().sum(1)


def test_a_loss_of_the_other_sign_is_refused(tmp_path, monkeypatch):
    def fit():
        made = Task(mlp(), loss=signed)
        return dattri.method("if-arnoldi", **ARNOLDI).fit(made, TRAIN, fits=tmp_path)

    fit()
    fit()
    monkeypatch.setitem(SIGN, "loss", -1.0)
    with pytest.raises(StoreError, match="the loss, the code of the model or its settings changed"):
        fit()


def test_a_full_disk_loses_no_fit(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_fits, "atomic_file", full)
    with pytest.warns(UserWarning, match="No space left on device.*goes on with what is in memory"):
        got = scores("if-kfac", {}, tmp_path)
    assert torch.equal(got, scores("if-kfac", {}))
    assert files(tmp_path) == []


def test_two_of_one_fit_compute_it_once(tmp_path):
    facts = kept_fits.KeptFits(tmp_path, {"origins": {}}, torch.ones(3, 1))
    made, started = [], threading.Event()

    def slow():
        made.append(1)
        started.set()
        threading.Event().wait(0.5)
        return {"a": torch.arange(3.0)}

    found = []

    def get():
        found.append(facts.get("numbers", {"rank": 2}, slow, torch.device("cpu"))["a"])

    first = threading.Thread(target=get)
    first.start()
    started.wait(10)
    get()
    first.join()
    assert made == [1]
    assert [each.tolist() for each in found] == [[0.0, 1.0, 2.0]] * 2


@attrs.frozen
class Third:
    """Somebody else's curvature: whatever it needs, kept under the name of its own fields."""

    power: int = 1

    def fit(self, problem):
        return kept(problem, "third", self, lambda: {"sum": torch.tensor(float(self.power))})


def test_whoever_keeps_nothing_has_it_computed():
    assert not isinstance(object(), dattri.KeepingFits)
    assert kept(object(), "any", {}, lambda: {"a": 1}) == {"a": 1}
    assert float(Third(4).fit(object())["sum"]) == 4


def test_parts_of_other_fields_have_files_of_their_own(tmp_path):
    facts = kept_fits.KeptFits(tmp_path, {"origins": {}}, torch.ones(3, 1))

    class Problem:
        def kept(self, name, part, make):
            return facts.get(name, part, make, torch.device("cpu"))

    for _ in range(2):
        for power in (1, 2):
            assert float(Third(power).fit(Problem())["sum"]) == power
    assert len(files(tmp_path)) == 2


def test_a_spec_names_the_folder(tmp_path):
    spec = tmp_path / "run.toml"
    spec.write_text('method = "if-kfac"\nsetting = "digits"\noutput = "s"\nfits = "kept"\n')
    assert read_run(spec).fits == Path("kept")
    spec.write_text('method = "if-kfac"\nsetting = "digits"\nfits = 3\n')
    with pytest.raises(SpecError, match="fits is 3, expected the path of a folder"):
        read_run(spec)


def test_a_method_without_parts_keeps_no_fits(tmp_path):
    with pytest.raises(SpecError, match="fits= keeps the fits of a method"):
        dattri.attribute(task(), TRAIN, TEST, "random", fits=tmp_path)


def test_a_fit_that_fails_keeps_nothing(tmp_path):
    broken = states(1)
    next(iter(broken[0].values()))[0] = torch.nan
    with pytest.raises(NumericsError):
        scores("if-kfac", {}, tmp_path, task(broken))
    assert files(tmp_path) == []
