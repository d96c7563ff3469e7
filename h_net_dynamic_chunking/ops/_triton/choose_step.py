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
    turns_ptr,
    written_ptr,
    active_ptr,
    reads_ptr,
    ids_ptr,
    values_ptr,
    logprobs_ptr,
    vocab,
    most,
    eos,
    no_distribution,
    READS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    if not (tl.load(turns_ptr + i_m) & tl.load(active_ptr + i_m)):
        tl.store(reads_ptr + i_m, False)
        return
    o_v = tl.arange(0, BLOCK)
    m_v = o_v < vocab
    written = tl.load(written_ptr + i_m)
    column = i_m * most + written
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

    broken = logprob != logprob
    writes = (broken | (chosen == eos)) == 0
    goes_on = writes & (written + 1 < most)
    value = tl.where(broken, no_distribution, chosen)
    tl.store(values_ptr + column, value.to(tl.int16), writes | broken)
    tl.store(logprobs_ptr + column, logprob)
    tl.store(ids_ptr + i_m, chosen.to(tl.int64))
    tl.store(written_ptr + i_m, written + writes)
    tl.store(active_ptr + i_m, goes_on)
    tl.store(reads_ptr + i_m, writes if READS_LAST else goes_on)


@on_its_device
def choose_step(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    turns: Tensor,
    written: Tensor,
    active: Tensor,
    reads: Tensor,
    ids: Tensor,
    values: Tensor,
    logprobs: Tensor,
    *,
    eos: int | None,
    reads_last: bool,
    no_distribution: int,
) -> None:
    """Choose, record and end rows; all but the first four are changed in place.

    logits:       float (rows, vocab)
    uniforms:     float32 (rows, most)
    temperature:  float32 (rows, 1)
    turns:        bool (rows,): rows that choose if they go on; may be `active` itself
    written:      int64 (rows,): bytes of each row, below `most`; counts the new one
    active:       bool (rows,): becomes False where a row of `turns` ends
    reads:        bool (rows,): whether the row chose a byte that is to be read
    ids:          int64 (rows, 1): the chosen ids; other rows keep theirs
    values:       int16 (rows, most): gets the id in the column `written`; nothing where the row
                  ends without one, or `no_distribution` where its logits are none
    logprobs:     float32 (rows, most): gets the log-probability of the id at temperature 1
    eos:          an id that ends a row; None for no such id
    reads_last:   whether a byte behind which there is no more room is to be read, too

    Raises:
        ValueError: shapes or dtypes off the contract.
    """
    rows, vocab = logits.shape
    most = uniforms.shape[1]
    wanted = {
        "logits": (logits, logits.dtype, (rows, vocab)),
        "uniforms": (uniforms, torch.float32, (rows, most)),
        "temperature": (temperature, torch.float32, (rows, 1)),
        "turns": (turns, torch.bool, (rows,)),
        "written": (written, torch.int64, (rows,)),
        "active": (active, torch.bool, (rows,)),
        "reads": (reads, torch.bool, (rows,)),
        "ids": (ids, torch.int64, (rows, 1)),
        "values": (values, torch.int16, (rows, most)),
        "logprobs": (logprobs, torch.float32, (rows, most)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        check_contiguous(name, tensor, *shape)
        check_dtype(name, tensor, dtype)
    choose_step_kernel[(rows,)](
        logits_ptr=logits,
        uniforms_ptr=uniforms,
        temperature_ptr=temperature,
        turns_ptr=turns,
        written_ptr=written,
        active_ptr=active,
        reads_ptr=reads,
        ids_ptr=ids,
        values_ptr=values,
        logprobs_ptr=logprobs,
        vocab=vocab,
        most=most,
        eos=-1 if eos is None else eos,
        no_distribution=no_distribution,
        READS_LAST=reads_last,
        BLOCK=triton.next_power_of_2(vocab),
        num_warps=2,
        **launch_options(logits),
    )
