"""The models that the tests of decoding share: random ones, whose routers really choose."""

from dataclasses import replace

import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.config import AttentionConfig, SSMConfig

# Windows of 3 and 5 to the left are crossed after a few bytes.
CONFIGS = {
    "one_stage": HNetConfig(
        arch_layout=["m1", ["T1"], "t1"],
        d_model=(32, 48),
        d_intermediate=(0, 64),
        attn_cfg=AttentionConfig((2, 4), (8, 6), (3, -1)),
    ),
    "three_stages": HNetConfig(
        arch_layout=["m1", ["T1m1", ["m1", ["T1M1"], "m1"], "m1t1"], "m1"],
        d_model=(32, 32, 64, 96),
        d_intermediate=(0, 64, 0, 64),
        attn_cfg=AttentionConfig((2, 2, 4, 4), (16, 4, 6, 8), (3, 5, -1, -1)),
        target_ratio=(2.0, 2.0, 2.0),
    ),
    "isotropic": HNetConfig(
        arch_layout=["m1T1"],
        d_model=(32,),
        d_intermediate=(64,),
        attn_cfg=AttentionConfig((2,), (8,), (-1,)),
    ),
}


def random_model(
    name: str, dtype: torch.dtype = torch.float64, seed: int = 0, d_state: int = 8
) -> HNetLM:
    """Weights far from the start, so that about half of the positions open a chunk.

    The kernels of the recurrence take a d_state from 16 on.
    """
    torch.manual_seed(seed)
    model = HNetLM(replace(CONFIGS[name], ssm_cfg=SSMConfig(d_state=d_state))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Bytes, each text beginning with all 256 values in some order where it is long enough."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, shape, generator=generator)
    for row in ids:
        if len(row) >= 256:
            row[:256] = torch.randperm(256, generator=generator)
    return ids
