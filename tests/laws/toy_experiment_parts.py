"""Toy metrics and settings: right without a fault, broken with one."""

import time

import numpy as np
import torch
from attrs import frozen
from torch import nn

from dattri_core import (
    Checkpoint,
    Counterfactual,
    InputError,
    MetricResult,
    Task,
    TrainingStep,
    World,
)

# --- metrics --------------------------------------------------------------------------------
INTERVALS = {"interval": (0.9, 0.95), "one interval": (0.2, 1.0)}
THRESHOLD = 8.0
"""Above the scores of influence functions in the toy world, and below three times them."""


RESAMPLES = 40
SEEDED = {
    "one seed": lambda seed: np.random.default_rng(0),
    "one state": lambda seed: np.random.Generator(np.random.PCG64(0)),  # which no spy sees
    "seed 0 alone": lambda seed: np.random.default_rng(None if seed else 0),
}
"""How a faulty metric makes its generator."""


@frozen
class ToyDetection:
    """Share of tests whose most helpful train example has their label; `fact` in place of it.

    With ``drawn`` its interval is a bootstrap over tests.
    """

    fault: str = ""
    fact: bool = False
    drawn: bool = False

    def interval(self, hits, share, seed):
        """Return a standard error on both sides of the share, of resamples of the tests."""
        draw = SEEDED.get(self.fault, np.random.default_rng)(seed)
        if self.fault == "sorted":  # hides the order of tests, not the seed of the generator
            hits, draw = np.sort(hits), np.random.default_rng([3, 4])
        error = hits[draw.integers(0, len(hits), (RESAMPLES, len(hits)))].mean(1).std()
        return max(0.0, float(share - error)), min(1.0, float(share + error))

    @property
    def needs(self):
        if self.fault == "words":
            return frozenset({"labels", "everything"})
        return frozenset({"fact:group" if self.fact else "labels"})

    def measure(self, evidence):
        scores, world = evidence.scores, evidence.world
        labels = world.train[-1].numpy(), world.test[-1].numpy()
        if self.fact:
            said = world.facts.get("group")
            if said is None:
                if self.fault == "silent":
                    return MetricResult(0.0, 0.0, 0.0, 0.0, 0.95)
                raise InputError("toy: the world's facts have no 'group'")
            labels = np.array(said["train"]), np.array(said["test"])
        if labels[0].ndim != 1:
            raise InputError("toy: the world has no labels")
        if self.fault != "unchecked":
            size = len(world.train_ids), len(world.test_ids)
            sides = 1 if self.fault == "rows" else 2
            if scores.shape[:sides] != size[:sides]:
                raise InputError("toy: scores of another size")
            if np.isnan(scores).any() or (self.fault != "infinite" and np.isinf(scores).any()):
                raise InputError("toy: scores are not finite")
        if self.fault == "own" and evidence.self_influence is None:
            raise LookupError("self-influence")
        if self.fault == "in place":
            scores *= 2
        if self.fault == "in world":
            world.train[0].add_(1e-9)
        if self.fault == "mode":
            world.task.model.train()
        if self.fault == "squares":
            with np.errstate(all="ignore"):
                scores = scores / np.sqrt(np.square(scores, dtype=np.float32).sum())
        hits = (
            labels[0][(-scores if self.fault == "turned" else scores).argmax(0)]
            == labels[1][: len(scores.T)]
        )
        share = hits.mean()
        if self.fault == "place":
            share = np.average(hits, weights=np.arange(len(hits)) + 1)
        if self.fault == "noise":
            share = share * (1 - 1e-7 * np.random.default_rng().random())
        if self.fault == "threshold" and scores.max() < THRESHOLD:
            share = share * 0.99
        if self.fault == "global":
            np.random.seed(0)  # noqa: NPY002
        if self.fault == "names" and world.test_ids[0] > world.test_ids[-1]:
            share = share * 0.99
        if self.fault == "float32" and scores.dtype == np.float32:
            share = share * 0.99
        flat = np.ptp(scores, axis=0).min() == 0
        if (self.fault == "constant" and flat) or (self.fault == "one test" and len(hits) == 1):
            share = np.nan
        if self.fault == "silence" and flat:
            share = 1.0
        chance = (labels[0][:, None] == labels[1]).mean()
        low, high = INTERVALS.get(self.fault, (0.0, 1.0))
        if self.drawn:
            low, high = self.interval(hits, share, evidence.seed)
        return MetricResult(
            float(share),
            low,
            high,
            0.0 if self.fault == "chance" else float(chance),
            0.95,
            per_test=tuple(hits[: 4 if self.fault == "some tests" else None].astype(float))
            if share == hits.mean()
            else None,
            bounds=(0.0, 0.8) if self.fault == "bounds" else (0.0, 1.0),
        )


