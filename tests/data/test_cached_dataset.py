"""A wrapped dataset gives the same samples, reads each of them once, and a loader gets a batch in one go."""

from __future__ import annotations

import multiprocessing
import os
from collections import OrderedDict, defaultdict, namedtuple
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from quatcache import CachedDataset, SharedCache
from quatcache.data import cached_rows
from quatcache.errors import (
    ConfigError,
    DamagedFileError,
    FormatError,
    SampleError,
    SlotIndexError,
    SlotValueError,
    StaleRowsError,
)

METHODS = [method for method in ("fork", "spawn") if method in multiprocessing.get_all_start_methods()]
SHAPE = (3, 4, 4)
COUNT = 40
Pair = namedtuple("Pair", ["image", "label"])
Side = IntEnum("Side", ["LEFT", "RIGHT"])


class Picture(torch.Tensor):
    """A tensor that transforms tell from others by its type, as those of torchvision."""


def image(index):
    return torch.full(SHAPE, index, dtype=torch.uint8)


KINDS = {
    "tensor": image,
    "tuple": lambda index: (image(index), index % 7),
    "label first": lambda index: (index * 1.5, image(index)),
    "list": lambda index: [image(index), bool(index % 2)],
    "named tuple": lambda index: Pair(image(index), index),
    "mapping": lambda index: {"id": index, "image": image(index), "mask": torch.full((2, 2), index / 4)},
    "array": lambda index: (image(index).numpy(), np.float32(index), np.full(2, index, np.int16)),
    "ordered mapping": lambda index: OrderedDict(image=image(index), label=index),
    "enumeration": lambda index: (image(index), Side(1 + index % 2)),
    "tensor of a kind": lambda index: (image(index).as_subclass(Picture), torch.ones(2).as_subclass(Picture)),
    "tensor label": lambda index: (image(index), torch.tensor(index), torch.tensor([index, -index])),
}


class Counted(Dataset):
    """Samples of a kind, and how often each was read, in whatever process."""

    def __init__(self, kind="tensor", count=COUNT):
        self.kind = kind
        self.count = count
        self.reads = torch.zeros(count, dtype=torch.int64).share_memory_()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads[index] += 1
        return KINDS[self.kind](index)


def wrapped(dataset, *, share=1.0, seed=None, **options):
    size = len(dataset) + int(share * len(dataset)) * image(0).numel()
    cache = SharedCache(size / (1 << 30), len(dataset), SHAPE, seed=seed)
    return CachedDataset(dataset, cache, example=KINDS[dataset.kind](0), **options)


def same(found, expected):
    """Compare samples and their types."""
    if isinstance(expected, dict):
        alike = type(found) is type(expected) and list(found) == list(expected)
        return alike and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (tuple, list)):
        return type(found) is type(expected) and all(map(same, found, expected)) and len(found) == len(expected)
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(found, torch.Tensor)
            and isinstance(found, Picture) == isinstance(expected, Picture)
            and found.dtype == expected.dtype
            and torch.equal(found, expected)
        )
    if isinstance(expected, (np.ndarray, np.generic)):
        return type(found) is type(expected) and found.dtype == expected.dtype and np.array_equal(found, expected)
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_dataset_cached_or_not(kind):
    dataset = Counted(kind)
    cached = wrapped(dataset)
    for _ in range(2):
        for index in (3, 0, 39):
            assert same(cached[index], KINDS[kind](index))
    found = cached.__getitems__([5, 3, 5, 39])
    assert all(map(same, found, map(KINDS[kind], [5, 3, 5, 39])))
    assert dataset.reads[[0, 3, 5, 39]].tolist() == [1, 1, 1, 1]
    assert len(cached) == COUNT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_dataset(kind, workers):
    dataset = Counted(kind)
    cached = wrapped(dataset)
    for turn in range(2):
        order = torch.Generator().manual_seed(turn)
        found = list(DataLoader(cached, 8, shuffle=True, generator=order, num_workers=workers))
        order = torch.Generator().manual_seed(turn)
        expected = list(DataLoader(Counted(kind), 8, shuffle=True, generator=order))
        assert len(found) == len(expected) and all(map(same, found, expected))
    assert dataset.reads.tolist() == [1] * COUNT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_share_what_they_read(method, persistent):
    dataset = Counted("tuple")
    cached = wrapped(dataset)
    loader = DataLoader(
        cached, 4, shuffle=True, num_workers=2, persistent_workers=persistent, multiprocessing_context=method
    )
    for _ in range(3):
        seen = {
            int(pixels[0, 0, 0]): int(label)
            for batch, labels in loader
            for pixels, label in zip(batch, labels, strict=True)
        }
        assert seen == {index: index % 7 for index in range(COUNT)}
    assert dataset.reads.tolist() == [1] * COUNT
    stats = cached.cache.stats()
    assert (stats.hits, stats.misses, stats.present) == (2 * COUNT, COUNT, COUNT)
    assert same(cached[7], KINDS["tuple"](7))  # and so does the process that started them
    assert dataset.reads.sum() == COUNT


