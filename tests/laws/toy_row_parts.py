"""Toy projectors, scorers, folds and methods: right without a fault, broken with one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch.utils.data import DataLoader
from toy_loose import emptied
from toy_solver_parts import noise

from dattri_core import BlockSpec, DenseBlock, Rows, Scored, Space


# --- projectors -----------------------------------------------------------------------------
@frozen
class ToyProjector:
    """A normal matrix on both factors of an outer block, one matrix on a dense block."""

    fault: str = ""

    @property
    def gives(self):
        bent = self.fault in ("bend", "count")
        return frozenset({"keeps-factors"} if bent else {"keeps-factors", "adjoint"})

    def out_space(self, space):
        if self.fault == "impure":
            torch.zeros(1)
        return _out_space(space, 4 if self.fault == "space" else 3)

    def build(self, space, *, stream, device):
        matrices = {}
        for spec in space:
            generator = None if self.fault == "global" else stream.generator(spec.name)

            def normal(rows, columns, generator=generator):
                numbers = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
                numbers = numbers / rows**0.5
                return numbers if self.fault == "home" else numbers.to(device)

            sizes = spec.shape if spec.kind == "outer" else (spec.size,)
            matrices[spec.name] = [normal(2 if len(sizes) == 2 else 3, size) for size in sizes]
        return ToyMap(self.fault, space, _out_space(space, 3), matrices)


@frozen
class ToyDataProjector(ToyProjector):
    """The same matrices, times the mean square of all entries of the train rows."""

    needs = frozenset({"rows"})

    def fit(self, problem):
        total = count = 0
        for rows in problem.rows():
            total, count = total + float(rows.flat().square().sum()), count + len(rows)
            if self.fault == "first":
                break
        built = self.build(problem.space, stream=problem.random, device=problem.device)
        scaled = {n: [m * total / count for m in ms] for n, ms in built.matrices.items()}
        return evolve(built, matrices=scaled)


@frozen
class ToyFlatProjector:
    """A normal matrix on the whole row; what parts of a row give adds up."""

    fault: str = ""
    gives = frozenset({"adjoint"})

    def out_space(self, space):
        return Space((BlockSpec("sketch", "dense", (3,)),))

    def build(self, space, *, stream, device):
        size = (3, space.dim)
        matrix = torch.randn(*size, generator=stream.generator(), dtype=torch.float64).to(device)
        if self.fault == "unsigned":
            hashed = torch.randint(3, (space.dim,), generator=stream.generator("hash"))
            matrix = 3**0.5 * torch.nn.functional.one_hot(hashed, 3).T.double().to(device)
        matrix = {"large": 37, "scale": 1.1}.get(self.fault, 1) * matrix / 3**0.5
        return ToyFlatMap(self.fault, space, self.out_space(space), matrix)


@frozen(eq=False)
class ToyFlatMap:
    fault: str
    in_space: Space
    out_space: Space
    matrix: torch.Tensor
    blockwise = False
    additive = True

    def map(self, rows):
        total = torch.zeros(len(rows), 3, dtype=rows.dtype, device=rows.device)
        for spec in rows.space:
            known = rows.space if self.fault == "place" else self.in_space
            start = known.offsets[spec.name]
            columns = self.matrix[:, start : start + spec.size].to(rows.dtype)
            total += rows.blocks[spec.name].flat() @ columns.T
        return Rows(self.out_space, {"sketch": DenseBlock(total)}, rows.index, rows.aux)

    def adjoint(self, rows):
        flat = rows.flat() @ self.matrix.to(rows.dtype)
        return Rows.from_flat(self.in_space, flat, rows.index, rows.aux)


def _out_space(space, dense):
    return Space(
        tuple(BlockSpec(s.name, s.kind, (2, 2) if s.kind == "outer" else (dense,)) for s in space)
    )


@frozen(eq=False)
class ToyMap:
    fault: str
    in_space: Space
    out_space: Space
    matrices: dict
    blockwise = True

    def map(self, rows):
        blocks = {}
        if self.fault == "in place":
            emptied(rows)
        for name, block in rows.blocks.items():
            *out, last = (m.to(rows.dtype) for m in self.matrices[name])
            if out:
                mapped = block.map(lambda x, m=last: x @ m.T, lambda y, m=out[0]: y @ m.T)
                if self.fault == "forms":
                    mapped = mapped.dense()
                if self.fault == "formed" and block.positions is None:
                    mapped = DenseBlock(2 * mapped.values)
            else:
                values = block.flat() @ last.T
                if self.fault == "bend":
                    values = values.abs()
                if self.fault == "count" and len(rows) == 1:
                    values = 1.1 * values
                if self.fault == "device" and values.device.type != "cpu":
                    values = 1.001 * values
                if self.fault == "leak" and len(rows.space) == 1:
                    values = 2 * values
                if self.fault == "coarse" and values.dtype == torch.float32:
                    values = values.bfloat16().float()
                mapped = DenseBlock(values)
            blocks[name] = mapped
        space = self.out_space.select(blocks)
        index = torch.zeros_like(rows.index) if self.fault == "index" else rows.index
        return Rows(space, blocks, index, rows.aux)

    def adjoint(self, rows):
        blocks = {}
        for name, block in rows.blocks.items():
            *out, last = (m.to(rows.dtype) for m in self.matrices[name])
            values = block.dense().values
            values = out[0].T @ values @ last if out else values @ last
            blocks[name] = DenseBlock(2 * values if self.fault == "adjoint" else values)
        return Rows(self.in_space, blocks, rows.index, rows.aux)


# --- scorers --------------------------------------------------------------------------------
@frozen
class ToyScorer:
    """Inner products; relative ones with a form; where weighted, by the label of the train row."""

    fault: str = ""
    form: str = ""
    weighs: bool = False

    @property
    def needs(self):
        return frozenset({self.form, "label" if self.weighs else ""} - {""})

    @property
    def locality(self):
        return "row" if self.fault == "locality" else "tile"

    @property
    def bilinear(self):
        return self.fault in ("", "thrice")

    def pair(self, train, test):
        part = train.inner(test)
        if self.fault == "thrice":
            part = 3 * part
        if self.fault == "bend":
            part = part * part.abs()
        if self.fault == "formed" and train.positions is None and len(train.shape) == 2:
            part = 2 * part
        return part

    def finish(self, total, train, test):
        values = total.clone()
        if self.form and self.fault != "idle":
            number = getattr(train, self.form.replace("-", "_"))
            size = number if self.fault == "zero" else number.clamp_min(1e-12)
            values = values / size.unsqueeze(1)
            if self.fault == "in place":
                number.mul_(2)
        if self.fault == "index":
            values = values / (1 + train.index.to(values)).unsqueeze(1)
        if self.fault == "reads":
            train.aux.get("secret")
        if self.fault == "device" and values.device.type != "cpu":
            values = 1.001 * values
        if self.fault == "place" and len(values) > 3:
            values[3] *= 1.5
        if self.fault == "tile":
            values = values / values.abs().amax(0).clamp_min(1e-12)
        if self.fault == "queries":
            values = values / values.abs().amax(1, keepdim=True).clamp_min(1e-12)
        if self.fault == "negative":
            values = -values
        if self.fault == "absolute":
            values = values.abs()
        if self.fault == "threshold":
            values = values.sign() * (values.abs() - 1).clamp_min(0)
        if self.fault == "noise":
            values = values * noise()
        if self.fault == "coarse" and values.dtype == torch.float32:
            values = values.bfloat16().float()
        if self.fault == "double":
            values = 2 * values
        if self.fault == "itself":
            same = train.index.unsqueeze(1) == test.index
            values = values.masked_fill(same.to(values.device), 0.0)
        if self.fault == "floor":
            values = values * (values.abs() > 1e-4)
        return Scored(values, self.weight(values, train) if self.weighs else None)

    def weight(self, values, train):
        """Return one plus the label, or what a fault makes of it."""
        if self.fault == "unread":
            return torch.ones_like(values[:, 0])
        weight = (1 + train.aux["label"]).to(values)
        if self.fault == "tile weight":
            weight = weight * len(values)
        if self.fault == "test weight":
            weight = weight * len(values.T)
        if self.fault == "negative weight":
            weight = -weight
        return weight


@frozen(eq=False)
class ForgetfulScorer:
    """A scorer that does not equal the same scorer made again."""

    needs = frozenset()
    locality = "tile"

    def pair(self, train, test):
        return train.inner(test)

    def finish(self, total, train, test):
        return Scored(total)


# --- folds ----------------------------------------------------------------------------------
@frozen
class ToyFold:
    """The mean, of scores times weights where it is weighted, times learning rates where rated."""

    fault: str = ""
    weighted: bool = False
    rated: bool = False

    @property
    def needs(self):
        words = {"weight": self.weighted, "learning-rate": self.rated}
        return frozenset(word for word, needed in words.items() if needed)

    @property
    def order(self):
        return "sideways" if self.fault == "order" else "forward"

    def update(self, state, scored, snapshot):
        values = scored.values
        if self.weighted:
            weight = scored.weight.unsqueeze(1)
            values = values * (weight.sqrt() if self.fault == "root" else weight)
        if self.rated and self.fault != "unread":
            values = values * snapshot.learning_rate ** (2 if self.fault == "square" else 1)
        if self.fault == "asks late":
            values = values * (snapshot.learning_rate or 1.0)
        if self.fault == "weighs" and scored.weight is not None:
            values = values * scored.weight.unsqueeze(1)
        if self.fault == "name" and "step" in snapshot.name:
            values = 2 * values
        if self.fault == "columns":
            values = values * len(values.T) / 3
        if self.fault == "zero":
            values = values * (values / values)
        if self.fault == "floor":
            values = values * (values.abs() > 1e-4)
        if self.fault == "device" and values.device.type != "cpu":
            values = 1.001 * values
        if self.fault == "clamp":
            values = values.clamp(-5, 5)
        if self.fault == "turn" and snapshot.position > 0:
            values = -values
        if self.fault == "rows" and len(values) != 4:
            values = 2 * values
        if self.fault == "noise":
            values = values * noise()
        if self.fault == "coarse" and values.dtype == torch.float32:
            values = values.bfloat16().float()
        if state is None:
            count = torch.ones(())
            total = values if self.fault == "in place" else values.clone()
        else:
            count = state["count"] + 1
            total = state["total"]
            total = total.add_(values) if self.fault == "in place" else total + values
        return {"total": total, "count": int(count) if self.fault == "number" else count}

    def finish(self, state):
        count = state["count"].clamp_max(3) if self.fault == "three" else state["count"]
        mean = state["total"] / count
        return 2 * mean if self.fault == "double" else mean


# --- methods --------------------------------------------------------------------------------
@frozen
class ToyAttributor:
    """A method behind a door of its own."""

    inner: Any
    fault: str = ""

    def attribute(self, task, train, test, **settings):
        if self.fault == "eval":
            task.model.eval()
        if self.fault == "sides" and task.target is not None:
            sign, asked = task.sign, task.target
            task = task.with_(loss=lambda m, b: sign * asked.function(m, b), target=asked)
        scores = self.inner.attribute(task, train, test, **settings)
        values = torch.as_tensor(scores.values).clone()
        if self.fault == "device" and task.device.type != "cpu":
            values = 1.001 * values
        if self.fault == "train place":
            values[3] *= 1.5
        if self.fault == "test place" and values.shape[1] > 3:
            values[:, 3] *= 1.5
        if self.fault == "queries":
            values = values / values.abs().amax(1, keepdim=True)
        if self.fault == "once" and isinstance(train, tuple) and len(train[0]) < 50:
            flat = train[0].flatten(1)
            for i in range(1, len(flat)):
                if (flat[:i] == flat[i]).all(1).any():
                    values[i] = 0
        if self.fault == "batches" and isinstance(train, DataLoader) and train.batch_size == 2:
            values = 1.1 * values
        if self.fault == "memory" and settings.get("memory"):
            values = 1.1 * values
        if self.fault == "noise":
            values = values * noise()
        if self.fault == "sign" and task.sign < 0:
            values = -values
        if self.fault == "negative":
            values = -values
        if self.fault == "coarse" and values.dtype == torch.float32:
            values = 1.1 * values
        ids = list(scores.train_ids)[:-1] if self.fault == "ids" else list(scores.train_ids)
        return SimpleNamespace(values=values, train_ids=ids, test_ids=list(scores.test_ids))


@frozen
class ToyFitting(ToyAttributor):
    """An attributor that can be fitted; at fault, twice the self-influence, or scores of a pool."""

    scorer: Any = field(factory=ToyScorer)

    def fit(self, task, train, **settings):
        fitted = self.inner.fit(task, train, **settings)
        own = fitted.self_influence()
        return SimpleNamespace(
            self_influence=lambda: 2 * own if self.fault == "own" else own,
            attribute=fitted.attribute,
            over=lambda pool: self.pooled(fitted.over(pool), len(pool[0]) < len(own)),
        )

    def pooled(self, fitted, fewer):
        if self.fault != "pool" or not fewer:
            return fitted
        return SimpleNamespace(
            attribute=lambda test: SimpleNamespace(values=2 * fitted.attribute(test).values)
        )
