"""Random ids in documents of random lengths: something to feed a model with, to try it out."""

import torch
from torch import Tensor

from h_net_dynamic_chunking.config_checks import check_integer


def random_jagged_ids(
    docs: int, slen: range, *, vocab_size: int = 256, generator: torch.Generator | None = None
) -> Tensor:
    """A jagged tensor of uniform ids, int64 (docs, *), on the CPU.

    Args:
        docs: how many documents, at least 1.
        slen: the lengths to draw from, each as likely.
        vocab_size: ids are below it.
        generator: of the random numbers; torch's own if None.

    Raises:
        ValueError: no document, no length to draw from, a negative length, or a vocabulary of none.

    >>> ids = random_jagged_ids(docs=3, slen=range(5, 9))
    >>> all(5 <= len(document) < 9 for document in ids.unbind())
    True
    """
    check_integer("docs", docs, 1)
    check_integer("vocab_size", vocab_size, 1)
    if not isinstance(slen, range) or not slen or min(slen) < 0:
        raise ValueError(f"slen must be a range of lengths of at least 0, got {slen!r}")
    drawn = torch.randint(len(slen), (docs,), generator=generator)
    lens = torch.tensor([0, *(slen[place] for place in drawn.tolist())])
    ids = torch.randint(vocab_size, (int(lens.sum()),), generator=generator)
    jagged: Tensor = torch.nested.nested_tensor_from_jagged(ids, lens.cumsum(0))
    return jagged
