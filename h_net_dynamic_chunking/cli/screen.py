"""Text on stdout: chunks in colours where a terminal shows them, plain text elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress
from rich.style import Style
from rich.text import Text

from h_net_dynamic_chunking.visualize import Characters, ChunkStyle, ChunkStyles, printable

# The hues of `visualize.SHADES` on terminals of 16 colours.
NAMES = ("blue", "green", "yellow", "red", "magenta", "cyan")


class Screen:
    """Where text goes.

    Args:
        no_color: leave out colours on a terminal too. NO_COLOR in the environment says the same.
    """

    def __init__(self, no_color: bool) -> None:
        self.console = Console(highlight=False)
        self.terminal = self.console.is_terminal
        self.colored = self.terminal and not no_color and not self.console.no_color

    def plain(self, text: str, end: str = "") -> None:
        """Write text at once."""
        typer.echo((printable(text) if self.terminal else text) + end, nl=False)

    def styled(self, text: str, look: ChunkStyle, bold: bool) -> None:
        """Write text at once, in the look of its chunk."""
        background = look.background
        if self.console.color_system in ("standard", "windows"):
            background = ("bright_", "")[look.shade] + NAMES[look.hue]
        style = Style(color="black", bgcolor=background, underline=look.underline, bold=bold)
        # Soft: the console does not know in which column the text before ended.
        self.console.print(Text(printable(text), style), end="", soft_wrap=True)


class ChunkWriter:
    """Writes one text as its bytes come, never a part of a character.

    Args:
        screen: where to.
        stages: of the model.
    """

    def __init__(self, screen: Screen, stages: int) -> None:
        self._screen = screen
        self._characters = Characters()
        self._styles = ChunkStyles(stages)

    def feed(self, content: bytes, depths: Sequence[int], bold: bool = False) -> None:
        """Write the characters that `content` completes."""
        self._write([*self._characters.feed(content, depths)], bold)

    def flush(self) -> None:
        """Write U+FFFD if a character was begun and not completed."""
        self._write([*self._characters.flush()], bold=False)

    def _write(self, characters: list[tuple[str, int]], bold: bool) -> None:
        if not self._screen.colored:
            text = "".join(text for text, _ in characters)
            if text:
                self._screen.plain(text)
            return
        looks = [(self._styles.at(depth), text) for text, depth in characters]
        for look, run in groupby(looks, key=itemgetter(0)):
            self._screen.styled("".join(text for _, text in run), look, bold)


@contextmanager
def byte_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield what takes the number of bytes so far; a bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    with Progress(
        *Progress.get_default_columns(),
        DownloadColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as progress:
        task = progress.add_task("writing", total=total)
        yield lambda count: progress.update(task, completed=count)
