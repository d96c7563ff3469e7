"""Official checkpoints in and out, exactly.

Three things are named or placed differently there: the innermost stack is one more `main_network`
under its stage, the vector that widens the way into a stage belongs to that stage, and `q_proj`
acts on the position before, so that it makes our keys.
"""

import importlib
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

_ROUTER = "chunker.to_queries_keys.weight"
# The official projections, in the order in which ours holds them: queries, then keys.
_HALVES = ("routing_module.k_proj_layer.weight", "routing_module.q_proj_layer.weight")

# How files of torch.save begin: a zip archive, and before torch 1.6 a pickled magic number.
_ZIP = b"PK"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# What reading damaged archives and pickles ends in, besides UnpicklingError.
_DAMAGE = (RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, struct.error)


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
    """Raise ValueError that names the first missing, extra or unfit tensors, if there are any."""
    problems = [f"{key} is missing" for key in wanted.keys() - got.keys()]
    problems += [f"{key} is not of this model" for key in got.keys() - wanted.keys()]
    for key in got.keys() & wanted.keys():
        if fault := _fault(got[key], wanted[key].shape):
            problems.append(f"{key} {fault}")
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        rest = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where} does not fit the configuration: {shown}{rest}")


def _fault(tensor: Tensor, shape: torch.Size) -> str | None:
    """Why the tensor cannot be a weight of that shape, or None."""
    # Before the shape, which a nested tensor has not.
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is sparse or nested ({tensor.layout}), wanted a dense tensor"
    if tensor.shape != shape:
        return f"has shape {tuple(tensor.shape)}, wanted {tuple(shape)}"
    if not tensor.is_floating_point():
        return f"has dtype {tensor.dtype}, wanted a floating-point one"
    if tensor.is_meta:
        return "is on the meta device and has no values"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}, wanted a plain tensor"
    return None


def check_tied(state: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError unless the head of a model with tied embeddings is its embedding."""
    head, embedding = state["lm_head.weight"], state["embeddings.weight"]
    # By their bytes, because a NaN differs from itself.
    if head.dtype != embedding.dtype or not torch.equal(_bytes(head), _bytes(embedding)):
        raise ValueError(
            f"{where}: lm_head.weight differs from embeddings.weight, although the configuration "
            "has tie_embeddings = true"
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pt file, memory mapped, without running any code that it may hold.

    Raises:
        ValueError: there is no such file, it is truncated, damaged or of another kind, or it holds
            anything but a state dict of tensors.
    """
    if not Path(path).is_file():
        raise ValueError(f"weights: there is no file {path}")
    _check_format(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to run what the file holds.
        raise ValueError(
            f"weights: {path} is refused, because it holds more than tensors or is damaged; "
            "nothing in it has run"
        ) from error
    except _DAMAGE as error:
        raise ValueError(
            f"weights: {path} is truncated, damaged or no state dict of torch.save"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"weights: {path} must hold a state dict of tensors, got {type(content).__name__}"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"weights: {path} must hold tensors by name and nothing else, as official files "
                f"do, got {type(value).__name__} at {key!r}"
            )
    return content


def _check_format(path: str | Path) -> None:
    """Raise ValueError unless the file begins as those of torch.save do."""
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY))
    if start == _LEGACY:
        raise ValueError(
            f"weights: {path} has the format that torch.save had before torch 1.6, which cannot be "
            "memory mapped; load it with weights_only=True and save it again"
        )
    if not start.startswith(_ZIP):
        raise ValueError(f"weights: {path} is not a torch checkpoint")


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors.

    Raises:
        OSError: the file cannot be written, perhaps for want of space.
    """
    library = _safetensors()
    path.touch()
    permissions = path.stat().st_mode
    try:
        library.torch.save_file(on_own_memory(state), path)
    except library.SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from error
    # The library has put another file there, which only its owner may read.
    path.chmod(permissions)


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as a .pt file, which `read_weights` reads.

    Raises:
        OSError: the file cannot be written, perhaps for want of space.
    """
    try:
        # Opened here, because torch.save does not say why it cannot write to a path.
        with path.open("wb") as file:
            torch.save(on_own_memory(state), file)
    except (OSError, RuntimeError) as error:
        # Where a write fails, torch hides the reason behind an error of its own.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(f"{path} cannot be written ({reason})") from error


def on_own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous, with a copy of those that share memory, and of no other."""
    seen: set[int] = set()
    apart = {}
    for key, value in state.items():
        storage = value.untyped_storage()
        shared = storage.nbytes() != value.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        value = value.detach()
        apart[key] = (value.clone() if shared else value).contiguous()
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
    try:
        hub = _required("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"name_or_path: there is no directory {name!r}, and to look for it on the hub, {error}"
        ) from error
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.pt"]))
    # Connection errors are OSErrors; the rest says that the name cannot be one.
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
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
