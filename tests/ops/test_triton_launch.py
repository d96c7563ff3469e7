"""The shortcut of `launch`: what was compiled is launched again for the same types, no others."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from h_net_dynamic_chunking.ops._triton import common


class Kernel:
    """Stands for a jitted kernel; counts how often Triton is asked, and the shortcut taken."""

    def __init__(self) -> None:
        self.arg_names = ["x", "n", "y", "BLOCK"]
        self.asked, self.shortcuts = 0, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, *values: Any, **options: Any) -> "Compiled":
        self.asked += 1
        return Compiled(self)


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *values: Any) -> None:
        assert len(values) == len(self._kernel.arg_names)
        self._kernel.shortcuts += 1


X = torch.zeros(64)


def launched(
    kernel: Kernel, x: torch.Tensor = X, n: int = 3, block: int = 4, warps: int = 4
) -> str:
    """How this launch went: by the shortcut, or by Triton."""
    asked = kernel.asked
    common.launch(kernel, 1, {"x": x, "n": n, "y": X}, {"BLOCK": block}, num_warps=warps)
    return "shortcut" if kernel.asked == asked else "triton"


def test_only_the_same_types_take_the_shortcut() -> None:
    kernel = Kernel()
    assert launched(kernel) == "triton"
    assert launched(kernel, n=16) == "shortcut"
    for other in ({"x": X.half()}, {"x": X.to("meta")}, {"block": 8}, {"warps": 8}):
        assert launched(kernel, **other) == "triton", other  # type: ignore[arg-type]
        assert launched(kernel, **other) == "shortcut", other  # type: ignore[arg-type]
    assert launched(Kernel()) == "triton"


@pytest.mark.parametrize("other", [{"x": X[1:]}, {"n": 1 << 31}])
def test_what_triton_specialises_goes_to_triton(other: dict[str, Any]) -> None:
    """Addresses off 16 bytes and wide integers; nor do they leave something for others."""
    kernel = Kernel()
    assert [launched(kernel, **other) for _ in range(2)] == ["triton"] * 2
    assert [launched(kernel) for _ in range(2)] == ["triton", "shortcut"]
    assert launched(kernel, **other) == "triton"


def test_amd_has_no_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton specialises there on the size of the tensors."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernel = Kernel()
    assert [launched(kernel) for _ in range(2)] == ["triton"] * 2
