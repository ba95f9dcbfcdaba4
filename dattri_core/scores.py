"""Scores: what every method returns, ``[n_train, n_test]``, positive where the train row helps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor

from dattri_core.errors import InputError, NumericsError
from dattri_core.ids import Id, Ids, as_ids, id_array, positions_of, select_axis
from dattri_core.scores_file import FolderWriter, read_folder, release_pages
from dattri_core.top import Extreme, checked_count, extreme_rows

Values: TypeAlias = Tensor | np.ndarray[Any, Any]  # an array is an open memmap
PARTS = frozenset(
    [
        "source",
        "projector",
        "inverse_hessian",
        "curvature",
        "preconditioner",
        "solver",
        "stages",
        "scorer",
        "fold",
    ]
)
"""Keys of a method's spec below which parts are named."""
CHUNK = 32 * 2**20
"""Bytes of scores that one step reads; results never depend on it."""


def parts_of(spec: Any) -> Iterator[str]:
    """Yield the names of the parts that a spec is made of, without those that do nothing."""
    if isinstance(spec, str):
        if spec not in ("identity", "mean"):
            yield spec
    elif isinstance(spec, Mapping):
        named = [spec["name"]] if "name" in spec else [spec[at] for at in spec if at in PARTS]
        for part in named:
            yield from parts_of(part)
    elif isinstance(spec, (list, tuple)):
        for part in spec:
            yield from parts_of(part)


def _as_values(given: Any) -> Values:
    values = given
    if isinstance(given, np.ndarray) and not isinstance(given, np.memmap):
        values = given if given.dtype.kind != "f" else torch.from_numpy(np.ascontiguousarray(given))
    if not isinstance(values, (Tensor, np.ndarray)):
        raise InputError(
            f"scores: values are a {type(values).__name__}, expected a tensor or array"
        )
    floating = (
        values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
    )
    if values.ndim != 2 or not floating:
        raise InputError(
            f"scores: values have shape {tuple(values.shape)} and dtype {values.dtype}, "
            "expected floating point numbers [n_train, n_test]"
        )
    if isinstance(values, np.ndarray):
        mapped: Values = values
        return mapped
    kept: Tensor = values.detach()
    return kept.float() if kept.dtype == torch.bfloat16 else kept  # exact; NumPy has none


def _not_yet(ids: Sequence[Id] | None) -> Ids:
    """Pass ids on; they are checked once the number of examples is known."""
    return cast("Ids", ids)


