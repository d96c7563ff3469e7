"""The layers that a language model puts around the chunker: mixers, MLP, and stacks of them.

Plain torch on any device; each is an ordinary module, and any other module can take its place.
"""

from h_net_dynamic_chunking.layers.attention import AttentionCache, CausalAttention
from h_net_dynamic_chunking.layers.isotropic import (
    Block,
    Isotropic,
    MixerFactory,
    StepMixer,
    parse_layout,
)
from h_net_dynamic_chunking.layers.mamba2 import Mamba2, MambaCache, ssd_chunked
from h_net_dynamic_chunking.layers.mlp import SwiGLU
from h_net_dynamic_chunking.layers.norm import RMSNorm

__all__ = [
    "AttentionCache",
    "Block",
    "CausalAttention",
    "Isotropic",
    "Mamba2",
    "MambaCache",
    "MixerFactory",
    "RMSNorm",
    "StepMixer",
    "SwiGLU",
    "parse_layout",
    "ssd_chunked",
]
