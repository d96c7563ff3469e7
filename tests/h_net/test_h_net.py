"""HNet around any modules: nesting, widths, lengths, losses and causality."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking import DynamicSequenceChunker, HNet
from tests.support import DEVICES, assert_close, cumulative, randn

LENS = [20, 0, 7, 1]


class RunningMean(nn.Module):
    """A causal module of its own padded sequences that must be told nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
        mean: Tensor = x + self.proj(x).cumsum(1) / steps[:, None]
        return mean


class Recorder(nn.Module):
    """Does nothing, and remembers the lengths that it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []


class TakesLens(Recorder):
    def forward(self, x: Tensor, lens: Tensor | None = None) -> Tensor:
        self.seen.append({"shape": tuple(x.shape), "lens": lens})
        return x


class TakesMask(Recorder):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen.append({"shape": tuple(x.shape), "mask": mask})
        return x


class TakesPackedLengths(Recorder):
    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int = -1, has_tail: bool | None = None
    ) -> Tensor:
        self.seen.append({"max_seqlen": max_seqlen, "has_tail": has_tail})
        return x


class TakesPacked(Recorder):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        self.seen.append({"shape": tuple(x.shape), "cu_seqlens": cu_seqlens})
        return x


def make(dims: tuple[int, ...] = (6, 8, 9), seed: int = 0, **options: Any) -> HNet:
    """A float64 HNet with a stage for each width but the last, causal modules, random weights."""
    torch.manual_seed(seed)
    *outer, innermost = dims
    network: nn.Module = RunningMean(innermost)
    for dim, dim_inner in zip(reversed(outer), reversed(dims[1:]), strict=True):
        network = HNet(RunningMean(dim), network, RunningMean(dim), dim, dim_inner, **options)
    assert isinstance(network, HNet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.double()


def test_unpacks_as_output_and_loss() -> None:
    result = make()(randn(2, 20, 6))
    output, loss = result
    assert output is result.output
    assert loss is result.loss
    assert output.shape == (2, 20, 6)
    assert result.next_cache is None


def test_is_the_sum_of_its_parts() -> None:
    """One stage, written out with the chunker alone."""
    net, x = make((6, 8)), randn(2, 20, 6)
    encoded = net.encoder(x)
    chunks, upsample, loss = net.chunker(encoded)
    want = net.decoder(upsample(net.width_out(net.network(net.width_in(chunks)))))
    got = net(x)
    assert_close("output", got.output, want)
    assert_close("loss", got.loss, loss)


def test_losses_of_all_stages_are_summed() -> None:
    result = make(ratio_loss_weight=0.5)(randn(2, 20, 6))
    assert len(result.intermediates) == 2
    want = sum(0.5 * stage.aux_ratio_loss for stage in result.intermediates)
    assert_close("loss", result.loss, torch.as_tensor(want))


def test_an_encoder_may_be_an_h_net() -> None:
    net = HNet(make((6, 6)), nn.Identity(), make((6, 7)), 6).double()
    result, x = net(randn(2, 20, 6)), randn(2, 20, 6)
    encoder, decoder = net.encoder(x), net.decoder
    chunks, upsample, loss = net.chunker(encoder.output)
    want = encoder.loss + loss + decoder(upsample(chunks)).loss
    assert_close("loss", net(x).loss, want)
    assert result.output.shape == x.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width_change", ["linear", "pad"])
def test_padded_packed_jagged_and_alone_agree(width_change: str, device: str) -> None:
    """Values, losses and gradients, with NaN in the pads, at three stages."""
    net = make((6, 8, 8, 9), width_change=width_change).to(device)
    x, cu_seqlens = randn(sum(LENS), 6, device=device), cumulative(LENS, device)
    real = (torch.arange(max(LENS)) < torch.tensor(LENS)[:, None]).to(device)
    padded = torch.full((*real.shape, 6), torch.nan, dtype=torch.float64, device=device)
    padded[real] = x.detach()
    weights = randn(*x.shape, seed=9, device=device).detach()

    def gradients(output: Tensor, loss: Tensor) -> list[Tensor]:
        wanted = list(net.parameters())
        return list(torch.autograd.grad((output * weights).sum() + loss, wanted))

    packed = net(x, cu_seqlens=cu_seqlens)
    want = gradients(packed.output, packed.loss)
    ragged = net(padded, LENS)
    jagged = net(torch.nested.nested_tensor_from_jagged(x, cu_seqlens))
    for result, output in ((ragged, ragged.output[real]), (jagged, jagged.output.values())):
        assert_close("output", output, packed.output)
        assert_close("loss", result.loss, packed.loss)
        for g, w in zip(gradients(output, result.loss), want, strict=True):
            assert_close("gradient", g, w)
    alone = [net(row[None]).output[0] for row in x.split(LENS) if len(row)]
    assert_close("alone", torch.cat(alone), packed.output)


def test_pad_width_appends_one_vector_and_slices_it_off() -> None:
    net = make((6, 8), width_change="pad")
    x = randn(2, 20, 6)
    chunks = net.chunker(x).downsampled
    wide = net.width_in(chunks)
    assert torch.equal(wide[..., :6], chunks)
    assert torch.equal(net.width_out(wide), chunks)
    assert sum(p.numel() for p in net.width_in.parameters()) == 2
    equal_widths = make((6, 6), width_change="pad")
    assert not list(equal_widths.width_in.parameters())


class TestLengthsProtocol:
    """Modules are told the lengths they ask for, and only those."""

    def test_no_lengths_no_arguments(self) -> None:
        encoder = TakesLens()
        HNet(encoder, nn.Identity(), nn.Identity(), 6).double()(randn(2, 9, 6))
        assert encoder.seen == [{"shape": (2, 9, 6), "lens": None}]

    def test_padded(self) -> None:
        encoder, network, decoder = TakesLens(), TakesMask(), TakesPacked()
        result = HNet(encoder, network, decoder, 6).double()(randn(2, 9, 6), [9, 4])
        assert encoder.seen[0]["lens"].tolist() == [9, 4]
        assert torch.equal(network.seen[0]["mask"], result.intermediates[0].mask)
        assert decoder.seen == [{"shape": (2, 9, 6), "cu_seqlens": None}]

    def test_packed(self) -> None:
        """A module that takes no cu_seqlens gets pads, so that sequences cannot mix."""
        encoder, network, decoder = TakesPacked(), TakesLens(), RunningMean(6)
        net = HNet(encoder, network, decoder, 6).double()
        result = net(randn(13, 6), cu_seqlens=torch.tensor([0, 9, 13]))
        assert encoder.seen[0]["cu_seqlens"].tolist() == [0, 9, 13]
        counts = result.intermediates[0].num_chunks
        assert network.seen[0]["lens"].tolist() == counts.tolist()
        assert network.seen[0]["shape"] == (2, int(counts.max()), 6)

    @pytest.mark.parametrize("max_chunks", [None, 5])
    def test_packed_lengths_that_the_host_knows(self, max_chunks: int | None) -> None:
        encoder, network = TakesPackedLengths(), TakesPackedLengths()
        net = HNet(encoder, network, nn.Identity(), 6, max_chunks=max_chunks).double()
        result = net(randn(13, 6), cu_seqlens=torch.tensor([0, 9, 13]))
        assert encoder.seen == [{"max_seqlen": 9, "has_tail": False}]
        most = max_chunks or int(result.intermediates[0].num_chunks.max())
        assert network.seen == [{"max_seqlen": most, "has_tail": max_chunks is not None}]

    def test_stock_modules_of_torch_get_their_padding_mask(self) -> None:
        """Not causal, so that a pad that was attended to would show; and `mask` is left alone."""
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        network = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        net = HNet(nn.Identity(), network, nn.Identity(), 6).double()
        x, lens = randn(3, 9, 6), [9, 5, 3]
        output = net(x, lens).output
        for row, length in enumerate(lens):
            alone = net(x[row : row + 1, :length]).output
            assert_close("row", output[row : row + 1, :length], alone)

    def test_packed_sequences_do_not_mix_in_a_module_that_sees_neighbours(self) -> None:
        class Conv(nn.Conv1d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.mT).mT

        net = HNet(Conv(6, 6, 3, padding=1), nn.Identity(), nn.Identity(), 6).double()
        x = randn(13, 6)
        packed = net(x, cu_seqlens=torch.tensor([0, 9, 13])).output
        alone = [net(row[None]).output[0] for row in x.split([9, 4])]
        assert_close("output", packed, torch.cat(alone))

    def test_compiled_modules_keep_their_signature(self) -> None:
        encoder = TakesLens()
        compiled = torch.compile(encoder, backend="eager")
        net = HNet(compiled, nn.Identity(), nn.Identity(), 6).double()
        net(randn(2, 9, 6).detach(), [9, 4])
        assert encoder.seen[0]["lens"].tolist() == [9, 4]


def test_chunk_lens_in_outermost_positions() -> None:
    result = make((6, 8, 8, 9))(randn(2, 30, 6), [30, 11])
    outer, middle, inner = result.intermediates
    for stage in result.intermediates:
        assert stage.absolute_chunk_lens.sum(1).tolist() == [30, 11]
    assert torch.equal(outer.absolute_chunk_lens, outer.chunk_lens)
    for above, stage in ((outer, middle), (middle, inner)):
        assert stage.chunk_lens.sum(1).tolist() == above.num_chunks.tolist()
        for row in range(2):
            ends = stage.chunk_lens[row].cumsum(0)
            above_ends = above.absolute_chunk_lens[row].cumsum(0)
            want = above_ends[ends - 1]
            assert stage.absolute_chunk_lens[row].cumsum(0).tolist() == want.tolist()


def test_given_boundaries_by_stage() -> None:
    x = randn(1, 8, 6)
    outer = torch.tensor([[True, False] * 4])
    inner = torch.tensor([[True, False, False, True]])
    result = make()(x, boundary_masks=[outer, inner])
    assert result.intermediates[0].chunk_lens.tolist() == [[2, 2, 2, 2]]
    assert result.intermediates[1].absolute_chunk_lens.tolist() == [[6, 2]]
    only_outer = make()(x, boundary_masks=[outer])
    assert only_outer.intermediates[0].chunk_lens.tolist() == [[2, 2, 2, 2]]


@pytest.mark.parametrize("dims", [(6, 8), (6, 8, 9), (6, 8, 8, 9)])
def test_causal_by_perturbation(dims: tuple[int, ...]) -> None:
    net, x = make(dims), randn(1, 24, 6).detach()
    with torch.no_grad():
        want = net(x)
        for t in (1, 11, 23):
            changed = x.clone()
            changed[:, t] += 3
            got = net(changed)
            assert_close("output", got.output[:, :t], want.output[:, :t], 1e-12)
            for g, w in zip(got.intermediates, want.intermediates, strict=True):
                closed = int((w.absolute_chunk_lens[0].cumsum(0) < t).sum())
                assert torch.equal(
                    g.absolute_chunk_lens[0, :closed], w.absolute_chunk_lens[0, :closed]
                )


def test_capped_h_net_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    net = make(max_chunks=5)
    run = torch.compile(lambda x: net(x).output, fullgraph=True, backend="aot_eager")
    for length in (20, 13):
        x = randn(2, length, 6)
        assert_close("output", run(x), net(x).output)


def test_capped_packed_equals_padded_at_every_depth() -> None:
    net, x, lens = make((6, 8, 8), max_chunks=7), randn(20, 6), [12, 8]
    padded = torch.nn.utils.rnn.pad_sequence(list(x.split(lens)), batch_first=True)
    packed, want = net(x, cu_seqlens=cumulative(lens)), net(padded, lens)
    assert_close("output", packed.output, torch.cat([want.output[0], want.output[1, :8]]))
    assert_close("loss", packed.loss, want.loss)


def test_capped_stages_have_static_shapes() -> None:
    net = make(max_chunks=5)
    for seed in range(3):
        result = net(randn(2, 20, 6, seed=seed))
        assert [tuple(s.mask.shape) for s in result.intermediates] == [(2, 5), (2, 5)]
        assert result.output.isfinite().all()


def test_state_dict_round_trip() -> None:
    net, other, x = make(), make(seed=1), randn(1, 12, 6)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x).output, other(x).output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": None}, "encoder must be a torch.nn.Module"),
        ({"dim_inner": 5, "width_change": "pad"}, "dim_inner must be at least dim, 6"),
        ({"width_change": "tile"}, "width_change must be one of"),
        ({"network": HNet(nn.Identity(), nn.Identity(), nn.Identity(), 4)}, "HNet of dim 6"),
        ({"max_chunks": 0}, "max_chunks must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    parts = {"encoder": nn.Identity(), "network": nn.Identity(), "decoder": nn.Identity()}
    with pytest.raises(ValueError, match=message):
        HNet(**{**parts, "dim": 6, **options})


class DropsTheLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :-1]


@pytest.mark.parametrize("part", ["encoder", "network", "decoder"])
def test_a_part_that_changes_the_length_is_named(part: str) -> None:
    parts = {"encoder": nn.Identity(), "network": nn.Identity(), "decoder": nn.Identity()}
    net = HNet(**{**parts, part: DropsTheLast()}, dim=6)
    with pytest.raises(ValueError, match=f"{part} must return hidden states of shape"):
        net(torch.randn(2, 9, 6))
    wide = HNet(**{**parts, "encoder": nn.Linear(6, 7)}, dim=6)
    with pytest.raises(ValueError, match=r"encoder must return hidden states of shape \(2, 9, 6\)"):
        wide(torch.randn(2, 9, 6))


def test_more_boundary_masks_than_stages() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    net = HNet(nn.Identity(), nn.Identity(), nn.Identity(), 6)
    with pytest.raises(ValueError, match="boundary_masks must have one entry a stage"):
        net(torch.zeros(1, 4, 6), boundary_masks=[mask, mask])
    with pytest.raises(ValueError, match="boundary_masks must be a sequence"):
        net(torch.zeros(1, 4, 6), boundary_masks=mask)


def test_bad_input_is_refused_before_any_module_runs() -> None:
    encoder = TakesLens()
    net = HNet(encoder, nn.Identity(), nn.Identity(), 6)
    with pytest.raises(ValueError, match=r"lens must be in 0 \.\. 4"):
        net(torch.zeros(1, 4, 6), [5])
    with pytest.raises(ValueError, match="tokens must have shape"):
        net(torch.zeros(4, 6))
    assert not encoder.seen


def test_chunker_class_is_the_public_one() -> None:
    assert isinstance(make().chunker, DynamicSequenceChunker)
