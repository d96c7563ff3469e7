"""A byte-level language model around a two-level HNet: embedding, HNet of layers, head."""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from h_net_dynamic_chunking import HNet
from h_net_dynamic_chunking.layers import Isotropic
from h_net_dynamic_chunking.scaling import INIT_STD, init_stacks
from h_net_dynamic_chunking.training.config import Config
from h_net_dynamic_chunking.training.mixers import mixers_for

BYTES = 256


class Prediction(NamedTuple):
    """What the model says about a batch; B rows, L bytes, stages from the outside in."""

    logits: Tensor  # (B, L, 256), of the byte after each
    weighted_ratio_loss: Tensor  # (), the term of the training loss
    ratio_loss: Tensor  # (), unweighted sum over stages
    chunk_counts: list[Tensor]  # per stage int (), chunks in the whole batch
    chunk_lens: list[Tensor]  # per stage int (B, chunks), in bytes, 0 for a pad

    def bits_per_byte(self, targets: Tensor) -> Tensor:
        """Return the cross entropy with `targets`, int64 (B, L), in bits."""
        logits = self.logits.flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten()) / math.log(2)


class ByteHNet(nn.Module):
    """Predicts the next byte; Mamba-2 around the chunks, attention over the innermost ones.

    content: int64 (B, L) with values below 256
    """

    stages = 2

    def __init__(self, config: Config) -> None:
        super().__init__()
        outer, middle, inner = config.dims
        mixers = mixers_for(config.mamba, config.attention)
        outer_layout, middle_layout, inner_layout = config.layouts
        self.embedding = nn.Embedding(BYTES, outer)
        self.hnet = HNet(
            Isotropic(outer_layout, outer, mixers=mixers),
            HNet(
                Isotropic(middle_layout, middle, mixers=mixers),
                Isotropic(inner_layout, inner, mixers=mixers),
                Isotropic(middle_layout, middle, mixers=mixers),
                dim=middle,
                dim_inner=inner,
                target_avg_token_length=config.target_ratio[1],
                ratio_loss_weight=config.ratio_loss_weight,
            ),
            Isotropic(outer_layout, outer, mixers=mixers),
            dim=outer,
            dim_inner=middle,
            target_avg_token_length=config.target_ratio[0],
            ratio_loss_weight=config.ratio_loss_weight,
        )
        self.head = nn.Linear(outer, BYTES, bias=False)
        self._initialise()

    def forward(self, content: Tensor) -> Prediction:
        result = self.hnet(self.embedding(content))
        stages = result.intermediates
        return Prediction(
            logits=self.head(result.output),
            weighted_ratio_loss=result.loss,
            ratio_loss=torch.stack([stage.aux_ratio_loss for stage in stages]).sum(),
            chunk_counts=[stage.num_chunks.sum() for stage in stages],
            chunk_lens=[stage.absolute_chunk_lens for stage in stages],
        )

    @property
    def inner(self) -> HNet:
        """The level inside: its encoder, decoder and chunker, around the main network."""
        return cast(HNet, self.hnet.network)

    def stacks(self) -> list[list[Isotropic]]:
        """Return the layer stacks of each level: two of stage 0, two of stage 1, the main one."""
        inner = self.inner
        levels = [
            [self.hnet.encoder, self.hnet.decoder],
            [inner.encoder, inner.decoder],
            [inner.network],
        ]
        return cast(list[list[Isotropic]], levels)

    def _initialise(self) -> None:
        """Initialise as the official code does; the chunkers keep what they chose themselves."""
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.head.weight, std=INIT_STD)
        init_stacks(self.stacks())
