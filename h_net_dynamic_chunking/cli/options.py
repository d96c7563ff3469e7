"""Options that several commands have, and how they fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

# Exit statuses.
FAILURE = 2
INTERRUPTED = 130  # as shells have it after Ctrl-C
MODEL_HELP = "preset (random weights), directory, official .pt, or name on the hub"

FloatType = Literal["float64", "float32", "bfloat16", "float16"]
StateFloatType = Literal["float32", "bfloat16", "float16"]

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="JSON configuration of an official .pt (None = beside it, same stem)",
    ),
]
ModelOption = Annotated[str, typer.Option("--model", "--model-path", help=MODEL_HELP)]
ModelConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "--config-path",
        exists=True,
        dir_okay=False,
        help="JSON configuration of an official .pt (None = beside it, same stem)",
    ),
]
StoredFloatTypeOption = Annotated[
    FloatType | None, typer.Option(help="dtype of all weights (None = as stored)")
]
StateFloatTypeOption = Annotated[
    StateFloatType | None,
    typer.Option(help="dtype of Mamba-2 states; 16 bits: faster for many rows, less accurate"),
]
BosOption = Annotated[bool, typer.Option("--bos/--no-bos", help="read BOS = 254 before the text")]
NoColorOption = Annotated[
    bool, typer.Option("--no-color", help="plain text, also on a terminal (or set NO_COLOR)")
]
FloatTypeOption = Annotated[FloatType, typer.Option(help="dtype of all weights")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
ClampOption = Annotated[
    float | None,
    typer.Option(
        help="the smoothing clamps p to [c, 1 - c]: official 1e-4, 0 for none (None = as saved)"
    ),
]


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """What the user can mend is said without a traceback; all else is a bug and keeps its own."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        raise typer.Exit(INTERRUPTED) from interruption
    except BrokenPipeError:
        raise  # nobody reads what would be said; typer ends the command quietly
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"hnet: {error}", err=True)
        raise typer.Exit(FAILURE) from error
