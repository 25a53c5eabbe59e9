"""Weights of other projects: read from safetensors, fitted to the config beside them, hashed.

Nothing here runs code from data: only safetensors and JSON are opened, every tensor is compared with the shape the
config asks for before memory is taken, and classes are named by us and never by the file. Weights are float32 from
here on: half precision moves ids (docs/tokenizers.md), so it is widened while loading and said once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.manifest import canonical_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
#: What libraries call the weights of a folder, in the order we look.
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
#: Formats that may hold pickled objects, which run code when they are opened.
PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".npz", ".tar"})
CONVERT = (
    "convert it once, on a machine where you trust the file: "
    "torch.load(..., weights_only=True), then safetensors.torch.save_file(state_dict, 'model.safetensors')"
)
#: Keys of a config that say who wrote it, not how it encodes.
VOLATILE = frozenset({"_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype"})
WIDENED = ("float16", "bfloat16", "float64")
LISTED = 4  # names an error shows of a longer list


@dataclass(frozen=True)
class Weights:
    """where: folder or file; tensors: name -> float32 (or integer) tensor; config: of config.json, may be empty;
    digest: sha256 over the tensors as stored, names, types and shapes included."""

    where: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    digest: str

    def identity(self, kind: str, reading: dict[str, Any]) -> str:
        """sha256 of weights, config and what we add to them (`reading`): the codec's mark in a vocabulary."""
        config = {key: value for key, value in self.config.items() if key not in VOLATILE}
        try:
            text = canonical_json(
                {"kind": kind, "config": config, "reading": reading, "weights": self.digest}
            )
        except (ValueError, TypeError) as error:
            raise VocabularyError(
                f"{CONFIG_NAME} holds a value JSON has no spelling for", where=self.where, why=str(error)
            ) from error
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_weights(path: Path) -> Weights:
    """Read a folder of safetensors and config.json, or one .safetensors file with config.json beside it.

    Sharded weights are read by their index. VocabularyError when there is nothing to read, several candidates,
    damage, numbers that are not finite, or a format that could hold pickled objects.
    """
    path = Path(path)
    files = [path] if path.is_file() else _files_of(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix.lower() != ".safetensors":
            raise VocabularyError(
                "weights are read from .safetensors only",
                where=str(file),
                why="other formats may hold pickled objects, and those run code when they are opened",
                fix=CONVERT,
            )
        part = _load(file)
        twice = tensors.keys() & part.keys()
        if twice:
            raise VocabularyError(f"a tensor is stored twice: {_some(twice)}", where=str(file))
        tensors |= part
    digest = _digest(tensors)
    return Weights(str(path), _widened(tensors, str(path)), read_config(path), digest)


def _files_of(folder: Path) -> list[Path]:
    """The weight files of a folder."""
    if not folder.is_dir():
        raise VocabularyError("no such file or folder of weights", where=str(folder))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        return _indexed(indices[0])
    found = sorted(folder.glob("*.safetensors"))
    named = [file for name in WEIGHT_NAMES for file in found if file.name == name]
    if named or len(found) == 1:
        return named[:1] or found
    if found:
        raise VocabularyError(
            f"several weight files, and none has a standard name: {_some(f.name for f in found)}",
            where=str(folder),
            fix="name the file instead of the folder",
        )
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLED)
    if pickled:
        raise VocabularyError(
            f"these weights are not safetensors: {_some(pickled)}",
            where=str(folder),
            why="such files may hold pickled objects, and those run code when they are opened",
            fix=CONVERT,
        )
    inner = [name for name in ("vae", "vqvae", "movq", "vqgan") if (folder / name).is_dir()]
    raise VocabularyError(
        "no .safetensors file in the folder",
        where=str(folder),
        fix=f"give the codec's own folder: {folder / inner[0]}" if inner else "download the weights first",
    )


def _indexed(index: Path) -> list[Path]:
    """Files an index names; plain names beside it only."""
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise VocabularyError("the index of the weights has no weight_map of names", where=str(index))
    files = sorted({index.parent / name for name in names.values()})
    for file in files:
        if file.parent != index.parent:
            raise VocabularyError(
                "the index of the weights names a file outside its folder", where=str(index)
            )
        if not file.is_file():
            raise VocabularyError(f"a file of the index is missing: {file.name}", where=str(index))
    return files


