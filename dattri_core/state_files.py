"""Files of weights: one, several that an index names, or the folder that a trainer wrote."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dattri_core.errors import InputError, StoreError

T = TypeVar("T")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
WHOLE = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
"""What a trainer calls the weights of one checkpoint, the first that is there counting."""
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
"""What it calls them where they are those of an adapter."""
OTHERS = re.compile(r"(optimizer|scheduler|scaler|rng_state.*|training_args)\.(pt|pth|bin)")
"""What it keeps beside them; never opened."""
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


def find_states(given: str | Path) -> list[tuple[str, Path]]:
    """Return name and place of each checkpoint that a path, pattern or folder names.

    A folder that a trainer wrote (``model.safetensors``, its shards with an index, or an adapter)
    is one checkpoint of that name, whatever optimizer lies beside it; a folder of such folders, and
    a folder of files of weights, are a checkpoint each, in the order of the numbers in their names.

    Raises:
        InputError: Nothing is there, or a folder holds weights of several kinds.
    """
    path = Path(given)
    matching = glob.glob(str(given)) if not path.exists() else [given]  # noqa: PTH207 - any root
    found = sorted(map(Path, matching), key=_natural)
    states = [state for place in found for state in _states_at(place, nested=True)]
    if not states:
        raise InputError(
            f"checkpoint: {str(given)!r} names no file with a suffix of {', '.join(SUFFIXES)}, and "
            f"no folder with {', '.join((*WHOLE, *ADAPTER))}"
        )
    return states


def read_state(path: Path) -> dict[str, Tensor]:
    """Read tensors from files of weights; never a pickle of code.

    Raises:
        InputError: There is no such file.
        StoreError: A file is truncated, foreign, or holds anything but tensors.
    """
    state: dict[str, Tensor] = {}
    for file, names in files_of(path).items():
        held = _read_file(file)
        state.update(held if names is None else _named(file, held, names))
    return state


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes in files; of a safetensors file only the header is read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file, names in files_of(path).items():
        held = _shapes(file)
        shapes.update(held if names is None else _named(file, held, names))
    return shapes


def hash_of(path: Path) -> str:
    """Return a hash of the bytes of a file, or of an index and all files that it names."""
    digest = hashlib.sha256()
    files = list(files_of(path))
    for file in files if files == [path] else [path, *files]:
        with file.open("rb") as handle:
            while piece := handle.read(4 * 2**20):
                digest.update(piece)
    return digest.hexdigest()


def files_of(path: Path) -> dict[Path, set[str] | None]:
    """Return the files with the tensors of a checkpoint, and the names an index says they hold.

    Raises:
        StoreError: An index is damaged, or names a file that is missing or in another folder.
    """
    if not path.name.endswith(INDEX):
        return {path: None}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        found: dict[Path, set[str] | None] = {}
        for name, file in sorted(listed.items()):
            if Path(file).name != file or not file.endswith(SUFFIXES):
                raise ValueError(f"{name!r} is said to be in {file!r}")
            held = found.setdefault(path.parent / file, set())
            assert held is not None
            held.add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"checkpoint {str(path)!r}: the index cannot be read ({error!r}); save the model again"
        ) from error
    missing = [file.name for file in found if not file.is_file()]
    if missing or not found:
        raise StoreError(
            f"checkpoint {str(path)!r}: the index names {missing or 'no file'}, "
            f"{'which are missing' if missing else 'and there has to be one'}; copy the whole "
            "folder, or save the model again"
        )
    return found


# --- finding --------------------------------------------------------------------------------------
def _states_at(place: Path, *, nested: bool) -> list[tuple[str, Path]]:
    if not place.is_dir():
        return [(place.name, place)]
    names = {file.name for file in place.iterdir() if file.is_file()}
    whole = [name for name in WHOLE if name in names][:1]
    adapter = [name for name in ADAPTER if name in names][:1]
    if whole and adapter:
        raise InputError(
            f"checkpoint {str(place)!r}: holds both {whole[0]} and {adapter[0]}; give the one that "
            "is meant, as a file"
        )
    single = whole + adapter
    known = {*WHOLE, *ADAPTER} if single else set()
    files = sorted(
        (
            place / name
            for name in names - known
            if name.endswith(SUFFIXES)
            and not OTHERS.fullmatch(name)
            and not (single and SHARD.fullmatch(name))
        ),
        key=_natural,
    )
    if single and not files:
        return [(place.resolve().name, place / single[0])]
    if files:
        return [
            (file.name, file)
            for file in sorted([*files, *(place / n for n in single)], key=_natural)
        ]
    if not nested:
        return []
    inner = sorted((folder for folder in place.iterdir() if folder.is_dir()), key=_natural)
    return [state for folder in inner for state in _trained_at(folder)]


def _trained_at(folder: Path) -> list[tuple[str, Path]]:
    """Return the checkpoint that a trainer wrote to a folder, if it is such a one."""
    if any((folder / name).is_file() for name in (*WHOLE, *ADAPTER)):
        return _states_at(folder, nested=False)
    return []


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that puts ``step-9`` before ``step-10``."""
    pieces = re.split(r"(\d+)", str(path))
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in pieces]


# --- reading --------------------------------------------------------------------------------------
def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"checkpoint: no file {str(path)!r}") from error
    except Exception as error:
        raise StoreError(
            f"checkpoint {str(path)!r}: cannot be read as tensors only "
            f"({type(error).__name__}: {_first_sentence(error)}); a pickled "
            "model is never loaded, since it may hold code: save its tensors with "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise StoreError(
            f"checkpoint {str(path)!r}: holds a {type(state).__name__}, expected names and tensors"
        )
    return state


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in _read_file(path).items()}
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"checkpoint {str(path)!r}: is no whole safetensors file ({error}); save it again"
        ) from error


def _named(path: Path, held: dict[str, T], names: set[str]) -> dict[str, T]:
    """Return what a file holds, if it is what the index says of it."""
    if set(held) != names:
        raise StoreError(
            f"checkpoint {str(path)!r}: holds {sorted(set(held) - names)} that its index does not "
            f"name there, and lacks {sorted(names - set(held))}; the files are of different saves: "
            "save the model again"
        )
    return held


def _first_sentence(error: Exception) -> str:
    """Return what torch says before its advice, which is to load the pickle all the same."""
    return str(error).partition("\n")[0].partition(". ")[0]