@pytest.mark.parametrize("seed", [None, 3])
def test_samples_without_a_slot_are_read_each_time(seed):
    dataset = Counted("tuple")
    cached = wrapped(dataset, share=0.5, seed=seed)
    for _ in range(3):
        for index in range(COUNT):
            assert same(cached[index], KINDS["tuple"](index))
    kept = cached.cache.indices
    assert len(kept) == COUNT // 2
    assert dataset.reads[kept].tolist() == [1] * len(kept)
    assert dataset.reads.sum() == len(kept) + 3 * (COUNT - len(kept))


def test_dataset_that_reads_batches_is_asked_for_the_misses_of_a_batch_at_once():
    asked = []

    class Batched(Counted):
        def __getitems__(self, indices):
            asked.append(list(indices))
            return [self[index] for index in indices]

    dataset = Batched()
    cached = wrapped(dataset)
    cached[2]
    cached.__getitems__([1, 2, 3, 1])
    assert asked == [[2], [1, 3]]


def test_sample_that_is_read_alone_is_counted_once():
    cached = wrapped(Counted("tuple"))
    cached[3], cached[3], cached[4]
    stats = cached.cache.stats()
    assert (stats.hits, stats.misses, stats.present) == (1, 2, 2)


def test_zeros_are_cached():
    dataset = Counted("tuple")
    cached = wrapped(dataset)
    assert [same(cached[0], KINDS["tuple"](0)) for _ in range(2)] == [True, True]
    assert dataset.reads[0] == 1


# the batch


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_batch_of_hits_is_collated_without_a_copy(kind, monkeypatch):
    cached = wrapped(Counted(kind))
    list(DataLoader(cached, 8))
    copy = lambda *_, **__: pytest.fail("rows were copied together")  # noqa: E731
    monkeypatch.setattr(cached_rows, "collate_tensor_fn", copy)
    monkeypatch.setitem(cached_rows.default_collate_fn_map, torch.Tensor, copy)
    for batch in DataLoader(cached, 8, shuffle=True):
        assert type(batch if kind == "tensor" else batch[0]) is torch.Tensor


def test_rows_in_another_order_or_of_other_batches_are_collated_as_ever():
    rows = cached_rows.rows_of(torch.arange(12).reshape(4, 3))
    other = cached_rows.rows_of(torch.arange(12, 24).reshape(4, 3))
    for chosen in (rows[::-1], rows[1:], rows[:1], [rows[0], rows[2]], [rows[0], rows[0]], [rows[3], other[0]],
                   [rows[0], torch.tensor([3, 4, 5])], [torch.tensor([3, 4, 5]), rows[0]]):  # fmt: skip
        plain = torch.stack([torch.tensor(row.tolist()) for row in chosen])
        found = default_collate(chosen)
        assert type(found) is torch.Tensor and torch.equal(found, plain)
    with pytest.raises(RuntimeError):
        default_collate([rows[0], torch.zeros(2, dtype=torch.int64)])


