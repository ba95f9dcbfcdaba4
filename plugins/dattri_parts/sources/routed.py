"""Modules that are given what a mask has chosen: how much of each example, the data decide.

An expert may be given one token of each example of a sample, and of a batch two tokens of one and
none of another: as many as there are examples, and not one of each. Shapes do not tell, so what
comes from an operation whose result is as long as the data have it is followed to the modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dattri_core import DispatchMode, Evaluator, run_under
from dattri_parts.sources.nest import pull
from dattri_parts.sources.observe import removed

_aten = torch.ops.aten
_CHOOSING = {
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.unique_dim_consecutive,
}
"""Their results are as long as the data have it."""
_GATHERING = {_aten.index, _aten._unsafe_index}
"""They choose too, where an index is a mask."""
_MASKS = (torch.bool, torch.uint8)
_BACK = {
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
    _aten.index_add,
    _aten.index_add_,
    _aten.index_copy,
    _aten.index_copy_,
    _aten.scatter,
    _aten.scatter_,
    _aten.scatter_add,
    _aten.scatter_add_,
    _aten.masked_scatter,
    _aten.masked_scatter_,
}
"""They bring what was chosen back to its places in their first argument."""


class _Followed(DispatchMode):
    """Remembers the memory of what was chosen, and of what is made of it line by line."""

    def __init__(self) -> None:
        super().__init__()
        self._chosen: dict[int, Tensor] = {}  # held, so that no memory is another's later

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        given, _ = pull((args[:1] if packet in _BACK else args, dict(kwargs or {})))
        masked = packet in _GATHERING and any(t.dtype in _MASKS for t in pull(args[1])[0])
        lengths = {tuple(t.shape[:1]) for t in given if self.holds(t)}
        made, _ = pull(result)
        for tensor in made:
            if packet in _CHOOSING or masked or tuple(tensor.shape[:1]) in lengths:
                self._chosen[_memory(tensor)] = tensor
        return result

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor was chosen, or made of what was."""
        return _memory(tensor) in self._chosen


def routed(evaluator: Evaluator, sample: Any, roles: Iterable[str]) -> set[nn.Module]:
    """Return the modules that are given what a mask has chosen, with the loss or target of roles.

    Operators that torch shows to nobody, such as ``flex_attention``, end the looking.

    Args:
        evaluator: The checkpoint.
        sample: A few examples on its device.
        roles: Whose functions are looked at.
    """
    found: set[nn.Module] = set()
    for role in roles:
        followed = _Followed()

        def before(module: nn.Module, args: Any, kwargs: Any, seen: _Followed = followed) -> None:
            if any(seen.holds(tensor) for tensor in pull((args, kwargs))[0]):
                found.add(module)

        def total(model: nn.Module, role: Any = role) -> None:
            evaluator.total_of(model, sample, role)

        def run(total: Any = total) -> None:
            evaluator.call(total)

        with evaluator.session(), torch.no_grad(), removed([]) as handles:
            for module in evaluator.task.model.modules():
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            run_under(followed, run)
    return found


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor has no such memory
        return id(tensor)
