"""The whole chunker on the Triton kernels against the whole chunker on torch operations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking import DynamicSequenceChunker, use_backend
from tests.ops.triton_cases import DEVICE
from tests.support import assert_close, cumulative, randn

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LENS = [9, 0, 1, 40]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_chunks": 7, "handle_residual_proj": True},
        # Room for all chunks before their number is known, in padded rows too.
        {"target_avg_token_length": 1.01},
        {"target_avg_token_length": 1.01, "multiply_by_prob": True},
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_same_numbers(options: dict[str, Any], packed: bool) -> None:
    torch.manual_seed(0)
    chunker = DynamicSequenceChunker(6, **options).to(DEVICE)
    with torch.no_grad():
        for parameter in chunker.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rows = randn(50, 6).detach().float().to(DEVICE)
    padded = torch.nn.utils.rnn.pad_sequence(list(rows.split(LENS)), batch_first=True)

    def run(backend: Any) -> list[Tensor]:
        x = (rows if packed else padded).clone().requires_grad_()
        lengths = {"cu_seqlens": cumulative(LENS, DEVICE)} if packed else {"lens": LENS}
        with use_backend(backend):
            chunks, upsample, loss = chunker(x, **lengths)
            out = upsample(torch.tanh(chunks))
            gradients = torch.autograd.grad(out.square().sum() + loss, [x, *chunker.parameters()])
        return [chunks, out, loss, *gradients]

    for i, (got, want) in enumerate(zip(run("triton"), run("torch"), strict=True)):
        assert_close(f"result {i}", got, want.double())
