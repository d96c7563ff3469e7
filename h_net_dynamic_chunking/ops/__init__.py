"""The four operations of dynamic chunking, in the packed layout of `ops.packing`.

boundary probability -> compaction -> (any network) -> smoothing -> expansion

The last two are also one operation, `dechunk`, which is what the chunker runs. Beside them stand
those of the layers around the chunker: `causal_conv`, `ssd` and `gated_norm` of Mamba-2, which are
also one operation, `mamba2_inner`; `rms_norm`, `swiglu`, `rotary`, `cross_entropy`.

Each has its contract at the top of its file, a sequential oracle in `ops.reference`, a hand-written
backward registered with torch.library, and a step form for decoding. The backward passes have no
derivative of their own: a second derivative raises RuntimeError.
"""

from h_net_dynamic_chunking.ops.backend import use_backend
from h_net_dynamic_chunking.ops.boundary import (
    boundary_probability,
    boundary_probability_of_pairs,
    boundary_probability_step,
)
from h_net_dynamic_chunking.ops.causal_conv import causal_conv
from h_net_dynamic_chunking.ops.compaction import (
    Segmentation,
    begin_segment,
    compact,
    gather_rows,
    segment,
)
from h_net_dynamic_chunking.ops.dechunk import dechunk
from h_net_dynamic_chunking.ops.ema import Smoothed, ema_smooth, ema_smooth_step
from h_net_dynamic_chunking.ops.expansion import expand, expand_step
from h_net_dynamic_chunking.ops.gated_norm import gated_norm
from h_net_dynamic_chunking.ops.mamba2 import Mamba2Parameters, mamba2_inner
from h_net_dynamic_chunking.ops.ssd import ssd, ssd_continued
from h_net_dynamic_chunking.ops.tail import zero_tail
from h_net_dynamic_chunking.ops.wide_linear import wide_linear

__all__ = [
    "Mamba2Parameters",
    "Segmentation",
    "Smoothed",
    "begin_segment",
    "boundary_probability",
    "boundary_probability_of_pairs",
    "boundary_probability_step",
    "causal_conv",
    "compact",
    "dechunk",
    "ema_smooth",
    "ema_smooth_step",
    "expand",
    "expand_step",
    "gated_norm",
    "gather_rows",
    "mamba2_inner",
    "segment",
    "ssd",
    "ssd_continued",
    "use_backend",
    "wide_linear",
    "zero_tail",
]
