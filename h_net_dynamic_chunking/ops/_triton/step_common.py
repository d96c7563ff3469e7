"""What the decoding kernels share: device functions, launch options, checks.

A step is a chain of short kernels, and starting one costs as much as running it. On Hopper and
later the kernels therefore overlap (programmatic dependent launch): each starts while the one
before still runs, asks for its weights, and waits for the other's results in `wait_for_inputs`.
Weights, which no kernel writes, may be read before that. So may flags which only kernels before the
stack have written, and caches which only other steps have. Nothing else is, and nothing is written.

That is safe because the first kernel of a stack starts when all before have ended; or it waits for
them before it lets the next one start, and reads no flag before that. What starts behind it, one by
the other, then finds in L2 what they have written. In L1 it might find what was there before; so
flags and caches are read past it. A first kernel that is not recorded starts when all have ended.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

# None: where the device can. True and False are for measurements.
overlap_launches: bool | None = None


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def load_gated(x_ptr, gate_ptr, offset, mask, GATED: tl.constexpr):
    """x silu(gate), or x, in float32."""
    x = tl.load(x_ptr + offset, mask, 0).to(tl.float32)
    if GATED:
        x *= silu(tl.load(gate_ptr + offset, mask, 0).to(tl.float32))
    return x


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x, float32, to the nearest number of `dtype`, of two the even one."""
    if INTERPRETED and dtype == tl.bfloat16:  # which it would cut off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_flag(pointer, GIVEN: tl.constexpr):
    """One bool; True where the tensor is not given."""
    flag = True
    if GIVEN:
        # In this order: the interpreter keeps the type on the left.
        flag = flag & tl.load(pointer, cache_modifier=".cg")  # from L2
    return flag


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """Let the next kernel start, which will itself wait for this one to end."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Stand before the first access to what other kernels write."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def rest(out, mask, is_first, ALONE: tl.constexpr, OVERLAP: tl.constexpr):
    """What a program does whose row rests: a row alone gets zeros, several stay unwritten.

    Several make room at once. One program waits for the kernel before all the same, so that a
    kernel that has ended says that all before it have.
    """
    let_next_start(OVERLAP)
    if ALONE:
        wait_for_inputs(OVERLAP)
        tl.store(out, 0.0, mask)
    elif is_first:
        wait_for_inputs(OVERLAP)


@triton.jit
def prefetch(pointers):
    """Ask for the 128-byte lines at `pointers`, all legal addresses, to be brought to L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def on_its_device(launcher: Launcher) -> Launcher:
    """Launch where the first tensor is: launches go to the current device, which may be another."""

    @functools.wraps(launcher)
    def launch(*arguments: Any, **options: Any) -> Any:
        values = (*arguments, *options.values())
        device = next(value.device for value in values if isinstance(value, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*arguments, **options)
        with torch.cuda.device(device):
            return launcher(*arguments, **options)

    return cast(Launcher, launch)


def launch_options(tensor: Tensor, begins: bool = False) -> dict[str, Any]:
    """Keywords of a launch: two flags of every kernel, and what the driver must know of them.

    begins: whether the kernel starts only when all before it have ended.
    """
    if tensor.device.type != "cuda":
        return {"INTERPRETED": True, "OVERLAP": False}
    overlap = overlap_launches
    if overlap is None:
        overlap = torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    return {"INTERPRETED": False, "OVERLAP": overlap, "launch_pdl": overlap and not begins}


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError unless `tensor` has this shape, and neighbours in its last dimension."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got {tensor.stride()}")


def check_contiguous(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError unless `tensor` has this shape and is contiguous."""
    check_shape(name, tensor, *shape)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless `tensor` has this dtype."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_active(active: Tensor | None, rows: int) -> None:
    """Raise ValueError unless `active` is None or bool (rows,)."""
    if active is not None:
        check_contiguous("active", active, rows)
        check_dtype("active", active, torch.bool)
