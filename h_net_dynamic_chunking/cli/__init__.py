"""The command `hnet`: look at models, run them, convert their checkpoints, compare them.

    hnet info hnet_2stage_XL
    hnet generate --model models/hnet_1stage_L --prompt "A chunk ends where"
    hnet chunks --model models/hnet_1stage_L --text "How is this text cut?"
    hnet convert hnet_1stage_L.pt models/hnet_1stage_L --config hnet_1stage_L.json
    hnet compare models/hnet_1stage_L models/hnet_1stage_L --dtype-b bfloat16

What goes wrong is one sentence on stderr and exit status 2.
"""

import sys

try:
    import rich  # noqa: F401  # only to see whether it is there
    import typer
except ModuleNotFoundError as error:
    # Nobody imports this folder but the command, for which a traceback would say less.
    print(
        f"hnet: {error.name} is missing: pip install 'h-net-dynamic-chunking[cli]'", file=sys.stderr
    )
    raise SystemExit(2) from error

from h_net_dynamic_chunking.cli.chunks import chunks_command
from h_net_dynamic_chunking.cli.compare import compare_command
from h_net_dynamic_chunking.cli.convert import convert_command
from h_net_dynamic_chunking.cli.generate import generate_command
from h_net_dynamic_chunking.cli.info import info_command

app = typer.Typer(
    help="Byte-level H-Net models: sizes, text, chunks, checkpoints, differences.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("info")(info_command)
app.command("generate")(generate_command)
app.command("chunks")(chunks_command)
app.command("convert")(convert_command)
app.command("compare")(compare_command)


def main() -> None:
    """The entry point."""
    app()
