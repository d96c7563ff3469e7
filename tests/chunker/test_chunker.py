"""DynamicSequenceChunker against the equations: every layout, values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking import DynamicSequenceChunker
from tests.reference_chunker import chunk_one_sequence, ratio_loss
from tests.support import (
    DEVICES,
    assert_close,
    assert_rounded_once,
    boundaries,
    cumulative,
    generator,
    randn,
)

DIM = 6
LENS = [9, 0, 1, 40]


def make(**options: Any) -> DynamicSequenceChunker:
    """A float64 chunker whose weights are neither identity nor zero."""
    chunker = DynamicSequenceChunker(DIM, **options).double()
    with torch.no_grad():
        for i, parameter in enumerate(chunker.parameters()):
            parameter.add_(0.3 * randn(*parameter.shape, seed=20 + i))
    return chunker


def inner(chunks: Tensor) -> Tensor:
    """A position-wise inner network."""
    return torch.tanh(2 * chunks) + chunks


def weights_like(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=generator(9), dtype=torch.float64).to(out.device)


def expected(
    chunker: DynamicSequenceChunker, sequences: list[Tensor], given: list[Tensor] | None = None
) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Outputs, loss, boundaries and chunks, by the oracle."""
    results = [
        chunk_one_sequence(chunker, x, inner, None if given is None else given[i])
        for i, x in enumerate(sequences)
        if len(x)
    ]
    outputs, probs, masks, chunks = (list(column) for column in zip(*results, strict=True))
    loss = ratio_loss(torch.cat(masks), torch.cat(probs), chunker.target_avg_token_length)
    return outputs, chunker.ratio_loss_weight * loss, masks, chunks


def backward(chunker: nn.Module, x: Tensor, out: Tensor, loss: Tensor) -> list[Tensor]:
    """Gradients of the input and of every parameter under random weights on the output."""
    total = (out * weights_like(out)).sum() + loss
    wanted = [x, *chunker.parameters()]
    return [
        torch.zeros_like(w) if g is None else g
        for g, w in zip(torch.autograd.grad(total, wanted, allow_unused=True), wanted, strict=True)
    ]


@pytest.mark.parametrize("options", [{}, {"handle_residual_proj": True, "dim_queries_keys": 4}])
def test_packed_equals_the_equations(options: dict[str, Any]) -> None:
    chunker, x = make(**options), randn(sum(LENS), DIM)
    (chunks, upsample, loss), seen = chunker(
        x, cu_seqlens=cumulative(LENS), return_intermediates=True
    )
    out = upsample(inner(chunks))
    outputs, want_loss, masks, want_chunks = expected(chunker, list(x.split(LENS)))
    assert_close("chunks", chunks, torch.cat(want_chunks))
    assert seen.boundary_mask.tolist() == torch.cat(masks).tolist()
    assert seen.num_chunks.tolist() == [int(masks[0].sum()), 0, 1, int(masks[2].sum())]
    want = torch.cat(outputs)
    assert_close("output", out, want)
    assert_close("loss", loss, want_loss)
    got_gradients = backward(chunker, x, out, loss)
    for i, g in enumerate(backward(chunker, x, want, want_loss)):
        assert_close(f"gradient {i}", got_gradients[i], g)


