"""Dynamic chunking for sequence models: the H-Net (arXiv 2507.07955), as parts that compose."""

from h_net_dynamic_chunking._version import __version__
from h_net_dynamic_chunking.chunker import DynamicSequenceChunker
from h_net_dynamic_chunking.config import HNetConfig
from h_net_dynamic_chunking.generation import Generated, TextPiece, generate
from h_net_dynamic_chunking.h_net import HNet, HNetOutput
from h_net_dynamic_chunking.intermediates import Intermediates
from h_net_dynamic_chunking.lm import HNetLM
from h_net_dynamic_chunking.lm_output import HNetLMOutput
from h_net_dynamic_chunking.losses import (
    SegmentationStatistics,
    ratio_loss,
    segmentation_statistics,
)
from h_net_dynamic_chunking.ops.backend import use_backend
from h_net_dynamic_chunking.outputs import Outputs

__all__ = [
    "DynamicSequenceChunker",
    "Generated",
    "HNet",
    "HNetConfig",
    "HNetLM",
    "HNetLMOutput",
    "HNetOutput",
    "Intermediates",
    "Outputs",
    "SegmentationStatistics",
    "TextPiece",
    "__version__",
    "generate",
    "ratio_loss",
    "segmentation_statistics",
    "use_backend",
]
