"""The model that an argument names."""

import re
from pathlib import Path

import torch

from h_net_dynamic_chunking.cli.options import FloatType
from h_net_dynamic_chunking.config import PRESETS, HNetConfig
from h_net_dynamic_chunking.lm import HNetLM
from h_net_dynamic_chunking.training.devices import resolve_device
from h_net_dynamic_chunking.training.folder import RunFolder

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def read_config(model: str) -> HNetConfig:
    """The configuration of a preset, of a directory, or in a JSON file."""
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    refuse_run(path)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ValueError(f"MODEL: {model} is no preset ({', '.join(PRESETS)}), nor is {path} there")
    return HNetConfig.from_json(path)


def load_model(
    source: str,
    config: Path | None,
    dtype: FloatType | None,
    device: str,
    seed: int = 0,
    clamp: float | None = None,
) -> HNetLM:
    """A preset with random weights, a directory, an official .pt, or a name on the hub.

    dtype None is as stored; `clamp` goes before that of its configuration.
    """
    torch_dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    torch_device = resolve_device(device)
    path = Path(source)
    if source not in PRESETS:
        refuse_run(path)
    if source not in PRESETS and path.is_file():
        return load_official(path, config, torch_device, torch_dtype, clamp)
    if config is not None:
        raise ValueError(f"{config} is of no use: {source} is not an official .pt")
    if source in PRESETS:
        # Drawn on the CPU in float32, so that the seed means the same weights everywhere.
        torch.manual_seed(seed)
        return HNetLM(PRESETS[source], smoothing_clamp=clamp).to(torch_device, torch_dtype)
    if path.is_dir() or _HUB_NAME.fullmatch(source):
        return HNetLM.from_pretrained(
            source, device=torch_device, dtype=torch_dtype, smoothing_clamp=clamp
        )
    raise ValueError(
        f"{source} is no preset ({', '.join(PRESETS)}), no directory, no file, and no name on the "
        "hub such as cartesia-ai/hnet_1stage_L"
    )


def refuse_run(path: Path) -> None:
    """Raise ValueError if this is the folder of a run of train.py, or a file with its model."""
    run = RunFolder(path if path.is_dir() else path.parent)
    if path in (run.path, run.config, run.checkpoint) and run.is_of_train:
        raise ValueError(f"{run.path} is a run folder of train.py, whose model hnet does not read")


def load_official(
    weights: Path,
    config: Path | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    clamp: float | None = None,
) -> HNetLM:
    """An official checkpoint, with the configuration beside it or that of the preset's name."""
    beside = weights.with_suffix(".json")
    if config is None and not beside.is_file() and weights.stem in PRESETS:
        preset = PRESETS[weights.stem]
        return HNetLM.from_official(
            preset, weights, device=device, dtype=dtype, smoothing_clamp=clamp
        )
    config = beside if config is None else config
    if not config.is_file():
        raise ValueError(f"{weights} needs a configuration: {config} is not there")
    return HNetLM.from_official(config, weights, device=device, dtype=dtype, smoothing_clamp=clamp)