def test_rows_that_somebody_viewed_otherwise_are_collated_as_they_are_now():
    """A random transposition behind the cache leaves a square image where it is in memory."""
    plain = torch.arange(8.0).reshape(2, 2, 2)
    for change in (torch.t, lambda row: row.view(torch.int32), lambda row: row[:1], lambda row: row.reshape(4)):
        rows = cached_rows.rows_of(plain.clone())
        try:
            expected = torch.stack([plain[0], change(plain[1])])
        except RuntimeError:
            with pytest.raises(RuntimeError):
                default_collate([rows[0], change(rows[1])])
        else:
            found = default_collate([rows[0], change(rows[1])])
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_rows_of_neighbouring_memory_that_is_not_one_are_copied_together():
    memory = np.arange(6.0)
    rows = [*cached_rows.rows_of(torch.from_numpy(memory[:3])[None]), torch.from_numpy(memory[3:])]
    assert default_collate(rows).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_rows_are_tensors_like_others():
    assert cached_rows.rows_of(torch.zeros(0, 3)) == []
    row, other = cached_rows.rows_of(torch.arange(3.0, 9.0).reshape(2, 3))
    assert type(other) is torch.Tensor
    assert isinstance(row, torch.Tensor)
    for made in (row + 1, row.double(), row[0], torch.stack([row, row]), row.clone()):
        assert type(made) is torch.Tensor
    assert row.tolist() == [3, 4, 5]


def listed(samples):
    return samples


@pytest.mark.parametrize("method", METHODS)
def test_collate_function_of_ones_own_gets_rows_and_they_travel_alone(method):
    """Workers send what the function returns: rows of a batch, and never the whole cache that they lie in."""
    cached = wrapped(Counted("tuple"))
    loader = DataLoader(cached, 8, num_workers=1, collate_fn=listed, multiprocessing_context=method)
    for _ in range(2):
        for batch in loader:
            for sample in batch:
                index = int(sample[0][0, 0, 0])
                assert type(sample[0]) is torch.Tensor and same(sample, KINDS["tuple"](index))
                assert sample[0].untyped_storage().nbytes() <= 8 * image(0).numel()


def test_subset_reads_through_too():
    dataset = Counted("tuple")
    cached = wrapped(dataset)
    loader = DataLoader(Subset(cached, [5, 30, 7]), 2)
    for _ in range(2):
        assert [labels.tolist() for _, labels in loader] == [[5, 2], [0]]
    assert dataset.reads.sum() == 3


def test_what_is_read_can_be_changed_in_place():
    cached = wrapped(Counted("tuple"))
    for _ in range(3):
        cached[4][0].zero_()
        cached.__getitems__([4, 5])[1][0].zero_()
    assert same(cached[4], KINDS["tuple"](4)) and same(cached[5], KINDS["tuple"](5))


# transforms


def brighter(pixels):
    return pixels.add_(100).float()


@pytest.mark.parametrize("workers", [0, 1])
def test_transform_sees_each_read_and_never_the_cache(workers):
    dataset = Counted("tuple")
    cached = wrapped(dataset, transform=brighter)
    for _ in range(3):
        for pixels, labels in DataLoader(cached, 8, num_workers=workers):
            assert pixels.dtype == torch.float32
            assert (pixels[:, 0, 0, 0] - 100).remainder(7).tolist() == labels.tolist()
    assert dataset.reads.tolist() == [1] * COUNT
    assert torch.equal(cached.cache[9], image(9))
    assert cached[9][0].unique().tolist() == [109]
    cached.transform = type  # one that is set later sees what a first one sees
    assert {sample[0] for sample in cached.__getitems__([1, 2])} == {cached[1][0]} == {torch.Tensor}


@pytest.mark.parametrize("kind", KINDS)
def test_transform_changes_the_item_alone(kind):
    cached = wrapped(Counted(kind), transform=lambda pixels: "changed")
    for _ in range(2):
        found = cached[3]
        parts = found.values() if isinstance(found, dict) else [found] if kind == "tensor" else found
        assert sum(isinstance(part, str) for part in parts) == 1
    assert cached.__getitems__([]) == []


