"""The ratio loss against its identity, and the statistics of a segmentation."""

import math

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking import ratio_loss, segmentation_statistics
from h_net_dynamic_chunking.ops import use_backend
from h_net_dynamic_chunking.ops.ratio import pooled_ratio_loss
from tests import reference_chunker
from tests.ops.triton_cases import DEVICE
from tests.support import assert_close, boundaries, cumulative, probabilities


def test_identity() -> None:
    mask, p = boundaries(50), probabilities(50)
    for n in (1.5, 3.0, 6.0):
        assert_close(f"N = {n}", ratio_loss(mask, p, n), reference_chunker.ratio_loss(mask, p, n))


def test_is_one_on_target_and_n_when_everything_is_a_boundary() -> None:
    on_target = torch.tensor([True, False, False, False]).repeat(5)
    assert float(ratio_loss(on_target, on_target.double(), 4.0)) == pytest.approx(1)
    everywhere = torch.ones(7, dtype=torch.bool)
    assert float(ratio_loss(everywhere, everywhere.double(), 4.0)) == pytest.approx(4)
    assert float(ratio_loss(~everywhere, (~everywhere).double(), 4.0)) == pytest.approx(4 / 3)


def test_gradient_is_a_controller() -> None:
    """dL/dp_t = N^2 / (N - 1) (F - 1/N) / L: zero once the hard rate is on target."""
    mask, p, n = boundaries(50), probabilities(50), 6.0
    (gradient,) = torch.autograd.grad(ratio_loss(mask, p, n), p)
    want = n * n / (n - 1) * (mask.double().mean() - 1 / n) / 50
    assert_close("gradient", gradient, want.expand(50))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weighted_beside_the_loss_itself(used: tuple[int, ...], backend: str) -> None:
    """Whichever of the two takes part in a loss: as multiplied afterwards."""
    if backend == "triton":
        pytest.importorskip("triton")
    mask, cu_seqlens = boundaries(53, device=DEVICE), cumulative([20, 0, 30], DEVICE)
    p = probabilities(53, device=DEVICE).detach().float().requires_grad_()

    def both(weight: float) -> tuple[Tensor, Tensor]:
        return pooled_ratio_loss(mask, p, cu_seqlens, 6.0, weight)

    with use_backend(backend):  # type: ignore[arg-type]
        loss, weighted = both(0.03)
        afterwards = both(1.0)[0]
        pairs = ((loss, afterwards), (weighted, 0.03 * afterwards))
        for got, want in pairs:
            assert torch.equal(got, want)
        losses = (sum(pair[i].square() for pair in (pairs[u] for u in used)) for i in (0, 1))
        got, want = (torch.autograd.grad(total, p, retain_graph=True)[0] for total in losses)  # type: ignore[arg-type]
    assert_close("gradient", got, want.double())
    assert not got[50:].any()


def test_pads_do_not_count() -> None:
    mask, p = boundaries(12).view(2, 6), probabilities(12).detach().view(2, 6)
    real = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    poisoned = p.where(real, torch.nan).requires_grad_()
    packed = ratio_loss(mask[real], p[real], 6.0)
    for per_sequence in (False, True):
        loss = ratio_loss(mask, poisoned, 6.0, mask=real, per_sequence=per_sequence)
        (gradient,) = torch.autograd.grad(loss, poisoned)
        assert not gradient[~real].any()
        assert gradient[real].isfinite().all()
    assert_close("loss", ratio_loss(mask, poisoned, 6.0, mask=real), packed)


def test_per_sequence_is_the_mean_over_sequences_that_are_not_empty() -> None:
    lens = [5, 0, 9]
    mask, p, cu = boundaries(16), probabilities(16), cumulative(lens)
    got = ratio_loss(mask, p, 3.0, cu_seqlens=cu, per_sequence=True)
    want = [ratio_loss(mask[s], p[s], 3.0) for s in (slice(0, 5), slice(5, 14))]
    assert_close("loss", got, torch.stack(want).mean())


def test_nothing_to_count() -> None:
    empty = torch.zeros(2, 0)
    for per_sequence in (False, True):
        assert ratio_loss(empty.bool(), empty, 3.0, per_sequence=per_sequence) == 0
    assert list(segmentation_statistics(empty.bool(), empty.bool(), empty)) == [0] * 5


def test_statistics_by_hand() -> None:
    p = torch.tensor([1.0, 0.25, 0.5, 0.75, torch.nan])
    real = torch.tensor([True, True, True, True, False])
    wanted = torch.tensor([True, False, False, True, True])
    kept = torch.tensor([True, False, False, False, False])
    statistics = segmentation_statistics(wanted, kept, p, mask=real)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert statistics._asdict() == pytest.approx(
        {
            "positions_per_chunk": 4.0,
            "boundary_share": 0.5,
            "mean_probability": 0.625,
            "probability_entropy": (0 + quarter + 1 + quarter) / 4,
            "capped_share": 0.5,
        }
    )


def test_bad_input() -> None:
    mask = torch.zeros(3, dtype=torch.bool)
    for n in (1.0, float("nan")):
        with pytest.raises(ValueError, match="target_ratio must be above 1"):
            ratio_loss(mask, torch.zeros(3), n)
    with pytest.raises(ValueError, match="probs must have the shape of boundary_mask"):
        ratio_loss(mask, torch.zeros(4), 3.0)
    with pytest.raises(
        ValueError, match=r"boundary_mask must have shape \(total,\) with cu_seqlens"
    ):
        ratio_loss(mask[:, None], torch.zeros(3, 1), 3.0, cu_seqlens=cumulative([3]))
    with pytest.raises(ValueError, match=r"boundary_mask must be bool, got torch.float32"):
        ratio_loss(mask.float(), torch.zeros(3), 3.0)
