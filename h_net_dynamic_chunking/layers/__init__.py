"""The layers that a language model puts around the chunker: mixers, MLP, and stacks of them.

On any device; each is an ordinary module, and any other module can take its place.
"""

from h_net_dynamic_chunking.layers.attention import CausalAttention
from h_net_dynamic_chunking.layers.attention_cache import AttentionCache
from h_net_dynamic_chunking.layers.block import Block
from h_net_dynamic_chunking.layers.isotropic import Isotropic, MixerFactory, parse_layout
from h_net_dynamic_chunking.layers.mamba2 import Mamba2, MambaCache
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
    "SwiGLU",
    "parse_layout",
]
