"""A curvature that is a linear operator of curvlinops."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor, nn

from dattri_core import (
    DenseBlock,
    InputError,
    Loss,
    ModelProblem,
    Operator,
    Problem,
    Rows,
    Space,
    SpecError,
    batch_size,
    labels_of,
)

Name = Literal["ggn", "hessian", "empirical-fisher", "kfac", "ekfac"]
CLASSES: Mapping[str, str] = {
    "ggn": "GGNLinearOperator",
    "hessian": "HessianLinearOperator",
    "empirical-fisher": "EFLinearOperator",
    "kfac": "KFACLinearOperator",
    "ekfac": "EKFACLinearOperator",
}
FACTORED = ("kfac", "ekfac")
LOSSES = {"cross-entropy": (nn.CrossEntropyLoss, 1.0), "squared-error": (nn.MSELoss, 0.5)}
"""The modules that curvlinops knows, and what our loss of the name is times theirs."""


@frozen
class Curvlinops:
    """H, a linear operator of the library curvlinops, as a mean over the train set.

    Any solver that asks for products or for the matrix gives (H + damping I)^-1 in the convention
    of dattri-core: curvlinops' own inverses, whose dampings mean other things, are not used.
    Batches are pairs of a tensor and labels, or dicts; the criterion reads the labels alone.

    Args:
        operator: ``"ggn"``, ``"hessian"``, ``"empirical-fisher"``; or ``"kfac"``, ``"ekfac"``: of
            the exact GGN (type 2), weight and bias together, for Linear and Conv2d layers.
    """

    operator: Name = field(default="ggn", validator=validators.in_(tuple(CLASSES)))
    exact: ClassVar[bool] = False  # which one is exact is a matter of the field
    needs: ClassVar[frozenset[str]] = frozenset({"rows"})

    def gives(self, space: Space) -> frozenset[str]:
        """Return that its operator can be applied and written down.

        Raises:
            SpecError: The rows are no gradients of parameters.
        """
        if not space.covers_parameters:
            raise SpecError(
                "curvature curvlinops: the rows are no gradients of the model's parameters; use "
                "the source 'per-example' and no projector before the inverse Hessian"
            )
        return frozenset({"apply", "dense"})

    def fit(self, problem: Problem) -> Operator:
        """Return the operator on a copy of the model.

        Raises:
            InputError: curvlinops is not installed, or the batches or the loss are others.
            SpecError: K-FAC is asked of layers that curvlinops does not know.
        """
        self._require_known(problem.space)
        if not isinstance(problem, ModelProblem):
            raise SpecError("curvature curvlinops: the problem shows no model to differentiate")
        model = copy.deepcopy(problem.task.model)
        model.load_state_dict(dict(problem.state))
        model.eval()
        parameters = [model.get_parameter(name) for name in problem.space.parameter_names]
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is one for one in parameters))
        loss, scale = self._loss(problem.task.loss)
        data = [_pair(batch) for batch in problem.batches()]
        options: dict[str, Any] = {
            "num_data": problem.n_train,
            "check_deterministic": False,
            "batch_size_fn": batch_size,
        }
        if self.operator in FACTORED:
            options |= {"fisher_type": "type-2", "separate_weight_and_bias": False}
        asked = _Asked(model, problem.task.loss)
        made = getattr(_library(), CLASSES[self.operator])(asked, loss, parameters, data, **options)
        return Adapted(problem.space, made, scale / problem.n_train, problem.dtype, problem.memory)

    def _require_known(self, space: Space) -> None:
        self.gives(space)
        other = [
            s.name for s in space if s.kind != "outer" or any(v.transposed for v in s.parameters)
        ]
        if self.operator in FACTORED and other:
            raise SpecError(
                f"curvature curvlinops: {self.operator} knows Linear and Conv2d layers, and the "
                f"blocks {other} are others; leave them out with parameters=, or use operator='ggn'"
            )

    def _loss(self, loss: Any) -> tuple[Any, float]:
        if not isinstance(loss, Loss):
            raise InputError(
                "curvature curvlinops: needs the model's outputs and the criterion apart; give a "
                "shipped loss by name, or dattri.Loss(forward=..., criterion=...)"
            )
        if self.operator in ("ggn", "hessian"):
            return _Summed(loss), 1.0
        if loss.name not in LOSSES:
            raise InputError(
                f"curvature curvlinops: {self.operator} is made for the losses {list(LOSSES)}, "
                f"and this one is {loss.name!r}; use operator='ggn'"
            )
        module, factor = LOSSES[loss.name]
        # The empirical Fisher is a sum of squared gradients, the others are linear in the loss.
        return module(reduction="sum"), factor**2 if self.operator == "empirical-fisher" else factor


class _Asked(nn.Module):
    """The model as curvlinops calls it: a module of one argument, inputs without labels."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, inputs: Any) -> Tensor:
        batch = inputs if isinstance(inputs, Mapping) else (inputs, None)
        return self.loss.forward(self.model, batch)


