"""The recorder: follows a user's own training loop and writes down every step."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attrs import define, field
from torch import Tensor, nn

from dattri_core import InputError, discard_leftovers
from dattri_unroll.run_folder import (
    StepFacts,
    read_weights,
    recorded_steps,
    step_file,
    write_step,
)

BUFFER = "momentum_buffer"
"""Of a parameter, in the state of `torch.optim.SGD`."""

_log = logging.getLogger("dattri")


@contextmanager
def record(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path
) -> Iterator[Recorder]:
    """Record the training that runs inside of the block; it is whole when the block ends well.

    ::

        with record(model, optimizer, "run") as run:
            for indices in batches:  # positions in the train set
                optimizer.zero_grad()
                loss(model, train[indices]).mean().backward()
                run.step(indices)
                optimizer.step()

    Every step keeps the weights that it was taken from, T + 1 files of the size of the model for T
    steps. A block that ends with an error leaves a run that another call goes on with: see
    `Recorder`.

    Args:
        model: In training; only read.
        optimizer: `torch.optim.SGD`, of all trainable parameters. Weight decay and changing
            learning rates are followed, and momentum, Nesterov's too, that stays the same.
        folder: Of the run; made where there is none.

    Raises:
        InputError: Another optimiser, or weights that fit no recorded step.
        StoreError: The folder holds a damaged run.
    """
    run = Recorder(model, optimizer, Path(folder))
    try:
        yield run
        run.finish()
    finally:
        run.close()


@define(eq=False)
class Recorder:
    """A run that is being recorded.

    In a folder that holds a run that was stopped, it goes on at the last recorded step whose
    weights the model has now, as restored by the user, and with momentum the state of the optimiser
    too; from there on steps are recorded again. `position` says which step comes next.

    Args:
        model: In training.
        optimizer: Takes the steps.
        folder: Of the run.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    folder: Path
    position: int = field(default=0, init=False)
    _run: str = field(default="", init=False)
    _found: int = field(default=0, init=False)  # files of the run that was stopped
    _recorded: int = field(default=0, init=False)  # since this object was made
    _taken: int = field(default=0, init=False)  # by the optimiser, since then
    _hook: Any = field(default=None, init=False)
    _momentum: _Momentum = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._momentum = _settings(self.optimizer)[2]
        _require_all_parameters(self.model, self.optimizer)
        steps = recorded_steps(self.folder) if self.folder.exists() else []
        self._run = steps[0].run if steps else secrets.token_hex(8)
        self._found = len(steps)
        for position in (len(steps), len(steps) - 1):  # one of them was being written at a kill
            discard_leftovers(step_file(self.folder, position))
        if steps:
            self.position = self._resume(steps)
            self._require_buffers()
        self._hook = self.optimizer.register_step_post_hook(self._count)

    def step(self, batch: Tensor | Sequence[int] | None = None, *, epoch: int = 0) -> None:
        """Write down the step that the optimiser is about to take; call it just before.

        Args:
            batch: Positions of the batch's examples in the train set, ``[B]``; None: all of it.
            epoch: Which pass over the train set the step belongs to.

        Raises:
            InputError: The optimiser has taken a step that was not recorded, or has another
                momentum than before; or the batch is empty or holds no positions.
        """
        self._require_in_step("step")
        rate, decay, momentum = _settings(self.optimizer)
        if momentum != self._momentum:
            raise InputError(
                f"record: the momentum of the optimiser changed from {self._momentum} to "
                f"{momentum} at step {self.position}; a recorded run has one at all steps"
            )
        self._write(rate, decay, epoch, None if batch is None else _positions(batch))
        self._recorded += 1

    def finish(self) -> None:
        """Write down the weights after the last step; the run is whole then."""
        self._require_in_step("finish")
        if self.position == 0:
            raise InputError(
                "record: the training ended and no step was recorded; call run.step(indices) "
                "before every optimizer.step()"
            )
        self._write(0.0, 0.0, 0, [])

    def close(self) -> None:
        """Let go of the optimiser; without `finish` the run can be gone on with."""
        self._hook.remove()

    def _write(self, rate: float, decay: float, epoch: int, batch: list[int] | None) -> None:
        facts = StepFacts(self._run, self.position, rate, decay, epoch, batch, *self._momentum)
        while self._found > self.position + 1:  # steps of the run that was stopped, the last first
            self._found -= 1
            step_file(self.folder, self._found).unlink()
        write_step(self.folder, facts, own_state(self.model))
        self.position += 1

    def _count(self, *_: Any) -> None:
        self._taken += 1

    def _require_in_step(self, what: str) -> None:
        if self._taken != self._recorded:
            raise InputError(
                f"record: at {what} the optimiser has taken {self._taken} steps and "
                f"{self._recorded} were recorded; call run.step(indices) exactly once before every "
                "optimizer.step(), and not after it"
            )

    def _resume(self, steps: Sequence[StepFacts]) -> int:
        """Return the last step whose weights the model has."""
        if steps[-1].ends:
            raise InputError(
                f"record: {str(self.folder)!r} holds a whole run of {len(steps) - 1} steps; give "
                "another folder"
            )
        now = own_state(self.model)
        for facts in reversed(steps):
            if _same(read_weights(step_file(self.folder, facts.position)), now):
                break
        else:
            raise InputError(
                f"record: {str(self.folder)!r} holds a run that was stopped after {len(steps)} "
                "steps, and the model has the weights of none of them; load the weights of the "
                f"last one, {step_file(self.folder, steps[-1].position).name!r}, into the model "
                "to take that step again, or give another folder"
            )
        _log.info("record: goes on at step %d of %r", facts.position, str(self.folder))
        return facts.position

    def _require_buffers(self) -> None:
        """Refuse to go on with momentum where the optimiser does not have what it gathered."""
        groups = self.optimizer.param_groups
        known = self.optimizer.state
        lacking = sum(known.get(p, {}).get(BUFFER) is None for g in groups for p in g["params"])
        if self.position and self._momentum.momentum and lacking:
            raise InputError(
                f"record: a run with momentum goes on at step {self.position}, and the optimiser "
                f"has no momentum of {lacking} parameters; load its state of that step "
                "(optimizer.load_state_dict) besides the weights, or record the run anew"
            )


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of parameters and persistent buffers, each once, on the CPU."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # tied weights have several names
            seen.add(id(tensor))
            state[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return state


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class _Momentum(NamedTuple):
    """How a step depends on those before it; as `StepFacts` has it."""

    momentum: float
    dampening: float
    nesterov: bool


def _settings(optimizer: torch.optim.Optimizer) -> tuple[float, float, _Momentum]:
    """Return learning rate, weight decay and momentum of SGD."""
    if type(optimizer) is not torch.optim.SGD:
        raise InputError(
            f"record: the optimiser is {type(optimizer).__name__}, whose steps are not those of "
            "gradient descent; a recorded run is one of torch.optim.SGD; of another optimiser save "
            "some checkpoints with their learning rates, for the method 'tracin'"
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise InputError(
            "record: SGD with maximize=True climbs; a recorded run is one of gradient descent, "
            "torch.optim.SGD(lr=..., weight_decay=..., momentum=...)"
        )
    found = {
        (
            float(g["lr"]),
            float(g["weight_decay"]),
            _Momentum(float(g["momentum"]), float(g["dampening"]), bool(g["nesterov"])),
        )
        for g in optimizer.param_groups
    }
    if len(found) != 1:
        raise InputError(
            f"record: parameter groups with different (lr, weight_decay, momentum): "
            f"{sorted(found)}; a recorded run has one of each at a step"
        )
    rate, decay, momentum = found.pop()
    return rate, decay, momentum if momentum.momentum else _Momentum(0.0, 0.0, False)


def _require_all_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = list(model.named_parameters())
    left = [name for name, p in named if p.requires_grad and id(p) not in known]
    foreign = known - {id(p) for _, p in named}
    if left or foreign:
        raise InputError(
            f"record: the optimiser does not have the trainable parameters {left[:8]} of the model "
            f"and has {len(foreign)} that are not the model's; make it with "
            "torch.optim.SGD(model.parameters(), ...) and freeze the rest (requires_grad=False)"
        )


def _positions(batch: Tensor | Sequence[int]) -> list[int]:
    found = torch.as_tensor(batch)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.dim() != 1 or not len(found) or not whole or int(found.min()) < 0:
        raise InputError(
            f"record: the batch of a step is {batch!r}; give the positions of its examples in the "
            "train set, whole numbers [B] from 0, at least one, or None for all examples"
        )
    listed: list[int] = found.tolist()
    return listed