@frozen(eq=False, repr=False)
class Scores:
    """Scores tau of every train example for every test example.

    **Sign.** tau_ij > 0: train example i *helps* test example j: its presence lowers the test loss,
    or raises a target that is better when higher. This holds for every method.

    **Scale.** Curvature is a mean over the train set, so tau_ij / n is the first-order change of
    the test loss when i is removed and the model trained again; see `removal_effect`.

    Args:
        values: ``[n_train, n_test]``, floating point: a tensor, an array, or an open
            `numpy.memmap`, which is read in pieces and never loaded whole.
        train_ids: One hashable int or str for each train example; default their positions.
        test_ids: The same for test examples.
        provenance: Where the numbers come from, JSON-ready: ``method`` (its spec), ``n_train``,
            ``target`` (``{"name": ..., "higher_is_better": ...}``), dampings, solver statistics,
            fingerprints, versions, and ``fitted_on``, the ``n_train`` of the fit where other
            examples are scored (`FittedMethod.over`). ``n_train`` is filled in when it is absent.
        known_finite: Skip the check that every value is finite, for values that passed it before.

    Raises:
        InputError: ``values`` is not a floating point matrix, or ids are repeated or too few.
        NumericsError: A value is not finite; the first is named.
    """

    sign: ClassVar[str] = "positive helps"

    values: Values = field(converter=_as_values)
    train_ids: Ids = field(default=None, converter=_not_yet)
    test_ids: Ids = field(default=None, converter=_not_yet)
    provenance: Mapping[str, Any] = field(factory=dict)
    known_finite: bool = field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        n_train, n_test = self.values.shape
        fix = object.__setattr__
        fix(self, "train_ids", as_ids(self.train_ids, n_train, "train"))
        fix(self, "test_ids", as_ids(self.test_ids, n_test, "test"))
        fix(self, "provenance", _as_provenance(self.provenance, n_train))
        if not self.known_finite:
            self._check_finite()
            fix(self, "known_finite", True)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n_train, n_test)."""
        return int(self.values.shape[0]), int(self.values.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        n_train, n_test = self.shape
        method = self.provenance.get("method")
        if isinstance(method, Mapping):
            method = method.get("name") or ", ".join(parts_of(method)) or "a composed method"
        kind = str(self.values.dtype).removeprefix("torch.")
        where = "on disk" if isinstance(self.values, np.memmap) else f"on {self.values.device}"
        of = f" by {method}" if method else ""
        return f"Scores[{n_train} train x {n_test} test]({kind} {where}{of}; positive helps)"

    # --- the most helpful and the most harmful --------------------------------------------------
    def top(self, k: int, test: Id | None = None) -> Extreme:
        """Return the k most helpful train examples, the most helpful first.

        Args:
            k: How many; fewer come when there are fewer train examples.
            test: The id of one test example, or None for all of them at once.

        Returns:
            ``Extreme(ids, values)``: for one test example a tuple of k ids and values ``[k]``; for
            all, an array of ids ``[k, n_test]`` and values ``[k, n_test]``. Equal scores keep the
            order of the train set. The full matrix is never sorted.
        """
        return self._extreme(k, test, largest=True)

    def bottom(self, k: int, test: Id | None = None) -> Extreme:
        """Return the k most harmful train examples, the most harmful first; see `top`."""
        return self._extreme(k, test, largest=False)

    def _extreme(self, k: int, test: Id | None, *, largest: bool) -> Extreme:
        k = checked_count(k, "top of scores")
        columns = slice(None)
        if test is not None:
            (column,) = positions_of(self.test_ids, [test], "test")
            columns = slice(column, column + 1)
        pieces = ((start, piece) for start, piece in self._pieces(columns))
        positions, values = extreme_rows(pieces, k, largest=largest)
        if test is not None:
            return Extreme(tuple(self.train_ids[i] for i in positions[:, 0].tolist()), values[:, 0])
        return Extreme(id_array(self.train_ids, positions.cpu()), values)

    def mean_over_tests(self) -> Tensor:
        """Return the mean score of each train example over all test examples, ``[n_train]``.

        It is the score for the mean test loss, because scores are linear in the target.
        """
        means = torch.zeros(len(self), dtype=torch.float64)
        for start, piece in self._pieces():
            means[start : start + len(piece)] = piece.mean(1, dtype=torch.float64)
        kind = str(self.values.dtype).removeprefix("torch.")
        return means.to(getattr(torch, kind))

    # --- scale ----------------------------------------------------------------------------------
    def removal_effect(self) -> Tensor:
        """Return the predicted change of each test target when one train example is removed.

        To first order in 1/n, with the model trained again without example i,

            target_j(without i) - target_j = tau_ij / n     for a loss,
                                           = -tau_ij / n    for a target that is better when higher,

        in the unit of the target: a helpful example's removal raises a loss and lowers a logit. The
        size is meaningful for scores that estimate influence (an inner product through an inverse
        Hessian; Koh and Liang 2017, arXiv 1703.04730, section 2.1); of cosines or random scores
        only the order is. n is ``provenance["n_train"]``, the size of the whole train set, also
        after slicing; of scores of a pool (`FittedMethod.over`) that of the train set of the fit,
        and an example that is not in there would, added to it, change the target by the negative.

        Returns:
            ``[n_train, n_test]`` in memory; of scores on disk take a slice first.

        Raises:
            InputError: The provenance does not say whether more of the target is better.
        """
        target = self.provenance.get("target")
        if not isinstance(target, Mapping) or "higher_is_better" not in target:
            raise InputError(
                "removal_effect: the provenance does not say whether more of the target is better; "
                'make Scores with provenance={"target": {"name": ..., "higher_is_better": ...}}'
            )
        sign = -1.0 if target["higher_is_better"] else 1.0
        own = self.provenance.get("fitted_on") or self.provenance
        scale: float = sign / own["n_train"]
        return _tensor_of(self.values).mul(scale)

    # --- parts ----------------------------------------------------------------------------------
    def __getitem__(self, key: Any) -> Scores:
        """Return the scores of chosen train (and test) positions, with their ids.

        A position may be an int (its axis stays, with length 1), a slice, an array or tensor of
        positions, or a mask. Both axes are chosen independently.
        """
        train, test = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        train, train_ids = select_axis(train, self.train_ids, "train")
        test, test_ids = select_axis(test, self.test_ids, "test")
        values: Any = self.values
        if isinstance(train, Tensor) and isinstance(test, Tensor):
            train = train[:, None]  # pairs every chosen row with every chosen column
        values = values[_index_for(train, values), _index_for(test, values)]
        return Scores(values, train_ids, test_ids, self.provenance, known_finite=True)

    def select(
        self, *, train_ids: Sequence[Id] | None = None, test_ids: Sequence[Id] | None = None
    ) -> Scores:
        """Return the scores of the given ids, in the given order; None keeps an axis whole."""
        train: Any = slice(None)
        test: Any = slice(None)
        if train_ids is not None:
            train = torch.tensor(positions_of(self.train_ids, train_ids, "train"), dtype=torch.long)
        if test_ids is not None:
            test = torch.tensor(positions_of(self.test_ids, test_ids, "test"), dtype=torch.long)
        return self[train, test]

    # --- in and out -----------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Write ``values.npy`` and ``scores.json`` to a folder that appears whole or not at all.

        Saved scores of that name are replaced; a folder that holds anything else is refused.
        """
        kind = str(self.values.dtype).removeprefix("torch.")
        with FolderWriter(folder, self.shape, kind) as writer:
            for start, piece in self._pieces():
                writer.values[start : start + len(piece)] = piece.cpu().numpy()
                release_pages(writer.values)
            writer.commit(self.facts())

    @classmethod
    def load(cls, folder: str | Path, *, mmap: bool = True, verify: bool = True) -> Scores:
        """Read what `save` wrote; no pickle is ever loaded.

        Args:
            folder: The folder.
            mmap: Map the values, so that only what is used is read, instead of loading them.
            verify: Compare the checksum and check that every value is finite, which reads the file
                twice. Shapes, sizes and the manifest are always checked.

        Raises:
            StoreError: The folder is truncated, foreign, damaged, or of a later version.
        """
        values, manifest = read_folder(folder, map_file=mmap, verify=verify)
        return cls(
            values,
            manifest["train_ids"],
            manifest["test_ids"],
            manifest["provenance"],
            known_finite=not verify,
        )

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame`: rows are train ids, columns test ids."""
        pandas = _optional("pandas")
        return pandas.DataFrame(
            _tensor_of(self.values).cpu().numpy(),
            index=pandas.Index(list(self.train_ids), name="train"),
            columns=pandas.Index(list(self.test_ids), name="test"),
        )

    def to_xarray(self) -> Any:
        """Return an `xarray.DataArray` with axes ``train`` and ``test`` and the provenance."""
        return _optional("xarray").DataArray(
            _tensor_of(self.values).cpu().numpy(),
            dims=("train", "test"),
            coords={"train": list(self.train_ids), "test": list(self.test_ids)},
            name="score",
            attrs={"sign": self.sign, "provenance": json.dumps(dict(self.provenance))},
        )

    def facts(self) -> dict[str, Any]:
        """Return what goes into the manifest beside the values: sign, ids and provenance."""
        return {
            "sign": self.sign,
            "train_ids": None if isinstance(self.train_ids, range) else list(self.train_ids),
            "test_ids": None if isinstance(self.test_ids, range) else list(self.test_ids),
            "provenance": dict(self.provenance),
        }

    def _pieces(self, columns: slice = slice(None)) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows ``[B, m]``) of the chosen columns, a bounded size at a time."""
        n_train, n_test = self.shape
        width = len(range(*columns.indices(n_test)))
        # a mapped row is read whole pages at a time, whichever columns are asked for
        bytes_of_row = (n_test if isinstance(self.values, np.memmap) else width) * 8
        rows = max(1, CHUNK // max(1, bytes_of_row))
        for start in range(0, n_train, rows):
            piece = self.values[start : start + rows, columns]
            if isinstance(piece, Tensor):
                yield start, piece
            else:
                yield start, torch.from_numpy(np.array(piece))
                release_pages(self.values)  # type: ignore[arg-type]

    def _check_finite(self) -> None:
        for start, piece in self._pieces():
            # one pass: a sum is finite only if every term is; if it overflowed, look closer
            if math.isfinite(piece.sum().item()):
                continue
            bad = (~torch.isfinite(piece)).nonzero()
            if len(bad):
                row, column = bad[0].tolist()
                raise NumericsError(
                    f"scores: the value {piece[row, column].item()} at train position "
                    f"{start + row} (id {self.train_ids[start + row]!r}), test position {column} "
                    f"(id {self.test_ids[column]!r}) is not finite; look for a diverged "
                    "checkpoint, or a singular curvature with damping 0"
                )


def _index_for(index: slice | Tensor, values: Values) -> Any:
    if isinstance(index, slice):
        return index
    return index.to(values.device) if isinstance(values, Tensor) else index.numpy()


def _tensor_of(values: Values) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def _as_provenance(provenance: Mapping[str, Any], n_train: int) -> Mapping[str, Any]:
    if not isinstance(provenance, Mapping):
        raise InputError(f"scores: provenance is a {type(provenance).__name__}, expected a mapping")
    clean: dict[str, Any] = _plain(provenance)
    clean.setdefault("n_train", n_train)
    return MappingProxyType(clean)


def _plain(value: Any) -> Any:
    """Return a JSON-ready copy; what JSON cannot hold becomes text, so that no result is lost."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(item) for item in items]
    if isinstance(value, (np.generic, Tensor)) and value.ndim == 0:
        return _plain(value.item())
    if isinstance(value, (np.ndarray, Tensor)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _optional(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"scores: to_{name}() needs {name}, which is not installed; "
            'install it with: pip install "dattri-core[table]"'
        ) from error
