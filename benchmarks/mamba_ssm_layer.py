"""mamba-ssm's fused Mamba-2 layer, from its source alone, for mamba2.py to measure.

Its Triton kernels need nothing compiled. Its convolution does, causal-conv1d, and is replaced by
ours, which moves the same bytes; so the layer is at least as fast here as with its own.
"""

import sys
import types
from pathlib import Path
from typing import Any

from torch import Tensor

from h_net_dynamic_chunking.layers import Mamba2


def import_mamba_ssm(folder: str) -> None:
    """Make `mamba_ssm` importable from its source without what it compiles, and its layer whole."""
    package: Any = types.ModuleType("mamba_ssm")
    package.__path__ = [str(Path(folder) / "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    from mamba_ssm.ops.triton import ssd_combined

    ssd_combined.causal_conv1d_fwd_function = _conv_fwd
    ssd_combined.causal_conv1d_bwd_function = _conv_bwd


def fused_layer(layer: Mamba2, x: Tensor, sequence: Tensor) -> Tensor:
    """What its module does with the parameters of ours: x (1, total, width) -> the same.

    sequence: int32 (1, total), which sequence each position is in.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    out: Tensor = mamba_split_conv1d_scan_combined(
        layer.in_proj(x),
        layer.conv1d.weight[:, 0],
        layer.conv1d.bias,
        layer.dt_bias,
        -layer.A_log.float().exp(),
        layer.D,
        256,
        seq_idx=sequence,
        rmsnorm_weight=layer.norm.weight,
        rmsnorm_eps=layer.norm.eps,
        outproj_weight=layer.out_proj.weight,
        headdim=len(layer.norm.weight) // layer.num_heads,
        norm_before_gate=False,
    )
    return out


def _conv_fwd(x: Tensor, weight: Tensor, bias: Tensor, sequence: Tensor, *_: Any) -> Tensor:
    """x (1, channels, total), of which the channels lie side by side, as its layer has them."""
    from h_net_dynamic_chunking.ops._triton.causal_conv import conv_fwd

    # No position is in the tail.
    return conv_fwd(x[0].t(), weight[:, None], bias, sequence[0], batch=1 << 20).t()[None]


def _conv_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad: Tensor,
    sequence: Tensor,
    _: None,
    __: None,
    grad_x: Tensor,
    *___: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    from h_net_dynamic_chunking.ops._triton.causal_conv import conv_bwd

    rows = x[0].t(), weight[:, None], bias, sequence[0], 1 << 20, grad_x[0].t()
    grad_weight, grad_bias = conv_bwd(grad[0].t(), *rows)
    return grad_x, grad_weight[:, 0], grad_bias
