"""`hnet info`: the sizes of a model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal as readable_size
from rich.table import Table

from h_net_dynamic_chunking import checkpoints
from h_net_dynamic_chunking.cli.models import read_config
from h_net_dynamic_chunking.cli.options import AsJson, one_sentence_errors
from h_net_dynamic_chunking.lm import HNetLM

FLOPS_SEQ_LEN = 8192


@one_sentence_errors()
def info_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="preset, directory with config.json, or JSON file"),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="official .pt that must fit (None = none is read)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the sizes of a model. Nothing of it is allocated.

    A preset goes before a directory of the same name, which ./NAME names.
    """
    config = read_config(model)
    with torch.device("meta"):
        empty = HNetLM(config)
    fitting = None if weights is None else WeightsFile.fitting(empty, weights)
    sizes = Sizes.of(empty)
    if as_json:
        typer.echo(json.dumps(asdict(sizes) | {"weights": fitting and asdict(fitting)}))
        return
    Console().print(sizes.table())
    typer.echo(f"parameters         {sizes.parameters:,}")
    typer.echo(
        f"FLOPs per byte     {sizes.flops_per_byte / 1e9:.3g} G forward, "
        f"{sizes.seq_len} bytes in a sequence"
    )
    if fitting is not None:
        typer.echo(
            f"weights            {fitting.path} fits, {readable_size(fitting.size)}, "
            f"{' and '.join(fitting.dtypes)}"
        )


@dataclass(frozen=True)
class LevelSizes:
    """One stage, or the main network inside all of them."""

    name: str
    width: int
    layers: tuple[str, ...]
    """Layouts of encoder and decoder, or of the main network."""
    parameters: int
    target_ratio: float | None
    """Positions a chunk; None for the main network, which makes none."""


@dataclass(frozen=True)
class Sizes:
    """What `hnet info` shows."""

    levels: list[LevelSizes]
    parameters: int
    flops_per_byte: float
    """Forward, in sequences of `seq_len` bytes."""
    seq_len: int

    @classmethod
    def of(cls, model: HNetLM) -> "Sizes":
        config = model.config
        parameters = [sum(p.numel() for p in level) for level in model.parameters_by_level()]
        names = [*(f"stage {stage}" for stage in range(config.stages)), "main network"]
        columns = (names, config.d_model, config.levels(), parameters, (*config.target_ratio, None))
        return cls(
            levels=[LevelSizes(*row) for row in zip(*columns, strict=True)],
            parameters=model.num_parameters(),
            flops_per_byte=model.flops_per_byte(seq_len=FLOPS_SEQ_LEN),
            seq_len=FLOPS_SEQ_LEN,
        )

    def table(self) -> Table:
        table = Table("", box=SIMPLE)
        table.add_column("width", justify="right")
        table.add_column("layers")
        table.add_column("parameters", justify="right")
        table.add_column("target ratio", justify="right")
        for level in self.levels:
            table.add_row(
                level.name,
                str(level.width),
                " / ".join(level.layers),
                f"{level.parameters:,}",
                "" if level.target_ratio is None else f"{level.target_ratio:g}",
            )
        return table


@dataclass(frozen=True)
class WeightsFile:
    """An official .pt."""

    path: str
    size: int
    """In bytes."""
    dtypes: list[str]

    @classmethod
    def fitting(cls, model: HNetLM, path: Path) -> "WeightsFile":
        """The file, if its keys and shapes are those of the model; else a ValueError."""
        found = checkpoints.read_weights(path)
        wanted = checkpoints.to_official(model.state_dict(), model.config.stages)
        checkpoints.check_matches(found, wanted, str(path))
        if model.config.tie_embeddings:
            checkpoints.check_tied(found, str(path))
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in found.values()}
        return cls(str(path), path.stat().st_size, sorted(dtypes))
