"""Laws of methods: of which examples the target is asked."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dattri_core.batch import Batch, tensors_of
from dattri_core.laws.law import law, require_close
from dattri_core.laws.methods import ITERATIVE, MethodBench, tensor
from dattri_core.laws.worlds import World, first_logit
from dattri_core.losses import Target


def _asked_of_tests(bench: MethodBench) -> str | None:
    at_train = getattr(bench.part, "measured", "test") == "train"
    return "it asks how models answer the train examples" if at_train else None


@law("method", _asked_of_tests)
def target_is_of_test_examples(bench: MethodBench) -> None:
    """S for a target that is another for train examples alone = S: train rows are of the loss."""
    for world in bench.worlds():
        plain, other = (
            tensor(bench.scores(bench.task(world, target=target), world.train, world.test))
            for target in (_better(first_logit), _better(_elsewhere(world)))
        )
        what = f"scores for a target that is another for train examples, in {world.name}"
        require_close(other, plain, what, ITERATIVE)


def _elsewhere(world: World) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a function that is the first logit, and four times it for train examples."""
    known = tensors_of(world.train)[0].flatten(1)

    def function(model: nn.Module, batch: Batch) -> Tensor:
        inputs = tensors_of(batch)[0].flatten(1)
        same = (inputs.unsqueeze(1) == known.to(inputs.device, inputs.dtype)).all(2).any(1)
        return first_logit(model, batch) * (1 + 3 * same.to(inputs.device))

    return function


def _better(function: Callable[[nn.Module, Batch], Tensor]) -> Target:
    return Target(function, higher_is_better=True)
