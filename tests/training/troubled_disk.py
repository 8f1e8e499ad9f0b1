"""Disks that are full, read-only or gone, for fits in processes of their own.

A process makes a small disk in a mount namespace of its own, so that nothing is left when it ends or dies.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

from tests.committed import only_store, texts_by_key
from tests.training.killed_fit import ENCODED, SAID, logged, run_fit, samples, steps

COUNT = 1500
SHARD_BYTES = 8192  # 128 rows of 64 bytes

SMALL = {"count": 200, "shard_bytes": 4096, "batch_size": 32}

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
NOBODY = 65534


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"mount {' '.join(map(str, arguments))}: {done.stderr.strip()}")


def small_disk(path, size):
    """Mount a file system of its own for this process alone, as root or else as root of a user namespace."""
    path.mkdir()
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)


def why_no_small_disk(folder):
    """Try; give the reason why it does not work, or None."""
    try:
        small_disk(Path(folder) / "tried", "64k")
    except OSError as error:
        return str(error)
    return None


class Trouble:
    """Fits on one save_dir in one process, with what was encoded and committed before and after each.

    Args:
        folder: For the log.
        save_dir: The cache directory.
    """

    def __init__(self, folder, save_dir):
        self.save_dir = save_dir
        folder.mkdir(exist_ok=True)
        self._log = folder / "log"
        self._number = 0
        self._texts = texts_by_key(samples(2 * COUNT)[2])

    def fit(self, count=COUNT, **settings):
        """Fit, and give what came of it; an error does not stop the process."""
        settings = {"shard_bytes": SHARD_BYTES, "batch_size": 32, **settings}
        self._number += 1
        before = self.committed()
        result = run_fit(self.save_dir, self._log, self._number, count=count, survive=True, **settings)
        encoded = logged(self._log, ENCODED).get(self._number, [])
        return {
            "error": result["error"],
            "as uncached": steps(result) == uncached(count),
            "encoded": len(encoded),
            "again": len(before & set(encoded)),
            "committed": len(self.committed()),
            "warned": [said for said in logged(self._log, SAID).get(self._number, []) if said.startswith("WARNING")],
        }

    def committed(self):
        """Give the texts whose rows are committed, each compared with the encoder."""
        try:
            rows = only_store(self.save_dir)
        except (PermissionError, FileNotFoundError):  # which safetensors makes of it
            return set()
        return {self._texts[key] for key in rows}

    def leftovers(self):
        """Give what was left behind of files that could not be written."""
        return [path.name for path in self.save_dir.rglob(".tmp*")]


@functools.cache
def uncached(count):
    """Give the steps of a fit without a cache."""
    return steps(run_fit(None, os.devnull, 0, count=count))


def full_disk(folder):
    """A disk that others have filled but for a little, and on which there is space again later."""
    disk = Path(folder) / "disk"
    small_disk(disk, "4m")
    trouble, ballast = Trouble(Path(folder), disk / "cache"), disk / "ballast"
    fill_up(ballast)
    os.truncate(ballast, ballast.stat().st_size - 80 * 1024)
    full = trouble.fit()
    left = trouble.leftovers()
    still_full = trouble.fit()
    ballast.unlink()
    return {"full": full, "left": left, "still full": still_full, "freed": trouble.fit(), "warm": trouble.fit()}


def at(moment, times, wanted, harm):
    """Do harm at one moment of a fill."""
    if (moment, times) == wanted:
        harm()


def fill_up(ballast):
    """Leave no space on a disk."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def full_disk_at(folder, moment, times):
    """A disk that others fill while one kind of file is written."""
    disk = Path(folder) / "disk"
    small_disk(disk, "4m")
    trouble, ballast = Trouble(Path(folder), disk / "cache"), disk / "ballast"
    full = trouble.fit(reached=partial(at, wanted=(moment, times), harm=partial(fill_up, ballast)))
    left = trouble.leftovers()
    ballast.unlink()
    return {"full": full, "left": left, "freed": trouble.fit(), "warm": trouble.fit()}


def read_only_disk(folder):
    """A disk that is filled, and is then mounted read-only."""
    disk = Path(folder) / "disk"
    small_disk(disk, "4m")
    trouble = Trouble(Path(folder), disk / "cache")
    filled = trouble.fit()
    shutil.copytree(disk / "cache", disk / "other")
    next((disk / "other").glob("encoders/*/manifest.json")).unlink()
    mount("-o", "remount,bind,ro", disk)
    other = Trouble(Path(folder) / "logs-of-other", disk / "other")
    return {
        "filled": filled,
        "warm": trouble.fit(),
        "other order": trouble.fit(COUNT - 500),  # texts that are known, in a dataset that is not
        "grown": trouble.fit(2 * COUNT),
        "without manifest": other.fit(),
    }


