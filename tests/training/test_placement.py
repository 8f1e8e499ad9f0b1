"""Where rows go: the fastest tier with room, said in words, and nothing that makes the machine swap."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from quatcache import CacheConfig, CacheType
from quatcache.errors import ConfigError
from quatcache.keys import content_keys
from quatcache.store import DiskStore, TensorStore
from quatcache.training import memory, placement
from quatcache.training.memory import free_memory
from quatcache.training.placement import pick_tier, place_rows
from tests.fits import Model, Texts, fit, loader, same_run, texts

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
GB = 10**9


@pytest.fixture
def free(monkeypatch):
    """A machine with so much free memory."""

    def have(main, gpu=0):
        monkeypatch.setattr(placement, "free_memory", lambda: main)
        monkeypatch.setattr(memory, "free_memory", lambda: main)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu, gpu))

    return have


def filled(store):
    store.put_many(content_keys(["a", "b"]), torch.ones(2, 512))
    return store


def test_auto_takes_the_fastest_tier_with_room_and_says_why(free):
    free(10 * GB, gpu=4 * GB)
    assert pick_tier(2 * GB, GPU, disk=True) == (CacheType.GPU, "2.0 GB of 4.0 GB free on the GPU")
    tier, reason = pick_tier(3 * GB, GPU, disk=True)
    assert tier is CacheType.CPU
    assert reason == "3.0 GB is too much of the 4.0 GB free on the GPU, 3.0 GB of 10.0 GB free in main memory"
    assert pick_tier(5 * GB, CPU, disk=True) == (CacheType.CPU, "5.0 GB of 10.0 GB free in main memory")
    assert pick_tier(6 * GB, CPU, disk=True) == (
        CacheType.DISK,
        "6.0 GB is too much of the 10.0 GB free in main memory",
    )
    assert pick_tier(6 * GB, GPU, disk=True)[0] is CacheType.DISK
    tier, reason = pick_tier(6 * GB, CPU, disk=False)
    assert tier is CacheType.CPU and reason.endswith("free in main memory, but the rows are nowhere else")


def test_a_fit_on_a_small_machine_trains_from_disk_and_says_so(tmp_path, free, caplog):
    plain = Model()
    fit(plain, loader(Texts(texts(40)), shuffle=True))
    free(2000)
    model = Model(cache=CacheConfig(save_dir=tmp_path))
    with caplog.at_level("INFO", "quatcache"):
        fit(model, loader(Texts(texts(40)), shuffle=True))
    assert "on DISK (AUTO: 2.6 kB is too much of the 2.0 kB free in main memory)" in caplog.text
    assert same_run(model, plain)


@pytest.mark.parametrize(("tier", "gpu"), [(CacheType.CPU, 0), (CacheType.GPU, 1000)])
def test_tier_without_room_is_refused_with_the_remedy(tmp_path, free, tier, gpu):
    free(memory.RESERVE + 1000, gpu)
    told = f"tier {tier.name} was asked for encoder 'text', whose rows take 4.1 kB of the 1.0 kB .* use DISK or AUTO"
    with pytest.raises(ConfigError, match=told):
        place_rows("text", filled(DiskStore(tmp_path, "0" * 32)), tier, GPU)


def test_rows_that_are_in_memory_already_need_no_room(tmp_path, free):
    free(0)
    assert place_rows("text", filled(TensorStore()), CacheType.CPU, CPU).tier is CacheType.CPU
    filled(DiskStore(tmp_path, "0" * 32)).flush()
    whole = DiskStore(tmp_path, "0" * 32, memory_map=False)
    assert place_rows("text", whole, CacheType.CPU, CPU, memory_map=False).tier is CacheType.CPU
    assert place_rows("text", whole, CacheType.AUTO, CPU, memory_map=False).tier is CacheType.CPU


def test_fill_in_memory_stops_before_the_machine_swaps(free):
    free(memory.RESERVE - 1)
    model = Model(cache=CacheConfig())
    with pytest.raises(ConfigError, match=r"encoder 'default' has .* rows .* in memory and 255 MiB are left free; set"):
        fit(model, loader(Texts(texts(40))))


def test_fill_onto_disk_goes_on_where_memory_is_short(tmp_path, free):
    free(memory.RESERVE - 1)
    model = Model(cache=CacheConfig(save_dir=tmp_path))
    fit(model, loader(Texts(texts(40))))
    assert model.cache_callback.report.encoders["default"].rows == 40


def group(root, path, **files):
    (root / path).mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (root / path / name.replace("__", ".")).write_text(f"{value}\n")


def test_free_memory_is_what_the_tightest_control_group_leaves(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/user.slice/job\n")
    assert free_memory(tmp_path / "nowhere", own) > GB
    group(tmp_path, "user.slice", memory__max=10**8, memory__current=10**7, memory__stat="anon 5\ninactive_file 1000")
    group(tmp_path, "user.slice/job", memory__max="max", memory__current=1, memory__stat="inactive_file 0")
    assert free_memory(tmp_path, own) == 10**8 - 10**7 + 1000
    group(tmp_path, "user.slice/job", memory__max=500, memory__current=400, memory__stat="inactive_file 50")
    assert free_memory(tmp_path, own) == 150
    group(tmp_path, ".", memory__max=100, memory__current=100, memory__stat="inactive_file 7")  # inside a container
    assert free_memory(tmp_path, own) == 7


def test_free_memory_knows_the_older_kind_of_control_groups(tmp_path):
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/x\n9:memory:/docker/1\n")
    files = {"memory__limit_in_bytes": 1000, "memory__usage_in_bytes": 900, "memory__stat": "total_inactive_file 11"}
    group(tmp_path, "memory/docker/1", **files)
    assert free_memory(tmp_path, own) == 111


STATISTICS = "anon 5\nfile 60\nactive_file 40\ninactive_file 20"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory__max": 1000, "memory__current": 900, "memory__stat": STATISTICS}, 160),
        ({"memory__max": 1000, "memory__current": 30, "memory__stat": STATISTICS}, 1000),
        ({"memory__max": "max", "memory__high": 500, "memory__current": 400, "memory__stat": STATISTICS}, 160),
        ({"memory__max": 450, "memory__high": 500, "memory__current": 400, "memory__stat": STATISTICS}, 110),
        ({"memory__max": 1000, "memory__high": 500, "memory__current": 900, "memory__stat": "inactive_file 1"}, 0),
        ({"memory__max": 1000, "memory__current": 900, "memory__stat": "a line of five words\ninactive_file x"}, 100),
        ({"memory__max": 1000, "memory__current": 900}, 100),
        ({"memory__max": 1000}, 1000),
    ],
    ids=[
        "page cache",
        "page cache beyond usage",
        "high",
        "both",
        "above high",
        "malformed",
        "no statistics",
        "no usage",
    ],
)
def test_free_memory_counts_page_cache_and_every_limit(tmp_path, files, left):
    own = tmp_path / "own"
    own.write_text("0::/job\n")
    group(tmp_path, "job", **files)
    assert free_memory(tmp_path, own) == left


@pytest.mark.parametrize("error", [FileNotFoundError, RuntimeError, NotImplementedError])
def test_machine_that_tells_nothing_has_what_its_groups_leave_and_refuses_nothing_without(tmp_path, monkeypatch, error):
    def fail():
        raise error("/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    assert free_memory(tmp_path, tmp_path / "none") == sys.maxsize
    own = tmp_path / "own"
    own.write_text("0::/job\n")
    group(tmp_path, "job", memory__max=1000, memory__current=900, memory__stat="inactive_file 0")
    assert free_memory(tmp_path, own) == 100


def test_free_memory_without_control_groups_is_that_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 12345})())
    assert free_memory(tmp_path, tmp_path / "none") == 12345
    (tmp_path / "odd").write_text("nonsense")
    assert free_memory(tmp_path, tmp_path / "odd") == 12345


def test_reading_whole_files_trains_alike(tmp_path):
    plain = Model()
    fit(plain, loader(Texts(texts(40)), shuffle=True))
    for checksums in (True, False):
        model = Model(cache=CacheConfig(save_dir=tmp_path, memory_map=False, checksums=checksums))
        fit(model, loader(Texts(texts(40)), shuffle=True))
        assert same_run(model, plain)


def test_tier_disk_without_a_memory_map_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tier DISK trains from a memory map, but memory_map is False; use CPU"):
        CacheConfig("disk", save_dir=tmp_path, memory_map=False)
    for setting in ("memory_map", "checksums"):
        with pytest.raises(ConfigError, match=f"{setting} is 1; use True or False"):
            CacheConfig(**{setting: 1})
