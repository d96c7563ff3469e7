"""The bar of a long run: on a terminal, and nowhere else."""

import pytest

from h_net_dynamic_chunking.cli.screen import byte_bar


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_bar(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    shown: bool,
) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", terminal)
    with byte_bar(100, shown) as show:
        show(40)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("40/100 bytes" in err) == (terminal and shown)
