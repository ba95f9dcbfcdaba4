"""Evaluating a task at one checkpoint without touching the user's model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from dattri_core.batch import Batch, batch_size, move, take, tensors_of
from dattri_core.checkpoint import Checkpoint, require_unwritten, state_fingerprint
from dattri_core.criteria import hessian_factor
from dattri_core.errors import InputError, NumericsError, SpecError
from dattri_core.losses import Draw, FunctionalLoss, Loss, Reduction
from dattri_core.memory import is_out_of_memory
from dattri_core.protocols import Parameters, Role
from dattri_core.rounding import coarsest, rounding_of
from dattri_core.task import Task
from dattri_core.tied import at_every_place

T = TypeVar("T")
SHRINK = (1.0, 0.3, 0.03)
"""Weights times these show the unit of a loss that is near zero at the weights themselves."""


class _Runner(nn.Module):
    """Runs a function of the model as a forward pass, so that `functional_call` swaps weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], T]) -> T:
        return function(self.model)


class Evaluator:
    """Losses and targets of one checkpoint as functions of parameters and a batch.

    Args:
        task: The task.
        checkpoint: One of its checkpoints; its weights are loaded here, and only here.
        sample: A few examples, to see the shape and the reduction of the loss.
        unseen: Roles whose values are not looked at here, but their rows elsewhere.

    Attributes:
        task: As given.
        checkpoint: As given, or the one that it was moved to.
        device: Of the model.
        state: All weights and buffers of the checkpoint by name, as the model would load them.
        parameters: Those that are parameters.
        buffers: Those that are none.
        selected: The parameters that are attributed through.

    Raises:
        InputError: The loss is not one number per example, mixes examples, or is random.
        NumericsError: The loss is not finite on the sample.
    """

    def __init__(
        self, task: Task, checkpoint: Checkpoint, sample: Batch, unseen: Collection[Role] = ()
    ) -> None:
        self.task = task
        self.device = task.device
        self._runner = _Runner(task.model)
        self._reduction: Reduction = "each"
        self._load(checkpoint)
        self._check(sample, unseen)

    def moved_to(self, checkpoint: Checkpoint) -> Evaluator:
        """Return the same at another checkpoint; it is not tried on a sample again."""
        other = copy(self)
        other._load(checkpoint)
        return other

    def _load(self, checkpoint: Checkpoint) -> None:
        task = self.task
        self.checkpoint = checkpoint
        self._in_session = False
        self.state = checkpoint.load(task.model)
        require_unwritten(task.model, self.state, checkpoint.name)
        names = {name for name, _ in task.model.named_parameters()}
        self.parameters: dict[str, Tensor] = {k: v for k, v in self.state.items() if k in names}
        self.buffers: dict[str, Tensor] = {k: v for k, v in self.state.items() if k not in names}
        if (
            checkpoint.source is None
        ):  # a forward pass that counts in a buffer must not reach the model
            self.buffers = {k: v.clone() for k, v in self.buffers.items()}
            self.state = {**self.state, **self.buffers}
        self.selected: dict[str, Tensor] = {k: self.parameters[k] for k in task.parameter_names}

    @property
    def fingerprint(self) -> str:
        """Return a hash of the weights in use, and of the optimiser's state where it is known."""
        return self.checkpoint.with_optimiser(state_fingerprint(self.state))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the attributed parameters."""
        return next(iter(self.selected.values())).dtype

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold the model in eval mode, without fused attention past its modules; then restore.

        The forward hooks of the checkpoint are on its modules meanwhile, before those of the user.
        A compiled model runs as it was written: hooks would have it compiled at every call.
        """
        if self._in_session:
            yield
            return
        modes = [(module, module.training) for module in self.task.model.modules()]
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self.task.model.eval()
        self._in_session = True
        handles: list[RemovableHandle] = []
        try:
            for name, hook in self.checkpoint.hooks.items():
                module = self.task.model.get_submodule(name)
                handles.append(module.register_forward_hook(hook, prepend=True))
            with _as_written(self.task.model), _differentiable(self.task.model):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._in_session = False
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training in modes:
                module.training = training

    def call(self, function: Callable[[nn.Module], T], parameters: Parameters | None = None) -> T:
        """Run ``function(model)`` with this checkpoint's weights, some replaced by ``parameters``.

        Replacements last while the function runs; do the backward pass inside it when the model
        recomputes activations.
        """
        state = at_every_place(self.task.model, {**self.state, **(parameters or {})})
        swapped = {f"model.{name}": tensor for name, tensor in state.items()}
        answer: T = functional_call(self._runner, swapped, (function,), tie_weights=False)
        return answer

    def per_example(self, parameters: Parameters | None, batch: Batch, role: Role) -> Tensor:
        """Return the loss (train) or the signed target (test) of each example, ``[B]``."""
        if isinstance(self._function(role), FunctionalLoss) and self._reduction != "each":
            singles = [
                self.total(parameters, take(batch, slice(i, i + 1)), role)
                for i in range(batch_size(batch))
            ]
            return torch.stack(singles)
        return self.call(lambda model: self.values(model, batch, role, parameters), parameters)

    def coarsest(self, batch: Batch, role: Role, *, tf32: bool = True) -> float:
        """Return the epsilon of the coarsest dtype in a forward pass; an autocast has its own."""
        with self.session(), torch.no_grad():
            return coarsest(lambda: self.per_example(None, batch, role), tf32=tf32)

    def rounding(self, batch: Batch, role: Role) -> Tensor:
        """Return up to what a difference of each value of `per_example` may be rounding."""
        return rounding_of(lambda given: self.per_example(given, batch, role), self.parameters)

    def is_near(self, left: Tensor, right: Tensor, batch: Batch, role: Role) -> bool:
        """Return whether values are equal but for rounding.

        Of a loss near zero a few roundings are left, in the unit of losses that are not.
        """
        loose = _TOLERANCE.get(left.dtype, 5e-2)
        if torch.allclose(left, right, rtol=loose, atol=0):
            return True
        least = loose * 1e-2 * self.unit(batch, role)
        return torch.allclose(left, right, rtol=loose, atol=least)

    def unit(self, batch: Batch, role: Role) -> float:
        """Return the largest value, here and at smaller weights, where no loss is sure; 1 at most.

        To be run without autograd, in a `session`.
        """
        sizes = []
        for share in SHRINK:
            at = {n: share * p for n, p in self.parameters.items() if p.is_floating_point()}
            sizes += self._values_at(at, batch, role).abs().flatten().tolist()
        return min(1.0, max((size for size in sizes if math.isfinite(size)), default=1.0))

    def _values_at(self, parameters: Parameters, batch: Batch, role: Role) -> Tensor:
        return self.call(lambda model: self.values(model, batch, role, parameters), parameters)

    def total(self, parameters: Parameters | None, batch: Batch, role: Role) -> Tensor:
        """Return the sum over the batch of the loss (train) or the signed target (test)."""
        return self.call(lambda model: self.total_of(model, batch, role, parameters), parameters)

    def total_of(
        self, model: nn.Module, batch: Batch, role: Role, parameters: Parameters | None = None
    ) -> Tensor:
        """Return `total` for a model whose weights are swapped already (inside `call`)."""
        values = self.values(model, batch, role, parameters)
        if values.dim() == 0:
            scale = batch_size(batch) if self._reduction == "mean" else 1
            return values * scale
        return values.sum()

    def values(
        self, model: nn.Module, batch: Batch, role: Role, parameters: Parameters | None = None
    ) -> Tensor:
        """Return what the loss or target gives, signed: ``[B]``, or a scalar if functional."""
        function = self._function(role)
        if isinstance(function, FunctionalLoss):
            given = {**self.parameters, **(parameters or {})}
            values = function.function(given, batch)
        else:
            values = function(model, batch)
        return values * self.task.sign if role == "test" else values

    def outputs(self, parameters: Parameters | None, batch: Batch) -> Tensor:
        """Return the model outputs that the loss's criterion takes, ``[B, ...]`` or ``[B]``."""
        return self.call(lambda model: self._outputs_of(model, batch), parameters)

    def pulled_of(
        self, model: nn.Module, batch: Batch, cotangent: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return sum_b <outputs_b, u_b> with u = cotangent(outputs) held constant; inside `call`.

        Raises:
            InputError: The loss is not split, or u is not shaped like the outputs.
            SpecError: Its outputs are several tensors.
        """
        outputs = self._outputs_of(model, batch)
        return (outputs * self._like(cotangent(outputs.detach()), outputs, "cotangent")).sum()

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the train loss of given outputs, ``[B]``."""
        return self._split_loss().criterion(outputs, batch)

    def sampled_slope(self, outputs: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """Return the slope of the criterion in the outputs, for labels drawn from the model."""
        sample = self._split_loss().sample
        assert sample is not None  # `require_kind` refused it
        with torch.no_grad():
            slope = sample(outputs.detach(), batch, draw)
        return self._like(slope, outputs, f"sample of the loss {self.task.loss_name!r}")

    def output_factor(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return columns f_k, sum_k f_k f_k^T = C_b, the criterion's Hessian; ``[K, B, ...]``."""
        loss = self._split_loss()
        if loss.factor is None:
            return hessian_factor(lambda out: loss.criterion(out, batch), outputs, loss.name)
        with torch.no_grad():
            factor = loss.factor(outputs.detach(), batch)
        if factor.shape[1:] != outputs.shape:
            raise InputError(
                f"factor of the loss {loss.name!r}: returned shape {tuple(factor.shape)} for "
                f"outputs {tuple(outputs.shape)}; expected [K, *outputs.shape], K columns"
            )
        return factor.to(outputs.dtype)

    def _outputs_of(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = self._split_loss()
        outputs = loss.forward(model, batch)
        if isinstance(outputs, Tensor):
            return outputs
        raise SpecError(
            f"outputs of the loss {loss.name!r}: its forward returned a {type(outputs).__name__}, "
            "and a GGN needs one tensor of outputs [B, K]; concatenate what the criterion takes, "
            "forward=lambda model, batch: torch.cat([scores, boxes.flatten(1)], 1), and take it "
            "apart in the criterion (outputs[:, :k], outputs[:, k:]); or use a curvature of the "
            "rows of the loss (the empirical Fisher) or of its Hessian"
        )

    def _split_loss(self) -> Loss:
        loss = self.task.loss
        if not isinstance(loss, Loss):
            raise InputError(
                f"outputs of the loss {self.task.loss_name!r}: a GGN needs the model's outputs and "
                "the criterion apart; give dattri.Loss(forward=..., criterion=...) or a shipped "
                "loss by name, or use the curvature 'hessian'"
            )
        return loss

    def _like(self, values: Tensor, outputs: Tensor, what: str) -> Tensor:
        if values.shape != outputs.shape:
            raise InputError(
                f"{what}: returned shape {tuple(values.shape)}, expected that of the outputs, "
                f"{tuple(outputs.shape)}"
            )
        return values.detach().to(outputs.dtype)

    def _function(self, role: Role) -> FunctionalLoss | Callable[[nn.Module, Batch], Tensor]:
        target = self.task.target
        if role == "test" and target is not None:
            return target.function
        return self.task.loss

    # --- checks before long work ----------------------------------------------------------------
    def _check(self, sample: Batch, unseen: Collection[Role]) -> None:
        sample = move(sample, self.device)
        with self.session(), torch.no_grad():
            if isinstance(self.task.loss, FunctionalLoss):
                self._reduction = self._detect_reduction(sample)
            if "train" not in unseen:
                self._check_values(sample, "train")
            if self.task.target is not None and "test" not in unseen:
                self._check_values(sample, "test")

    def _check_values(self, sample: Batch, role: Role) -> None:
        size = batch_size(sample)
        what = f"{'loss' if role == 'train' else 'target'} {self._name(role)!r}"
        first = self._try(sample, role, what)
        shape = tuple(first.shape)
        if not isinstance(self._function(role), FunctionalLoss) and shape != (size,):
            raise InputError(
                f"{what}: returned shape {shape} for {size} examples; expected "
                f"[{size}], one number per example (reduction='none'), or mark a function of "
                "parameters with dattri.functional"
            )
        if not torch.isfinite(first).all():
            raise NumericsError(
                f"{what}: not finite at checkpoint {self.checkpoint.name!r} on the first examples: "
                f"{first.tolist()}; look for a diverged checkpoint or a log of zero"
            )
        again = [self._try(sample, role, what) for _ in range(2)]
        if not all(self.is_near(first, other, sample, role) for other in again):
            raise self._random(what, first, again[-1])
        # Two copies, not as many as there are examples: a loss in which the others are negatives
        # depends on how many there are, even where they are all alike.
        for b in range(size if first.dim() == 1 else 0):
            alike = self._try(take(sample, torch.full((2,), b)), role, what)
            if not self.is_near(first[b : b + 1], alike[:1], sample, role):
                if (first[b] - alike[0]).abs() <= self.rounding(sample, role)[b]:
                    continue
                raise InputError(
                    f"{what}: mixes examples: the value of example {b} is {first[b].item():.6g} "
                    f"among {size} and {alike[0].item():.6g} next to a copy of itself; "
                    f"{_culprits(self.task.model)}"
                )

    def _detect_reduction(self, sample: Batch) -> Reduction:
        what = f"loss {self.task.loss_name!r}"
        size = batch_size(sample)
        whole = self._try(sample, "train", what)
        again = self._try(sample, "train", what)
        finite = torch.isfinite(whole).all()
        if finite and not self.is_near(whole, again, sample, "train"):
            raise self._random(what, whole, again)
        if whole.dim() == 1 and len(whole) == size:
            return "each"
        if whole.dim() != 0:
            raise InputError(
                f"{what}: returned shape {tuple(whole.shape)} for {size} examples; a functional "
                f"loss returns a scalar, or [{size}]"
            )
        # An example fitted to a loss of zero tells a sum from a mean only at other weights.
        for shrink in (1.0, 0.5, 0.0):
            weights = {name: tensor * shrink for name, tensor in self.parameters.items()}
            reduction = self._reduction_at(weights if shrink < 1 else None, sample, what)
            if reduction is not None:
                return reduction
        raise InputError(
            f"{what}: it is zero on the first {size} examples, so its mean cannot be told from its "
            f"sum; return one number per example, [{size}]"
        )

    def _reduction_at(
        self, weights: Parameters | None, sample: Batch, what: str
    ) -> Reduction | None:
        size = batch_size(sample)
        whole = self._try(sample, "train", what, weights)
        singles = torch.stack(
            [self._try(take(sample, slice(i, i + 1)), "train", what, weights) for i in range(size)]
        )
        if not torch.isfinite(torch.stack([whole, *singles])).all():
            if weights is not None:
                return None
            raise NumericsError(
                f"{what}: not finite at checkpoint {self.checkpoint.name!r}: {whole.item()} on "
                f"{size} examples, {singles.tolist()} one at a time"
            )
        noise = _TOLERANCE.get(whole.dtype, 5e-2) * max(singles.abs().sum(), whole.abs())
        mean, total = singles.mean(), singles.sum()
        if (total - mean).abs() <= 4 * noise:
            return None
        if (whole - mean).abs() <= noise:
            return "mean"
        if (whole - total).abs() <= noise:
            return "sum"
        raise InputError(
            f"{what}: on {size} examples it is {whole.item():.6g}, which is neither the mean "
            f"({mean.item():.6g}) nor the sum ({total.item():.6g}) of the single "
            "examples; it mixes examples, so no example has a gradient of its own; "
            f"{_culprits(self.task.model)}"
        )

    def _random(self, what: str, first: Tensor, again: Tensor) -> InputError:
        return InputError(
            f"{what}: the same examples gave different numbers twice ({first.tolist()} and "
            f"{again.tolist()}); something random runs in eval mode (a dropout called with "
            "training=True, noise); switch it off"
        )

    def _try(
        self, sample: Batch, role: Role, what: str, weights: Parameters | None = None
    ) -> Tensor:
        try:
            values = self.call(lambda model: self.values(model, sample, role, weights), weights)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):  # batch statistics of one example
                raise InputError(
                    f"{what}: mixes examples: it cannot be computed for one alone ({error}); "
                    f"{_culprits(self.task.model)}"
                ) from error
            raise
        except RuntimeError as error:
            if "device" in str(error):
                raise InputError(
                    f"{what}: tensors meet on two devices ({error}); the batch was moved to the "
                    f"model's {self.device}; look for a constant of the loss or model elsewhere"
                ) from error
            if is_out_of_memory(error):
                raise
            raise self._failed(what, sample, error) from error
        except (TypeError, IndexError) as error:
            raise self._failed(what, sample, error) from error
        if not isinstance(values, Tensor):
            raise InputError(f"{what}: returned a {type(values).__name__}, expected a tensor")
        return values

    def _failed(self, what: str, sample: Batch, error: Exception) -> InputError:
        tensors = ", ".join(f"{_dtype(t.dtype)} {list(t.shape)}" for t in tensors_of(sample))
        return InputError(
            f"{what}: fails on the first examples ({type(error).__name__}: {error}); the batch "
            f"holds {tensors}, the model is {_dtype(self.dtype)} on {self.device}; a loss is "
            "called with (model, batch), labels of classes are whole numbers below the number of "
            "outputs"
        )

    def _name(self, role: Role) -> str:
        return self.task.loss_name if role == "train" else self.task.target_name


_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def _as_written(model: nn.Module) -> AbstractContextManager[Any]:
    """Leave compiled code aside where a module is compiled; else do nothing, at no cost."""
    compiled = any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    return stance("force_eager") if compiled and stance is not None else nullcontext()


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Leave cuDNN aside where a module recurs: it has no backward pass of one in eval mode."""
    before: bool = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _culprits(model: nn.Module) -> str:
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats
    ]
    if norms:
        return (
            f"batch statistics are used by {norms}; set track_running_stats=True or use another "
            "norm"
        )
    return "look for statistics, sums or padding taken over the whole batch"


def leaves(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return leaf copies (sharing memory) that require gradients, for a backward pass."""
    return {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}


def dtype_of(source: object) -> torch.dtype | None:
    """Return the dtype of a bound source's rows: its own, or that of its model; None if neither."""
    own = getattr(source, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    evaluator = getattr(source, "evaluator", None)
    return evaluator.dtype if isinstance(evaluator, Evaluator) else None
