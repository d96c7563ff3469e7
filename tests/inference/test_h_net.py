"""HNet around any modules, position after position: the numbers of the whole sequence."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from h_net_dynamic_chunking import HNet
from h_net_dynamic_chunking.cache import tensors_of
from tests.support import assert_close, randn


class RunningSum(nn.Module):
    """Somebody's causal module, with the two methods of the protocol and nothing else."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.proj(x).cumsum(1).tanh()

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        weight = self.proj.weight
        return {"sum": weight.new_zeros(batch_size, weight.shape[0], dtype=dtype)}

    def step(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        cache["sum"] += self.proj(x)
        return x + 0.3 * cache["sum"].tanh()


def make(depth: int = 2, **options: Any) -> HNet:
    """A float64 HNet whose router really chooses."""
    torch.manual_seed(0)
    network: nn.Module = RunningSum(6 + depth)
    for dim in range(5 + depth, 5, -1):
        network = HNet(RunningSum(dim), network, RunningSum(dim), dim, dim + 1, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert isinstance(network, HNet)
    return network.double().eval()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_chunks": 4},
    {"learn_start_key": True},
    {"multiply_by_prob": True},
    {"smoothing_clamp": 1e-2, "width_change": "pad"},
    {"handle_residual_proj": False, "boundary_threshold": 0.3},
]


@pytest.mark.parametrize("masked", [False, True], ids=["compact", "masked"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_while_decoding(options: dict[str, Any], masked: bool) -> None:
    """A piece, steps, a piece; two rows that cut at different places, three stages."""
    net, x = make(3, **options), randn(2, 24, 6).detach()
    with torch.no_grad():
        want = net(x)
    cache = net.allocate_inference_cache(2, 24)
    outs, decisions = [], []
    first = net(x[:, :7], cache=cache)
    assert first.next_cache is cache
    outs.append(first.output)
    for t in range(7, 18):
        result = net.step(x[:, t], cache, masked=masked)
        outs.append(result.output[:, None])
        decisions.append(result.stages)
    outs.append(net.extend(x[:, 18:], cache).output)
    assert_close("output", torch.cat(outs, 1), want.output)
    outermost = torch.stack([stages[0].boundary_mask for stages in decisions], dim=1)
    assert torch.equal(outermost, want.intermediates[0].boundary_mask[:, 7:18])
    assert len(decisions[0]) == 3
    for stages in decisions:  # a stage opens chunks only where the one around it does
        for outer, inner in itertools.pairwise(stages):
            assert not (inner.boundary_mask & ~outer.boundary_mask).any()


def test_plain_modules() -> None:
    """Modules that see one position at a time need nothing, and may be wrapped."""
    block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    wrapped = checkpoint_wrapper(nn.LayerNorm(6))
    net = HNet(nn.Identity(), block, wrapped, 6, 8).double()
    x = randn(2, 12, 6).detach()
    cache = net.allocate_inference_cache(2, 12)
    got = torch.stack([net.step(x_t, cache).output for x_t in x.unbind(1)], 1)
    assert_close("output", got, net(x).output)


def test_other_dtypes_are_refused() -> None:
    """Before the first cache changes, here that of the chunker."""
    net = HNet(nn.Identity(), nn.Identity(), nn.Identity(), 6).double()
    cache = net.allocate_inference_cache(2, 8)
    for call in (net.step, lambda x, cache: net.extend(x[:, None], cache)):
        with pytest.raises(ValueError, match=r"encoder must return torch.float64, as the chunker"):
            call(torch.randn(2, 6), cache)
    assert not any(tensor.any() for tensor in tensors_of(cache))


def test_modules_that_cannot_decode_are_named() -> None:
    """With what to do about it; a GRU sees more than one position."""
    net = HNet(nn.Identity(), nn.GRU(6, 6, batch_first=True), nn.Identity(), 6)
    message = r"network must have allocate_inference_cache.*; GRU has not: add them, or put an adap"
    with pytest.raises(ValueError, match=message):
        net.allocate_inference_cache(1, 8)


@pytest.mark.parametrize("position", [0, torch.zeros(()), torch.zeros(3, 2)], ids=repr)
def test_caches_whose_rows_cannot_be_told_apart(position: Any) -> None:
    """A position for the whole batch cannot be right once rows chunk differently."""

    class Counting(RunningSum):
        def allocate_inference_cache(self, *sizes: Any) -> dict[str, Any]:
            return {**super().allocate_inference_cache(*sizes), "position": position}

    net = HNet(nn.Identity(), Counting(6), nn.Identity(), 6)
    message = "network must have a cache of tensors whose first dimension is the batch, 2, got "
    with pytest.raises(ValueError, match=message):
        net.allocate_inference_cache(2, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "mean"}, "pool must be 'select' to decode, got 'mean'"),
        ({"embed_chunk_lens": True}, "embed_chunk_lens must be False to decode"),
    ],
)
def test_options_that_look_ahead(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options).allocate_inference_cache(1, 8)