@frozen
class ToyRemoval:
    """Mean margin that is lost without the most helpful example: it asks for retraining."""

    fault: str = ""
    needs = frozenset({"retraining"})

    def measure(self, evidence):
        scores, world = evidence.scores, evidence.world
        if scores.shape != (len(world.train_ids), len(world.test_ids)):
            raise InputError("toy: scores of another size")
        if evidence.outcomes is None or not np.isfinite(scores).all():
            raise InputError("toy: no outcomes, or no scores")
        whole = np.ones(len(scores), dtype=bool)
        without = [Counterfactual(~np.eye(len(scores), dtype=bool)[i]) for i in range(len(scores))]
        target = "margin" if self.fault == "margin" else world.target
        found = evidence.outcomes.outcomes([Counterfactual(whole), *without], target)
        if self.fault != "target" and not world.retraining.targets[target]:
            found = -found
        lost = found[0] - found[1:]
        if self.fault == "neighbour":
            lost = np.roll(lost, 9, axis=0)
        if self.fault == "one subset":  # of the same places whatever the seed
            subset = np.random.RandomState(0).permutation(len(scores))[: len(scores) // 2]
            scores, lost = scores[subset], lost[subset]
        one = lost[scores.argmax(0), np.arange(len(scores.T))]
        value = float(one[:3].mean() if self.fault == "first tests" else one.mean())
        return MetricResult(value, value, value, float(lost.mean()), 0.95)


# --- settings -------------------------------------------------------------------------------
RATE, STEPS = 0.2, 6


@frozen(slots=False)
class ToyRetraining:
    """Logistic regression by a few full steps; the seed decides the initial weights."""

    train_data: tuple
    test_data: tuple
    fingerprint: str
    fault: str = ""
    rate: float = RATE
    together: int = 4
    targets = {"loss": False, "margin": True}

    @property
    def n_train(self):
        return len(self.train_data[0]) - (self.fault == "count")

    @property
    def n_test(self):
        return len(self.test_data[0])

    def path(self, one):
        mask = one.mask.copy()
        if self.fault == "masks":
            mask = np.arange(len(mask)) < mask.sum()  # as many of the first ones
        if self.fault == "other half" and not mask.all():
            mask = ~mask
        if self.fault == "trains globally":
            torch.manual_seed(one.seed)
        inputs, labels = (t[torch.from_numpy(mask)] for t in self.train_data)
        random = torch.Generator().manual_seed(one.seed)
        weight = torch.randn(2, 3, generator=random, dtype=torch.float64)
        for _ in range(STEPS):
            yield {"weight": weight.clone()}
            error = (inputs @ weight.T).softmax(1) - nn.functional.one_hot(labels, 2)
            weight = weight - self.rate * error.T @ inputs / len(inputs)
        yield {"weight": weight}

    def train(self, counterfactuals):
        of_mask = {}
        for place, one in enumerate(counterfactuals):
            state = list(self.path(one))[-1]
            if self.fault == "by mask":
                state = of_mask.setdefault(one.mask.tobytes(), state)
            if self.fault == "company":
                state = {"weight": state["weight"] * (1 + place)}
            if self.fault == "everything" and one.mask.all():
                state = {"weight": state["weight"] * 1.1}
            yield state

    def measure(self, state):
        inputs, labels = self.test_data
        loss = nn.functional.cross_entropy(inputs @ state["weight"].T, labels, reduction="none")
        loss = loss.numpy() * (2 if self.fault == "measure" else 1)
        return {"loss": loss, "margin": -np.log(np.expm1(loss))}


@frozen
class ToySetting:
    """Points of two classes; one that gives its retraining alone trains nothing for it."""

    fault: str = ""
    alone: bool = False
    classes: bool = True
    rate: float = RATE
    title = "points"
    metrics = ("lds",)

    @property
    def sizes(self):
        small = (50, 10) if self.fault == "sizes" else (20, 10)
        return {"full": (50, 30), "small": small[::-1] if self.fault == "sizes" else small}

    @property
    def retraining(self):
        """Return how the retraining of a world is made, None where it is not given alone."""
        return self._retraining if self.alone else None

    def _retraining(self, size=None, seed=0, wrong=None):
        return self.load(size, 0 if self.fault == "alone" else seed, wrong).retraining

    def load(self, size=None, seed=0, wrong=None):
        size = (50, 30) if size is None else size
        wrong = 0.0 if wrong is None else wrong
        fits = 1 <= size[0] <= 50 and 1 <= size[1] <= 30
        if self.fault != "takes" and not (fits and 0 <= seed < 2**32 and 0 <= wrong < 1):
            raise InputError("toy: no such world")
        size = min(50, max(1, size[0])), min(30, max(1, size[1]))
        if self.fault == "global":
            torch.rand(1)
        if self.fault == "dtype":
            torch.set_default_dtype(torch.float64)
        random = np.random.default_rng(abs(seed))
        inputs = torch.from_numpy(random.standard_normal((sum(size), 3)))
        true = (inputs[:, 0] > 0).long()
        labels = true.clone()
        count = 0 if not 0 < wrong < 1 else round(wrong * size[0])
        count += self.fault == "miscounts" and count > 0
        labels[torch.from_numpy(random.permutation(size[0])[:count])] ^= 1
        train = inputs[: size[0]], labels[: size[0]]
        test = inputs[size[0] :], true[size[0] :]
        if self.fault == "overlap":
            test = inputs[: size[1]], true[: size[1]]
        rate = "" if self.fault == "recipe" else self.rate
        said = f"{size} {seed} {wrong} {rate}" if self.fault != "fingerprint" else f"{wrong} {rate}"
        if self.fault == "train size":
            said = f"{size[1]} {seed} {wrong} {rate}"
        given = (inputs[: size[0]], true[: size[0]]) if self.fault == "right labels" else train
        retraining = ToyRetraining(given, test, said, self.fault, self.rate)
        whole = Counterfactual(np.ones(size[0], dtype=bool), abs(seed) % 2**32)
        run = list(retraining.path(whole))
        (end,) = retraining.train([whole])
        end = run[-1] if self.fault == "everything" else end
        model = nn.utils.skip_init(nn.Linear, 3, 2, bias=False).double().eval()
        model.load_state_dict(end)
        if self.fault == "mode":
            model.add_module("dropout", nn.Dropout())
        along = [run[2], run[3] if self.fault == "ends" else end]

        def steps():
            taken = run[3:] if self.fault == "steps" else run
            named = [(f"step {i}", state) for i, state in enumerate(taken)]
            step = TrainingStep(None)
            kept = [
                Checkpoint(name, i, len(named), RATE, state, step=step)
                for i, (name, state) in enumerate(named)
            ]
            return Task(model, "cross-entropy", checkpoints=kept)

        return World(
            task=Task(model, "cross-entropy", checkpoints=[end]),
            trajectory=Task(model, "cross-entropy", checkpoints=along, learning_rates=[RATE] * 2),
            train=train,
            test=test,
            train_ids=tuple(f"train {i}" for i in range(size[0])),
            test_ids=tuple(f"test {j}" for j in range(size[1])),
            retraining=retraining,
            target="loss",
            damping=0.1,
            threads=1,
            facts={"data": self.title, **self.said_besides(train)},
            true_labels=true[: size[0]].numpy() if self.classes else None,
            pictures=self.pictures(size),
            steps=steps,
        )

    def said_besides(self, train):
        """Return facts that a fault adds."""
        faulty = {"facts": time.time_ns(), "array": train[0].mean(0).numpy()}
        return {name: value for name, value in faulty.items() if name == self.fault}

    def pictures(self, size):
        """Return pictures where a fault asks for them: rows of pixels."""
        if self.fault != "flat pictures":
            return None
        return tuple(np.zeros((count, 64), np.uint8) for count in size)