def test_transform_that_changes_in_place_hurts_neither_the_dataset_nor_the_same_sample_in_a_batch():
    images = [image(index) for index in range(COUNT)]
    size = (COUNT + 20 * image(0).numel()) / (1 << 30)
    cached = CachedDataset(images, SharedCache(size, COUNT, SHAPE), transform=lambda pixels: pixels.add_(100))
    for _ in range(2):
        for chosen in ([3, 3, 30, 30], [3, 4, 30]):  # 30 has no slot
            assert [int(pixels[0, 0, 0]) - 100 for pixels in cached.__getitems__(chosen)] == chosen
        assert int(cached[31][0, 0, 0]) == 131
    assert all(torch.equal(kept, image(index)) for index, kept in enumerate(images))
    arrays = CachedDataset([kept.numpy() for kept in images], SharedCache(1, COUNT, SHAPE), transform=halve)
    assert [int(pixels[0, 0, 0]) for pixels in arrays.__getitems__([8, 8])] == [4, 4]
    assert int(images[8][0, 0, 0]) == 8


def halve(pixels):
    pixels //= 2
    return pixels


# warm starts


@pytest.mark.parametrize("kind", KINDS)
def test_warm_start_reads_only_what_it_verifies(kind, tmp_path):
    first = wrapped(Counted(kind))
    list(DataLoader(first, 8, sampler=range(30), collate_fn=listed))
    assert first.save(tmp_path / "warm") == 30
    dataset = Counted(kind)
    second = wrapped(dataset)
    assert second.load(tmp_path / "warm") == 30
    assert dataset.reads.nonzero().flatten().tolist() == [0, 14, 29]
    for index in range(30):
        assert same(second[index], KINDS[kind](index))
    assert dataset.reads.sum() == 3
    again = Counted(kind)
    assert wrapped(again).load(tmp_path / "warm", verify=0) == 30
    assert again.reads.sum() == 0


def test_dataset_that_was_changed_is_noticed_at_a_warm_start(tmp_path):
    first = wrapped(Counted("tuple"))
    first.__getitems__(range(COUNT))
    first.save(tmp_path)
    dataset = Counted("tuple")
    second = wrapped(dataset)
    second.dataset = Subset(dataset, list(range(COUNT))[::-1])
    with pytest.raises(StaleRowsError, match=r"sample 0 in .* is not what the dataset gives"):
        second.load(tmp_path)
    assert second.cache.stats().present == 0


def test_labels_that_were_changed_are_noticed_at_a_warm_start(tmp_path):
    labels = list(range(COUNT))
    dataset = Labelled(labels)
    first = CachedDataset(dataset, SharedCache(1, COUNT, SHAPE))
    first.__getitems__(range(10, 21))
    first.save(tmp_path)
    labels[20] = 7
    second = CachedDataset(dataset, SharedCache(1, COUNT, SHAPE))
    with pytest.raises(StaleRowsError, match=r"sample 20 in .*part1.safetensors is not what the dataset gives"):
        second.load(tmp_path)
    assert second[20][1] == 7
    labels[20] = 20
    assert CachedDataset(dataset, SharedCache(1, COUNT, SHAPE)).load(tmp_path) == 11


def test_items_are_verified_where_a_file_has_fewer_labels(tmp_path):
    first = wrapped(Counted("tuple"))
    first.__getitems__([1, 2])
    first.save(tmp_path)
    labels = (tmp_path / "part1.safetensors").read_bytes()
    first.__getitems__([0, 9])
    first.save(tmp_path)
    (tmp_path / "part1.safetensors").write_bytes(labels)
    second = wrapped(Counted("tuple"))
    assert second.load(tmp_path) == 4
    assert all(same(second[index], KINDS["tuple"](index)) for index in (0, 1, 2, 9))


