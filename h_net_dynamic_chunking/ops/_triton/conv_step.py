"""The causal convolution of Mamba-2 for one position: out = silu(bias + sum_k weight_k x_k).

It is depthwise, so that the product which makes new channels can convolve them, too, and no launch
stands between: `linear_step` does. For several rows that took longer than `conv_step` behind the
product (24 us in place of 9 for norm, product and convolution of 43 rows; H200).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.step_common import (
    check_active,
    check_contiguous,
    check_dtype,
    check_shape,
    launch_options,
    let_next_start,
    load_flag,
    on_its_device,
    silu,
    wait_for_inputs,
)

_CHANNELS = 128  # a program


@triton.jit
def sum_of_window(window, weight, bias, mask, TAPS: tl.constexpr):
    """What is known before the new channel is: pointers to the first tap of each, and to its bias.

    It may stand before `wait_for_inputs`.
    """
    total = tl.load(bias, mask, 0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(window + tap, mask, 0, cache_modifier=".cg").to(tl.float32)
        total = total + old * tl.load(weight + tap, mask, 0).to(tl.float32)
    return total


@triton.jit
def convolved(total, new, window, weight, mask, TAPS: tl.constexpr):
    """The result, from the sum of the window and the new channel, which joins the window."""
    for tap in tl.static_range(1, TAPS - 1):
        tl.store(window + tap - 1, tl.load(window + tap, mask, 0), mask)
    if TAPS > 1:
        tl.store(window + TAPS - 2, new, mask)
    total += new.to(tl.float32) * tl.load(weight + TAPS - 1, mask, 0).to(tl.float32)
    return silu(total)


@triton.jit
def conv_step_kernel(
    x_ptr,
    window_ptr,
    weight_ptr,
    bias_ptr,
    active_ptr,
    out_ptr,
    channels,
    x_stride,
    TAPS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row at BLOCK channels."""
    let_next_start(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (o_c < channels) & load_flag(active_ptr + i_m, HAS_ACTIVE)
    window = window_ptr + (i_m * channels + o_c) * (TAPS - 1)
    weight = weight_ptr + o_c * TAPS
    total = sum_of_window(window, weight, bias_ptr + o_c, mask, TAPS)
    wait_for_inputs(OVERLAP)
    new = tl.load(x_ptr + i_m * x_stride + o_c, mask, 0)
    out = convolved(total, new, window, weight, mask, TAPS)
    tl.store(out_ptr + i_m * channels + o_c, out, mask)


class Convolution(NamedTuple):
    """What a convolution of some channels needs beside them."""

    window: Tensor
    """(rows, channels, taps - 1), in the dtype of the channels: moved on in place."""
    weight: Tensor
    """(channels, taps) or, as `conv1d` has it, (channels, 1, taps)."""
    bias: Tensor
    """(channels,)."""
    out: Tensor
    """float32 (rows, channels): the result, in rows that are active."""
    first: int
    """Which output of the product before is the first of the channels."""

    @property
    def channels(self) -> int:
        return self.window.shape[1]

    @property
    def taps(self) -> int:
        return self.weight.shape[-1]

    def check(self, rows: int, dtype: torch.dtype, outputs: int) -> None:
        """Raise ValueError unless it fits a product with so many outputs, of that dtype."""
        middle = (1,) if self.weight.ndim == 3 else ()
        check_contiguous("conv_weight", self.weight, self.channels, *middle, self.taps)
        check_contiguous("conv_bias", self.bias, self.channels)
        check_contiguous("conv", self.window, rows, self.channels, self.taps - 1)
        check_dtype("conv", self.window, dtype)
        check_contiguous("conv_out", self.out, rows, self.channels)
        check_dtype("conv_out", self.out, torch.float32)
        if not 0 <= self.first <= outputs - self.channels:
            raise ValueError(
                f"first must be in 0 .. {outputs - self.channels}, for {self.channels} channels "
                f"of {outputs} outputs, got {self.first}"
            )


def convolution_arguments(convolution: Convolution | None, unused: Tensor) -> dict[str, Any]:
    """Keywords of a kernel that may convolve what it made."""
    c = convolution or Convolution(unused, unused, unused, unused, 0)
    return {
        "window_ptr": c.window,
        "conv_weight_ptr": c.weight,
        "conv_bias_ptr": c.bias,
        "conv_out_ptr": c.out,
        "conv_first": c.first,
        "channels": 0 if convolution is None else c.channels,
        "TAPS": 0 if convolution is None else c.taps,
    }


@on_its_device
def conv_step(x: Tensor, convolution: Convolution, active: Tensor | None = None) -> None:
    """Convolve the channels that begin at `convolution.first` of x (rows, width).

    active:  bool (rows,), or None for all. The others keep their window to the bit

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    check_shape("x", x, *x.shape)
    convolution.check(x.shape[0], x.dtype, x.shape[1])
    check_active(active, x.shape[0])
    conv_step_kernel[(x.shape[0], triton.cdiv(convolution.channels, _CHANNELS))](
        x_ptr=x[:, convolution.first :],
        window_ptr=convolution.window,
        weight_ptr=convolution.weight,
        bias_ptr=convolution.bias,
        active_ptr=x if active is None else active,
        out_ptr=convolution.out,
        channels=convolution.channels,
        x_stride=x.stride(0),
        TAPS=convolution.taps,
        HAS_ACTIVE=active is not None,
        BLOCK=_CHANNELS,
        num_warps=4,
        **launch_options(x),
    )