def empty_read_only_disk(folder):
    disk = Path(folder) / "disk"
    small_disk(disk, "4m")
    mount("-o", "remount,bind,ro", disk)
    return Trouble(Path(folder), disk / "cache").fit()


def harmed_at_each_moment(folder, kind):
    """Fill a new directory for each kind of file operation, and do harm at that moment: at an early and a later one.

    Args:
        folder: For everything.
        kind: "full": the disk is full from then on; "deleted": the directory is.

    Returns:
        For each moment what came of it, and of the fit after the harm was made good.
    """
    disk = Path(folder) / "disk"
    if kind == "full":
        small_disk(disk, "4m")
    ballast, found = disk / "ballast", []
    moments = run_fit(disk / "cache", Path(folder) / "log", 0, **SMALL)["moments"]
    shutil.rmtree(disk / "cache")
    for moment, total in sorted(moments.items()):
        for times in sorted({1, total // 2 + 1}):
            trouble = Trouble(Path(folder) / f"logs-{len(found)}", disk / f"cache-{len(found)}")
            harm = partial(fill_up, ballast) if kind == "full" else partial(shutil.rmtree, trouble.save_dir, True)
            harmed = trouble.fit(reached=partial(at, wanted=(moment, times), harm=harm), **SMALL)
            ballast.unlink(missing_ok=True)
            found.append({"moment": f"{moment}, {times}", "harmed": harmed, "after": trouble.fit(**SMALL)})
            shutil.rmtree(trouble.save_dir)
    return found


def at_call(number, wanted, harm):
    if number == wanted:
        harm()


def unmounted_disk(folder):
    """A disk that is gone in the middle of a fill, and comes back as it was."""
    disk, behind = Path(folder) / "disk", Path(folder) / "behind"
    small_disk(behind, "4m")
    disk.mkdir()
    mount("--bind", behind, disk)
    trouble = Trouble(Path(folder), disk / "cache")
    gone = trouble.fit(happens=partial(at_call, wanted=20, harm=partial(unmount, disk)))
    found = sorted(path.name for path in disk.iterdir())
    mount("--bind", behind, disk)
    return {"gone": gone, "found": found, "back": trouble.fit(), "warm": trouble.fit()}


def unmount(disk):
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def delete(folder):
    """Delete a folder, though a commit that is on its way may still write into it."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def deleted_directory(folder, call):
    """A cache directory that somebody deletes in the middle of a fill."""
    save_dir = Path(folder) / "cache"
    trouble = Trouble(Path(folder), save_dir)
    gone = trouble.fit(happens=partial(at_call, wanted=call, harm=partial(delete, save_dir)))
    found = save_dir.exists()
    return {"gone": gone, "found": found, "again": trouble.fit(), "warm": trouble.fit()}


def directory_that_is_a_file(folder, place):
    """A file where a directory is needed."""
    save_dir = Path(folder) / "cache"
    file = save_dir / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    outcome = Trouble(Path(folder), save_dir).fit()
    return {"file": outcome, "content": file.read_text()}


def become_nobody(folder):
    """Drop the rights of root, which no permission binds; what is imported late is imported before."""
    warm_up = Path(folder) / "warm-up"
    Trouble(warm_up, warm_up / "cache").fit(50)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def forbidden(folder, harm, mode, grown=False):
    """A directory that is filled, in which everybody may write, and some of which is then forbidden.

    Args:
        folder: For everything.
        harm: Pattern of what is forbidden, below the save_dir; "" is the save_dir itself; None: an empty save_dir.
        mode: Permissions that are left.
        grown: Whether the dataset has grown meanwhile.
    """
    folder = Path(folder)
    save_dir = folder / "cache"
    if harm is None:
        save_dir.mkdir()
    else:
        Trouble(folder, save_dir).fit()
        (folder / "log").unlink()
    permit(save_dir)
    for path in save_dir.glob(harm) if harm else [save_dir]:
        path.chmod(mode)
    become_nobody(folder)
    return Trouble(folder, save_dir).fit(2 * COUNT if grown else COUNT)


def permit(save_dir):
    """Let everybody read and write."""
    save_dir.chmod(0o777)
    for path in save_dir.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)
