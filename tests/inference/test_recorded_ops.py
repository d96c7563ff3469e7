"""What a step that is recorded launches: kernels of ours, which overlap, and hardly any of torch's.

One of torch's starts when all before it have ended, and what is behind it when it has.
"""

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from h_net_dynamic_chunking.decoding import Decoding
from h_net_dynamic_chunking.ops.backend import use_backend
from h_net_dynamic_chunking.sampling import Sampling
from h_net_dynamic_chunking.stopping import StopStrings
from tests.inference.models import random_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter, whose kernels can be left out",
)
interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs triton")

ROWS = 3


class Launched(TorchDispatchMode):
    """The operations of torch that are more than a view or a tensor without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if not func.is_view and "empty" not in name:
            self.names.append(name)
        return func(*args, **kwargs or {})


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel is launched; none of them runs."""
    count: Counter[str] = Counter()

    def run(kernel: Any, *_: Any, **__: Any) -> None:
        count[kernel.fn.__name__] += 1

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    return count


def test_a_step_of_each_depth(kernels: Counter[str]) -> None:
    """The wider vectors of the networks inside are all that torch makes."""
    model = random_model("three_stages", torch.float32, d_state=16).bfloat16()
    # Without a prompt: what is launched does not depend on numbers.
    state = Decoding(
        model,
        [b"a"] * ROWS,
        9,
        sampling=Sampling(),
        seeds=range(ROWS),
        stops=StopStrings([]),
        plan="waiting",
    )
    state._cache = model.allocate_inference_cache(ROWS, 9)
    step = model.waiting_step(state._cache, state._ids[:, 0], state._reads, state._choose)
    with use_backend("triton"):
        step(model.config.stages)  # which allocates what is kept
        for depth in range(model.config.stages + 1):
            kernels.clear()
            with Launched() as launched:
                step(depth)
            assert launched.names == ["aten::cat"] * max(0, depth - 1), depth
            stages = min(depth + 1, model.config.stages)
            for name in ("route_step_kernel", "dechunk_step_kernel"):
                assert kernels[name] == stages, (name, depth)
            for name in ("embed_step_kernel", "choose_step_kernel"):
                assert kernels[name] == 1, (name, depth)
