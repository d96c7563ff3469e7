"""Which backend runs: the predicate, the choice by name, and what happens where it cannot run."""

import threading

import pytest
import torch

from h_net_dynamic_chunking import use_backend
from h_net_dynamic_chunking.ops import boundary_probability_of_pairs
from h_net_dynamic_chunking.ops.backend import Machine, chosen_backend, uses_triton, why_not_triton
from tests.support import cumulative, randn

HOPPER = Machine(triton_installed=True, interpreted=False, capability=(9, 0))


@pytest.mark.parametrize(
    ("device", "dtype", "machine", "reason"),
    [
        ("cuda", torch.bfloat16, HOPPER, None),
        ("cuda", torch.float32, HOPPER, None),
        ("cuda", None, HOPPER, None),
        ("cuda", torch.float64, HOPPER, "not float64"),
        ("cpu", torch.float32, HOPPER, "not on cpu"),
        ("mps", torch.float32, HOPPER._replace(capability=None), "not on mps"),
        ("cuda", torch.float32, HOPPER._replace(triton_installed=False), "not installed"),
        ("cuda", torch.float32, HOPPER._replace(capability=(7, 5)), "capability 8.0, not 7.5"),
        ("cuda", torch.float32, HOPPER._replace(capability=None), "NVIDIA GPUs only"),
        ("cpu", torch.float32, HOPPER._replace(interpreted=True), "asked for by name"),
    ],
)
def test_predicate(
    device: str, dtype: torch.dtype | None, machine: Machine, reason: str | None
) -> None:
    got = why_not_triton(device, dtype, machine, by_name=False)
    assert got == reason if reason is None else reason in str(got)


def test_by_name_takes_the_interpreter_and_other_gpus() -> None:
    for device, machine in (
        ("cpu", HOPPER._replace(interpreted=True)),
        ("cuda", HOPPER._replace(capability=None)),
    ):
        assert why_not_triton(device, torch.float32, machine, by_name=True) is None


def test_the_choice_nests_and_is_given_back() -> None:
    assert chosen_backend() == "auto"
    with use_backend("torch"):
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert chosen_backend() == "torch"
        seen: list[str] = []
        other = threading.Thread(target=lambda: seen.append(chosen_backend()))
        other.start()
        other.join()
        assert seen == ["auto"]
    assert chosen_backend() == "auto"


def test_asking_for_triton_where_it_cannot_run_raises_with_the_reason() -> None:
    x, cu_seqlens = randn(4, 6), cumulative([4])
    with use_backend("triton"), pytest.raises(ValueError, match=r"cannot run here: .*float64"):
        boundary_probability_of_pairs(x, cu_seqlens)
    boundary_probability_of_pairs(x, cu_seqlens)


def test_auto_on_a_cpu_is_torch_and_empty_tensors_are_always() -> None:
    assert not uses_triton(torch.zeros(3, 4))
    with use_backend("triton"):
        assert not uses_triton(torch.zeros(0, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_falling_back_on_a_gpu_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from h_net_dynamic_chunking.ops.backend import _log_once

    _log_once.cache_clear()
    for _ in range(2):
        boundary_probability_of_pairs(randn(4, 6, device="cuda"), cumulative([4], "cuda"))
    assert [r.getMessage() for r in caplog.records] == [
        "torch operations in place of Triton kernels: "
        "the kernels take bfloat16, float16 and float32, not float64"
    ]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        use_backend("cuda")  # type: ignore[arg-type]
