"""Small encoders at module level, so that a spawned worker can import them."""

from __future__ import annotations

import torch

from quatcache.encoders import Encoder


class TableEncoder(Encoder):
    """Looks rows up in a table of 32 x 4; items are integers below 32."""

    trainable = False
    embedding_size = 4

    def __init__(self, seed=0):
        self.table = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))

    def collate(self, items):
        return torch.tensor(items)

    def forward(self, inputs):
        return self.table[inputs]


class LengthEncoder(Encoder):
    """Maps a text to its length and its first character; depends on nothing but the text."""

    embedding_size = 2

    def collate(self, items):
        return torch.tensor([[len(item), ord(item[0])] for item in items], dtype=torch.float32)

    def forward(self, inputs):
        return inputs

    def length(self, item):
        return len(item)


class DoublingHead(torch.nn.Module):
    """A head of a class that no registry knows."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, rows):
        return rows * self.factor


class ThresholdCollate:
    """A collate object with a setting."""

    def __init__(self, threshold=0.5):
        self.threshold = threshold

    def __call__(self, items):
        return torch.tensor(items)


def stack_floats(items):
    return torch.tensor(items, dtype=torch.float32)
