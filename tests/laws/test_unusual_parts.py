"""Parts that are right and unlike the shipped ones: no law rejects them."""

import numpy as np
import pytest
import torch
from attrs import frozen
from torch import nn

import dattri_core as dattri
from dattri_core.laws import check


# --- folds ------------------------------------------------------------------------------------
@frozen
class Median:
    """The median over checkpoints, all of which its state holds."""

    order = "reverse"
    needs = frozenset()

    def update(self, state, scored, snapshot):
        values = scored.values.unsqueeze(0)
        return {"all": values if state is None else torch.cat([state["all"], values])}

    def finish(self, state):
        return state["all"].quantile(0.5, dim=0)


@frozen
class RateMean:
    """The mean with learning rates as weights, times the weights of train rows."""

    order = "forward"
    needs = frozenset({"learning-rate", "weight"})

    def update(self, state, scored, snapshot):
        rate = snapshot.learning_rate
        part = rate * scored.values * scored.weight.unsqueeze(1)
        if state is None:
            return {"sum": part, "rates": torch.full((), rate, dtype=torch.float64)}
        return {"sum": state["sum"] + part, "rates": state["rates"] + rate}

    def finish(self, state):
        return state["sum"] / state["rates"].to(state["sum"])


# --- metrics ----------------------------------------------------------------------------------
@frozen
class Pairs:
    """Share of drawn pairs in which the train example of the test's class scores higher.

    The chance of random pairs is drawn as well. Values are from -1 to 0 where they are negative.
    """

    drawn: int = 400
    negative: bool = False
    needs = frozenset({"labels"})

    def measure(self, evidence):
        world, scores = evidence.world, np.asarray(evidence.scores, dtype=float)
        size = len(world.train_ids), len(world.test_ids)
        if len(world.train) < 2 or scores.shape != size or not np.isfinite(scores).all():
            raise dattri.InputError("pairs: no labels, or scores of another world")
        train, test = world.train[-1].numpy(), world.test[-1].numpy()
        random = np.random.default_rng(evidence.seed)
        one, two = random.integers(size[0], size=(2, self.drawn))
        tests = random.integers(size[1], size=self.drawn)
        fits = (train[one] == test[tests]) & (train[two] != test[tests])
        if not fits.any():
            raise dattri.InputError("pairs: none of them is of two classes")
        gaps = (scores[one, tests] - scores[two, tests])[fits]
        value = float(np.where(gaps == 0, 0.5, gaps > 0).mean())
        chance = float((random.random(20 * self.drawn) > 0.5).mean())
        wide = 2 / float(np.sqrt(fits.sum()))
        low, high, shift = max(0.0, value - wide), min(1.0, value + wide), float(self.negative)
        return dattri.MetricResult(
            value - shift,
            low - shift,
            high - shift,
            chance - shift,
            0.95,
            bounds=(-shift, 1 - shift),
        )


# --- settings ---------------------------------------------------------------------------------
class TokenModel(nn.Module):
    """Next tokens of the token before."""

    def __init__(self, dtype):
        super().__init__()
        self.embedding = nn.Embedding(11, 4, dtype=dtype)
        self.head = nn.Linear(4, 11, dtype=dtype)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embedding(input_ids))


def trained(dtype, seed):
    """Return the model as a seed begins it, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TokenModel(dtype).eval()


@frozen
class TokenRetraining:
    """A few full steps of gradient descent; batches are mappings."""

    train_data: dict
    test_data: dict
    fingerprint: str
    dtype: torch.dtype
    together = 1
    targets = {"loss": False}

    @property
    def n_train(self):
        return len(self.train_data["labels"])

    @property
    def n_test(self):
        return len(self.test_data["labels"])

    def path(self, one):
        kept = torch.from_numpy(np.flatnonzero(one.mask))
        model = trained(self.dtype, one.seed)
        batch = {name: values[kept] for name, values in self.train_data.items()}
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            yield {name: t.clone() for name, t in model.state_dict().items()}
            optimiser.zero_grad()
            dattri.causal_lm(model, batch).float().mean().backward()
            optimiser.step()
        yield {name: t.clone() for name, t in model.state_dict().items()}

    def train(self, counterfactuals):
        for one in counterfactuals:
            yield list(self.path(one))[-1]

    def measure(self, state):
        model = trained(self.dtype, 0)
        model.load_state_dict(state)
        with torch.no_grad():
            return {"loss": dattri.causal_lm(model, self.test_data).double().numpy()}


@frozen
class Tokens:
    """Twelve sequences that end in padding, of one size only; no classes."""

    dtype: torch.dtype
    title = "tokens"
    metrics = ("lds",)
    sizes = {"full": (12, 4), "small": (12, 4)}

    def load(self, size=None, seed=0, wrong=None):
        if size not in (None, (12, 4), (12, 3)) or wrong not in (None, 0):
            raise dattri.InputError("tokens: it has 12 train and 3 or 4 test examples, no classes")
        dattri.Counterfactual(np.ones(1, dtype=bool), seed)  # refuses a seed that cannot be
        count = (size or (12, 4))[1]
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, 11, (12 + count, 7), generator=random)
        ends = torch.randint(3, 8, (12 + count, 1), generator=random)
        mask = (torch.arange(7) < ends).long()
        batch = {
            "input_ids": tokens * mask,
            "attention_mask": mask,
            "labels": tokens.masked_fill(mask == 0, -100),
        }
        train, test = (
            {name: values[side] for name, values in batch.items()}
            for side in (slice(0, 12), slice(12, None))
        )
        retraining = TokenRetraining(train, test, f"{seed} {count} {self.dtype}", self.dtype)
        run = list(retraining.path(dattri.Counterfactual(np.ones(12, dtype=bool), seed)))
        model = trained(self.dtype, 0)
        model.load_state_dict(run[-1])
        along, rates = [run[1], run[-1]], [0.1, 0.1]
        return dattri.World(
            task=dattri.Task(model, "causal-lm", checkpoints=[run[-1]]),
            trajectory=dattri.Task(model, "causal-lm", checkpoints=along, learning_rates=rates),
            train=train,
            test=test,
            train_ids=tuple(f"train {i}" for i in range(12)),
            test_ids=tuple(f"test {j}" for j in range(count)),
            retraining=retraining,
            target="loss",
            damping=0.1,
            facts={"data": self.title},
        )


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("fold", Median()),
        ("fold", RateMean()),
        ("metric", Pairs()),
        ("metric", Pairs(negative=True)),
        ("setting", Tokens(torch.float32)),
        ("setting", Tokens(torch.bfloat16)),
    ],
)
def test_an_unusual_part_meets_the_laws(kind, part):
    report = check(kind, part)
    assert report.ok, str(report)
