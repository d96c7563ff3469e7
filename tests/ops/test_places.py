"""Places of packed positions in padded rows: a hand-made case, the oracle, and the kernel."""

import pytest
import torch

from h_net_dynamic_chunking.ops import use_backend
from h_net_dynamic_chunking.ops.places import padded_places
from tests.ops.triton_cases import DEVICE
from tests.ops.triton_cases import poisoned_memory as poisoned_memory
from tests.support import compiled, cumulative

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("lens", [[2, 0, 3], [1], [0, 0], [], [600, 1]])
def test_oracle(lens: list[int], tail: int, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    length, total = max(lens, default=0) + 1, sum(lens) + tail
    with use_backend(backend):  # type: ignore[arg-type]
        places, inverse = padded_places(cumulative(lens, DEVICE), length, total)
    rows = [[i * length + j for j in range(n)] for i, n in enumerate(lens)]
    wanted = [place for row in rows for place in row]
    assert places.tolist() == wanted + [-1] * tail
    assert inverse.tolist() == [
        wanted.index(place) if place in wanted else -1 for place in range(len(lens) * length)
    ]


def test_opcheck_and_compilation() -> None:
    cu_seqlens = cumulative([3, 0, 2])
    torch.library.opcheck(torch.ops.h_net.padded_places.default, (cu_seqlens, 4, 6))
    run, compilations = compiled(padded_places)
    for length, total in ((4, 5), (5, 7), (6, 9)):
        for got, want in zip(
            run(cu_seqlens, length, total), padded_places(cu_seqlens, length, total), strict=True
        ):
            assert torch.equal(got, want)
    assert compilations() <= 2
