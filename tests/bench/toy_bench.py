"""A setting, metrics, methods and a store of outcomes that take milliseconds and count their work.

As a script it runs ``dattri bench`` with them: a test kills it.
"""

import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import attrs
import numpy as np
import torch
from attrs import field, frozen
from dattri_parts.scorers.dot import Dot
from torch import nn

from dattri_core import (
    Counterfactual,
    InputError,
    MetricResult,
    Scorer,
    Scores,
    Task,
    World,
    atomic_file,
)
from dattri_core.cli import main
from dattri_core.discovery import Origin
from dattri_core.registry import LOCAL, Registry, using

CALLS: list[str] = []
CLASSES, FEATURES = 3, 4


def counted(what):
    """Note a piece of work, and die at the one that the environment names."""
    CALLS.append(what)
    if os.environ.get("TOY_DIES_AT") == str(len(CALLS)):
        os._exit(9)


def data(n, seed, role):
    random = np.random.default_rng([seed, role])
    labels = random.integers(CLASSES, size=n)
    means = np.random.default_rng(7).normal(size=(CLASSES, FEATURES))
    inputs = means[labels] + 0.7 * random.normal(size=(n, FEATURES))
    return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels)


@frozen(eq=False)
class ToyRetraining:
    """Full-batch gradient descent of a linear classifier."""

    train_data: tuple
    test_data: tuple
    rate: float = 0.5
    targets: ClassVar = {"loss": False}
    together: ClassVar = 2

    @property
    def fingerprint(self):
        total = float(self.train_data[0].sum()), int(self.train_data[1].sum())
        return f"toy-{self.n_train}-{total}-{self.rate}"

    @property
    def n_train(self):
        return len(self.train_data[1])

    @property
    def n_test(self):
        return len(self.test_data[1])

    def train(self, counterfactuals):
        for counterfactual in counterfactuals:
            counted("train")
            inputs, labels = (t[torch.tensor(counterfactual.mask)] for t in self.train_data)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(counterfactual.seed)
                model = nn.Linear(FEATURES, CLASSES)
            for _ in range(25):
                model.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                with torch.no_grad():
                    for weight in model.parameters():
                        weight -= self.rate * weight.grad
            yield {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def measure(self, state):
        model = nn.Linear(FEATURES, CLASSES)
        model.load_state_dict(state)
        with torch.no_grad():
            losses = nn.functional.cross_entropy(
                model(self.test_data[0]), self.test_data[1], reduction="none"
            )
        return {"loss": losses.double().numpy()}


@frozen
class ToySetting:
    title: ClassVar = "toy: three clouds of points"
    sizes: ClassVar = {"full": (60, 20), "small": (24, 8)}
    metrics: ClassVar = ("agreement", "flips")
    rate: float = 0.5

    def load(self, size=None, seed=0, wrong=None):
        counted("load")
        n_train, n_test = size or self.sizes["full"]
        train, test = data(n_train, seed, 0), data(n_test, seed, 1)
        true = train[1].numpy().copy()
        count = round((wrong or 0) * n_train)
        chosen = np.random.default_rng([seed, 2]).permutation(n_train)[:count]
        train[1][torch.from_numpy(chosen)] = (train[1][torch.from_numpy(chosen)] + 1) % CLASSES
        retraining = ToyRetraining(train, test, self.rate)
        (state,) = retraining.train([Counterfactual(np.ones(n_train, bool), seed)])
        model = nn.Linear(FEATURES, CLASSES)
        model.load_state_dict(state)
        return World(
            task=Task(model, checkpoints=[state]),
            trajectory=Task(model, checkpoints=[state, state], learning_rates=[0.5, 0.1]),
            train=train,
            test=test,
            train_ids=tuple(f"a{i}" for i in range(n_train)),
            test_ids=tuple(f"b{i}" for i in range(n_test)),
            retraining=retraining,
            target="loss",
            damping=0.03,
            threads=1,
            facts={"model": "linear"},
            true_labels=true,
        )


@frozen
class Rounding(ToySetting):
    """A setting that notes in which precision its model was asked to be trained, and heeds it."""

    tf32: bool = False

    def load(self, size=None, seed=0, wrong=None):
        CALLS.append(f"tf32 {self.tf32}")
        return super().load(size, seed + 100 * self.tf32, wrong)  # other numbers


@frozen
class NoClasses(ToySetting):
    """A setting that refuses wrong labels."""

    def load(self, size=None, seed=0, wrong=None):
        if wrong:
            raise InputError("setting 'no-classes': its examples have no labels")
        return super().load(size, seed)


@frozen
class ToyStore:
    """Outcomes in one file for each counterfactual."""

    folder: Path
    retraining: ToyRetraining

    def outcomes(self, counterfactuals, target):
        return np.stack([self._one(c, target) for c in counterfactuals])

    def _one(self, counterfactual, target):
        name = f"{self.retraining.fingerprint}-{counterfactual.key.hex()}.npy"
        path = Path(self.folder) / "outcomes" / name
        if not path.exists():
            (state,) = self.retraining.train([counterfactual])
            with atomic_file(path) as handle:
                np.save(handle, self.retraining.measure(state)[target])
        return np.load(path)


def result(value, chance=0.0, ceiling=None, higher=True):
    return MetricResult(value, value - 0.1, value + 0.2, chance, 0.95, ceiling, higher)


@frozen
class Agreement:
    """Correlation of summed scores with outcomes of models on random halves."""

    needs: ClassVar = frozenset({"retraining"})
    subsets: int = 6

    def measure(self, evidence):
        counted("metric")
        n = evidence.scores.shape[0]
        random = np.random.default_rng(evidence.seed)
        masks = [random.permutation(n) < n // 2 for _ in range(self.subsets)]
        got = evidence.outcomes.outcomes([Counterfactual(m, 5) for m in masks], "loss")
        told = np.stack(masks).astype(float) @ evidence.scores
        both = zip(told.T, got.T, strict=True)
        value = -np.mean([np.corrcoef(a, b)[0, 1] if a.std() else 0.0 for a, b in both])
        return result(float(value), ceiling=0.9)


@frozen
class Flips:
    """Share of the wrong labels among as many lowest mean scores."""

    needs: ClassVar = frozenset({"mislabelled"})

    def measure(self, evidence):
        counted("metric")
        wrong = evidence.world.flipped
        worst = np.argsort(evidence.scores.mean(1))[: wrong.sum()]
        return result(float(wrong[worst].mean()), chance=float(wrong.mean()))


@frozen
class Own:
    needs: ClassVar = frozenset({"self-influence"})

    def measure(self, evidence):
        return result(float(evidence.self_influence.sum()))


@frozen
class Sneaky:
    """Asks for what it does not declare."""

    needs: ClassVar = frozenset()

    def measure(self, evidence):
        return evidence.outcomes.outcomes([], "loss")


@frozen
class NotANumber:
    needs: ClassVar = frozenset()

    def measure(self, evidence):
        return result(float("nan"))


@frozen
class Other:
    """Scores of the same method for another model."""

    needs: ClassVar = frozenset({"attribute"})

    def measure(self, evidence):
        again = evidence.attribute(evidence.world.task)
        return result(float(np.abs(again - evidence.scores).max()), higher=False)


@frozen
class Counted:
    """Gradient-free scores that depend on a field."""

    scale: float = 1.0

    def attribute(self, task, train, test, **settings):
        counted("attribute")
        n, m = len(train[1]), len(test[1])
        values = np.random.default_rng(3).normal(size=(n, m)) + self.scale * np.eye(n, m)
        return Scores(torch.from_numpy(values))


@frozen
class Asking:
    """Scores from models that it asks for; says which seed it was given."""

    ground_truth: Any = None
    seed: int = 0

    def attribute(self, task, train, test, **settings):
        mask = np.arange(len(train[1])) % 2 == 0
        (found,) = self.ground_truth.outcomes([Counterfactual(mask, self.seed)], "loss")
        return Scores(torch.from_numpy(np.outer(mask - 0.5, found) + self.seed))


@frozen
class Noise:
    """Random scores; fails at one seed."""

    seed: int = 0
    fails_at: int = -1

    def attribute(self, task, train, test, **settings):
        if self.seed == self.fails_at:
            raise ValueError(f"no luck at {self.seed}")
        random = np.random.default_rng(self.seed)
        return Scores(torch.from_numpy(random.normal(size=(len(train[1]), len(test[1])))))


@frozen
class Louder(Dot):
    """A scorer of another distribution, see `with_plugin`."""


@frozen
class Shout(Noise):
    """An attributor of another distribution, made of another part."""

    scorer: Scorer = field(factory=Dot)


@frozen
class Scribbler:
    """Writes to what it is given."""

    needs: ClassVar = frozenset({"self-influence"})
    what: str = "scores"

    def measure(self, evidence):
        given = getattr(evidence, self.what)
        given *= 0
        return result(0.0)


@frozen
class Misspelt:
    needs: ClassVar = frozenset({"label"})

    def measure(self, evidence):
        return result(0.0)


@frozen
class Bounded:
    needs: ClassVar = frozenset({"fact:anything"})

    def measure(self, evidence):
        value = float(evidence.scores[0, 0])
        return attrs.evolve(result(value), bounds=(value - 0.01, float("inf")))


@frozen
class Pair(ToySetting):
    """A setting that gives no world."""

    def load(self, size=None, seed=0, wrong=None):
        world = super().load(size, seed, wrong)
        return world.train, world.test


@frozen
class Broken:
    def attribute(self, task, train, test, **settings):
        counted("attribute")
        raise ValueError("no luck | at all")


def registry():
    """Return the parts and methods that are installed, with these instead of the real rest."""
    made, here = Registry(LOCAL), __name__ if __name__ != "__main__" else "toy_bench"
    for plugin_kind in ("source", "projector", "inverse_hessian", "curvature", "solver", "scorer"):
        copy_parts(made, plugin_kind)
    for kind in ("fold", "layer_rule", "command"):
        copy_parts(made, kind)
    for name in ("grad-dot", "if-ekfac", "if-cg", "tracin", "knn-shapley"):
        recipe = INSTALLED.recipe(name)
        about = {"summary": recipe.summary, "formula": recipe.formula, "citation": recipe.citation}
        made.method(name, recipe.spec, **about)
    for kind, name, target in (
        ("setting", "toy", "ToySetting"),
        ("setting", "no-classes", "NoClasses"),
        ("setting", "rounding", "Rounding"),
        ("ground_truth", "retraining", "ToyStore"),
        ("metric", "agreement", "Agreement"),
        ("metric", "flips", "Flips"),
        ("metric", "own", "Own"),
        ("metric", "sneaky", "Sneaky"),
        ("metric", "nan", "NotANumber"),
        ("metric", "other", "Other"),
        ("metric", "scribbler", "Scribbler"),
        ("metric", "misspelt", "Misspelt"),
        ("metric", "bounded", "Bounded"),
        ("setting", "pair", "Pair"),
        ("attributor", "counted", "Counted"),
        ("attributor", "noise", "Noise"),
        ("attributor", "broken", "Broken"),
        ("attributor", "asking", "Asking"),
    ):
        made.part(kind, name, f"{here}:{target}")
    for name in ("counted", "broken", "asking", "noise"):
        made.method(name, {"attributor": name}, summary="toy", formula="S", citation="-")
    return made


def with_plugin(version, distribution="dattri-loud"):
    """Return the registry with a scorer and an attributor that a release of a plugin brought."""
    made, plugin = registry(), Registry(Origin("loud", distribution, version))
    plugin.part("scorer", "louder", "toy_bench:Louder")
    plugin.part("attributor", "shout", "toy_bench:Shout")
    made.merge(plugin)
    made.method("shout", {"attributor": "shout"}, summary="toy", formula="S", citation="-")
    return made


INSTALLED = Registry.discovered()


def copy_parts(made, kind):
    for entry in INSTALLED.entries_of(kind):
        made.part(kind, entry.name, entry.target, entry.summary)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import toy_bench

    torch.set_num_threads(1)
    with using(toy_bench.registry()):
        sys.exit(main(["bench", *sys.argv[1:]]))
