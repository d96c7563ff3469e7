"""What the kernels and their launchers share."""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels as Triton compiled them, by everything that they were compiled for.
_COMPILED: dict[tuple[Any, ...], Any] = {}


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

    Triton's own way there looks at every argument anew. With this, and with `ops.registration`, the
    host took 32 us for boundary probability in place of 69, and 87 us for the three launches of
    segmentation in place of 172 (H200 machine of benchmarks/RESULTS.md).

    Args:
        kernel: Its integers must not be specialised.
        programs: Of the grid, whose last dimensions are 1.
        arguments: Tensors and numbers, in the kernel's order.
        constants: Those that come after, in the kernel's order.
        num_warps: Warps of a program.
    """
    grid = (programs, 1, 1) if isinstance(programs, int) else (*programs, 1)
    key, passed = [kernel, num_warps, *constants.values()], []
    # On AMD a kernel is compiled for tensors of under 2 GB as well, which the key does not hold.
    ordinary = torch.version.hip is None
    for value in arguments.values():
        if isinstance(value, Tensor):
            device = value.device
            # Of each: Triton refuses a tensor of the host, whose address a kernel would read.
            key += (value.dtype, device)
            value = value.data_ptr()
            ordinary &= value % 16 == 0
        elif type(value) is int:
            ordinary &= value < 1 << 31
        # Triton would ask a tensor for its address once more, and the driver about that.
        passed.append(value)
    compiled = _COMPILED.get(tuple(key)) if ordinary else None
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(device):
        if compiled is not None:
            compiled[grid](*passed, *constants.values())
            return
        assert [*arguments, *constants] == kernel.arg_names
        # Products and sums may fuse, which versions of Triton differ about by default.
        compiled = kernel[grid](
            *arguments.values(), **constants, num_warps=num_warps, enable_fp_fusion=True
        )
    # The interpreter compiles nothing.
    if ordinary and compiled is not None:
        _COMPILED[tuple(key)] = compiled
