"""Encoders whose values are sequences or feature maps, batch-independent, and a head for sequences."""

from __future__ import annotations

import torch
from torch import nn

from quatcache import Encoder, PaddedSequences


class LettersEncoder(Encoder):
    """One row of a fixed table for each letter of a text; it counts the texts that it was asked for.

    What stands in the padding depends on the batch, as with a transformer, unless ``tidy``.
    """

    embedding_size = 8

    def __init__(self, seed=0, tidy=True):
        self.register_buffer("table", torch.randn(128, 8, generator=torch.Generator().manual_seed(seed)))
        self.tidy = tidy
        self._rows = 0

    def collate(self, items):
        width = max(map(len, items))
        return torch.tensor([[ord(c) % 128 for c in item] + [0] * (width - len(item)) for item in items])

    def forward(self, inputs):
        self._rows += len(inputs)
        mask = inputs > 0
        values = self.table[inputs]
        rest = torch.zeros_like(values) if self.tidy else values.sum(dim=(0, 1)).expand_as(values)
        return PaddedSequences(torch.where(mask[..., None], values, rest), mask)

    def length(self, item):
        return len(item)


class SumHead(nn.Module):
    """Weighs each element, sums what is no padding, element by element, and maps the sum to five classes.

    Elements are summed one after the other: a vectorised sum may go in another order for another width.
    """

    def __init__(self, width=8, classes=5):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(5)))
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(width, classes)

    def forward(self, sequences):
        assert isinstance(sequences, PaddedSequences)
        weighed = sequences.values * self.gate * sequences.mask[..., None]
        total = torch.zeros_like(weighed[:, 0])
        for step in range(weighed.shape[1]):
            total = total + weighed[:, step]
        return self.linear(self.dropout(total))


class PatchesEncoder(Encoder):
    """A frozen convolution over small pictures, given as (seed, shade): feature maps ``(3, 4, 5)``."""

    embedding_size = 5

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.convolution = nn.Conv2d(2, 3, kernel_size=3, padding=1).requires_grad_(False)
        self.eval()
        self._rows = 0

    def collate(self, items):
        pictures = [
            shade * torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed, shade in items
        ]
        return torch.stack(pictures)

    def forward(self, inputs):
        self._rows += len(inputs)
        # one by one, and each where memory is aligned alike: kernels differ by batch size and alignment
        return torch.cat([self.convolution(one[None].clone()) for one in inputs])


class MapHead(nn.Module):
    """A convolution over feature maps, and a line: what is trained above a cached backbone."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.convolution = nn.Conv2d(3, 4, kernel_size=2)
            self.linear = nn.Linear(4, 5)

    def forward(self, maps):
        assert maps.dim() == 4
        return self.linear(self.convolution(maps).relu().mean(dim=(2, 3)))
