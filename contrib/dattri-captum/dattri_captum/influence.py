"""A method of dattri-core that answers captum's ``DataInfluence``."""

from __future__ import annotations

from typing import Any

import torch
from captum.influence import DataInfluence
from captum.influence._utils.common import KMostInfluentialResults
from torch import Tensor

import dattri_core as dattri


class MethodInfluence(DataInfluence):
    """``influence(inputs)`` and ``self_influence()`` as TracInCP has them, by any method of parts.

    It takes the place of ``TracInCP(model, train_dataset, checkpoints, loss_fn=...)``. The train
    set is read when the object is made, as far as the method has something to fit. Scores are
    larger where a train example helps more, in captum ("proponents") and in dattri-core alike; here
    they have captum's shape, ``[n_test, n_train]``.

    Args:
        task: Model, loss and checkpoints.
        train_dataset: A Dataset, or a DataLoader in a fixed order, of tuples that end with labels.
        method: A name, or a `dattri_core.Method`.
        progress: Whether bars are shown.
        **changes: Fields of a method that is given by name, such as ``damping=1e-2``.
    """

    def __init__(
        self,
        task: dattri.Task,
        train_dataset: Any,
        method: Any = "if-ekfac",
        *,
        progress: bool = False,
        **changes: Any,
    ) -> None:
        made = dattri.method(method, **changes) if isinstance(method, str) else method
        if not isinstance(made, dattri.Method):
            raise dattri.SpecError(
                f"captum adapter: {method!r} is no method of parts, so it cannot be fitted before "
                "inputs are there; use dattri.attribute(task, train, test, method=...)"
            )
        self.model = task.model
        self.train_dataset = train_dataset
        self.fitted = made.fit(task, train_dataset, progress=progress)

    def influence(
        self,
        inputs: Any = None,
        k: int | None = None,
        proponents: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Return the influence of every train example on every input, or the k largest.

        Args:
            inputs: A tuple of tensors that ends with the labels, or a DataLoader.
            k: None, or how many train examples to return for each input.
            proponents: Whether the k are those that help most, or those that harm most.
            **kwargs: What only TracInCP knows is refused.

        Returns:
            ``[n_test, n_train]``; with k ``KMostInfluentialResults(indices, influence_scores)``,
            ``[n_test, k]`` each, most influential first.
        """
        if kwargs:
            raise dattri.InputError(
                f"captum adapter: influence takes inputs, k and proponents; got "
                f"{sorted(kwargs)} (bars are shown with MethodInfluence(..., progress=True))"
            )
        if inputs is None:
            raise dattri.InputError(
                "captum adapter: influence of what? Give inputs, a tuple that ends with the "
                "labels or a DataLoader; for the train set on itself call self_influence()"
            )
        if k is None:
            scores = self.fitted.attribute(inputs)
            return torch.as_tensor(scores.values).T
        found = self.fitted.extremes(inputs, k)
        side = found.top if proponents else found.bottom
        indices = torch.as_tensor([[int(i) for i in row] for row in side.ids.T])
        return KMostInfluentialResults(indices, torch.as_tensor(side.values).T)

    def self_influence(self) -> Tensor:
        """Return the influence of every train example on itself, ``[n_train]``."""
        return torch.as_tensor(self.fitted.self_influence())
