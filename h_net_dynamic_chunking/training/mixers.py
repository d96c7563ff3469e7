"""The mixers of the layer stacks: our own, or those of another library when a flag asks for it."""

import importlib
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.config_checks import MAMBA_HEAD_DIM
from h_net_dynamic_chunking.layers import CausalAttention, Mamba2, MixerFactory

HEAD_DIM = 64  # channels of an attention head, as near as the width allows
MAMBA_STATE = 64  # half of the published models', whose windows are 16 times as long


def mixers_for(mamba: str, attention: str) -> dict[str, MixerFactory]:
    """Return the constructors of the layout letters m and t that take a width.

    mamba, attention: names from `config.MAMBAS` and `config.ATTENTIONS`
    """
    mambas: dict[str, MixerFactory] = {"torch": own_mamba, "mamba-ssm": mamba_ssm}
    attentions: dict[str, MixerFactory] = {
        "torch": own_attention,
        "flash-attn": FlashAttention,
        "x-transformers": XTransformersAttention,
    }
    return {"m": mambas[mamba], "t": attentions[attention]}


def own_mamba(d_model: int) -> nn.Module:
    return Mamba2(d_model, d_state=MAMBA_STATE, head_dim=MAMBA_HEAD_DIM)


def own_attention(d_model: int) -> nn.Module:
    return CausalAttention(d_model, num_heads=heads_for(d_model))


def mamba_ssm(d_model: int) -> nn.Module:
    library = _load("mamba_ssm", "mamba-ssm")
    return cast(nn.Module, library.Mamba2(d_model, d_state=MAMBA_STATE, headdim=MAMBA_HEAD_DIM))


class FlashAttention(nn.Module):
    """Causal attention with rotary positions by flash-attn, whose kernels take half precision only.

    tokens: (batch, length, d_model), result alike
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        library = _load("flash_attn.modules.mha", "flash-attn")
        heads = heads_for(d_model)
        self.attention = library.MHA(
            d_model,
            heads,
            qkv_proj_bias=False,
            out_proj_bias=False,
            causal=True,
            rotary_emb_dim=d_model // heads,
            use_flash_attn=True,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            return cast(Tensor, self.attention(tokens)).to(tokens.dtype)


class XTransformersAttention(nn.Module):
    """Causal attention by x-transformers; order is known from the Mamba-2 layers around it.

    tokens: (batch, length, d_model), result alike
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        library = _load("x_transformers.x_transformers", "x-transformers")
        heads = heads_for(d_model)
        self.attention = library.Attention(
            d_model, heads=heads, dim_head=d_model // heads, causal=True, flash=True
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.attention(tokens))


def heads_for(d_model: int) -> int:
    """Return how many heads of about HEAD_DIM channels divide `d_model` evenly."""
    heads = max(d_model // HEAD_DIM, 1)
    while d_model % heads:
        heads -= 1
    return heads


def _load(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{package} is not usable ({error}): pip install {package}") from error
