"""The benchmarks: contenders that train alike, and bars that are held or missed by the figures alone."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import measures, rows, store
from benchmarks.__main__ import CONTENDERS as TIMED
from benchmarks.__main__ import GROUPS
from benchmarks.anonymous import Peak, anonymous_bytes
from benchmarks.epochs import CONTENDERS, SHAPES, losses_of, make_data, run
from benchmarks.measures import MEASURES, parse
from benchmarks.process import one_process
from benchmarks.report import Bar, write_json
from benchmarks.store import FULL, PARTS, Sizes, bench_store
from quatcache.store import disk

ROWS, EPOCHS = 2_100, 2  # the last batch is short in both shapes


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("contender", sorted(set(CONTENDERS) - {"raw"}))
def test_contender_has_the_losses_of_the_raw_loop_bit_for_bit(shape, contender):
    reference = losses_of("raw", shape, ROWS, EPOCHS)
    steps = -(-ROWS // SHAPES[shape].batch_size)
    assert reference.shape == (EPOCHS * steps,)
    assert torch.equal(losses_of(contender, shape, ROWS, EPOCHS), reference)


def test_losses_fall_so_that_equal_losses_mean_equal_training():
    losses = losses_of("raw", "mlp", ROWS, 4)
    assert losses[-5:].mean() < losses[:5].mean()


@pytest.mark.parametrize("contender", CONTENDERS)
def test_every_epoch_but_the_first_is_timed(contender):
    seconds = run(contender, "linear", ROWS, epochs=3)
    assert len(seconds) == 2
    assert all(took > 0 for took in seconds)


def test_data_are_the_same_in_every_process():
    assert torch.equal(make_data(50).rows, make_data(50).rows)


def test_every_timed_contender_exists_and_the_losses_of_all_are_compared_with_raw():
    for shape, names in TIMED.items():
        assert shape in SHAPES
        assert set(names) <= set(CONTENDERS)
        assert "raw" in names


@pytest.mark.parametrize(
    ("bar", "held"),
    [
        (Bar("slower", 1.41, 1.40), False),
        (Bar("as fast", 1.40, 1.40), True),
        (Bar("faster", 2.5, 2.5, at_most=False), True),
        (Bar("not fast enough", 2.49, 2.5, at_most=False), False),
        (Bar("a figure", 170.0), None),
    ],
)
def test_bar_is_held_or_missed_by_its_figure(bar, held):
    assert bar.held is held


def test_json_names_the_machine_and_every_bar(tmp_path):
    target = tmp_path / "new folder" / "figures.json"
    write_json(target, {"mlp": {"rows": 3}}, [Bar("a ratio", 1.2, 1.4)])
    found = json.loads(target.read_text())
    assert found["mlp"] == {"rows": 3}
    assert found["bars"] == [{"what": "a ratio", "value": 1.2, "bar": 1.4, "at_most": True, "held": True}]
    assert "torch" in found["machine"]["packages"]


# the store

TINY = Sizes(
    rows=3000, written=2000, filled=(700, 1400), texts=1500, weights=9_000_000, batch=100, shard_bytes=1 << 19, rounds=2
)
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is told by Linux alone")


@pytest.fixture
def quiet():
    return Console(file=io.StringIO())


@pytest.fixture
def in_this_process(monkeypatch):
    """Run measures here: importing torch for each of them would take minutes."""
    monkeypatch.setattr(disk, "SHARD_BYTES", disk.SHARD_BYTES)  # a measure sets it
    called = []

    def measured(name, *arguments):
        called.append((name, *map(str, arguments)))
        return MEASURES[name](parse(called[-1]))

    monkeypatch.setattr(store, "measured", measured)
    return called


@linux
@pytest.mark.filterwarnings("ignore:.*`max_steps=3` reached.*")
@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_store_is_measured_and_leaves_no_file(tmp_path, in_this_process, quiet, part):
    figures, bars = bench_store(TINY, quiet, tmp_path / "results", [part])
    assert list((tmp_path / "results").iterdir()) == []
    assert set(figures) == {"sizes", part}
    assert bars
    assert all(np.isfinite(bar.value) for bar in bars)
    json.dumps(figures)
    for name, *arguments in in_this_process if part == "fill_memory" else ():
        assert arguments[-2:] == ["--shard-bytes", str(TINY.shard_bytes)], name  # several shards, though it is tiny


def test_bars_of_the_store_are_those_that_were_promised(tmp_path, monkeypatch, quiet):
    figures = {
        "bytes": 100_000_000, "seconds": 0.25, "bytes_per_second": 2.0, "per_second": 3e6, "characters": 49.0,
        "again_seconds": 0.0, "anonymous_left": 90_000_000, "anonymous_highest": 99_000_000, "first_step_seconds": 0.9,
        "fill_seconds": 5.0,
    }  # fmt: skip

    def measured(name, *arguments):
        given = dict(pairwise(arguments))
        if "--folder" in given:
            Path(given["--folder"]).mkdir(parents=True, exist_ok=True)
        encoded = int(given.get("--rows", 0)) if (name, given.get("--folder")) not in seen else 0
        seen.add((name, given.get("--folder")))
        memory = {"anonymous_highest": 10_000_000 + 80 * int(given["--rows"])} if name == "fit" else {}
        return {**figures, "encoded": encoded, **memory}

    seen = set()
    monkeypatch.setattr(store, "measured", measured)
    _, bars = bench_store(FULL, quiet, tmp_path)
    judged = {bar.what: (bar.value, bar.bar, bar.at_most) for bar in bars if bar.bar is not None}
    assert sorted(judged.values()) == [
        (0.25, 0.3, True),  # seconds for 100 MB of weights
        (0.25, 1.0, True),  # seconds to the first look-up
        (1.0, 0.8, False),  # write rate
        (3.0, 1.0, False),  # million texts a second
        (80.0, 154.0, True),  # bytes a row of a growing fill
        (90.0, 100.0, True),  # MB of anonymous memory
    ]


def test_measure_runs_in_a_process_of_its_own():
    found = one_process("measures", "keys", "--rows", 1000)
    assert found["per_second"] > 0
    assert 40 < found["characters"] < 60


def test_measures_but_the_fit_do_not_wait_for_lightning():
    source = Path(measures.__file__).read_text() + Path(rows.__file__).read_text()
    head = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not [line for line in head if "training" in line or "lightning" in line or "fills" in line]


def test_store_is_among_the_groups_of_the_command_line():
    assert GROUPS == ["mlp", "linear", "store", "demo"]


def test_rows_are_found_under_their_keys_and_a_wrong_one_stops_the_benchmark(tmp_path):
    rows.write_cache(tmp_path, 9000)  # more than one block
    opened = rows.open_store(tmp_path)
    indices = torch.tensor([8999, 0, 8192, 5])
    found = opened.get_many(rows.keys_of(indices.tolist())).values
    rows.check_rows(found, indices)
    with pytest.raises(SystemExit, match="wrong rows"):
        rows.check_rows(found.roll(1, dims=0), indices)
    with pytest.raises(SystemExit, match="wrong rows"):
        rows.check_rows(found[:3], indices)
    with pytest.raises(SystemExit, match="cannot be told apart"):
        next(rows.row_blocks((1 << 24) + 1))


def test_epoch_reads_every_row_once():
    parts = list(rows.random_batches(1000, 64))
    assert torch.cat(parts).sort().values.tolist() == list(range(1000))
    assert torch.cat(parts).tolist() != list(range(1000))


@pytest.mark.parametrize(
    ("measure", "spoil"), [("write", "get_many"), ("first_look_up", "rows_of"), ("epoch", "rows_of")]
)
def test_measure_that_gets_wrong_rows_gives_no_figure(tmp_path, monkeypatch, measure, spoil):
    place = ["--folder", str(tmp_path / "cache"), "--rows", "500"]
    MEASURES["cache"](parse(["cache", *place]))
    real = getattr(disk.DiskStore, spoil)

    def spoilt(self, keys):
        answer = real(self, keys)
        if spoil == "rows_of":
            return (answer + 1) % 500
        answer.values[0, 0] += 1
        return answer

    monkeypatch.setattr(disk.DiskStore, spoil, spoilt)
    with pytest.raises(SystemExit, match="no figure"):
        MEASURES[measure](
            parse([measure, *place, "--folder", str(tmp_path / ("cache" if measure != "write" else "new"))])
        )


@linux
def test_anonymous_memory_counts_what_is_allocated_and_not_what_is_mapped(tmp_path):
    size = 64 << 20
    (tmp_path / "zeros").write_bytes(bytes(size))
    with Peak() as mapped:
        view = np.memmap(tmp_path / "zeros", mode="r")
        assert int(view.sum()) == 0
    with Peak() as taken:
        kept = np.ones(size, np.uint8)
    with Peak() as given_back:
        taken_again = np.ones(size, np.uint8)
        held = anonymous_bytes()
        while given_back.highest < size * 0.9:  # until the other thread has looked
            pass
        del taken_again
    assert mapped.highest < size / 4
    assert taken.left > size * 0.9
    assert given_back.left < size / 2 < size * 0.9 < given_back.highest
    assert held > size
    assert kept[0] == 1