@pytest.mark.parametrize("device", DEVICES)
def test_padded_equals_packed_and_pads_may_be_nan(device: str) -> None:
    chunker, x = make(handle_residual_proj=True).to(device), randn(sum(LENS), DIM, device=device)
    mask = torch.arange(max(LENS)) < torch.tensor(LENS)[:, None]
    padded = torch.full((len(LENS), max(LENS), DIM), torch.nan, dtype=torch.float64, device=device)
    padded[mask.to(device)] = x.detach()
    padded.requires_grad_()

    (chunks, upsample, loss), seen = chunker(padded, LENS, return_intermediates=True)
    # What the inner network leaves in its pads must not matter either.
    back = inner(chunks).masked_fill(~seen.mask[..., None], torch.nan)
    out = upsample(back)
    packed_chunks, packed_upsample, packed_loss = chunker(x, cu_seqlens=cumulative(LENS, device))
    packed_out = packed_upsample(inner(packed_chunks))

    assert_close("chunks", chunks[seen.mask], packed_chunks)
    assert not chunks[~seen.mask].any()
    assert_close("output", out[mask], packed_out)
    assert not out[~mask].any()
    assert_close("loss", loss, packed_loss, 1e-12)
    weights = torch.zeros_like(out)
    weights[mask.to(device)] = weights_like(packed_out)
    wanted = [padded, *chunker.parameters()]
    gradients = torch.autograd.grad((out * weights).sum() + loss, wanted)
    want = backward(chunker, x, packed_out, packed_loss)
    assert_close("gradient of tokens", gradients[0][mask], want[0])
    assert not gradients[0][~mask].any()
    for i in range(1, len(want)):
        assert_close(f"gradient {i}", gradients[i], want[i])


def test_rows_alone_equal_rows_in_a_batch() -> None:
    chunker, x = make(), randn(3, 20, DIM)
    chunks, upsample, _ = chunker(x)
    batched = upsample(inner(chunks))
    for row in range(3):
        alone_chunks, alone_upsample, _ = chunker(x[row : row + 1])
        assert_close("row", batched[row : row + 1], alone_upsample(inner(alone_chunks)))


def test_jagged_in_jagged_out() -> None:
    chunker, x = make(), randn(50, DIM)
    jagged = torch.nested.nested_tensor_from_jagged(x, cumulative(LENS))
    (chunks, upsample, loss), seen = chunker(jagged, return_intermediates=True)
    packed_chunks, packed_upsample, packed_loss = chunker(x, cu_seqlens=cumulative(LENS))
    assert chunks.is_nested
    assert torch.equal(chunks.values(), packed_chunks)
    assert torch.equal(upsample(chunks).values(), packed_upsample(packed_chunks))
    assert torch.equal(loss, packed_loss)
    assert [len(row) for row in seen.chunk_lens.unbind()] == seen.num_chunks.tolist()


@pytest.mark.parametrize("shape", [(2, 0, DIM), (0, 5, DIM), (1, 1, DIM), (3, 1, DIM)])
def test_empty_and_single_tokens(shape: tuple[int, ...]) -> None:
    chunker, x = make(handle_residual_proj=True), randn(*shape)
    chunks, upsample, loss = chunker(x)
    out = upsample(inner(chunks))
    assert out.shape == shape
    (out.sum() + loss).backward()
    assert x.grad is not None
    assert loss.isfinite()
    if x.numel():
        assert torch.equal(chunks, x)


def test_all_zero_tokens_tie_and_make_one_chunk() -> None:
    """p is exactly 0.5, and a boundary needs more."""
    _, seen = DynamicSequenceChunker(4)(torch.zeros(2, 7, 4), return_intermediates=True)
    assert seen.chunk_lens.tolist() == [[7], [7]]


def test_starts_as_the_cosine_of_neighbours() -> None:
    x = randn(1, 30, DIM).float()
    for width in (None, 2 * DIM):
        _, seen = DynamicSequenceChunker(DIM, dim_queries_keys=width)(x, return_intermediates=True)
        cosine = torch.cosine_similarity(x[0, 1:], x[0, :-1], dim=-1)
        assert_close("p", seen.probs[0, 1:], (1 - cosine) / 2)


def test_given_boundaries() -> None:
    chunker, x = make(), randn(sum(LENS), DIM)
    given = boundaries(sum(LENS))
    (chunks, upsample, loss), seen = chunker(
        x, cu_seqlens=cumulative(LENS), boundary_mask=given, return_intermediates=True
    )
    outputs, want_loss, masks, _ = expected(chunker, list(x.split(LENS)), list(given.split(LENS)))
    assert seen.boundary_mask.tolist() == torch.cat(masks).tolist()
    assert_close("output", upsample(inner(chunks)), torch.cat(outputs))
    assert_close("loss", loss, want_loss)


