"""What the kernels and their launchers share."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel


class _Compiled(NamedTuple):
    """A kernel as Triton compiled it, and what `run` of it wants."""

    kernel: Any
    """Held, so that no other one has its id."""
    launcher: Any
    """Launches it with a grid, as Triton documents."""
    run: Any
    """What that ends in; None where it may be another thing."""
    function: Any
    metadata: Any


# By everything that they were compiled for.
_COMPILED: dict[tuple[Any, ...], _Compiled] = {}

# In which `run` takes what `launch` gives it.
_RUNS_DIRECTLY = (3, 5) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def sigmoid(b_x):
    """For float32, in fewer instructions than Triton's, which keep small numbers from zero."""
    return 1 / (1 + tl.exp2(b_x * _MINUS_LOG2_E))


@triton.jit
def silu(b_x):
    """As `sigmoid`; in one instruction less than b_x times that."""
    return b_x / (1 + tl.exp2(b_x * _MINUS_LOG2_E))


@triton.jit
def sequence_of(p_cu, o_t, B, halvings):
    """The last i in 0 .. B with cu[i] <= t: which sequence owns each position, B in the tail."""
    b_low = tl.zeros_like(o_t)
    b_high = tl.zeros_like(o_t) + B
    for _ in range(halvings):
        b_middle = (b_low + b_high + 1) // 2
        m_right = tl.load(p_cu + b_middle).to(tl.int64) <= o_t
        b_low = tl.where(m_right, b_middle, b_low)
        b_high = tl.where(m_right, b_high, b_middle - 1)
    return b_low


def halvings(batch: int) -> int:
    """Steps that `sequence_of` needs."""
    return batch.bit_length()


def cdiv(n: int, size: int) -> int:
    """How many pieces of a size n needs; `triton.cdiv` takes the host 3 us."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not under n."""
    return 1 << (n - 1).bit_length()


def launch(
    kernel: Any,
    programs: int | tuple[int, int],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    num_warps: int,
) -> None:
    """Launch a kernel, straight from what was compiled for such arguments if there is something.

    Triton's own way there looks at every argument anew, makes a record of the launch, and calls
    hooks with it, which most often do nothing. To hold no device in the key and no kernel, whose
    hash is made in Python, and to call `run` as it is, took a launch of 11 arguments from 8.5 us to
    5.4, without the driver's part (CPU, Triton 3.9, a stub of what is compiled).

    Args:
        kernel: Its integers must not be specialised.
        programs: Of the grid, whose last dimensions are 1.
        arguments: Tensors and numbers, in the kernel's order.
        constants: Those that come after, in the kernel's order.
        num_warps: Warps of a program.
    """
    key, passed, addresses, largest = [id(kernel), num_warps, *constants.values()], [], 0, 0
    device = None
    for value in arguments.values():
        if isinstance(value, Tensor):
            # Of each: Triton refuses a tensor of the host, whose address a kernel would read.
            if value.get_device() != device:
                device = value.get_device()
                key.append(device)
            key.append(value.dtype)
            value = value.data_ptr()
            addresses |= value
        elif type(value) is int and value > largest:
            largest = value
        # Triton would ask a tensor for its address once more, and the driver about that.
        passed.append(value)
    assert device is not None
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(kernel, programs, arguments, constants, num_warps)
        return
    # On AMD a kernel is compiled for tensors of under 2 GB as well, which the key does not hold.
    ordinary = addresses % 16 == 0 and largest < 1 << 31 and torch.version.hip is None
    compiled = _COMPILED.get(tuple(key)) if ordinary else None
    x, y = (programs, 1) if isinstance(programs, int) else programs
    if compiled is None:
        launcher = _compile(kernel, (x, y, 1), arguments, constants, num_warps)
        # The interpreter compiles nothing.
        if ordinary and launcher is not None:
            _COMPILED[tuple(key)] = _ready(kernel, launcher)
        return
    _, launcher, run, function, metadata = compiled
    if run is None or _is_hooked():
        launcher[x, y, 1](*passed, *constants.values())
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(x, y, 1, stream, function, metadata, None, None, None, *passed, *constants.values())


def _compile(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    num_warps: int,
) -> Any:
    """Launches it as well."""
    assert [*arguments, *constants] == kernel.arg_names
    # Products and sums may fuse, which versions of Triton differ about by default.
    return kernel[grid](
        *arguments.values(), **constants, num_warps=num_warps, enable_fp_fusion=True
    )


def _ready(kernel: Any, launcher: Any) -> _Compiled:
    if not (_RUNS_DIRECTLY and isinstance(launcher, CompiledKernel)):
        return _Compiled(kernel, launcher, None, None, None)
    return _Compiled(kernel, launcher, launcher.run, launcher.function, launcher.packed_metadata)


def _is_hooked() -> bool:
    """Whether a profiler of Triton wants to know of launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Chains of hooks, which most often are empty, unless somebody has put a hook in their place.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
