"""x-transformers' Decoder inside an HNet: steps and pieces give the numbers of forward."""

from typing import Any

import pytest
import torch
from torch import nn

from h_net_dynamic_chunking import HNet
from h_net_dynamic_chunking.integrations.x_transformers import SteppedDecoder
from tests.support import assert_close, randn

x_transformers = pytest.importorskip("x_transformers", reason="needs x-transformers")


def decoder(dim: int) -> SteppedDecoder:
    layers = x_transformers.Decoder(dim=dim, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True)
    return SteppedDecoder(layers)


@pytest.mark.parametrize("masked", [False, True], ids=["compact", "masked"])
def test_decoders_in_every_place(masked: bool) -> None:
    """Two rows that chunk differently, so that their caches differ in length."""
    torch.manual_seed(0)
    net = HNet(decoder(16), decoder(24), decoder(16), 16, 24).double().eval()
    x = randn(2, 14, 16).detach()
    with torch.no_grad():
        want = net(x)
    cache = net.allocate_inference_cache(2, 14)
    outs = [net.extend(x[:, :5], cache).output]
    outs += [net.step(x[:, t], cache, masked=masked).output[:, None] for t in range(5, 11)]
    outs.append(net.extend(x[:, 11:], cache, torch.tensor([3, 3])).output)
    assert_close("output", torch.cat(outs, 1), want.output)
    assert want.intermediates[0].num_chunks.unique().numel() == 2
    kept = [row.cache_length for row in cache.network.rows]
    assert kept == want.intermediates[0].num_chunks.tolist()


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be an x_transformers.Decoder, got Linear"):
        SteppedDecoder(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="decoder must have cross_attend=False"):
        SteppedDecoder(x_transformers.Decoder(dim=16, depth=1, heads=2, cross_attend=True))


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"shift_tokens": 1}, "shift_tokens"),
        ({"attn_data_dependent_alibi": True}, "data_dependent_alibi"),
        ({"attn_orthog_projected_values": True}, "orthog_projected_values"),
        ({"attn_selective": True}, "selective"),
    ],
)
def test_options_whose_steps_are_not_forward(option: dict[str, Any], name: str) -> None:
    layers = x_transformers.Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, **option)
    net = HNet(nn.Identity(), SteppedDecoder(layers), nn.Identity(), 16)
    with pytest.raises(ValueError, match=f"decoder must be without {name} to decode"):
        net.allocate_inference_cache(1, 8)
