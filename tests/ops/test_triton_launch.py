"""The shortcut of `launch`: what was compiled is launched again for the same types, no others."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.compiler import CompiledKernel

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


class Direct(CompiledKernel):  # type: ignore[misc]  # Triton carries no types
    """As Triton returns it from a GPU: launched by `run`, which its way by a grid ends in too."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.function, self.packed_metadata, self.module = "function", "metadata", None
        self._run: Any = self._launch

    def _launch(self, *values: Any) -> None:
        *grid, stream, function, metadata, launch_metadata, enter, leave = values[:9]
        assert [*grid, stream, function, metadata] == [3, 2, 1, "stream", "function", "metadata"]
        assert [launch_metadata, enter, leave] == [None] * 3
        assert values[9:] == (X.data_ptr(), 3, X.data_ptr(), 4)
        self._kernel.shortcuts += 1

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._kernel.launched_by_grid


class DirectKernel(Kernel):
    def __init__(self) -> None:
        super().__init__()
        self.hooked = 0

    def _compile(self, *values: Any, **options: Any) -> Any:
        self.asked += 1
        return Direct(self)

    def launched_by_grid(self, *values: Any) -> None:
        assert len(values) == len(self.arg_names)
        self.hooked += 1


X = torch.zeros(64)


class OnGpu(torch.Tensor):
    """Says that it is on another device than X."""

    def get_device(self) -> int:
        return 0


def launched(
    kernel: Kernel, x: torch.Tensor = X, n: int = 3, block: int = 4, warps: int = 4
) -> str:
    """How this launch went: by the shortcut, or by Triton."""
    asked = kernel.asked
    common.launch(kernel, 1, {"x": x, "n": n, "y": X}, {"BLOCK": block}, num_warps=warps)
    return "shortcut" if kernel.asked == asked else "triton"


def test_only_the_same_types_take_the_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    kernel = Kernel()
    assert launched(kernel) == "triton"
    assert launched(kernel, n=16) == "shortcut"
    for other in ({"x": X.half()}, {"x": X.as_subclass(OnGpu)}, {"block": 8}, {"warps": 8}):
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


def test_runs_directly_unless_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's own way ends in; with a hook for launches, that way itself, which calls it."""
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False
    )
    kernel, hooks = DirectKernel(), triton.knobs.runtime.launch_enter_hook

    def launch() -> None:
        arguments = {"x": X, "n": 3, "y": X}
        common.launch(kernel, (3, 2), arguments, {"BLOCK": 4}, num_warps=4)

    for _ in range(3):
        launch()
    assert (kernel.asked, kernel.shortcuts, kernel.hooked) == (1, 2, 0)
    hook = lambda metadata: None  # noqa: E731  # the same one is taken away again
    hooks.add(hook)
    try:
        launch()
    finally:
        hooks.remove(hook)
    assert (kernel.asked, kernel.shortcuts, kernel.hooked) == (1, 2, 1)
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", print)
    launch()
    assert (kernel.asked, kernel.shortcuts, kernel.hooked) == (1, 2, 2)


def test_launches_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]

    class Device:
        def __init__(self, index: int) -> None:
            self._index = index

        def __enter__(self) -> None:
            self._before, current[0] = current[0], self._index

        def __exit__(self, *_: object) -> None:
            current[0] = self._before

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    devices = []

    class Noting(Kernel):
        def _compile(self, *values: Any, **options: Any) -> Compiled:
            devices.append(current[0])
            return super()._compile(*values, **options)

    y = X.as_subclass(OnGpu)
    common.launch(Noting(), 1, {"x": y, "n": 3, "y": y}, {"BLOCK": 4}, num_warps=4)
    assert (devices, current) == ([0], [1])
