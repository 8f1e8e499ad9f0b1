"""A real fit for a process of its own, which logs what it encodes and may be killed at a chosen moment."""

from __future__ import annotations

import itertools
import logging
import os
import resource
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch

import quatcache.store.disk as disk
import quatcache.store.files as files
from quatcache import CacheConfig
from quatcache.encoders import SentenceTransformerEncoder
from tests.fits import HashingEncoder, Model, Texts, fit, head_of, loader, texts

torch.set_num_threads(1)

KILLED, FILLED, ENCODED, SAID = "killed", "filled", "encoded", "said"
"""Events in the log."""

_OPERATIONS = {
    "os.chmod": "changing the mode of",
    "os.mkdir": "making",
    "os.remove": "removing",
    "os.rename": "renaming",
    "os.rmdir": "removing",
    "os.truncate": "truncating",
    "os.utime": "touching",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def append(log, attempt, event, *words):
    """Append a line for each word to a log, all or none of them, whoever else appends to it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(descriptor, "".join(f"{attempt}\t{event}\t{word}\n" for word in words).encode())
    os.close(descriptor)


def logged(log, event):
    """Read a log: for each attempt (or process) that had such an event, its words in order."""
    found = {}
    for line in Path(log).read_text().splitlines() if Path(log).exists() else ():
        attempt, kind, word = line.split("\t")
        if kind == event:
            found.setdefault(int(attempt), []).append(word)
    return found


class Logging:
    """Writes every text that is collated for the encoder into a log; a fill collates each batch once."""

    _log = None
    _happens = None
    _calls = 0

    def collate(self, items):
        append(*self._log, ENCODED, *items)
        self._calls += 1
        if self._happens is not None:
            self._happens(self._calls)
        return super().collate(items)


class LoggingEncoder(Logging, HashingEncoder):
    """Batch-independent."""


class LoggingMiniLM(Logging, SentenceTransformerEncoder):
    """A padded transformer."""


class FileOperations:
    """Every operation of this process on the files below a directory, by name: a moment at which it may die.

    Args:
        root: The directory.
        log: Log and number of the attempt.
        kill: A moment, and at which of its occurrences (from 1) the process kills itself; None: never.
        reached: Called at each moment; it may do harm of its own.
    """

    def __init__(self, root, log, kill=None, reached=None):
        self.moments = Counter()
        self._root = os.fspath(root)
        self._log = log
        self._kill = kill and tuple(kill)
        self._reached = reached

    def watch(self):
        """Watch from now on, in place of another one: an audit hook cannot be removed, so there is one for all."""
        if not _watching:
            sys.addaudithook(lambda event, arguments: _watching[-1].audit(event, arguments))
            os.fsync = partial(_watched_fsync, os.fsync)
            files.write_safetensors = partial(_watched_write, files.write_safetensors)
        _watching[:] = [self]

    def audit(self, event, arguments):
        if event == "open":
            operation = "opening for writing" if (arguments[2] or 0) & _WRITES else "opening"
        elif (operation := _OPERATIONS.get(event)) is None:
            return
        if isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if path.startswith(self._root):
                self.reach(f"before {operation} {self.kind(path)}")

    def kind(self, path):
        name, folder = Path(path).name, Path(path).parent.name
        if "shard-" in name:
            return "a shard"
        if "manifest.json" in name:
            return "the manifest"
        if name.endswith(".safetensors"):
            return "an index table"
        if folder == "encoders":
            return "the directory of a store"
        return name if path.startswith(f"{self._root}/") else "save_dir"

    def is_due(self, moment):
        return self._kill == (moment, self.moments[moment] + 1)

    def reach(self, moment):
        due = self.is_due(moment)
        self.moments[moment] += 1
        if due:
            append(*self._log, KILLED, moment)
            os.kill(os.getpid(), signal.SIGKILL)
        if self._reached is not None:
            self._reached(moment, self.moments[moment])


_watching = []


def _watched_fsync(fsync, descriptor):
    watching = _watching[-1]
    what = watching.kind(os.path.realpath(f"/proc/self/fd/{descriptor}"))
    watching.reach(f"before flushing {what}")
    fsync(descriptor)
    watching.reach(f"after flushing {what}")


def _watched_write(write, file, tensors, metadata):
    watching = _watching[-1]
    filename = os.path.realpath(f"/proc/self/fd/{file.fileno()}")
    what = watching.kind(filename)
    watching.reach(f"before writing the tensors of {what}")
    digest = write(file, tensors, metadata)
    half = f"in the middle of writing the tensors of {what}"
    if watching.is_due(half):
        os.truncate(filename, Path(filename).stat().st_size // 2)  # what had reached the file by then
    watching.reach(half)
    watching.reach(f"after writing the tensors of {what}")
    return digest


class _Tells(pl.Callback):
    """Tells when the fill begins, and logs when it is over."""

    def __init__(self, log, begins):
        self._log = log
        self._begins = begins

    def on_fit_start(self, trainer, pl_module):  # before that of the model's own callback
        if self._begins is not None:
            self._begins()

    def on_train_start(self, trainer, pl_module):
        append(*self._log, FILLED, "training begins")


class Messages(logging.Handler):
    """Writes what quatcache tells its users into the log of a test."""

    def __init__(self, log, said=None):
        super().__init__(logging.INFO)
        self._test_log = log
        self._said = said

    def emit(self, record):
        message = f"{record.levelname} {record.getMessage()}"
        append(*self._test_log, SAID, message)
        if self._said is not None:
            self._said(message)


def samples(count):
    """Texts for training and for validation, with duplicates and an overlap, and the set of all of them."""
    train, val = Texts(texts(count, count * 9 // 10)), Texts(texts(count + count // 20)[-count // 5 :])
    return train, val, sorted({*train.texts, *val.texts})


def small_commits(shard_bytes=None, commit_seconds=None):
    """Have the stores of this process commit often."""
    disk.SHARD_BYTES = shard_bytes or disk.SHARD_BYTES
    disk.COMMIT_SECONDS = disk.COMMIT_SECONDS if commit_seconds is None else commit_seconds


def run_fit(
    save_dir,
    log,
    attempt,
    *,
    count,
    encoder="hashing",
    seed=0,
    batch_size=8,
    kill=None,
    reached=None,
    begins=None,
    happens=None,
    said=None,
    survive=False,
    **commits,
):
    """Fit once, from a cache or to fill it.

    Args:
        save_dir: Where; None: without a cache.
        log: File in which texts that were encoded are logged, with the number of the attempt.
        attempt: That number; or that of the process.
        count: How many samples.
        encoder: "hashing", or the path of a sentence-transformers model.
        seed: Of the weights of a hashing encoder.
        batch_size: Of the fill.
        kill: See :class:`FileOperations`.
        reached: See :class:`FileOperations`.
        begins: Called when the fill begins.
        happens: Called with the number of each encoder call of the fill.
        said: Called with each message for the user.
        survive: Return an error, and fit the same model once more, without a cache.
        commits: See :func:`small_commits`.
    """
    small_commits(**commits)
    log = (os.fspath(log), attempt)
    messages = Messages(log, said)
    logging.getLogger("quatcache").addHandler(messages)
    operations = FileOperations(save_dir or "/nowhere", log, kill, reached)
    operations.watch()
    train, val, _ = samples(count)
    encodes = LoggingEncoder(seed) if encoder == "hashing" else LoggingMiniLM(encoder)
    encodes._log, encodes._happens = log, happens
    cache = None if save_dir is None else CacheConfig(save_dir=save_dir, batch_size=batch_size)
    model = Model({"default": encodes}, cache)
    loaders = loader(train, shuffle=True, batch_size=64), loader(val, batch_size=64)
    error = None
    try:
        fit(model, *loaders, callbacks=[_Tells(log, begins)])
    except Exception as caught:
        if not survive:
            raise
        error = {"kind": type(caught).__name__, "message": str(caught)}
        model.cache, encodes._log, encodes._happens = None, (log[0], -1), None
        fit(model, *loaders)
    finally:
        logging.getLogger("quatcache").removeHandler(messages)
    report = model.cache_callback.report
    return {
        "error": error,
        "losses": [model.train_losses, model.val_losses],
        "head": {name: value.tolist() for name, value in head_of(model).items()},
        "encoded": report.encoded,
        "read": report.read,
        "seconds": report.fill_seconds,
        "moments": dict(operations.moments),
    }


def run_fit_until_a_file_is_too_big(limit, **settings):
    """Fit until a file grows beyond so many bytes: the system kills the process then, in the middle of writing it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return run_fit(**settings)


def steps(fitted):
    """Give every loss and the final head of a fit in one list."""
    head = [torch.tensor(value).flatten().tolist() for _, value in sorted(fitted["head"].items())]
    return [*itertools.chain(*fitted["losses"], *head)]
