"""GraphedStep: the numbers of a plain loop, wherever it runs, and rates that change on the way."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.training.graphs import GraphedStep
from h_net_dynamic_chunking.training.optimizer import adamw, set_learning_rate

RATES = [1e-3, 2e-3, 3e-3, 2e-3, 5e-4, 1e-4]
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def small_model(device: str) -> HNetLM:
    torch.manual_seed(0)
    config = HNetConfig.create_reasonable_config(D=[32, 64], arch=["m1", "T1"])
    return HNetLM(config, max_chunks=[12]).to(device)


def batches(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (3, 41), generator=generator).to(device) for _ in RATES]


def losses_of(model: HNetLM, ids: Tensor) -> Sequence[Tensor]:
    out = model(ids[:, :-1], ids[:, 1:])
    assert out.loss is not None
    return [out.loss, out.stages[0].boundary_mask.sum()]


def plain(device: str) -> tuple[HNetLM, list[float]]:
    model = small_model(device)
    optimizer, losses = adamw(model.parameter_groups(0.1), 1.0), []
    for rate, ids in zip(RATES, batches(device), strict=True):
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        loss = losses_of(model, ids)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("device", DEVICES)
def test_as_a_plain_loop(device: str) -> None:
    want_model, want = plain(device)
    model = small_model(device)
    optimizer = adamw(model.parameter_groups(0.1), 1.0)
    step = GraphedStep(lambda ids: losses_of(model, ids), optimizer)
    results = []
    for rate, ids in zip(RATES, batches(device), strict=True):
        set_learning_rate(optimizer, rate)
        results.append(step(ids))
    # Rates are rounded to float32 where they are tensors.
    tolerance = 0.0 if device == "cpu" else 1e-4
    assert [loss.item() for loss, _ in results] == pytest.approx(want, rel=tolerance, abs=0)
    assert not any(tensor.requires_grad for result in results for tensor in result)
    for got, expected in zip(model.parameters(), want_model.parameters(), strict=True):
        assert torch.allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_rates_may_be_tensors() -> None:
    """In place, for the graph that holds them; and the optimizer takes them."""
    model, plainly = small_model("cpu"), small_model("cpu")
    optimizers = [adamw(m.parameter_groups(0.1), 1.0) for m in (model, plainly)]
    for group in optimizers[0].param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    held = [group["lr"] for group in optimizers[0].param_groups]
    for optimizer, m in zip(optimizers, (model, plainly), strict=True):
        set_learning_rate(optimizer, 1e-3)
        losses_of(m, batches("cpu")[0])[0].backward()
        optimizer.step()
    assert all(
        group["lr"] is tensor
        for group, tensor in zip(optimizers[0].param_groups, held, strict=True)
    )
    for got, want in zip(model.parameters(), plainly.parameters(), strict=True):
        assert torch.allclose(got, want, rtol=1e-6)


def test_shapes_do_not_depend_on_the_routers() -> None:
    """What a graph needs; the chunks of one that would want more join the last."""
    model = small_model("cpu")
    for mask in (torch.ones(2, 40, dtype=torch.bool), torch.zeros(2, 40, dtype=torch.bool)):
        out = model(batches("cpu")[0][:2, :40], boundary_masks=[mask])
        assert out.stages[0].intermediates.chunk_layout.shape == (2, 12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_other_shapes_are_refused() -> None:
    model = small_model("cuda")
    step = GraphedStep(lambda ids: losses_of(model, ids), adamw(model.parameter_groups(0.1), 1e-3))
    for ids in batches("cuda"):
        step(ids)
    with pytest.raises(ValueError, match="inputs must be"):
        step(batches("cuda")[0][:2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rates_that_are_replaced_reach_the_graph() -> None:
    model = small_model("cuda")
    optimizer = adamw(model.parameter_groups(0.0), 1e-3)
    step = GraphedStep(lambda ids: losses_of(model, ids), optimizer)
    for ids in batches("cuda"):
        step(ids)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.clone() for parameter in model.parameters()]
    step(batches("cuda")[0])
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="optimizer must keep the state"):
        step(batches("cuda")[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses_of": 5}, "losses_of must be callable, got int"),
        ({"optimizer": None}, "optimizer must be a torch.optim.Optimizer, got NoneType"),
        ({"max_norm": -1.0}, "max_norm must be a number above 0, got -1.0"),
        ({"max_norm": "1"}, "max_norm must be a number above 0, got '1'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    model = small_model("cpu")
    arguments = {"losses_of": model, "optimizer": adamw(model.parameter_groups(0.1), 1e-3)}
    with pytest.raises(ValueError, match=message):
        GraphedStep(**{**arguments, **change})


@pytest.mark.parametrize(
    ("results_of", "got"),
    [
        (lambda loss: loss, "got Tensor"),
        (lambda loss: [], "got list without any"),
        (lambda loss: None, "got NoneType"),
        (lambda loss: [loss, 3.0], r"got \['Tensor', 'float'\]"),
        (lambda loss: [loss.expand(2)], r"shape \(2,\), requires_grad=True"),
        (lambda loss: [loss.detach()], r"shape \(\), requires_grad=False"),
    ],
)
def test_bad_losses_change_nothing(results_of: Callable[[Tensor], Any], got: str) -> None:
    model = small_model("cpu")
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = adamw(model.parameter_groups(0.1), 1e-3)
    step = GraphedStep(lambda ids: results_of(losses_of(model, ids)[0]), optimizer)
    with pytest.raises(ValueError, match=f"losses_of must return a sequence.*{got}"):
        step(batches("cpu")[0])
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("inputs", [(), ([1, 2],), (torch.zeros(2, 3).long(), 5)])
def test_inputs_are_tensors(inputs: tuple[Any, ...]) -> None:
    model = small_model("cpu")
    step = GraphedStep(lambda ids: losses_of(model, ids), adamw(model.parameter_groups(0.1), 1e-3))
    with pytest.raises(ValueError, match="inputs must be one tensor or more"):
        step(*inputs)


def test_adamw_wants_multiples_and_a_rate() -> None:
    model = small_model("cpu")
    for groups, got in ((model.parameters(), "got Parameter"), ([{"params": []}], "'params'")):
        with pytest.raises(
            ValueError, match=f"groups must be dicts with an 'lr_multiplier'.*{got}"
        ):
            adamw(groups, 1e-3)  # type: ignore[arg-type]
    groups = model.parameter_groups(0.1)
    wanted = "learning_rate must be a finite number of at least 0, got "
    for bad in ("1", True, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{wanted}{bad!r}"):
            adamw(groups, bad)  # type: ignore[arg-type]
    optimizer = adamw(groups, 0.5)
    rates = [group["lr"] for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=f"{wanted}True"):
        set_learning_rate(optimizer, True)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    other = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"optimizer must have an 'lr_multiplier'.*SGD"):
        set_learning_rate(other, 1e-3)
    assert other.param_groups[0]["lr"] == 0.1