def refused(net: HNet, x: Tensor, cache: Any, message: str) -> None:
    before = [tensor.clone() for tensor in tensors_of(cache)]
    with pytest.raises(ValueError, match=message):
        net.step(x, cache)
    assert all(map(torch.equal, before, tensors_of(cache)))


def test_bad_pieces_change_nothing() -> None:
    net, x = make(), randn(2, 4, 6).detach()
    cache = net.allocate_inference_cache(2, 9)
    net.extend(x, cache)
    before = [tensor.clone() for tensor in tensors_of(cache)]
    for lens, message in (
        (torch.tensor([-1, 2]), r"lens must be in 0 .. 4, got \[-1, 2\]"),
        (torch.tensor([5, 2]), r"lens must be in 0 .. 4, got \[5, 2\]"),
        (torch.tensor([2]), r"lens must have shape \(2,\), got \(1,\)"),
        (torch.tensor([1.0, 2.0]), "lens must be int32 or int64, got torch.float32"),
        ([1, 2], "lens must be a tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            net.extend(x, cache, lens)
    with pytest.raises(ValueError, match=r"x must have shape \(rows, length, dim\), got \(2, 6\)"):
        net.extend(x[:, 0], cache)
    with pytest.raises(ValueError, match=r"x must have shape \(rows, dim\), got \(2, 4, 6\)"):
        net.step(x, cache)
    with pytest.raises(ValueError, match=r"positions of their stage, \(2,\), got \(1,\)"):
        net.step(x[:, 0], cache, boundary_masks=[None, torch.tensor([True])])
    assert all(map(torch.equal, before, tensors_of(cache)))


def test_bad_caches_change_nothing() -> None:
    net, x = make(), randn(2, 6).detach()
    refused(net, x, net.allocate_inference_cache(3, 8), "batch size of x, 2, got one of 3")
    refused(net, x, make(1).allocate_inference_cache(2, 8), "must be the HNetCache that HNet")
    refused(net, x, None, "cache must be the HNetCache that HNet allocates, got NoneType")
    wrong = net.allocate_inference_cache(2, 8, torch.float32)
    refused(net, x, wrong, r"cache must have the dtype of x, torch.float64, got .*float32")
    full = net.allocate_inference_cache(2, 1)
    net.step(x, full)
    refused(net, x, full, r"cache is full: .* max_seqlen = 1 .* seen \[1, 1\], and 1 more")
    for sizes in ((0, 8), (2, 0), (2.0, 8)):
        with pytest.raises(ValueError, match="must be an integer of at least 1, got"):
            net.allocate_inference_cache(*sizes)
    for dtype in (torch.int64, "float32"):
        with pytest.raises(
            ValueError, match=r"dtype must be a floating-point torch\.dtype or None"
        ):
            net.allocate_inference_cache(2, 8, dtype)
    assert full in [wrong, full]  # caches are compared by identity, not tensor by tensor