def _load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(file, device="cpu")
    except Exception as error:  # safetensors raises its own exception type on damage
        raise VocabularyError(
            "not a readable safetensors file", where=str(file), why=f"{type(error).__name__}: {error}"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VocabularyError(
            "not readable JSON", where=str(file), why=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, dict):
        raise VocabularyError("a JSON object was expected", where=str(file))
    return value


def read_config(path: Path) -> dict[str, Any]:
    """The config.json in a folder or beside a file; empty when there is none."""
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    return _json(file) if file.is_file() else {}


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes in name order: the same for any sharding of the same weights."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _widened(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Every float tensor as float32; VocabularyError for floats that have no exact widening or are not finite."""
    out, changed = {}, set()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            stored = str(tensor.dtype).removeprefix("torch.")
            if stored not in ("float32", *WIDENED):
                raise VocabularyError(f"{name} is stored as {stored}, which is not read", where=where)
            if stored != "float32":
                changed.add(stored)
                tensor = tensor.float()
            if not tensor.isfinite().all():
                raise VocabularyError(f"{name} holds numbers that are not finite", where=where)
        out[name] = tensor
    if changed:
        _say_once(f"{where}: {' and '.join(sorted(changed))} weights are used as float32")
    return out


@lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    log.warning(text)


def library(module: str, name: str, *, extra: str) -> Any:
    """Attribute `name` of a library module, imported now; VocabularyError naming the extra that brings it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        package = module.partition(".")[0]
        raise VocabularyError(
            f"this codec needs {name} of the package {package}, which cannot be imported",
            why=f"{type(error).__name__}: {error}",
            fix=f"pip install 'ringweave[{extra}]'" if extra else f"pip install --upgrade {package}",
        ) from error


def diffusers_config(weights: Weights, cls: Any) -> dict[str, Any]:
    """Arguments of the diffusers class `cls` in config.json; VocabularyError for another class or unknown keys.

    diffusers drops keys it does not know with a printed line; here they are refused, for they change latents.
    """
    config = {key: value for key, value in weights.config.items() if not key.startswith("_")}
    named = weights.config.get("_class_name", cls.__name__)
    known = set(cls._get_init_keys(cls)) - {"self"}
    if not config or named != cls.__name__:
        raise VocabularyError(
            f"config.json is of {named}, not of {cls.__name__}" if config else "there is no config.json",
            where=weights.where,
            fix="put the config.json that was published with the weights beside them",
        )
    unknown = sorted(config.keys() - known - {"dtype", "torch_dtype"})
    if unknown:
        raise VocabularyError(
            f"config.json has keys this version of {cls.__name__} does not know: {', '.join(unknown[:4])}",
            where=weights.where,
            fix="pip install --upgrade diffusers, or take the keys out if they change nothing",
        )
    return {key: value for key, value in config.items() if key in known}


def build(
    make: Callable[[], torch.nn.Module], tensors: dict[str, torch.Tensor], *, where: str, device: str
) -> torch.nn.Module:
    """The module of `make` with exactly these weights, frozen, in evaluation mode, on `device`.

    It is made without memory first, so a config that asks for terabytes fails by comparing shapes.
    """
    import torch

    try:
        with torch.device("meta"):
            module = make()
    except Exception as error:  # whatever a library raises on a config it does not like
        raise VocabularyError(
            f"{CONFIG_NAME} does not describe a model", where=where, why=f"{type(error).__name__}: {error}"
        ) from error
    asked = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_shapes(asked, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, where=where)
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval().to(device)


def check_shapes(asked: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], *, where: str) -> None:
    """VocabularyError that names missing, surplus and misshapen tensors."""
    shaped = [
        f"{k} is {list(found[k])}, not {list(asked[k])}"
        for k in sorted(asked.keys() & found.keys())
        if asked[k] != found[k]
    ]
    refuse_unfit(asked.keys() - found.keys(), found.keys() - asked.keys(), shaped, where=where)


def refuse_unfit(missing: Any, surplus: Any, misshapen: Any, *, where: str) -> None:
    """VocabularyError unless all three are empty."""
    parts = [("missing", missing), ("not expected", surplus), ("other shape", misshapen)]
    if any(names for _, names in parts):
        raise VocabularyError(
            "the weights are not those the config describes",
            where=where,
            why="; ".join(f"{label}: {_some(names)}" for label, names in parts if names),
            fix=f"put the {CONFIG_NAME} that was published with the weights beside them",
        )


def _some(names: Any) -> str:
    """The first few of `names` and how many more there are."""
    ordered = sorted(str(name) for name in names)
    rest = len(ordered) - LISTED
    return ", ".join(ordered[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def exactly(device: str = "cpu") -> Iterator[None]:
    """float32 without shortcuts, without gradients, on one CPU thread.

    A float codec is only as repeatable as its sums: the order of summation changes with the number of threads,
    with the batch, and with reduced-precision matmuls a program may have switched on. One picture or clip at a
    time inside this block, ids depend on none of them. They may still differ between kinds of processor and
    versions of torch, which is why a set made of tokens keeps its ids and does not encode again.
    """
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    kind = torch.device(device).type
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(kind, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


def check_codes(codes: NDArray[Any], size: int, *, what: str, dims: int) -> NDArray[np.int64]:
    """`codes` as int64; DataError unless integers in [-1, size) with at least `dims` axes, none empty."""
    if codes.dtype.kind not in "iu" or codes.ndim < dims or 0 in codes.shape:
        raise DataError(
            f"codes must be integers with {dims} axes or more, got {codes.dtype} {list(codes.shape)}",
            where=what,
            why="bfloat16 holds no integer above 256 exactly" if codes.dtype.kind not in "iu" else "",
        )
    low, high = int(codes.min()), int(codes.max())
    if low < -1 or high >= size:
        raise DataError(f"codes from {low} to {high} are not of a codebook of {size}", where=what)
    return codes.astype(np.int64)


def to_pixels(values: torch.Tensor, *, what: str) -> NDArray[np.uint8]:
    """Rounded and clipped to 0..255; DataError when not finite."""
    import torch

    if not values.isfinite().all():
        raise DataError("the decoder gave values that are not finite", where=what)
    return values.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
