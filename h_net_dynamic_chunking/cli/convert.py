"""`hnet convert`: a checkpoint in the other format."""

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal as readable_size

from h_net_dynamic_chunking.cli.models import load_official, refuse_run
from h_net_dynamic_chunking.cli.options import ConfigOption, one_sentence_errors
from h_net_dynamic_chunking.lm import HNetLM


@one_sentence_errors()
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="official .pt, or directory")],
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="directory, or official .pt")
    ],
    config: ConfigOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace existing files")] = False,
) -> None:
    """Turn an official checkpoint into a directory, or a directory into an official checkpoint.

    A directory holds model.safetensors and config.json; an official checkpoint is a .pt with a
    .json of the same stem beside it, which has no place for target ratios, the weight of the ratio
    loss and the clamp of the smoothing. Weights keep every bit.
    """
    refuse_run(source)
    if not source.exists():
        raise ValueError(f"SOURCE: {source} does not exist")
    to_official = destination.suffix == ".pt"
    if to_official:
        files = [destination, destination.with_suffix(".json")]
    else:
        files = [destination / "model.safetensors", destination / "config.json"]
    if not to_official and destination.is_file():
        raise ValueError(
            f"DESTINATION must be a new directory or a .pt, got the file {destination}"
        )
    present = [str(file) for file in files if file.exists()]
    if present and not overwrite:
        raise ValueError(f"{' and '.join(present)} would be replaced; add --overwrite to do so")

    if to_official:
        if not source.is_dir():
            raise ValueError(f"SOURCE must be a directory to make a .pt of, got {source}")
        if config is not None:
            raise ValueError(f"--config must be left out: {source} holds its own configuration")
        loaded = HNetLM.from_pretrained(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        loaded.save_official(config_json=files[1], weights=files[0])
    else:
        if not source.is_file():
            raise ValueError(f"SOURCE must be an official .pt to make a directory of, got {source}")
        load_official(source, config).save_pretrained(destination)
    for file in files:
        typer.echo(f"wrote {file}, {readable_size(file.stat().st_size)}")
