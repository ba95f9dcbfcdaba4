"""A pretended accelerator: it computes on the CPU, and mixes with the CPU no better than a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from dattri_core.laws.law import NotApplicable

NAME = "pretended"
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._copy_from.default, aten._to_copy.default)
"""Operations that go from device to device."""
INDEXED = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
)
"""Operations whose positions may be those of the CPU."""
FILLED = (aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.where.self)
"""Operations beside the pointwise ones that take one number of the CPU."""
MADE = (
    *("arange", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint"),
    *("randn", "randperm", "scalar_tensor", "tril_indices", "triu_indices", "zeros"),
)
"""Operations that make a tensor on a device, some of them by resizing an empty one."""


def accelerator() -> torch.device:
    """Return the accelerator of this machine, or a pretended one.

    Raises:
        NotApplicable: There is none, and none can be pretended in this process.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    reason = _why_not()
    if reason:
        raise NotApplicable(f"no CUDA here, and no pretended device: {reason}")
    return torch.device(NAME, 0)


@cache
def prepare() -> str:
    """Make the device ``"pretended"``; return an empty text, or why it cannot be made.

    Its tensors hold those of the CPU and follow the rules of a GPU: they meet others of the device
    only, single numbers in pointwise operations aside; positions may be on the CPU. It takes no
    generator of the CPU, and NumPy cannot read it. What an operation computes is what the CPU
    computes, so a part that moves what it needs gives the same numbers, and one that does not fails
    as it would on a GPU. It stands for no kernels, streams or limits of memory.

    To be called before the first backward pass of a process: autograd counts the devices then.
    """
    if torch.cuda.is_available():
        return "there is a CUDA device, and torch's backward pass takes one accelerator a process"
    start = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if start is None:
        return f"torch {torch.__version__} has no backends in Python; a later one has"
    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        return f"the backend {taken!r} has its place"
    start(NAME, backend_module=_Module())
    _register()
    return ""


@cache
def _why_not() -> str:
    reason = prepare()
    if not reason:
        number = torch.ones((), device=NAME, requires_grad=True)
        try:
            number.square().backward()  # type: ignore[no-untyped-call]
        except RuntimeError:
            reason = "a backward pass ran before it was made; call laws.pretended.prepare() first"
    return reason


# Not in torch 2.5; what lacks it has no backends in Python either, see `prepare`.
_Base: Any = getattr(backend_registration, "_DummyBackendModule", object)


class _Module(_Base):  # type: ignore[misc]
    def is_available(self) -> bool:
        """Answer no, so that no library chooses the device by itself."""
        return False

    def get_rng_state(self, device: Any = None) -> Tensor:
        """Return the state of the CPU's generator, which its numbers are drawn from."""
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Set the state of the CPU's generator."""
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return what autocast may cast to."""
        return [torch.bfloat16, torch.float16]


class _Pretended(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _Pretended:
        made: _Pretended = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, *args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {NAME}"

    def numpy(self, **_: Any) -> Any:
        """Refuse, as a GPU does."""
        raise TypeError(f"can't convert a tensor on {NAME} to numpy; use .cpu() first")

    def tolist(self) -> Any:
        """Return the numbers."""
        return self.detach().cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a tensor of its own, a parameter where this is one."""
        if id(self) not in memo:
            copied: Tensor = _Pretended(self.held.detach().clone())
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        found: Tensor = memo[id(self)]
        return found

    def untyped_storage(self) -> Any:
        """Return the storage on the CPU, which tells views of one tensor."""
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        """Return where the numbers are."""
        return self.held.data_ptr()


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of the device on what its tensors hold."""
    given = _leaves((args, kwargs))
    here = any(isinstance(leaf, _Pretended) for leaf in given)
    if here and func not in COPIES:
        _refuse_mixing(func, _leaves((args[0], args[2:])) if func in INDEXED else given)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: expected a {NAME!r} generator, but found one of the CPU")
    target = kwargs.get("device")
    stays = here if target is None else torch.device(target).type == NAME
    if func is aten._efficientzerotensor.default:
        func = aten.zeros.default  # that of the CPU has no memory to hold
    held_args, held_kwargs = _mapped(_held, (args, kwargs))
    result = func(*held_args, **held_kwargs)
    _refuse_resized(func, given)
    if func is aten.copy_.default:
        return args[0]
    if not stays:
        return result
    placed = _mapped(_placed, result)
    if not here:
        return placed
    aliased: Any = return_and_correct_aliasing  # views share a storage, results in place are args
    return aliased(func, args, kwargs, placed)


# Those of torch's pytree take most of the time of an operation on a toy tensor.
def _leaves(tree: Any) -> list[Any]:
    """Return what tuples, lists and dicts hold, in order."""
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in _leaves(part)]
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in _leaves(part)]
    return [tree]


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return tuples, lists and dicts with every leaf replaced."""
    if type(tree) in (tuple, list):
        return type(tree)([_mapped(function, part) for part in tree])
    if type(tree) is dict:
        return {key: _mapped(function, part) for key, part in tree.items()}
    return tree_map(function, tree) if isinstance(tree, (tuple, list, dict)) else function(tree)


def _held(leaf: Any) -> Any:
    if isinstance(leaf, _Pretended):
        return leaf.held
    if isinstance(leaf, torch.device) and leaf.type == NAME:
        return torch.device("cpu")
    return leaf


def _placed(leaf: Any) -> Any:
    if type(leaf) is not Tensor:
        return leaf
    if leaf.layout is not torch.strided:
        raise NotImplementedError(f"{NAME}: it holds no tensors of layout {leaf.layout}")
    return _Pretended(leaf)


def _refuse_mixing(func: Any, given: Sequence[Any]) -> None:
    single = torch.Tag.pointwise in func.tags or func in INDEXED or func in FILLED
    for leaf in given:
        if isinstance(leaf, Tensor) and not isinstance(leaf, _Pretended):
            if single and leaf.dim() == 0:
                continue
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found {NAME}:0 and "
                f"{leaf.device}, a tensor of shape {tuple(leaf.shape)}"
            )


def _refuse_resized(func: Any, given: Sequence[Any]) -> None:
    for leaf in given:
        if isinstance(leaf, _Pretended) and leaf.held.numel() != leaf.numel():
            raise NotImplementedError(
                f"{func}: a tensor on {NAME} keeps its shape {tuple(leaf.shape)}, but was resized "
                f"to {tuple(leaf.held.shape)}; make a new one"
            )


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    form = memory_format or torch.contiguous_format
    return _Pretended(torch.empty(size, dtype=dtype, memory_format=form))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _Pretended(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


_KEPT: list[Any] = []  # a library that is forgotten takes its operations with it


def _register() -> None:
    library: Any = torch.library
    own, rest = library.Library("aten", "IMPL"), library.Library("_", "IMPL")
    own.impl("empty.memory_format", _empty, "PrivateUse1")
    own.impl("empty_strided", _empty_strided, "PrivateUse1")
    own.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in MADE:
        packet = getattr(aten, name)
        for overload in (getattr(packet, each) for each in packet.overloads()):
            if _makes(overload):
                own.impl(overload, partial(_run, overload), "PrivateUse1")
    rest.fallback(_run, "PrivateUse1")
    _KEPT.extend((own, rest))


def _makes(overload: Any) -> bool:
    arguments = overload._schema.arguments
    placed = any(a.name == "device" for a in arguments)
    return placed and not any("Tensor" in str(a.type) for a in arguments)
