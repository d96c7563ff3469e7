"""Official checkpoints in and out, exactly.

Three things are named or placed differently there: the innermost stack is one more `main_network`
under its stage, the vector that widens the way into a stage belongs to that stage, and `q_proj`
acts on the position before, so that it makes our keys.
"""

import importlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from h_net_dynamic_chunking.files import whole

_ROUTER = "chunker.to_queries_keys.weight"
# The official projections, in the order in which ours holds them: queries, then keys.
_HALVES = ("routing_module.k_proj_layer.weight", "routing_module.q_proj_layer.weight")


def from_official(official: Mapping[str, Tensor], stages: int) -> dict[str, Tensor]:
    """Our state dict of the same weights. Tensors are shared, except those of the routers.

    Args:
        official: a state dict of the official code.
        stages: how many chunkers the model has.
    """
    left = dict(official)
    ours = {}
    for there, here in _router_prefixes(stages):
        halves = [left.pop(there + half) for half in _HALVES if there + half in left]
        # Half a router is left out, so that its absence is noticed.
        if len(halves) == len(_HALVES):
            ours[here + _ROUTER] = torch.cat(halves)
    rules = _prefixes(stages)
    return ours | {_translated(key, rules): value for key, value in left.items()}


def to_official(ours: Mapping[str, Tensor], stages: int) -> dict[str, Tensor]:
    """The official state dict of the same weights; the inverse of `from_official`."""
    left = dict(ours)
    official: dict[str, Tensor] = {}
    for there, here in _router_prefixes(stages):
        if here + _ROUTER in left:
            halves = left.pop(here + _ROUTER).chunk(2)
            official |= {there + name: half for name, half in zip(_HALVES, halves, strict=True)}
    rules = [(here, there) for there, here in _prefixes(stages)]
    return official | {_translated(key, rules): value for key, value in left.items()}


def check_matches(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError that names the first missing, extra or mis-shaped keys, if there are any."""
    problems = [f"{key} is missing" for key in wanted.keys() - got.keys()]
    problems += [f"{key} is not of this model" for key in got.keys() - wanted.keys()]
    problems += [
        f"{key} has shape {tuple(got[key].shape)}, wanted {tuple(wanted[key].shape)}"
        for key in got.keys() & wanted.keys()
        if got[key].shape != wanted[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        rest = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where} does not fit the configuration: {shown}{rest}")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pt file, memory mapped, without running any code that it may hold.

    Raises:
        ValueError: the file is truncated, is not a state dict, or holds more than tensors.
    """
    if not Path(path).is_file():
        raise ValueError(f"weights: there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"weights: {path} is truncated, or not a torch checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"weights: {path} cannot be read safely ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"weights: {path} must hold a state dict of tensors")
    return content


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors, whole or not at all."""
    with whole(path) as part:
        _safetensors().torch.save_file(on_own_memory(state), part)


def on_own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with a copy of those that share memory, and of no other."""
    seen: set[int] = set()
    apart = {}
    for key, value in state.items():
        storage = value.untyped_storage()
        shared = storage.nbytes() != value.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        apart[key] = value.detach().clone() if shared else value.detach()
    return apart


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory mapped.

    Raises:
        ValueError: there is no such file, or it is truncated or of another kind.
    """
    library = _safetensors()
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    try:
        state: dict[str, Tensor] = library.torch.load_file(path)
    except library.SafetensorError as error:
        raise ValueError(f"weights: {path} is truncated, or not safetensors ({error})") from error
    return state


def fetch_from_hub(name: str) -> Path:
    """The local folder of a model of the Hugging Face hub, downloaded if need be.

    Raises:
        ValueError: the hub cannot be reached, or knows no such model.
        ImportError: huggingface-hub is not installed.
    """
    hub = _required("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.pt"]))
    # Connection errors are OSErrors; the rest says that the name cannot be one.
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"name_or_path: {name!r} is no directory, and the hub did not give it either ({reason})"
        ) from error


def _safetensors() -> ModuleType:
    _required("safetensors.torch")
    return _required("safetensors")


def _required(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(
            f"{package} is missing: pip install 'h-net-dynamic-chunking[hub]'"
        ) from error


def _router_prefixes(stages: int) -> list[tuple[str, str]]:
    """Where each stage stands there and here, outermost first."""
    return [
        ("backbone." + "main_network." * stage, "backbone." + "network." * stage)
        for stage in range(stages)
    ]


def _prefixes(stages: int) -> list[tuple[str, str]]:
    """What the rest of the keys begin with, there and here."""
    prefixes = []
    for there, here in _router_prefixes(stages):
        prefixes += [(there + part, here + part) for part in ("encoder.", "decoder.")]
        prefixes.append((there + "residual_proj.", here + "chunker.residual_proj."))
        prefixes.append((there + "main_network.pad_dimension", here + "width_in.vector"))
    innermost = "backbone." + "main_network." * stages + "main_network."
    return [*prefixes, (innermost, "backbone." + "network." * stages)]


def _translated(key: str, rules: list[tuple[str, str]]) -> str:
    """The key with its prefix exchanged; unknown keys stay, for `check_matches` to name."""
    for prefix, replacement in rules:
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return key
