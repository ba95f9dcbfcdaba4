"""The recorder: follows a user's own training loop and writes down every step."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from dattri_core import AdamRule, InputError, discard_leftovers
from dattri_unroll.moments_file import held, moments_file, require_same, write_moments
from dattri_unroll.run_folder import (
    StepFacts,
    read_weights,
    recorded_steps,
    step_file,
    write_step,
)

BUFFER = "momentum_buffer"
"""Of a parameter, in the state of `torch.optim.SGD`."""

Decay = float | dict[str, float]
"""Weight decay of all parameters, or by name."""

_log = logging.getLogger("dattri")


@contextmanager
def record(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: str | Path,
    *,
    clip: float | None = None,
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
    steps, and of Adam the moments as well, three times as much. A block that ends with an error
    leaves a run that another call goes on with: see `Recorder`.

    Args:
        model: In training; only read.
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW`, of all trainable parameters. Changing
            learning rates and weight decay are followed, those of groups of parameters too, and
            momentum, Nesterov's too, or betas that stay the same.
        folder: Of the run; made where there is none.
        clip: What `torch.nn.utils.clip_grad_norm_` shortens the gradient of all parameters to
            before each step, where it is called.

    Raises:
        InputError: Another optimiser, or weights that fit no recorded step.
        StoreError: The folder holds a damaged run.
    """
    run = Recorder(model, optimizer, Path(folder), clip)
    try:
        yield run
        run.finish()
    finally:
        run.close()


@define(eq=False)
class Recorder:
    """A run that is being recorded.

    In a folder that holds a run that was stopped, it goes on at the last recorded step whose
    weights the model has now, as restored by the user, and with momentum, or of Adam, the state of
    the optimiser too; from there on steps are recorded again. `position` says which step comes
    next.

    Args:
        model: In training.
        optimizer: Takes the steps.
        folder: Of the run.
        clip: Largest norm of the gradient.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    folder: Path
    clip: float | None = None
    position: int = field(default=0, init=False)
    _run: str = field(default="", init=False)
    _found: int = field(default=0, init=False)  # files of the run that was stopped
    _recorded: int = field(default=0, init=False)  # since this object was made
    _taken: int = field(default=0, init=False)  # by the optimiser, since then
    _hook: Any = field(default=None, init=False)
    _rule: _Rule = field(init=False)

    def __attrs_post_init__(self) -> None:
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise InputError(
                f"record: clip is {self.clip}; give the largest norm of the gradient, above 0, or "
                "None where it is not clipped"
            )
        _require_all_parameters(self.model, self.optimizer)
        self._rule = _settings(self.optimizer, self.model).rule
        steps = recorded_steps(self.folder) if self.folder.exists() else []
        self._run = steps[0].run if steps else secrets.token_hex(8)
        self._found = len(steps)
        for position in (len(steps), len(steps) - 1):  # one of them was being written at a kill
            discard_leftovers(step_file(self.folder, position))
            discard_leftovers(moments_file(self.folder, position))
        moments_file(self.folder, len(steps)).unlink(missing_ok=True)  # its step was not written
        if steps:
            self.position = self._resume(steps)
            self._require_buffers()
        self._hook = self.optimizer.register_step_post_hook(self._count)

    def step(
        self,
        batch: Tensor | Sequence[int] | None = None,
        *,
        epoch: int = 0,
        scale: float = 1.0,
    ) -> None:
        """Write down the step that the optimiser is about to take; call it just before.

        Args:
            batch: Positions of the batch's examples in the train set, ``[B]``; None: all of it.
            epoch: Which pass over the train set the step belongs to.
            scale: What is minimised over the mean loss of the batch. A mean over the tokens of a
                batch, of a loss that sums those of an example, has |B| / their number.

        Raises:
            InputError: The optimiser has taken a step that was not recorded, or has another
                momentum or other betas than before; or the batch is empty or holds no positions.
        """
        self._require_in_step("step")
        _require_all_parameters(self.model, self.optimizer)  # a group may have been added
        settings = _settings(self.optimizer, self.model)
        if settings.rule != self._rule:
            raise InputError(
                f"record: the momentum of the optimiser changed from {self._rule} to "
                f"{settings.rule} at step {self.position}; a recorded run has one at all steps"
            )
        if not 0 < scale < float("inf"):
            raise InputError(f"record: scale is {scale} at step {self.position}, expected above 0")
        self._write(settings, epoch, None if batch is None else _positions(batch), scale)
        self._recorded += 1

    def finish(self) -> None:
        """Write down the weights after the last step; the run is whole then."""
        self._require_in_step("finish")
        if self.position == 0:
            raise InputError(
                "record: the training ended and no step was recorded; call run.step(indices) "
                "before every optimizer.step()"
            )
        self._write(_Settings(self._rule), 0, [], 1.0)

    def close(self) -> None:
        """Let go of the optimiser; without `finish` the run can be gone on with."""
        self._hook.remove()

    def _write(
        self, settings: _Settings, epoch: int, batch: list[int] | None, scale: float
    ) -> None:
        while self._found > self.position + 1:  # steps of the run that was stopped, the last first
            self._found -= 1
            step_file(self.folder, self._found).unlink()
            moments_file(self.folder, self._found).unlink(missing_ok=True)
        moments = held(self.optimizer, self.model) if self._rule.adam else {}
        digest = write_moments(self.folder, self.position, moments)
        facts = StepFacts(
            self._run,
            self.position,
            settings.rate,
            settings.decay,
            epoch,
            batch,
            *self._rule,
            self.clip,
            float(scale),
            digest,
            settings.rates,
        )
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
                if facts.moments:
                    moments = held(self.optimizer, self.model) if self._rule.adam else {}
                    require_same(self.folder, facts.position, moments, self.model)
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
        if self.position and self._rule.momentum and lacking:
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


class _Rule(NamedTuple):
    """How a step depends on those before it; as `StepFacts` has it."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    adam: AdamRule | None = None