def test_chunk_lens_only() -> None:
    chunker, x = make(), randn(2, 12, DIM)
    lens = chunker(x, [12, 5], return_only_chunk_lens=True)
    _, seen = chunker(x, [12, 5], return_intermediates=True)
    assert lens.dtype == torch.int64
    assert torch.equal(lens, seen.chunk_lens)
    assert lens.sum(1).tolist() == [12, 5]
    assert ((lens > 0) == seen.mask).all()


@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_same_in_evaluation(training: bool) -> None:
    chunker, x = make(), randn(2, 12, DIM)
    wanted = chunker(x).weighted_aux_ratio_loss
    with torch.no_grad():
        again = chunker.train(training)(x.detach()).weighted_aux_ratio_loss
    assert torch.equal(again, wanted)


class TestMaxChunks:
    """The capped mode: static shapes, first come first served."""

    def test_static_shapes_and_the_overflow_joins_the_last_chunk(self) -> None:
        x = randn(2, 10, DIM)
        everywhere = torch.ones(2, 10, dtype=torch.bool)
        (chunks, upsample, _), seen = make(max_chunks=3)(
            x, boundary_mask=everywhere, return_intermediates=True
        )
        assert torch.equal(chunks, x[:, :3])
        assert seen.chunk_lens.tolist() == [[1, 1, 8]] * 2
        assert upsample(chunks).shape == x.shape
        assert float(seen.statistics.capped_share) == pytest.approx(0.7)

    def test_equals_the_free_mode_where_the_limit_is_not_reached(self) -> None:
        x, lens = randn(3, 10, DIM), [10, 0, 4]
        free, capped = make(), make(max_chunks=12)
        free_chunks, free_upsample, free_loss = free(x, lens)
        chunks, upsample, loss = capped(x, lens)
        assert chunks.shape == (3, 12, DIM)
        assert torch.equal(chunks[:, : free_chunks.shape[1]], free_chunks)
        got, want = upsample(inner(chunks)), free_upsample(inner(free_chunks))
        assert_close("output", got, want)
        for g, w in zip(
            backward(capped, x, got, loss), backward(free, x, want, free_loss), strict=True
        ):
            assert_close("gradient", g, w)

    def test_ratio_loss_steers_by_what_the_router_wants(self) -> None:
        x = randn(2, 10, DIM)
        assert torch.equal(
            make()(x).weighted_aux_ratio_loss, make(max_chunks=2)(x).weighted_aux_ratio_loss
        )

    def test_packed_equals_padded(self) -> None:
        """Values and gradients, with NaN where the inner network leaves unused slots."""
        chunker, x, lens = make(max_chunks=3, handle_residual_proj=True), randn(14, DIM), [10, 4]
        chunks, upsample, loss = chunker(x, cu_seqlens=cumulative(lens))
        assert chunks.shape == (6, DIM)
        used = chunks.abs().sum(-1, keepdim=True) > 0
        out = upsample(inner(chunks).where(used, torch.nan))
        padded = torch.nn.utils.rnn.pad_sequence(list(x.split(lens)), batch_first=True)
        padded_chunks, padded_upsample, padded_loss = chunker(padded, lens)
        padded_out = padded_upsample(inner(padded_chunks))
        want = torch.cat([padded_out[0], padded_out[1, :4]])
        assert_close("output", out, want)
        for g, w in zip(
            backward(chunker, x, out, loss), backward(chunker, x, want, padded_loss), strict=True
        ):
            assert_close("gradient", g, w)

    def test_jagged_is_refused(self) -> None:
        jagged = torch.nested.nested_tensor_from_jagged(randn(14, DIM), cumulative([10, 4]))
        with pytest.raises(ValueError, match="padded or packed when max_chunks"):
            make(max_chunks=2)(jagged)

    @pytest.mark.parametrize("layout", ["equal", "lens", "packed"])
    def test_compiles_as_one_graph(self, layout: str) -> None:
        torch._dynamo.reset()
        chunker = make(max_chunks=4, handle_residual_proj=True)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            if layout == "packed":
                cu_seqlens = torch.tensor([0, 5, 2 * x.shape[1]])
                chunks, upsample, loss = chunker(x.flatten(0, 1), cu_seqlens=cu_seqlens)
            else:
                lens = None if layout == "equal" else torch.tensor([x.shape[1], 3])
                chunks, upsample, loss = chunker(x, lens)
            return upsample(inner(chunks)), loss

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for length in (9, 14, 11):
            x = randn(2, length, DIM)
            got, want = compiled(x), run(x)
            assert_close("output", got[0], want[0])
            for g, w in zip(backward(chunker, x, *got), backward(chunker, x, *want), strict=True):
                assert_close("gradient", g, w)