class _Summed(nn.Module):
    """The loss as curvlinops calls it: a module that gives the sum over the batch."""

    reduction = "sum"

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.loss.criterion(outputs, (outputs, labels)).sum()


@frozen(eq=False)
class Adapted:
    """An operator of curvlinops on rows.

    Args:
        space: Of the rows.
        operator: Of curvlinops, in lists of parameters, a sum over the train set.
        scale: That makes it a mean of our loss.
        dtype: Of the model.
        memory: Bytes that work with it may use.
    """

    space: Space
    operator: Any
    scale: float
    dtype: torch.dtype
    memory: int

    def apply(self, rows: Rows) -> Rows:
        """Return H g for every row g."""
        self.space.require_same(rows.space, "curvature curvlinops")
        columns = [x.to(self.dtype).movedim(0, -1).contiguous() for x in _parameters(rows)]
        products = [x.movedim(-1, 0) * self.scale for x in self.operator @ columns]
        return _rows(products, rows)

    def dense(self) -> Tensor:
        """Return H in float64, ``[d, d]``, symmetrised."""
        size = self.space.dim
        device = self.operator.device
        units = torch.eye(size, dtype=self.dtype, device=device)
        made = self.apply(Rows.from_flat(self.space, units, torch.arange(size))).flat().double()
        return (made + made.T) / 2


def _parameters(rows: Rows) -> list[Tensor]:
    """Return rows as a tensor for each parameter, ``[B, *shape]``."""
    found = []
    for spec in rows.space:
        matrix = rows.blocks[spec.name].dense().values.reshape(len(rows), *spec.matrix_shape)
        for view in spec.parameters:
            part = matrix[:, :, view.start : view.stop]
            found.append((part.mT if view.transposed else part).reshape(len(rows), *view.shape))
    return found


def _rows(parameters: list[Tensor], like: Rows) -> Rows:
    """Return the inverse of `_parameters`, with the index and the numbers of other rows."""
    blocks, waiting = {}, iter(parameters)
    for spec in like.space:
        matrix = parameters[0].new_empty(len(like), *spec.matrix_shape)
        for view in spec.parameters:
            part = matrix[:, :, view.start : view.stop]
            given = next(waiting)
            if view.transposed:
                part.copy_(given.reshape(len(like), part.shape[2], part.shape[1]).mT)
            else:
                part.copy_(given.reshape(part.shape))
        blocks[spec.name] = DenseBlock(matrix.reshape(len(like), *spec.shape).to(like.dtype))
    return Rows(like.space, blocks, like.index, like.aux)


def _pair(batch: Any) -> tuple[Any, Tensor]:
    """Return inputs and labels as curvlinops takes them: a tensor, or a dict, and a tensor."""
    if isinstance(batch, Mapping):
        labels = labels_of(batch)
        return {name: value for name, value in batch.items() if value is not labels}, labels
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(
            f"curvature curvlinops: a batch is a {type(batch).__name__} of {len(batch)}; expected "
            "a pair of a tensor and labels, or a dict"
        )
    return batch[0], batch[1]


def _library() -> Any:
    try:
        return importlib.import_module("curvlinops")
    except ImportError as error:
        raise InputError(
            "curvature curvlinops: the library is not installed; install it with: "
            "pip install curvlinops-for-pytorch"
        ) from error