@frozen
class _Settings:
    """What an optimiser is set to before a step.

    Args:
        rule: Of all its parameters.
        rate: The largest learning rate.
        decay: Weight decay, by name of parameter where groups have different ones.
        rates: Learning rates over the largest, by name of parameter, where they are others.
    """

    rule: _Rule
    rate: float = 0.0
    decay: Decay = 0.0
    rates: dict[str, float] = field(factory=dict)


def _settings(optimizer: torch.optim.Optimizer, model: nn.Module) -> _Settings:
    """Return what SGD or Adam is set to."""
    kind, groups = type(optimizer), optimizer.param_groups
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise InputError(
            f"record: the optimiser is {kind.__name__}, whose steps are not known; a recorded run "
            "is one of torch.optim.SGD, Adam or AdamW; of another optimiser save some checkpoints "
            "with their learning rates, for the method 'tracin'"
        )
    if any(group.get("maximize") or group.get("amsgrad") for group in groups):
        raise InputError(
            f"record: {kind.__name__} with maximize=True or amsgrad=True takes other steps; a "
            "recorded run is one of descent, torch.optim.SGD(lr=..., weight_decay=..., "
            "momentum=...) or torch.optim.AdamW(lr=..., betas=..., weight_decay=...)"
        )
    rules = {_rule_of(optimizer, group) for group in groups}
    if len(rules) != 1:
        raise InputError(
            "record: parameter groups with different momentum or betas: "
            f"{sorted(rules, key=repr)}; a recorded run has one of each"
        )
    names = {id(p): name for name, p in model.named_parameters()}

    def by_name(what: str) -> dict[str, float]:
        return {names[id(p)]: float(g[what]) for g in groups for p in g["params"]}

    rates, decays = by_name("lr"), by_name("weight_decay")
    rate = max(rates.values())
    decay: Decay = decays if len(set(decays.values())) > 1 else next(iter(decays.values()))
    others = {name: own / rate for name, own in rates.items() if own != rate}
    return _Settings(rules.pop(), rate, decay, others)


def _rule_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> _Rule:
    if "betas" in group:
        return _Rule(adam=AdamRule.of(optimizer, group))
    if not group["momentum"]:
        return _Rule()
    return _Rule(float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"]))


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