def test_means_are_accumulated_in_float32() -> None:
    x = randn(1, 300, 8).detach().to(torch.bfloat16)
    last = torch.zeros(1, 300, dtype=torch.bool)
    last[0, -1] = True
    chunker = DynamicSequenceChunker(8, pool="mean").to(torch.bfloat16)
    chunks, _, _ = chunker(x, boundary_mask=last)
    assert_rounded_once("mean", chunks[0, 1], x[0, 1:].double().mean(0))


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("max_chunks", [None, 4])
def test_pooling_ends_at_the_boundary(pool: Any, max_chunks: int | None) -> None:
    """Group k holds the positions behind boundary k - 1, up to boundary k."""
    chunker, x = make(pool=pool, max_chunks=max_chunks), randn(2, 15, DIM)
    outputs, seen = chunker(x, [15, 6], return_intermediates=True)
    for row in range(2):
        opened = seen.boundary_mask[row].nonzero().flatten().tolist()
        for chunk, (before, here) in enumerate(zip([-1, *opened[:-1]], opened, strict=True)):
            group = x[row, before + 1 : here + 1]
            want = group.mean(0) if pool == "mean" else group.amax(0)
            assert_close(f"chunk {chunk}", outputs.downsampled[row, chunk], want)
    outputs.downsampled.sum().backward()
    assert x.grad is not None
    assert not x.grad[1, 6:].any()


