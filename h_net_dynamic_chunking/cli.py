"""The command `hnet`: look at a model, convert its checkpoint, compare it with another.

    hnet info hnet_2stage_XL
    hnet convert hnet_1stage_L.pt models/hnet_1stage_L --config hnet_1stage_L.json
    hnet compare models/hnet_1stage_L models/hnet_1stage_L --dtype-b bfloat16

What goes wrong is one sentence on stderr and exit status 2.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from h_net_dynamic_chunking import checkpoints
from h_net_dynamic_chunking.comparison import Comparison, Summary, compare
from h_net_dynamic_chunking.config import PRESETS, HNetConfig
from h_net_dynamic_chunking.lm import HNetLM
from h_net_dynamic_chunking.training.devices import resolve_device

FAILURE = 2  # exit status

try:
    import typer
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.filesize import decimal as readable_size
    from rich.table import Table
except ModuleNotFoundError as error:
    # Nobody imports this file but the command, for which a traceback would say less.
    print(
        f"hnet: {error.name} is missing: pip install 'h-net-dynamic-chunking[cli]'", file=sys.stderr
    )
    raise SystemExit(FAILURE) from error

FLOPS_SEQ_LEN = 8192
MODEL_HELP = "preset (random weights), directory, or official .pt"
PROMPT = "A chunk ends where the next byte is hard to guess, often with a word. A chunk "

app = typer.Typer(
    help="Byte-level H-Net models: sizes, checkpoints, differences.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

FloatType = Literal["float64", "float32", "bfloat16", "float16"]

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of tables")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="JSON configuration of an official .pt (None = beside it, same stem)",
    ),
]
FloatTypeOption = Annotated[FloatType, typer.Option(help="dtype of all weights")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
ClampOption = Annotated[
    float | None,
    typer.Option(
        help="the smoothing clamps p to [c, 1 - c]: official 1e-4, 0 for none (None = as saved)"
    ),
]


def main() -> None:
    """The entry point."""
    app()


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """What the user can mend is said without a traceback; all else is a bug and keeps its own."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"hnet: {error}", err=True)
        raise typer.Exit(FAILURE) from error


@app.command()
@one_sentence_errors()
def info(
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


@app.command()
@one_sentence_errors()
def convert(
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
    to_official = destination.suffix == ".pt"
    if to_official:
        files = [destination, destination.with_suffix(".json")]
    else:
        files = [destination / "model.safetensors", destination / "config.json"]
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


@app.command("compare")
@one_sentence_errors()
def compare_command(
    a: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help=MODEL_HELP)],
    config_a: ConfigOption = None,
    config_b: ConfigOption = None,
    prompt: Annotated[
        str | None, typer.Option(help="text to start from (None = a sentence)")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="file to start from, whole")
    ] = None,
    new_bytes: Annotated[int, typer.Option(min=1, help="length of the continuation, bytes")] = 16,
    dtype_a: FloatTypeOption = "float32",
    dtype_b: FloatTypeOption = "bfloat16",
    device_a: DeviceOption = "cpu",
    device_b: DeviceOption = "cpu",
    clamp_a: ClampOption = None,
    clamp_b: ClampOption = None,
    seed: Annotated[int, typer.Option(help="seed of a preset's weights")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare two models, or one with itself in another dtype, on another device or clamped.

    Prefill compares the logits at all bytes of the prompt. Decode compares them along a greedy
    continuation, in which both models read the bytes that A chose.
    """
    text = read_prompt(prompt, file)
    model_a = load_model(a, config_a, dtype_a, device_a, seed, clamp_a)
    model_b = load_model(b, config_b, dtype_b, device_b, seed, clamp_b)
    comparison = compare(model_a, model_b, text, new_bytes)
    continuation = comparison.continuation.decode(errors="replace")
    if as_json:
        typer.echo(json.dumps(asdict(comparison) | {"continuation": continuation}))
        return
    for name, source, model, dtype, device in (
        ("A", a, model_a, dtype_a, device_a),
        ("B", b, model_b, dtype_b, device_b),
    ):
        origin = f"random weights of seed {seed}" if source in PRESETS else "its own weights"
        clamp = model.config.smoothing_clamp
        clamped = f", clamp {clamp:g}" if clamp else ""
        typer.echo(f"{name}  {source}, {origin}, {dtype} on {device}{clamped}")
    console = Console()
    console.print(logits_table(comparison))
    console.print(differences_table(comparison))
    # As a literal, because the bytes may be control codes of the terminal.
    typer.echo(f"continuation of A: {continuation!r}")


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


def read_config(model: str) -> HNetConfig:
    """The configuration of a preset, of a directory, or in a JSON file."""
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ValueError(f"MODEL: {model} is no preset ({', '.join(PRESETS)}), nor is {path} there")
    return HNetConfig.from_json(path)


def load_model(
    source: str,
    config: Path | None,
    dtype: FloatType,
    device: str,
    seed: int,
    clamp: float | None,
) -> HNetLM:
    """A preset with random weights, a directory, or an official .pt.

    `clamp` goes before that of its configuration.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    torch_device = resolve_device(device)
    path = Path(source)
    if source not in PRESETS and path.is_file():
        return load_official(path, config, torch_device, torch_dtype, clamp)
    if config is not None:
        raise ValueError(f"{config} is of no use: {source} is not an official .pt")
    if source in PRESETS:
        # Drawn on the CPU in float32, so that the seed means the same weights everywhere.
        torch.manual_seed(seed)
        return HNetLM(PRESETS[source], smoothing_clamp=clamp).to(torch_device, torch_dtype)
    if path.is_dir():
        return HNetLM.from_pretrained(
            path, device=torch_device, dtype=torch_dtype, smoothing_clamp=clamp
        )
    raise ValueError(f"{source} is no preset ({', '.join(PRESETS)}), no directory and no file")


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


def read_prompt(text: str | None, file: Path | None) -> bytes:
    """The bytes of --prompt or of --file, exactly; a sentence if there is neither."""
    if text is not None and file is not None:
        raise ValueError("--prompt and --file exclude each other: give one")
    if file is not None:
        return file.read_bytes()
    return (PROMPT if text is None else text).encode("utf-8", errors="surrogateescape")


def logits_table(comparison: Comparison) -> Table:
    table = Table("logits", "shape", "dtype", box=SIMPLE)
    for heading in ("min", "max", "mean", "std"):
        table.add_column(heading, justify="right")

    def add_row(name: str, summary: Summary) -> None:
        numbers = (summary.min, summary.max, summary.mean, summary.std)
        shape = " x ".join(map(str, summary.shape))
        table.add_row(name, shape, summary.dtype, *(f"{number:.3f}" for number in numbers))

    for phase, difference in (("prefill", comparison.prefill), ("decode", comparison.decode)):
        add_row(f"{phase} A", difference.a)
        add_row(f"{phase} B", difference.b)
    return table


def differences_table(comparison: Comparison) -> Table:
    table = Table("A - B", box=SIMPLE)
    phases = (comparison.prefill, comparison.decode)
    for heading in ("prefill", "decode"):
        table.add_column(heading, justify="right")
    table.add_row("max |difference|", *(f"{phase.max_abs:.3g}" for phase in phases))
    table.add_row("RMS difference", *(f"{phase.rms:.3g}" for phase in phases))
    by_stage = zip(*(phase.same_boundaries for phase in phases), strict=True)
    for stage, shares in enumerate(by_stage):
        table.add_row(f"same boundaries, stage {stage}", *(f"{share:.1%}" for share in shares))
    table.add_row("same greedy bytes", *(f"{phase.same_greedy_bytes:.1%}" for phase in phases))
    return table
