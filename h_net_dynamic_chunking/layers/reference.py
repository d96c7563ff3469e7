"""Sequential oracle of the Mamba-2 recurrence: one token at a time, nothing clever, float64 clean.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,      y_t = S_t C_t + D x_t

For tests and for readers; never on a hot path.
"""

import torch
from torch import Tensor


def ssd_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    sequence: Tensor | None = None,
) -> Tensor:
    """Run the recurrence as written; shapes as in `ssd.ssd_chunked`.

    >>> x, dt, A = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1), torch.tensor([0.5]).log()
    >>> B = C = torch.ones(1, 3, 1)
    >>> ssd_sequential(x, dt, A, B, C, D=torch.zeros(1)).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    batch, length, heads, head_dim = x.shape
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1])
    outputs = []
    for t in range(length):
        if sequence is not None and t > 0:
            goes_on = sequence[:, t] == sequence[:, t - 1]
            state = torch.where(goes_on[:, None, None, None], state, 0)
        decay = (dt[:, t] * A).exp()[:, :, None, None]
        write = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = decay * state + write
        outputs.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1) if outputs else x
