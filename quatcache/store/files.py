"""Files that are either wholly there or not there at all, and memory maps of them.

What is read back was checked for size and checksum first, because a memory map of a truncated file kills the
interpreter when it is touched.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from xxhash import xxh3_128

from quatcache.errors import DamagedFileError, FormatError, StoreError
from quatcache.store.safetensors_writer import Written, tensor_bytes, write_safetensors
from quatcache.store.unfinished import UnfinishedFile

__all__ = [
    "FILL_LOCK",
    "MANIFEST_LOCK",
    "checksum",
    "content_digest",
    "locked",
    "make_directory",
    "open_tensors",
    "read_json",
    "read_tensors",
    "replace_file",
    "write_json",
    "write_tensors",
]

MANIFEST_LOCK = ".manifest.lock"
FILL_LOCK = ".fill.lock"

Result = TypeVar("Result")


def make_directory(path: Path) -> None:
    """Make a directory and those above it, if it is not there.

    Raises:
        StoreError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {_reason(error)}; permit writing there, or move what is there."
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, into a directory that is there.

    Raises:
        StoreError: The file cannot be written.
    """
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    replace_file(path, lambda file: file.write(text.encode() + b"\n"))


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
) -> Written:
    """Write a safetensors file atomically.

    Args:
        path: Where; the directory is there.
        tensors: Tensors on any device; they need not be contiguous, and may share memory.
        metadata: Strings for the header.
        durable: Flush it to the device; false: for what nobody reads after a power cut.

    Raises:
        StoreError: The file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    return replace_file(path, lambda file: write_safetensors(file, plain, metadata or {}), durable=durable)


def replace_file(path: Path, write: Callable[[UnfinishedFile], Result], *, durable: bool = True) -> Result:
    """Write a file atomically, into a directory that is there.

    Args:
        path: The file.
        write: Writes its content.
        durable: Flush it to the device; false: for what nobody reads after a power cut.

    Returns:
        What ``write`` returned.

    Raises:
        StoreError: The file cannot be written.
    """
    unfinished = None
    try:
        unfinished = UnfinishedFile(path)
        result = write(unfinished)
        unfinished.publish(durable=durable)
        return result
    except BaseException as error:
        if unfinished is not None:
            unfinished.discard()
        if not isinstance(error, OSError):
            raise
        raise StoreError(
            f"cannot write {path}: {_reason(error)}; free space or permit writing there, and run again: "
            "what was committed before is kept."
        ) from error


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: The file cannot be read.
        DamagedFileError: It is not a JSON object.
    """
    try:
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(
            mode
        ):  # reading a pipe would wait for ever
            raise DamagedFileError(f"{path} is no regular file; it is made again when the cache is next used.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(path)) from None
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {_reason(error)}; permit reading it, or use another save_dir."
        ) from error
    except DamagedFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}); it is made again when the cache is next used.") from error
    if not isinstance(content, dict):
        raise DamagedFileError(
            f"{path} holds a {type(content).__name__}, not an object; it is made again when the cache is next used."
        )
    return content


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock of the operating system, which dies with its process.

    Args:
        path: The lock file; made if need be.

    Raises:
        StoreError: It cannot be opened for writing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    except OSError as error:
        raise StoreError(f"cannot lock {path}: {_reason(error)}; permit writing there.") from error
    try:
        yield
    finally:
        lock.release()


def checksum(path: Path) -> str:
    """Hash the bytes of a file: 32 hex characters of xxh3_128, at several GB/s.

    Raises:
        FormatError: The file is missing.
        StoreError: It cannot be read.
    """
    digest, block = xxh3_128(), memoryview(bytearray(1 << 20))
    with _reading(path), path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def open_tensors(path: Path, expected_bytes: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Map the tensors of a safetensors file into memory; nothing is read until it is touched.

    Args:
        path: The file.
        expected_bytes: Its size as recorded when it was written.

    Returns:
        The tensors by name, and the metadata of the header.

    Raises:
        FormatError: The file is missing, of another size, or not what safetensors accepts.
        StoreError: The file cannot be read.
    """
    with _reading(path, expected_bytes), safe_open(path, framework="pt", device="cpu") as file:
        metadata = dict(file.metadata() or {})
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def read_tensors(path: Path, expected_bytes: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file whole into memory, in one go: memory maps are slow on network disks.

    Arguments, result and errors are those of :func:`open_tensors`.
    """
    with _reading(path, expected_bytes):
        content = path.read_bytes()
        tensors = load(content)  # refuses what is no safetensors file, so its header can be read below
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, dict(header.get("__metadata__") or {})


@contextmanager
def _reading(path: Path, expected_bytes: int | None = None) -> Iterator[None]:
    """Compare the size of a file, and turn what goes wrong while it is read into errors that name it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise DamagedFileError(f"{path} is no regular file; delete it, and its rows are encoded again.")
        size = status.st_size
        if expected_bytes is not None and size != expected_bytes:
            raise DamagedFileError(
                f"{path} has {size} bytes instead of {expected_bytes}; delete it, and its rows are encoded again."
            )
        path.open("rb").close()  # safetensors takes whatever goes wrong for a missing file
        yield
    except FileNotFoundError as error:
        if path.exists():
            raise StoreError(
                f"cannot read {path}: too many files may be open; raise that limit, and run again."
            ) from error
        raise FormatError(f"{path} is missing; its rows are encoded again if the rest of the cache is kept.") from error
    except FormatError:
        raise
    except (RuntimeError, MemoryError) as error:  # no memory to map or to read it: that is no damage
        raise StoreError(f"cannot read {path}: {error}; free memory or raise its limit, and run again.") from error
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}); delete it, and its rows are encoded again.") from error
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {_reason(error)}; permit reading it, or use another save_dir."
        ) from error


def content_digest(about: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash what a file of tensors says, whatever its layout.

    Args:
        about: JSON values.
        tensors: CPU tensors by name.

    Returns:
        32 hex characters: xxh3_128 over ``about`` as JSON with sorted keys, then for each tensor in the order of the
        names ``"<name> <dtype> <shape>"`` as Python prints them and its bytes in C order.

    Example:
        >>> len(content_digest({"version": 1}, {"keys": torch.zeros(1, 2)}))
        32
    """
    digest = xxh3_128(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