class Labelled(Dataset):
    """Images, and labels that somebody may change."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return image(index), self.labels[index]


def test_damaged_items_are_computed_again_and_labels_that_are_missing_too(tmp_path):
    first = wrapped(Counted("tuple"))
    first.__getitems__(range(COUNT))
    first.save(tmp_path)
    items, labels = tmp_path / "items.safetensors", tmp_path / "part1.safetensors"
    content = bytearray(items.read_bytes())
    content[-100] ^= 1
    items.write_bytes(content)
    dataset = Counted("tuple")
    second = wrapped(dataset)
    with pytest.raises(DamagedFileError):
        second.load(tmp_path)
    assert same(second[3], KINDS["tuple"](3))
    first.save(tmp_path)
    labels.unlink()
    third = wrapped(dataset)
    with pytest.raises(FormatError, match="is missing"):
        third.load(tmp_path)
    third.cache.load(items)  # items whose labels nobody has
    assert third.cache.stats().present == COUNT
    dataset.reads.zero_()
    for _ in range(2):
        assert all(same(sample, KINDS["tuple"](i)) for i, sample in enumerate(third.__getitems__(range(COUNT))))
    assert dataset.reads.tolist() == [1] * COUNT


def test_items_that_are_cleared_are_computed_again():
    dataset = Counted("mapping")
    cached = wrapped(dataset)
    cached.__getitems__([1, 2])
    cached.cache.clear()
    assert same(cached[1], KINDS["mapping"](1))
    assert dataset.reads[:3].tolist() == [0, 2, 1]


def test_labels_of_items_that_were_cleared_are_those_that_are_read_anew():
    labels = [0] * 5
    cached = CachedDataset(Labelled(labels), SharedCache(1, 5, SHAPE))
    cached.__getitems__(range(5))
    cached.cache.clear()
    labels[3] = 9
    assert [cached[3][1], cached[3][1], cached.__getitems__([3])[0][1]] == [9, 9, 9]


@pytest.mark.parametrize("many", [False, True])
def test_sample_whose_parts_are_not_all_there_is_computed(many):
    dataset = Counted("mapping")
    cached = wrapped(dataset)
    read = cached.__getitems__ if many else lambda chosen: [cached[index] for index in chosen]
    read(range(6))
    (_, number), (_, mask), _ = cached._store.files(Path())
    number.clear()
    number.set_slots([0, 2, 3, 5], torch.tensor([0, 2, 3, 5]))
    mask.clear()
    mask.set_slots([2, 4, 5], torch.stack([torch.full((2, 2), index / 4) for index in (2, 4, 5)]))
    dataset.reads.zero_()
    for _ in range(2):
        assert all(same(sample, KINDS["mapping"](index)) for index, sample in enumerate(read(range(6))))
    assert dataset.reads[:6].tolist() == [1, 1, 0, 1, 1, 0]


# what is refused


@pytest.mark.parametrize("index", [-1, COUNT])
def test_index_outside_the_dataset_is_refused(index):
    dataset = Counted()
    cached = wrapped(dataset)
    with pytest.raises(SlotIndexError, match=f"index {index} is outside"):
        cached[index]
    with pytest.raises(IndexError):
        cached.__getitems__([1, index])
    assert dataset.reads.sum() == 0
    assert len(list(cached)) == COUNT  # iteration ends there


def test_cache_of_another_dataset_is_refused():
    with pytest.raises(
        ConfigError, match="the dataset has 40 samples, the cache is for 41; make it with dataset_len=40"
    ):
        CachedDataset(Counted(), SharedCache(1, 41, SHAPE))


def test_stream_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(SampleError, match="Stream has no indices or no length"):
        CachedDataset(Stream(), SharedCache(1, 10, SHAPE))


def boxes():
    found = torch.ones(4).as_subclass(Picture)
    found.format = "xyxy"
    return found


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (torch.zeros(3), r"a sample has \(3,\) torch.float32, the cache takes \(3, 4, 4\) torch.uint8"),
        ((image(0).float(), 1), r"\(3, 4, 4\) torch.float32, \(\) torch.int64"),
        ((), "no part"),
        ((image(0), "name"), "'name' is a str.*get_slot and set_slot"),
        ({"image": image(0), "boxes": [1, 2]}, "is a list"),
        ("text", "is a str"),
        ((image(0), torch.ones(2, dtype=torch.complex64)), r"\(2,\) torch.complex64, which no slot can have"),
        ((image(0), np.zeros((0, 4))), r"\(0, 4\) torch.float64, which no slot can have"),
        ((image(0), 2**70), "cannot be a tensor"),
        (defaultdict(list, image=image(0)), "a defaultdict cannot be made of its parts .*; have the dataset return"),
        ((image(0), boxes()), "a Picture is more than its numbers: it has format"),
    ],
)
def test_sample_that_cannot_be_cached_is_refused(sample, said):
    with pytest.raises(SampleError, match=said):
        CachedDataset([sample] * 5, SharedCache(1, 5, SHAPE))


@pytest.mark.parametrize(
    ("odd", "error", "said"),
    [
        ((torch.zeros(3, 4, 5, dtype=torch.uint8), 1), SlotValueError, r"sample 3 of the dataset: .*\(3, 4, 5\)"),
        ((image(3).float(), 1), SlotValueError, "sample 3 of the dataset: .*float32"),
        ((image(3), 1.5), SlotValueError, "sample 3 of the dataset: 1.5 is no int64"),
        ((image(3), torch.zeros(2)), SlotValueError, "sample 3 of the dataset"),
        ((image(3),), SampleError, "not made like the first sample"),
        (image(3), SampleError, "not made like the first sample"),
        ({"image": image(3)}, SampleError, "not made like the first sample"),
    ],
)
def test_sample_that_is_unlike_the_first_is_refused_and_nothing_of_its_batch_stored(odd, error, said):
    samples = [(image(index), index) for index in range(5)]
    samples[3] = odd
    cached = CachedDataset(samples, SharedCache(1, 5, SHAPE))
    with pytest.raises(error, match=said):
        cached.__getitems__([1, 2, 3])
    assert cached.cache.stats().present == 0
    assert same(cached[1], samples[1])


@pytest.mark.parametrize("odd", [{"id": 1}, {"id": 1, "image": image(1), "name": 2}, {"id": 1, "picture": image(1)}])
def test_mapping_of_other_keys_than_the_first_is_refused(odd):
    cached = CachedDataset([{"id": 0, "image": image(0)}, odd], SharedCache(1, 2, SHAPE))
    with pytest.raises(SampleError, match="not made like the first sample"):
        cached[1]
    assert cached.cache.stats().present == 0


def test_error_of_the_dataset_reaches_the_caller_and_nothing_is_stored():
    class Failing(Counted):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("a file is missing")
            return super().__getitem__(index)

    cached = wrapped(Failing("tuple"))
    with pytest.raises(OSError, match="a file is missing"):
        cached.__getitems__([1, 2])
    assert cached.cache.stats().present == 0


# processes of one host


def train(name, own, answers, barrier):
    dataset = Counted("tuple")
    cached = CachedDataset(dataset, SharedCache(1, COUNT, SHAPE, name=name))
    dataset.reads.zero_()  # the sample that was looked at
    cached.__getitems__(range(own, COUNT, 2))
    barrier.wait()
    found = cached.__getitems__(range(COUNT))
    answers.put((all(map(same, found, map(KINDS["tuple"], range(COUNT)))), dataset.reads.tolist()))
    barrier.wait()


@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_one_host_read_each_sample_once_in_all(method):
    context = multiprocessing.get_context(method)
    answers, barrier = context.Queue(), context.Barrier(2)
    name = f"ranks-{os.getpid()}-{method}"
    ranks = [context.Process(target=train, args=(name, own, answers, barrier), daemon=True) for own in range(2)]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert all(right for right, _ in found)
    assert [sum(reads) for reads in zip(*(reads for _, reads in found), strict=True)] == [1] * COUNT


def test_example_spares_reading_a_sample():
    dataset = Counted("tuple")
    CachedDataset(dataset, SharedCache(1, COUNT, SHAPE), example=KINDS["tuple"](0))
    assert dataset.reads.sum() == 0
    CachedDataset(dataset, SharedCache(1, COUNT, SHAPE))
    assert dataset.reads.tolist() == [2] + [0] * (COUNT - 1)


def test_a_dataset_that_augments_is_told_of_before_its_samples_are_frozen(caplog):
    class Augmenting(Counted):
        def __getitem__(self, index):
            return torch.randint(0, 256, SHAPE, dtype=torch.uint8), index

    CachedDataset(Counted("tuple"), SharedCache(1, COUNT, SHAPE))
    assert "sample 0" not in caplog.text
    CachedDataset(Augmenting(), SharedCache(1, COUNT, SHAPE))
    assert "Augmenting gives another sample 0 each time" in caplog.text
    assert "CachedDataset(..., transform=...)" in caplog.text
