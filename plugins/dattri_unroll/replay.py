"""A recorded run, taken again without some examples: what `magic` predicts to first order."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import asdict, define, field, frozen
from dattri_parts.training.description import Description
from dattri_parts.training.fingerprint import digest_of
from dattri_parts.training.measures import check_targets, measured, outcomes_of
from dattri_parts.training.objective import loss_of
from torch import Tensor, nn

from dattri_core import (
    AdamState,
    Checkpoint,
    Counterfactual,
    InputError,
    Loss,
    NumericsError,
    SpecError,
    Task,
    TrainingStep,
    batch_size,
    map_tensors,
    take,
)

VERSION = "replay-2"
"""Changes when the same run would be taken again otherwise."""
TOLERANCE = 0.01
"""Largest difference of the first step from the recorded one, relative to its length."""
ROUNDING = 8
"""Units in the last place by which weights may differ besides."""
MEASURED = 512
"""Test examples in a forward pass, at most."""

Array = np.ndarray[Any, Any]


@define(eq=False)
class _Held:
    """What is made once."""

    fingerprint: str | None = None
    checked: bool = False


@frozen(eq=False)
class RunRetraining:
    """A `Retraining` that takes a recorded run again with some of its examples left out.

    The same weights at the start, the same batches in the same order, the same learning rates; step
    s goes along (scale_s / |B_s|) sum_{i in B_s, i kept} grad loss_i(theta): an example that is
    left out has the weight 0. So `magic` gives the derivative of what changes here, and is measured
    by it; ``CounterfactualStore(folder, RunRetraining(...))`` answers for any masks. The seed of a
    counterfactual draws nothing.

    Source: Ilyas and Engstrom 2025, MAGIC: Near-Optimal Data Attribution for Deep Learning (arXiv
    2504.16430), section 2, predictive data attribution of a single model.

    Args:
        task: Model, loss and a recorded run as its checkpoints,
            ``Task(model, loss, checkpoints=dattri_unroll.read_run(folder))``.
        train_data: A nest of tensors, in the order in which the positions of the run count.
        test_data: Likewise, what is measured on.
        targets: What is measured, of ``"loss"``, ``"margin"``, ``"logit"`` and ``"correct"``.

    Raises:
        InputError: The loss does not have the targets.
        SpecError: The checkpoints are no whole recorded run.
    """

    task: Task
    train_data: Any
    test_data: Any
    targets: Mapping[str, bool] = field(converter=measured)
    _held: _Held = field(init=False, factory=_Held, repr=False)

    def __attrs_post_init__(self) -> None:
        check_targets(self.targets, self._loss)
        if len(self._run) < 2 or any(c.step is None for c in self._run):
            raise SpecError(
                f"replay: the task has {len(self._run)} checkpoints, and it is not known which "
                "steps were taken from them; give Task(model, loss, "
                "checkpoints=dattri_unroll.read_run(folder))"
            )
        for checkpoint in self._run[:-1]:
            batch = self._batch(checkpoint)
            if not len(batch) or int(batch.max()) >= self.n_train:
                raise SpecError(
                    f"replay: the step at {checkpoint.name!r} saw {len(batch)} examples, the last "
                    f"of them {int(batch.max()) if len(batch) else None}, and the train set has "
                    f"{self.n_train}; give the whole run and the train set that it was recorded "
                    "with"
                )

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        return batch_size(self.train_data)

    @property
    def n_test(self) -> int:
        """Return the number of test examples."""
        return batch_size(self.test_data)

    @property
    def together(self) -> int:
        """Return 1: runs are taken one after another."""
        return 1

    @property
    def fingerprint(self) -> str:
        """Return a hash of the start, the steps, the data, the code and the targets; taken once."""
        if self._held.fingerprint is None:
            said = {
                "version": VERSION,
                "model": Description().of(self.task.model),
                "loss": Description().of(self._loss),
                "start": self._run[0].fingerprint(self.task.model),
                "steps": [self._words(checkpoint) for checkpoint in self._run],
                "data": [digest_of(part) for part in (self.train_data, self.test_data)],
                "targets": sorted(self.targets),
            }
            self._held.fingerprint = _hash_of(said)
        return self._held.fingerprint

    def train(self, counterfactuals: Sequence[Counterfactual]) -> Iterator[Mapping[str, Tensor]]:
        """Yield the state dict at the end of the run for each counterfactual, in their order.

        Raises:
            InputError: A mask is not one of this train set, or the first step, taken again with all
                examples, is not the recorded one.
            NumericsError: Weights are not finite.
        """
        for counterfactual in counterfactuals:
            if len(counterfactual.mask) != self.n_train:
                raise InputError(
                    f"replay: the mask of a counterfactual has {len(counterfactual.mask)} truth "
                    f"values, and there are {self.n_train} train examples"
                )
        self._rehearse()
        return (self._again(torch.from_numpy(c.mask.copy())) for c in counterfactuals)

    def measure(self, state: Mapping[str, Tensor]) -> dict[str, Array]:
        """Return the outcome of every target on every test example, ``[n_test]`` in float64.

        Raises:
            NumericsError: An outcome is not finite.
        """
        model = self._model(state)
        found: dict[str, list[Tensor]] = {target: [] for target in self.targets}
        with torch.no_grad():
            for start in range(0, self.n_test, MEASURED):
                batch = self._placed(self.test_data, slice(start, start + MEASURED))
                for target, values in outcomes_of(self._loss, self.targets, model, batch).items():
                    found[target].append(values)
        outcomes = {target: torch.cat(parts).cpu().numpy() for target, parts in found.items()}
        odd = [target for target, values in outcomes.items() if not np.isfinite(values).all()]
        if odd:
            raise NumericsError(
                f"replay: the {odd[0]} of a test example is not finite at the end of a run; the "
                "run without those examples diverged"
            )
        return outcomes

    @property
    def _run(self) -> tuple[Checkpoint, ...]:
        return self.task.checkpoints

    @property
    def _loss(self) -> Loss:
        return loss_of(self.task.loss)

    def _batch(self, checkpoint: Checkpoint) -> Tensor:
        assert checkpoint.step is not None
        batch = checkpoint.step.batch
        return torch.arange(self.n_train) if batch is None else batch.cpu()

    def _words(self, checkpoint: Checkpoint) -> Any:
        """Return what a step is besides its weights, JSON-ready."""
        assert checkpoint.step is not None
        facts = asdict(checkpoint.step, recurse=True)
        facts["batch"] = self._batch(checkpoint).tolist()
        return [checkpoint.learning_rate, facts]

    def _placed(self, data: Any, index: Any) -> Any:
        return map_tensors(lambda tensor: tensor.to(self.task.device), take(data, index))

    def _model(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return a copy of the model, in eval mode as it is attributed, with other weights."""
        model = copy.deepcopy(self.task.model).eval()
        own = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, values in state.items():
                own[name].copy_(values)
        return model

    def _again(self, mask: Tensor) -> Mapping[str, Tensor]:
        """Return the weights at the end of the run with the examples of a mask."""
        model = self._model(self._run[0].load(self.task.model))
        optimizer = _optimizer_of(model, self._run[0])
        for checkpoint in self._run[:-1]:
            self._step(model, optimizer, checkpoint, mask)
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        if not all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point()):
            raise NumericsError(
                f"replay: the weights at the end of the run with {int(mask.sum())} of "
                f"{len(mask)} examples are not finite; the run diverged without the others"
            )
        return state

    def _step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        checkpoint: Checkpoint,
        mask: Tensor,
    ) -> None:
        """Take a step with the examples of its batch that are kept."""
        step = checkpoint.step
        assert step is not None
        batch = self._batch(checkpoint)
        kept = batch[mask[batch]]
        optimizer.zero_grad(set_to_none=True)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if len(kept):
            values = self._loss(model, self._placed(self.train_data, kept))
            (values.sum() * (step.scale / len(batch))).backward()  # type: ignore[no-untyped-call]
        for parameter in trained:
            if parameter.grad is None:  # decay and momentum go on
                parameter.grad = torch.zeros_like(parameter)
        if step.clip is not None:
            nn.utils.clip_grad_norm_(trained, step.clip)
        for group in optimizer.param_groups:
            group["lr"] = (checkpoint.learning_rate or 0.0) * step.rate_of(group["name"])
            group["weight_decay"] = step.decay_of(group["name"])
        optimizer.step()

    def _rehearse(self) -> None:
        """Raise `InputError` unless the first step comes out as it was recorded; once."""
        if self._held.checked:
            return
        start = self._run[0].load(self.task.model)
        after = self._run[1].load(self.task.model)
        model = self._model(start)
        everything = torch.ones(self.n_train, dtype=torch.bool)
        self._step(model, _optimizer_of(model, self._run[0]), self._run[0], everything)
        gap = move = scale = 0.0
        for name, parameter in model.named_parameters():
            gap += float((parameter.detach().double() - after[name].double()).square().sum())
            move += float((after[name].double() - start[name].double()).square().sum())
            rounding = ROUNDING * torch.finfo(parameter.dtype).eps
            scale += float(start[name].double().square().sum()) * rounding**2
        if not gap**0.5 <= TOLERANCE * move**0.5 + scale**0.5:
            raise InputError(
                f"replay: the first step, taken again with all examples, ends {gap**0.5:.3g} from "
                f"the recorded weights, after a move of {move**0.5:.3g}; the train set must be the "
                "one that was trained on, in its order, and the loss the one that was minimised, a "
                "mean over the batch (else record its scale), without dropout, batch statistics or "
                "clipping that was not recorded"
            )
        self._held.checked = True


def _hash_of(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _optimizer_of(model: nn.Module, first: Checkpoint) -> torch.optim.Optimizer:
    """Return the optimiser of a run as it was before the first step."""
    step: TrainingStep | None = first.step
    assert step is not None
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [p], "name": name} for name, p in named.items()]
    rule = step.adam
    if rule is None:
        return torch.optim.SGD(
            groups,
            lr=0.0,
            momentum=step.momentum,
            dampening=step.dampening,
            nesterov=step.nesterov,
        )
    kind = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
    optimizer = kind(groups, lr=0.0, betas=rule.betas, eps=rule.epsilon)
    if isinstance(first.optimiser, AdamState):
        for name, own in first.optimiser.load(model, list(named)).items():
            optimizer.state[named[name]] = {
                "step": torch.tensor(float(own.step)),
                "exp_avg": own.first.clone().to(named[name]),
                "exp_avg_sq": own.second.clone().to(named[name]),
            }
    return optimizer