class TestUpsample:
    """The way back takes what any network returns, and refuses what cannot be right."""

    def test_results_of_many_kinds(self) -> None:
        chunks, upsample, _ = make()(randn(2, 9, DIM))
        want = upsample(chunks)

        class Result:
            last_hidden_state = chunks

        for result in ((chunks, "cache"), [chunks], Result(), chunks.transpose(1, 2).mT):
            assert torch.equal(upsample(result), want)
        with pytest.raises(ValueError, match="must return a tensor"):
            upsample({"x": chunks})

    @pytest.mark.parametrize("residual", [True, False])
    def test_comes_back_in_the_dtype_of_the_tokens(self, residual: bool) -> None:
        x = randn(2, 9, DIM).detach().float()
        chunker = DynamicSequenceChunker(DIM, handle_residual_proj=residual)
        chunks, upsample, _ = chunker(x)
        out = upsample(chunks.to(torch.bfloat16))
        assert out.dtype == torch.float32
        # bf16 rounds what comes back once, by up to 0.4 per cent, and the smoothing adds them up.
        assert_close("output", out, upsample(chunks).double(), 1e-2)

    def test_another_width(self) -> None:
        chunks, upsample, _ = make()(randn(2, 9, DIM))
        assert upsample(chunks[..., :4]).shape == (2, 9, 4)
        _, with_residual, _ = make(handle_residual_proj=True)(randn(2, 9, DIM))
        with pytest.raises(ValueError, match="inner must have 6 channels"):
            with_residual(chunks[..., :4])

    def test_wrong_length_or_batch(self) -> None:
        chunks, upsample, _ = make()(randn(2, 9, DIM))
        for wrong in (chunks[:, 1:], chunks[:1], chunks[0], torch.cat([chunks, chunks], 1)):
            with pytest.raises(ValueError, match="inner must have shape"):
                upsample(wrong)

    def test_jagged_of_another_batch(self) -> None:
        jagged = torch.nested.nested_tensor_from_jagged(randn(14, DIM), cumulative([10, 4]))
        chunks, upsample, _ = make()(jagged)
        one = torch.nested.nested_tensor_from_jagged(
            chunks.values(), torch.tensor([0, len(chunks.values())])
        )
        with pytest.raises(ValueError, match="inner must have rows as long"):
            upsample(one)

    def test_without_scale_the_router_learns_only_by_the_smoothing(self) -> None:
        x = randn(1, 12, DIM)
        chunker = make()
        one_chunk = torch.zeros(1, 12, dtype=torch.bool)
        chunks, upsample, _ = chunker(x, boundary_mask=one_chunk)
        weight = chunker.to_queries_keys.weight
        cut = upsample(chunks, apply_scale=False).sum()
        (gradient,) = torch.autograd.grad(cut, weight, retain_graph=True)
        assert not gradient.any()
        (gradient,) = torch.autograd.grad(upsample(chunks).sum(), weight)
        assert gradient.any()


