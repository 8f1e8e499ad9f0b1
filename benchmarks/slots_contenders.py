"""Caches of a dataset by index, in memory that the workers of a loader share: JPEG files, read whole and as slots.

* ``uncached``: each image is read, decoded and scaled each time;
* ``stocaching``: the dataset of its README, item by item;
* ``quatcache, same code``: the same lines with the other import;
* ``quatcache, CachedDataset``: the dataset wrapped in one line.

What every epoch brings is held against the decoded images before any is timed, and once more behind the last.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quatcache import CachedDataset, SharedCache

__all__ = ["CONTENDERS", "epochs", "make_images", "single"]

SHAPE = (3, 224, 224)
SIZE = (500, 375)  # of a file, as photographs come
BYTES = 55_000
GIB = 1 << 30


def make_images(folder: str, count: int) -> dict[str, float]:
    """Write JPEG files of smooth noise, all of about the same size.

    Returns:
        Bytes of a file on average.
    """
    generator = np.random.default_rng(0)
    quality = None
    sizes = []
    for number in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC), np.int16)
        grain = generator.integers(-16, 17, smooth.shape, dtype=np.int16)
        image = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        if quality is None:  # the first one decides
            quality = min(range(30, 96), key=lambda chosen: abs(len(_encoded(image, chosen)) - BYTES))
        content = _encoded(image, quality)
        (Path(folder) / f"{number}.jpg").write_bytes(content)
        sizes.append(len(content))
    return {"bytes": sum(sizes) / count}


def _encoded(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


class Images(Dataset[Tensor]):
    """Images as they are read from files: ``(3, 224, 224)`` uint8."""

    def __init__(self, folder: str, count: int) -> None:
        self.folder = folder
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(f"{self.folder}/{index}.jpg") as image:
            pixels = np.array(image.convert("RGB").resize(SHAPE[1:], Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class WithSlots(Dataset[Tensor]):
    """The dataset that stocaching's README shows."""

    def __init__(self, images: Images, cache: Any) -> None:
        self.images = images
        self.cache = cache

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        x: Tensor | None = self.cache.get_slot(index)
        if x is None:
            x = self.images[index]
            self.cache.set_slot(index, x)
        return x


def gib(count: int, share: float) -> float:
    """Give the limit by which a share of so many images has slots."""
    size = int(np.prod(SHAPE))
    return (count + size * round(share * count) + size // 2) / GIB


def stocached(count: int, share: float) -> Any:
    """Make the cache of stocaching, which prints what it does."""
    from stocaching import SharedCache as Theirs

    with contextlib.redirect_stdout(io.StringIO()):
        return Theirs(gib(count, share), count, SHAPE, torch.uint8)  # type: ignore[arg-type]  # it takes a float, too


def ours(count: int, share: float) -> SharedCache:
    """Make the cache of quatcache."""
    return SharedCache(gib(count, share), count, SHAPE, torch.uint8)


def _by_hand(make: Callable[[int, float], Any], images: Images, share: float) -> Dataset[Tensor]:
    return WithSlots(images, make(len(images), share)) if share else images


def _wrapped(images: Images, share: float) -> Dataset[Tensor]:
    example = torch.empty(SHAPE, dtype=torch.uint8)
    return CachedDataset(images, ours(len(images), share), example=example) if share else images


CONTENDERS: dict[str, Callable[[Images, float], Dataset[Tensor]]] = {
    "uncached": lambda images, share: images,
    "stocaching": partial(_by_hand, stocached),
    "quatcache, same code": partial(_by_hand, ours),
    "quatcache, CachedDataset": _wrapped,
}


def epochs(
    contender: str, folder: str, count: int, batch: int, workers: int, persistent: bool, passes: int, share: float = 1.0
) -> dict[str, Any]:
    """Time epochs over the images.

    Args:
        contender: A name of ``CONTENDERS``.
        folder: Has the images.
        count: How many.
        batch: Images a batch.
        workers: Of the loader.
        persistent: Whether they live on from epoch to epoch.
        passes: Epochs behind the first one.
        share: Of the images, how many have slots.

    Returns:
        Milliseconds an image: of the first epoch, and of the fastest of those behind it.
    """
    images = Images(folder, count)
    expected = [int(images[index].sum()) for index in range(count)]
    dataset = CONTENDERS[contender](images, share)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(
        dataset, batch, shuffle=True, generator=order, num_workers=workers, persistent_workers=persistent
    )
    check = partial(_check, contender, expected)
    seconds = []
    for number in range(1 + passes):
        started = time.perf_counter()
        seen = sum(int(images[:, 0, 0, 0].numel()) for images in _touched(loader))
        seconds.append(time.perf_counter() - started)
        if seen != count:
            raise SystemExit(f"{contender} brought {seen} images of {count}; no figure is given")
        if number == 0:  # what the first epoch has stored is what the others bring
            check(loader)
    check(loader)
    return {"first_ms": 1e3 * seconds[0] / count, "again_ms": 1e3 * min(seconds[1:]) / count}


def _touched(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    """Give batches, each page of which was read: what a worker has sent is mapped only then."""
    for images in loader:
        images.view(-1)[::4096].sum()
        yield images


def _check(contender: str, expected: list[int], loader: DataLoader[Tensor]) -> None:
    """Compare what an epoch brings, in whatever order."""
    found = sorted(int(image.sum()) for batch in loader for image in batch)
    if found != sorted(expected):
        raise SystemExit(f"{contender} brought other images; no figure is given")


def single(contender: str, count: int, batch: int, passes: int) -> dict[str, Any]:
    """Time slots alone, in one process.

    Args:
        contender: "stocaching" or "quatcache".
        count: Slots.
        batch: Slots that are read together.
        passes: How often everything is done; the fastest counts.

    Returns:
        Microseconds of a write and of a read; of a batch of slots stacked, and of one read at once, where that exists.
    """
    make = stocached if contender == "stocaching" else ours
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=generator)
    order = torch.randperm(count, generator=generator).tolist()
    batches = [order[start : start + batch] for start in range(0, count - batch + 1, batch)]
    best: dict[str, float] = {}

    def note(what: str, started: float, times: int) -> None:
        took = 1e6 * (time.perf_counter() - started) / times
        best[what] = min(best.get(what, took), took)

    cache = make(count, 1.0)
    for turn in range(passes):
        cache.clear()
        started = time.perf_counter()
        for index in order:
            cache.set_slot(index, images[index])
        if turn:  # before, the memory was touched for the first time
            note("set_slot_us", started, count)
        started = time.perf_counter()
        slots = [cache.get_slot(index) for index in order]
        note("get_slot_us", started, count)
        if not all(torch.equal(slot, images[index]) for index, slot in zip(order, slots, strict=True)):
            raise SystemExit(f"{contender} gave other slots; no figure is given")
        for chosen in batches:
            started = time.perf_counter()
            stacked = torch.stack([cache.get_slot(index) for index in chosen])
            note("stacked_us", started, 1)
            if contender == "quatcache":
                started = time.perf_counter()
                found = cache.get_slots(chosen)
                note("batch_us", started, 1)
                if not torch.equal(found.values, stacked):
                    raise SystemExit("a batch read gave other slots; no figure is given")
    return best
