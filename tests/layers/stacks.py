"""Small stacks that the tests of the layers share."""

import torch

from h_net_dynamic_chunking.layers import Isotropic

D_MODEL = 32


def small_stack(layout: str, window_size: int = -1) -> Isotropic:
    torch.manual_seed(0)
    return Isotropic(
        layout,
        D_MODEL,
        ssm={"d_state": 8, "head_dim": 16, "chunk_size": 8},
        attention={"num_heads": 2, "window_size": window_size},
    )


STACKS = [("m2", -1), ("T1", -1), ("T1", 3), ("T1m2M1", -1), ("M1t1m1", 3)]
