"""The next id of each row from its logits, and what becomes of the row: `decoding` in one kernel.

The draw is `sampling.draw` with a temperature and no filter, by inverse CDF.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.step_common import (
    check_contiguous,
    check_dtype,
    launch_options,
    let_next_start,
    on_its_device,
    wait_for_inputs,
)


@triton.jit
def choose_step_kernel(
    logits_ptr,
    uniforms_ptr,
    temperature_ptr,
    step_ptr,
    active_ptr,
    reads_ptr,
    ids_ptr,
    values_ptr,
    logprobs_ptr,
    vocab,
    steps,
    eos,
    no_byte,
    no_distribution,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK)
    m_v = o_v < vocab
    step = tl.load(step_ptr)
    column = i_m * steps + step
    logits = tl.load(logits_ptr + i_m * vocab + o_v, m_v, -float("inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + i_m)

    # The largest first, and of equal ones the lowest id.
    largest = tl.max(logits, 0)
    greedy = tl.min(tl.where(logits == largest, o_v, BLOCK), 0)
    shifted = logits - largest
    weights = tl.exp(shifted / tl.maximum(temperature, 1.1754943508222875e-38))
    probs = weights / tl.sum(weights, 0)
    sums = tl.where(probs > 0, tl.cumsum(probs, 0), 0.0)
    reached = sums > tl.load(uniforms_ptr + column) * tl.max(sums, 0)
    drawn = tl.min(tl.where(reached, o_v, BLOCK), 0)
    chosen = tl.minimum(tl.where(temperature > 0, drawn, greedy), vocab - 1)
    of_chosen = tl.sum(tl.where(o_v == chosen, shifted, 0.0), 0)
    logprob = of_chosen - tl.log(tl.sum(tl.exp(shifted), 0))

    active = tl.load(active_ptr + i_m)
    broken = logprob != logprob
    ends = broken | (chosen == eos)
    writes = active & (ends == 0)
    value = tl.where(writes, chosen, tl.where(active & broken, no_distribution, no_byte))
    tl.store(values_ptr + column, value.to(tl.int16))
    tl.store(logprobs_ptr + column, logprob)
    tl.store(ids_ptr + i_m, chosen.to(tl.int64))
    tl.store(active_ptr + i_m, writes)
    tl.store(reads_ptr + i_m, writes)


@on_its_device
def choose_step(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    step: Tensor,
    active: Tensor,
    reads: Tensor,
    ids: Tensor,
    values: Tensor,
    logprobs: Tensor,
    *,
    eos: int | None,
    no_byte: int,
    no_distribution: int,
) -> None:
    """Choose, record and end rows; all but the first four are changed in place.

    logits:       float32 (rows, vocab)
    uniforms:     float32 (rows, steps)
    temperature:  float32 (rows, 1)
    step:         int64 (1,): the column of this step, below `steps`
    active:       bool (rows,): rows that go on; False from now on where the row ends
    reads:        bool (rows,): as `active` comes out
    ids:          int64 (rows, 1): the chosen ids, of rows at rest too
    values:       int16 (rows, steps): gets the id, `no_byte` where the row wrote none, or
                  `no_distribution` where its logits are none
    logprobs:     float32 (rows, steps): gets the log-probability of the id at temperature 1
    eos:          an id that ends a row; None for no such id

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    rows, vocab = logits.shape
    steps = uniforms.shape[1]
    wanted = {
        "logits": (logits, torch.float32, (rows, vocab)),
        "uniforms": (uniforms, torch.float32, (rows, steps)),
        "temperature": (temperature, torch.float32, (rows, 1)),
        "step": (step, torch.int64, (1,)),
        "active": (active, torch.bool, (rows,)),
        "reads": (reads, torch.bool, (rows,)),
        "ids": (ids, torch.int64, (rows, 1)),
        "values": (values, torch.int16, (rows, steps)),
        "logprobs": (logprobs, torch.float32, (rows, steps)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        check_contiguous(name, tensor, *shape)
        check_dtype(name, tensor, dtype)
    choose_step_kernel[(rows,)](
        logits_ptr=logits,
        uniforms_ptr=uniforms,
        temperature_ptr=temperature,
        step_ptr=step,
        active_ptr=active,
        reads_ptr=reads,
        ids_ptr=ids,
        values_ptr=values,
        logprobs_ptr=logprobs,
        vocab=vocab,
        steps=steps,
        eos=-1 if eos is None else eos,
        no_byte=no_byte,
        no_distribution=no_distribution,
        BLOCK=triton.next_power_of_2(vocab),
        num_warps=2,
        **launch_options(logits),
    )