class TestPublishedOptions:
    """What the chunker published under this name does by default, here as options."""

    def test_start_key(self) -> None:
        chunker, x = make(learn_start_key=True), randn(2, 9, DIM)
        (chunks, upsample, _), seen = chunker(x, return_intermediates=True)
        assert chunker.start_key is not None
        query = x[:, 0] @ chunker.to_queries_keys.weight[:DIM].T
        cosine = torch.cosine_similarity(query, chunker.start_key[None], dim=-1)
        assert_close("p", seen.probs[:, 0], (1 - cosine) / 2)
        assert seen.boundary_mask[:, 0].all()
        # Nothing lies before the first chunk, so it comes back times its probability.
        assert_close("first", upsample(chunks)[:, 0], chunks[:, 0] * seen.probs[:, :1])
        upsample(chunks).sum().backward()
        assert chunker.start_key.grad is not None
        assert chunker.start_key.grad.any()

    def test_gradient_scaling(self) -> None:
        plain, scaled = make(), make(learning_rate_difference=0.5)
        x = randn(1, 9, DIM)
        chunks, upsample, _ = plain(x)
        chunks2, upsample2, _ = scaled(x)
        assert torch.equal(upsample(chunks), upsample2(chunks2))
        (down,) = torch.autograd.grad(chunks.sum(), x)
        (down2,) = torch.autograd.grad(chunks2.sum(), x)
        assert_close("down", down2, 2 * down)
        z = randn(*chunks.shape)
        (up,) = torch.autograd.grad(upsample(z).sum(), z)
        (up2,) = torch.autograd.grad(upsample2(z).sum(), z)
        assert_close("up", up2, 0.5 * up)

    @pytest.mark.parametrize("weight", [0.0, 0.5])
    def test_probabilities_that_are_shown_have_the_gradient_of_the_loss(
        self, weight: float
    ) -> None:
        """The same as where nobody sees them, by way of the tokens."""
        chunker, x = make(ratio_loss_weight=weight), randn(2, 9, DIM)
        found = []
        for shown in (True, False):
            outputs = chunker(x, return_intermediates=shown)
            if shown:
                outputs, seen = outputs
            chunks, upsample, loss = outputs
            everything = upsample(chunks.sin()).cos().sum() + loss
            found.append(
                torch.autograd.grad(everything, (x, *chunker.parameters()), retain_graph=True)
            )
            if shown:
                (of_loss,) = torch.autograd.grad(loss, seen.packed_probs)
                assert bool(of_loss.any()) == (weight > 0)
        for got, want in zip(*found, strict=True):
            assert_close("gradient", got, want, 1e-12)

    def test_straight_through_fraction(self) -> None:
        x = randn(1, 9, DIM)
        plain, soft = make()(x), make(straight_through_frac_vecs=True)
        (_, _, loss), seen = soft(x, return_intermediates=True)
        assert_close("value", loss, plain.weighted_aux_ratio_loss, 1e-12)
        (got,) = torch.autograd.grad(loss, seen.packed_probs)
        p, n = seen.packed_probs.detach(), 6.0
        f, g = seen.boundary_mask.double().mean(), p.mean()
        through_g = n * n / (n - 1) * (f - 1 / n) / 9
        sigmoid = (p - 0.5).sigmoid()
        through_f = n * n / (n - 1) * (g - 1 / n) / 9 * sigmoid * (1 - sigmoid)
        assert_close("gradient", got, 0.03 * (through_g + through_f))

    def test_chunk_length_embedding(self) -> None:
        chunker, x = make(embed_chunk_lens=True), randn(2, 9, DIM)
        outputs, seen = chunker(x, return_intermediates=True)
        assert chunker.length_embed is not None
        plain, _, _ = make()(x)
        want = plain + chunker.length_embed(seen.chunk_lens[..., None].double())
        assert_close("chunks", outputs.downsampled[seen.mask], want[seen.mask])

    def test_multiplied_chunks(self) -> None:
        """With an inner network that does nothing this is the paper's formula again."""
        x = randn(2, 9, DIM)
        (chunks, upsample, _), seen = make(multiply_by_prob=True)(x, return_intermediates=True)
        plain_chunks, plain_upsample, _ = make()(x)
        p = (1 - seen.gates)[..., None]
        assert_close("chunks", chunks, (plain_chunks * p).masked_fill(~seen.mask[..., None], 0))
        assert_close("output", upsample(chunks), plain_upsample(plain_chunks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tokens(dtype: torch.dtype) -> None:
    """Probabilities stay in float32, and given the same boundaries the output stays close."""
    chunker, x = DynamicSequenceChunker(64, handle_residual_proj=True), randn(2, 50, 64).detach()
    exact_chunks, exact_upsample, _ = chunker.double()(x)
    mask = chunker(x, return_intermediates=True)[1].boundary_mask
    (chunks, upsample, loss), seen = chunker.to(dtype)(
        x.to(dtype), boundary_mask=mask, return_intermediates=True
    )
    assert seen.probs.dtype == loss.dtype == torch.float32
    out = upsample(chunks)
    assert out.dtype == dtype
    # Tokens, probabilities' projections, chunks and output are each rounded to 8 bits in bf16.
    assert_close("output", out, exact_upsample(exact_chunks), 2e-2)


def test_mixed_precision_by_autocast() -> None:
    chunker, x = DynamicSequenceChunker(32, handle_residual_proj=True), randn(2, 9, 32).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunks, upsample, loss = chunker(x)
        out = upsample(nn.Linear(32, 32)(chunks))
    assert out.dtype == loss.dtype == torch.float32


def test_residual_is_in_float32_under_autocast() -> None:
    chunker, x = DynamicSequenceChunker(32, handle_residual_proj=True), randn(1, 9, 32).float()
    assert chunker.residual_proj is not None
    nn.init.normal_(chunker.residual_proj.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunks, upsample, _ = chunker(x)
        out = upsample(torch.zeros_like(chunks))
    assert_close("residual", out, chunker.residual_proj(x).double())


@pytest.mark.parametrize("options", [{}, {"max_chunks": 6}, {"pool": "mean"}, {"pool": "max"}])
def test_causal(options: dict[str, Any]) -> None:
    """Another token at t changes nothing before t: probabilities, boundaries, output."""
    chunker, x = make(handle_residual_proj=True, **options), randn(1, 30, DIM).detach()
    for t in (1, 10, 29):
        changed = x.clone()
        changed[:, t] = randn(DIM, seed=5)
        results = []
        for tokens in (x, changed):
            (chunks, upsample, _), seen = chunker(tokens, return_intermediates=True)
            causal = chunks.cumsum(1)
            results.append((seen.probs[:, :t], upsample(causal)[:, :t]))
        assert torch.equal(results[0][0], results[1][0])
        assert_close("output", results[0][1], results[1][1], 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"dim_queries_keys": 0}, "dim_queries_keys must be"),
        ({"boundary_threshold": 1.0}, "boundary_threshold must be in"),
        ({"target_avg_token_length": 1.0}, "target_avg_token_length must be above 1"),
        ({"max_chunks": 2.5}, "max_chunks must be an integer"),
        ({"target_avg_token_length": float("inf")}, "target_avg_token_length must be"),
        ({"ratio_loss_weight": -1.0}, "ratio_loss_weight must be at least 0"),
        ({"max_chunks": 0}, "max_chunks must be an integer"),
        ({"pool": "sum"}, "pool must be one of"),
        ({"learning_rate_difference": 0.0}, "learning_rate_difference must be above 0"),
        ({"boundary_threshold": "a"}, r"boundary_threshold must be in \(0, 1\), got 'a'"),
        ({"ratio_loss_weight": None}, "ratio_loss_weight must be at least 0 and finite, got None"),
        ({"smoothing_clamp": 0.5}, "smoothing_clamp must be None or in"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSequenceChunker(**{"dim": DIM, **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(4, DIM)}, "tokens must have shape"),
        ({"tokens": torch.zeros(1, 4, 5)}, "tokens must be floating point with 6 channels"),
        ({"tokens": torch.zeros(1, 4, DIM, dtype=torch.int64)}, "tokens must be floating"),
        ({"tokens": torch.zeros(1, 4, DIM).bfloat16()}, "tokens must be torch.float32"),
        ({"lens": [4, 4]}, "lens must have shape"),
        ({"lens": [5]}, "lens must be in 0 .. 4"),
        ({"lens": [-1]}, "lens must be in 0 .. 4"),
        ({"lens": ["a"]}, "lens must be integers, got"),
        ({"tokens": [[1.0]]}, "tokens must be a tensor, got list"),
        ({"tokens": torch.zeros(1, 2, 4, DIM)}, "tokens must have shape"),
        ({"boundary_mask": [True]}, "boundary_mask must be a tensor"),
        ({"lens": torch.tensor([1.0])}, "lens must be integers"),
        ({"lens": [4], "cu_seqlens": torch.tensor([0, 4])}, "exclude each other"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "tokens must have shape .total, dim."),
        (
            {
                "tokens": torch.nested.nested_tensor_from_jagged(
                    torch.zeros(4, DIM), torch.tensor([0, 2, 4]), lengths=torch.tensor([1, 2])
                )
            },
            "without holes",
        ),
        (
            {"tokens": torch.zeros(4, DIM), "cu_seqlens": torch.tensor([0, 3])},
            "cu_seqlens must rise",
        ),
        (
            {"tokens": torch.zeros(4, DIM), "cu_seqlens": torch.tensor([0, 5])},
            "cu_seqlens must rise",
        ),
        (
            {"tokens": torch.zeros(4, DIM), "cu_seqlens": torch.tensor([0, 3, 2])},
            "cu_seqlens must rise",
        ),
        ({"boundary_mask": torch.zeros(1, 3, dtype=torch.bool)}, "boundary_mask must be bool"),
        ({"boundary_mask": torch.zeros(1, 4)}, "boundary_mask must be bool"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSequenceChunker(DIM)(**{"tokens": torch.zeros(1, 4, DIM), **arguments})
