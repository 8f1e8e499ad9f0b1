"""Batches: samples read from a dataset and collated for every encoder of a model.

The unit of reading is the batch, not the sample: a :class:`BatchReader` implements ``__getitems__``, which a
``DataLoader`` calls once per batch with all its indices. So a batch whose encoders and labels are all cached is one
index operation, and the loader's own sampler, generator and ``drop_last`` decide what is in it, cached or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from typing_extensions import Self

from quatcache.data.devices import to_device
from quatcache.data.samples import (
    ReadSample,
    SampleLayout,
    arranged_items,
    common_layout,
    target_columns,
)
from quatcache.errors import CollateError, ConfigError, QuatcacheError, SampleError, shorten

__all__ = [
    "INDICES",
    "Batch",
    "BatchReader",
    "CachedColumns",
    "as_it_is",
    "collate_items",
    "given_samples",
    "positions_of",
    "read_samples",
]

SampleReader = Callable[[Any], Any]

INDICES = "#indices"
"""No encoder has this name: names are those of attributes."""


class Batch(NamedTuple):
    """What a training step gets.

    Attributes:
        inputs: For each encoder name what its ``forward`` takes: a collated batch, or the rows themselves where the
            encoder is cached.
        targets: What the loss takes after the embeddings.
    """

    inputs: dict[str, Any]
    targets: tuple[Any, ...]

    def to(self, device: torch.device) -> Batch:
        """Bring the tensors of a batch to a device; Lightning asks for it, and then need not look for them itself."""
        return Batch(to_device(self.inputs, device), to_device(self.targets, device))


@dataclass(frozen=True, eq=False)
class CachedColumns:
    """What is known of every sample of one dataset, by index.

    Attributes:
        rows: For each cached encoder the row numbers of the items, int64 ``(N, k)``; -1 for one without a row.
        targets: The target columns ``(N, ...)``; None where labels are not cached.
        layout: The layout of the samples.
    """

    rows: Mapping[str, torch.Tensor]
    targets: tuple[torch.Tensor, ...] | None
    layout: SampleLayout

    @property
    def size(self) -> int:
        """Samples of the dataset."""
        return next(len(rows) for rows in self.rows.values())

    @property
    def complete(self) -> bool:
        """Whether every item has a row."""
        return all(bool((rows >= 0).all()) for rows in self.rows.values())

    def to(self, device: torch.device) -> CachedColumns:
        """Bring the columns to a device; those that are there are shared."""
        targets = None if self.targets is None else tuple(column.to(device) for column in self.targets)
        return replace(self, rows={name: rows.to(device) for name, rows in self.rows.items()}, targets=targets)


def given_samples(dataset: Any, indices: Sequence[int]) -> Sequence[Any]:
    """Read samples of a map-style dataset, in one call where the dataset offers that.

    Raises:
        SampleError: The dataset returned another number of them.
    """
    many = getattr(dataset, "__getitems__", None)
    samples = many(list(indices)) if many else [dataset[index] for index in indices]
    if len(samples) != len(indices):
        raise SampleError(
            f"{type(dataset).__name__}.__getitems__ returned {len(samples)} samples for {len(indices)} indices; return "
            "one per index, in order."
        )
    return samples


def read_samples(dataset: Any, indices: Sequence[int], reader: SampleReader) -> list[ReadSample]:
    """Read and take apart samples of a map-style dataset.

    Raises:
        SampleError: A sample is of no supported kind, or the dataset returned another number of them.
    """
    return [reader(sample) for sample in given_samples(dataset, indices)]


def collate_items(name: str, collate: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> Any:
    """Collate a batch of items for one encoder; if that fails, find out which item is to blame.

    Raises:
        CollateError: With the encoder, the item and the cause.
    """
    try:
        return collate(items)
    except QuatcacheError:
        raise
    except Exception as error:
        culprits = (shorten(item) for item in items if _fails(collate, item))
        about = next((f"item {culprit}" for culprit in culprits), f"a batch of {len(items)} items together")
        raise CollateError(
            f"encoder {name!r} could not collate {about} ({type(error).__name__}: {error}); correct the item, or what "
            "collate does with it."
        ) from error


def _fails(collate: Callable[[Sequence[Any]], Any], item: Any) -> bool:
    try:
        collate([item])
    except Exception:
        return True
    return False


@dataclass
class BatchReader(Dataset[Any]):
    """A dataset as batches: given the indices of a batch, it returns the whole :class:`Batch`.

    Attributes:
        dataset: The user's map-style dataset.
        collates: For each encoder that is not cached, its collate function.
        reader: Takes a sample apart.
        columns: What is cached of this dataset; None where nothing is.
    """

    dataset: Any
    collates: Mapping[str, Callable[[Sequence[Any]], Any]]
    reader: SampleReader
    columns: CachedColumns | None = field(default=None)

    def __len__(self) -> int:
        """Count the samples, as the user's dataset does."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        """Give a batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int] | torch.Tensor) -> Batch:
        """Give the batch of these samples.

        Rows are still numbers, for the loader to gather; where samples were read beside them, the indices are among
        the inputs as :data:`INDICES`, for the loader to take out.
        """
        columns = self.columns
        if columns is not None and columns.targets is not None and not self.collates:
            return self.cached(self.positions(indices))
        wanted = indices.tolist() if isinstance(indices, torch.Tensor) else indices
        samples = read_samples(self.dataset, wanted, self.reader)
        if columns is None:
            return collate_samples(samples, self.collates)
        batch = self.batch_of(samples, indices)
        if columns.targets is None:
            return batch
        return batch._replace(targets=columns.layout.loss_arguments(_select(columns.targets, batch.inputs[INDICES])))

    def cached(self, where: torch.Tensor) -> Batch:
        """Give a batch of which everything is cached, targets too, with the numbers of its rows.

        Args:
            where: int64 ``(B,)``, none negative, on the device of the columns.
        """
        columns = self.columns
        assert columns is not None
        assert columns.targets is not None
        return Batch(self._numbers(columns, where), columns.layout.loss_arguments(_select(columns.targets, where)))

    def batch_of(self, samples: Sequence[ReadSample], indices: Sequence[int] | torch.Tensor) -> Batch:
        """Give the batch of samples that were read, with the numbers of their rows; see :meth:`__getitems__`."""
        assert self.columns is not None
        where = self.positions(indices)
        batch = collate_samples(samples, self.collates)
        return Batch({**batch.inputs, **self._numbers(self.columns, where), INDICES: where}, batch.targets)

    def batch_beside(self, samples: Sequence[ReadSample], places: torch.Tensor, where: torch.Tensor) -> Batch | None:
        """Give a batch of which some samples were read, while rows and targets of the others are cached.

        Args:
            samples: Those that were read.
            places: Where they are in the batch.
            where: Indices of all samples of the batch.

        Returns:
            The batch, with numbers of rows; None if the targets do not go together.
        """
        assert self.columns is not None
        assert self.columns.targets is not None
        targets = _select(self.columns.targets, where)
        for column, fresh in zip(targets, target_columns(samples) if samples else (), strict=bool(samples)):
            if not isinstance(fresh, torch.Tensor) or (fresh.dtype, fresh.shape[1:]) != (
                column.dtype,
                column.shape[1:],
            ):
                return None
            column[places] = fresh
        return Batch(self._numbers(self.columns, where), self.columns.layout.loss_arguments(targets))

    def check_size(self) -> None:
        """Refuse a dataset that became longer or shorter since it was cached: its rows may be those of others now.

        Raises:
            ConfigError: It has.
        """
        if self.columns is not None and len(self.dataset) != self.columns.size:
            raise ConfigError(
                f"the dataset ({type(self.dataset).__name__}) has {len(self.dataset):,} samples and had "
                f"{self.columns.size:,} when it was cached in this run; give the trainer "
                "reload_dataloaders_every_n_epochs=1, so that what is new gets cached as well."
            )

    def positions(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Give the indices of a batch as the dataset understands them; see :func:`positions_of`."""
        return positions_of(indices, len(self.dataset))

    def with_columns(self, columns: CachedColumns) -> Self:
        """Give the same reader over other columns, for instance the same ones on another device.

        Indices are then given as tensors on that device, and nothing leaves it.
        """
        return replace(self, columns=columns)

    @staticmethod
    def _numbers(columns: CachedColumns, where: torch.Tensor) -> dict[str, Any]:
        return {
            name: rows.reshape(-1).index_select(0, where)  # a gather from one dimension takes half as long
            if rows.shape[1] == 1
            else rows.index_select(0, where).t().reshape(-1)
            for name, rows in columns.rows.items()
        }


def positions_of(indices: Sequence[int] | torch.Tensor, size: int) -> torch.Tensor:
    """Give the indices of a batch as a dataset understands them: whole numbers, negative ones from the end.

    Args:
        indices: Of B samples; a tensor on another device than the CPU has no negative ones.
        size: That of the dataset.

    Returns:
        int64 ``(B,)``.

    Example:
        >>> positions_of([0, -1], 5)
        tensor([0, 4])
    """
    where = torch.as_tensor(indices)
    if where.dtype is not torch.int64:
        where = where.to(torch.int64)
    if where.device.type != "cpu" or not len(where) or where.min() >= 0:  # a look at a GPU would wait for it
        return where
    return torch.where(where < 0, where + size, where)


def as_it_is(batch: Any) -> Any:
    """Collate nothing: for the loader of a dataset that gives what belongs to all indices of a batch at once."""
    return batch


def collate_samples(samples: Sequence[ReadSample], collates: Mapping[str, Callable[[Sequence[Any]], Any]]) -> Batch:
    """Collate B samples for each of the encoders.

    Raises:
        CollateError: An encoder could not collate an item.
        SampleError: The samples mix layouts.
    """
    layout = common_layout(samples)
    items = arranged_items(samples)
    inputs = {name: collate_items(name, collate, items) for name, collate in collates.items()}
    return Batch(inputs, layout.loss_arguments(target_columns(samples)))


def _select(columns: Sequence[torch.Tensor], where: torch.Tensor) -> tuple[Any, ...]:
    return tuple(column.index_select(0, where) for column in columns)
