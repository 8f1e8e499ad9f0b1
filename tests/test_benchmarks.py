"""The benchmarks: contenders that compute the same, parts that run at any size, and bars that figures hold or miss.

Parts run here in this process, at sizes that take seconds, on made-up lists in the format of Debian's. No time is
judged.
"""

from __future__ import annotations

import importlib.util
import io
import json
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import (
    lookups,
    measures,
    process,
    rows,
    scale,
    settings,
    slots,
    slots_contenders,
    store,
    texts,
    training,
    turns,
)
from benchmarks.anonymous import Peak, anonymous_bytes
from benchmarks.epochs import CONTENDERS, losses_of, seconds_of
from benchmarks.fill_contenders import CONTENDERS as ENCODING
from benchmarks.filling import MINILM, STATIC, check_vectors
from benchmarks.hits_contenders import CONTENDERS as CACHES
from benchmarks.hits_contenders import look_up
from benchmarks.loading import LOADERS
from benchmarks.measures import MEASURES, parse
from benchmarks.process import one_process
from benchmarks.report import Bar, merge_json, read_bars
from benchmarks.shapes import SHAPES, check_batches, make_data
from benchmarks.store import FULL, PARTS, Sizes, bench_store
from quatcache.store import disk

ROWS, EPOCHS = 2_100, 2  # the last batch is short in both shapes
ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is told by Linux alone")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), width=200)


def said(console):
    return console.file.getvalue()


# contenders that compute the same


@pytest.mark.parametrize("contender", sorted(set(CONTENDERS) - {"raw"}))
def test_contender_has_the_losses_of_the_raw_loop_bit_for_bit(contender):
    found = losses_of(contender, list(SHAPES), ROWS, EPOCHS)
    assert found == losses_of("raw", list(SHAPES), ROWS, EPOCHS)
    for shape, losses in found.items():
        assert len(losses) == EPOCHS * -(-ROWS // SHAPES[shape].batch_size)


def test_losses_fall_so_that_equal_losses_mean_equal_training():
    losses = losses_of("raw", ["mlp"], ROWS, 4)["mlp"]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("contender", CONTENDERS)
def test_every_epoch_but_the_first_is_timed(contender):
    seconds = seconds_of(contender, {"linear": 3}, ROWS)["linear"]
    assert len(seconds) == 2
    assert all(took > 0 for took in seconds)


def test_data_are_the_same_in_every_process():
    assert torch.equal(make_data(50).rows, make_data(50).rows)


def test_every_timed_contender_exists_and_can_be_held_against_the_reference():
    assert set(training.TRAINED) == {*CONTENDERS, "quaterion"}
    assert all(set(shapes) <= set(SHAPES) for shapes in training.TRAINED.values())
    assert training.TRAINED["raw"] == list(SHAPES)
    assert set(MINILM) == set(ENCODING)
    assert MINILM[0] == STATIC[0] == "encode"  # the others are compared with what it has written
    assert list(CACHES) == lookups.NAMES
    assert list(slots_contenders.CONTENDERS) == slots.NAMES


def test_contender_with_other_losses_is_refused():
    assert training.check_losses({"raw": [1.0, 2.0], "same": [1.0, 2.0 + 1e-7]}, "mlp", "raw") < 1e-6
    for other in ([1.0, 2.1], [1.0], [1.0, float("nan")]):
        with pytest.raises(SystemExit, match="losses of other"):
            training.check_losses({"raw": [1.0, 2.0], "other": other}, "mlp", "raw")


def test_contender_with_other_vectors_is_refused(tmp_path):
    for name, value in (("encode", 0.0), ("near", 5e-6), ("far", 2e-5)):
        np.save(tmp_path / f"{name}.npy", np.full((3, 4), value, np.float32))
    np.save(tmp_path / "short.npy", np.zeros((2, 4), np.float32))
    np.save(tmp_path / "nan.npy", np.full((3, 4), np.nan, np.float32))
    assert check_vectors(tmp_path / "near.npy", tmp_path / "encode.npy") == pytest.approx(5e-6)
    for name in ("far", "short", "nan"):
        with pytest.raises(SystemExit, match=f"vectors of {name} .* no time"):
            check_vectors(tmp_path / f"{name}.npy", tmp_path / "encode.npy")


@pytest.mark.parametrize("contender", LOADERS)
def test_loader_alone_is_timed_after_its_batches_were_compared(contender):
    assert len(LOADERS[contender](make_data(ROWS), 3)) == 2


def test_loader_that_brings_other_rows_or_labels_is_refused():
    data = make_data(ROWS)
    batches = list(zip(data.rows.split(256), data.labels.split(256), strict=True))
    check_batches(reversed(batches), data)
    rolled = [(found, labels.roll(1)) for found, labels in batches]
    twice = [batches[0], *batches[:-1]]
    for wrong in (rolled, twice, batches[1:]):
        with pytest.raises(SystemExit, match="other rows or labels"):
            check_batches(wrong, data)


@pytest.mark.parametrize("name", lookups.NAMES)
def test_cache_gives_the_rows_and_equal_misses_are_counted(name, tmp_path, monkeypatch, quiet):
    if not settings.installed([name], quiet):
        pytest.skip(said(quiet))
    monkeypatch.setitem(CACHES, name, replace(CACHES[name], batches=1))
    found = look_up(name, 1, str(tmp_path))
    assert found["us_tensor"] >= found["us_each"] > 0
    recomputes = name.startswith(("batche", "langchain"))
    assert found["computed_of_three"] == (None if not CACHES[name].fills else 3 if recomputes else 2)


@pytest.mark.parametrize("contender", slots.NAMES)
@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_over_images_are_timed_after_they_were_compared(contender, workers, tmp_path, monkeypatch, quiet):
    if not settings.installed([contender], quiet):
        pytest.skip(said(quiet))
    slots_contenders.make_images(str(tmp_path), 6)
    options = {"count": 6, "batch": 4, "workers": workers, "persistent": workers > 0, "passes": 1, "share": 0.5}
    found = slots_contenders.epochs(contender, str(tmp_path), **options)
    assert found["first_ms"] > 0 and found["again_ms"] > 0
    wrong = lambda images, share: [images[index].flip(0) + 1 for index in range(6)]  # noqa: E731
    monkeypatch.setitem(slots_contenders.CONTENDERS, contender, wrong)
    with pytest.raises(SystemExit, match="other images; no figure"):
        slots_contenders.epochs(contender, str(tmp_path), **options)


def test_images_have_the_size_of_those_that_were_measured_before(tmp_path):
    assert 50_000 < slots_contenders.make_images(str(tmp_path), 3)["bytes"] < 60_000


def test_straightness_is_one_on_a_line_and_less_off_it():
    assert slots.straightness([0, 1, 2, 3], [5.0, 4.0, 3.0, 2.0]) == pytest.approx(1.0)
    assert slots.straightness([0, 1, 2, 3], [5.0, 1.0, 0.5, 0.2]) < 0.9


def test_nothing_of_quatcache_runs_in_quaterions_environment():
    for module in ("quaterion_contender", "shapes", "texts", "work", "anonymous"):
        source = (ROOT / "benchmarks" / f"{module}.py").read_text()
        assert not [line for line in source.splitlines() if line.startswith(("import quatcache", "from quatcache"))]


# turns, bars and files


def test_contenders_take_turns_and_ratios_are_taken_within_a_round(quiet):
    order = []

    def run(name, seconds):
        return lambda turn: order.append(name) or seconds[turn]

    runs = {"slow": run("slow", [2.0, 40.0, 8.0]), "quick": run("quick", [1.0, 10.0, 2.0]), "rare": run("rare", [6.0])}
    found = turns.take_turns(runs, 3, quiet, "some work", fewer={"rare": 1})
    assert order == ["slow", "quick", "rare", "slow", "quick", "slow", "quick"]
    assert found.ratio("slow", "quick") == 4.0  # the ratio of the medians would be not that of the medians
    assert found.ratio("quick", "slow") == 0.25
    assert found.ratio("rare", "quick") == 6.0
    assert found.median("slow") == 8.0
    found.print(quiet, "some work", "quick", {"s": "{:.1f}".format})
    assert "6.00" in said(quiet)


@pytest.mark.parametrize(
    ("bar", "held"),
    [
        (Bar("slower", 1.41, 1.40), False),
        (Bar("as fast", 1.40, 1.40), True),
        (Bar("faster", 2.5, 2.5, at_most=False), True),
        (Bar("not fast enough", 2.49, 2.5, at_most=False), False),
        (Bar("no number", float("nan"), 2.5), False),
        (Bar("a figure", 170.0), None),
    ],
)
def test_bar_is_held_or_missed_by_its_figure(bar, held):
    assert bar.held is held


def test_json_keeps_the_other_parts_and_names_the_machine_of_each(tmp_path):
    target = tmp_path / "new folder" / "figures.json"
    merge_json(target, "epochs", {"rows": 3}, [Bar("a ratio", 1.2, 1.4)])
    merge_json(target, "fill", {"texts": 4}, [Bar("another", 3.0)])
    merge_json(target, "epochs", {"rows": 5}, [Bar("a ratio", 1.5, 1.4)])
    parts = json.loads(target.read_text())["parts"]
    assert {name: part["figures"] for name, part in parts.items()} == {"epochs": {"rows": 5}, "fill": {"texts": 4}}
    assert parts["epochs"]["bars"] == [{"what": "a ratio", "value": 1.5, "bar": 1.4, "at_most": True, "held": False}]
    assert all("torch" in part["machine"]["packages"] for part in parts.values())
    assert [bar.what for bar in read_bars(target)] == ["a ratio", "another"]
    assert [path.name for path in target.parent.iterdir()] == ["figures.json"]


def test_file_of_something_else_is_not_written_over(tmp_path):
    for content in ("no json", "[1]", '{"ratio": 3}'):
        (tmp_path / "mine.json").write_text(content)
        with pytest.raises(SystemExit, match="name another file"):
            merge_json(tmp_path / "mine.json", "epochs", {}, [])
        assert (tmp_path / "mine.json").read_text() == content


def test_parts_go_on_after_one_that_gave_no_figures(tmp_path, monkeypatch, capsys):
    def refused(given, console):
        raise SystemExit("losses of [other] differ")

    def measured(given, console):
        return {"rounds": given.rounds}, [Bar("kept", 1.0, 2.0), Bar("not kept", 3.0, 2.0)]

    monkeypatch.setattr(
        command, "PARTS", {"epochs": refused, "fill": measured, "hits": lambda given, console: ({}, [])}
    )
    target = tmp_path / "figures.json"
    arguments = ["--only", "epochs", "fill", "hits", "--rounds", "7", "--folder", str(tmp_path), "--json", str(target)]
    assert command.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "losses of [other] differ" in printed
    assert "missed" in printed
    assert list(json.loads(target.read_text())["parts"]) == ["fill"]  # hits had nothing to measure
    assert json.loads(target.read_text())["parts"]["fill"]["figures"] == {"rounds": 7}


def test_only_the_largest_part_waits_to_be_asked_for():
    everything, usual, _ = command.parse(["--full"])
    some, _, _ = command.parse([])
    assert set(everything) - set(some) == {"large"}
    assert set(everything) == set(command.PARTS)
    assert usual.sizes[-1] == usual.large_rows == 10_000_000
    assert command.parse(["--only", "large"])[0] == ["large"]


def test_contender_whose_package_is_missing_is_left_out_in_one_line(monkeypatch, quiet):
    monkeypatch.setattr(settings, "find_spec", lambda package: None if package == "diskcache" else object())
    assert settings.installed(["dict", "diskcache", "langchain"], quiet) == ["dict", "langchain"]
    assert said(quiet) == "diskcache is left out: diskcache is not installed; pip install '.[bench]'\n"


def test_quaterion_is_left_out_with_the_way_to_get_it(quiet, tmp_path):
    assert not replace(SMALL, quaterion=tmp_path / "python").with_quaterion(quiet)
    assert "make bench-quaterion" in said(quiet)


def test_slope_is_the_power_of_growth():
    sizes = [10, 100, 1000]
    assert scale.slope(sizes, [3 * size**0.5 for size in sizes]) == pytest.approx(0.5)
    assert scale.slope(sizes, [7.0, 7.0, 7.0]) == pytest.approx(0.0)


# texts


DESCRIPTIONS = """Package: hello
Description-md5: 1
Description-en: example package
 The GNU hello program
 greets.
 .
 It does no more.

Package: bye
Description-en: the other one
 Nothing else.

"""


def translations(count):
    made = (
        f"Package: p{i}\nDescription-en: package {i}\n It does {i} things{', and more' * (i % 7)}.\n .\n Well.\n\n"
        for i in range(count)
    )
    return DESCRIPTIONS + "".join(made)


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Small lists in the formats of apt and WordNet."""
    folder = tmp_path / "debian"
    folder.mkdir()
    (folder / "mirror_debian_dists_stable_main_i18n_Translation-en").write_text(translations(40))
    for part, count in (("noun", 300), ("verb", 40), ("adj", 40), ("adv", 40)):
        lines = [f'{i:08d} 03 n 01 word{i} 0 000 | a {part} of the kind {i}; "it is {i}"  \n' for i in range(count)]
        (folder / f"data.{part}").write_text("  1 the licence | is no gloss\n" + "".join(lines))
    monkeypatch.setattr(texts, "LISTS", folder)
    monkeypatch.setattr(texts, "WORDNET", folder)
    texts._all_descriptions.cache_clear()
    texts._all_glosses.cache_clear()
    yield folder
    texts._all_descriptions.cache_clear()
    texts._all_glosses.cache_clear()


def test_descriptions_are_short_and_long_text_and_distinct(debian):
    found = texts.descriptions(42)
    assert "example package\nThe GNU hello program\ngreets.\n\nIt does no more." in found
    assert "the other one\nNothing else." in found
    assert len(set(found)) == 42
    assert found == texts.descriptions(42) != sorted(found)
    with pytest.raises(SystemExit, match="42 descriptions are at hand, 43 were asked for"):
        texts.descriptions(43)


def test_glosses_leave_the_licence_out(debian):
    found = texts.glosses(420)
    assert 'a verb of the kind 3; "it is 3"' in found
    assert not [text for text in found if "licence" in text or "no gloss" in text]
    with pytest.raises(SystemExit, match="420 glosses"):
        texts.glosses(421)


def test_share_of_duplicates_is_as_asked():
    mixed = texts.with_duplicates([f"text {i}" for i in range(1000)], 0.3)
    assert len(mixed) == 1000
    assert len(set(mixed)) == 700


def test_parts_without_their_texts_are_left_out_and_say_how_to_get_them(tmp_path, monkeypatch, quiet):
    monkeypatch.setattr(texts, "LISTS", tmp_path)
    monkeypatch.setattr(texts, "WORDNET", tmp_path)
    for part in ("fill", "fill-cheap", "growth"):
        assert command.PARTS[part](SMALL, quiet) == ({}, [])
    assert "apt-get install wordnet-base" in said(quiet)
    assert "Acquire::Languages=en update" in said(quiet)


# parts


SMALL = settings.Settings(
    rounds=2, rows=2_100, check_rows=600, texts=33, glosses=404, images=12, warm_rows=3_000, warm_steps=3,
    sizes=(600, 1_200),
    large_rows=6_000, quaterion=Path("nowhere/python"),
)  # fmt: skip
EXPECTED = {
    "epochs": {"rows", "rounds", "mlp", "linear"},
    "loading": {"rows", "epoch_seconds", "us_per_row"},
    "disk": {"rows", "epoch_seconds"},
    "fill": {"texts", "largest_difference", "seconds", "ms_per_text"},
    "fill-cheap": {"texts", "largest_difference", "seconds", "ms_per_text", "duplicates"},
    "growth": {"static", "minilm"},
    "hits": {"us_per_item", "us_per_item_as_tensor", "rounds_as_tensor", "computed_of_three"},
    "slots": {"images", "file_bytes", "epochs", "shares", "single"},
    "warm-start": {"rows", "steps", "runs", "process_seconds", "first_step_seconds", "anonymous_mb"},
    "scale": {"sizes", "slopes"},
    "large": {"small", "large"},
}


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Run contenders in this process: importing torch for each of them would take minutes."""
    called = []

    def work(module, function, *, python="", **options):
        called.append((module, function, options))
        given = json.loads(json.dumps(options, default=str))
        answer = getattr(importlib.import_module(f"benchmarks.{module}"), function)(**given)
        return json.loads(json.dumps(answer))

    monkeypatch.setattr(process, "work", work)
    (tmp_path / "results").mkdir()
    return called


@linux
@pytest.mark.filterwarnings("ignore:.*`max_steps=[0-9]*` reached.*")
@pytest.mark.parametrize("part", EXPECTED)
def test_part_gives_figures_and_bars_and_leaves_no_file(part, here, debian, tmp_path, quiet, monkeypatch):
    if part in ("fill-cheap", "growth") and importlib.util.find_spec("wordllama") is None:
        pytest.skip("static embeddings come with wordllama: pip install --no-deps wordllama")
    for name, cache in CACHES.items():
        monkeypatch.setitem(CACHES, name, replace(cache, batches=1))
    monkeypatch.setattr(lookups, "PASSES", 1)
    given = replace(SMALL, folder=tmp_path / "results")
    figures, bars = command.PARTS[part](given, quiet)
    assert set(figures) == EXPECTED[part]
    assert bars
    assert all(np.isfinite(bar.value) for bar in bars)
    json.dumps(figures)
    assert list((tmp_path / "results").iterdir()) == []
    exact = [bar for bar in bars if "encoded /" in bar.what or "distinct misses" in bar.what]
    assert all(bar.held and bar.value == bar.bar for bar in exact)
    assert len(exact) == {"growth": 2, "fill-cheap": 1, "hits": 1}.get(part, 0)


def test_every_part_is_run_here_or_has_tests_of_its_own():
    assert set(EXPECTED) | {"store", "demo"} == set(command.PARTS)


def test_bars_are_those_that_were_promised(here, debian, tmp_path, quiet, monkeypatch):
    """What each part is judged by; the figures are made up."""
    answers = {
        "losses_of": {"mlp": [1.0], "linear": [1.0]},
        "seconds_of": {"mlp": [1.0], "linear": [1.0]},
        "train": {"losses": [1.0], "seconds": [1.0], "encoded": 0, "steps": 3},
        "encode": {"seconds": 1.0},
        "duplicates": {"texts": 10, "distinct": 7, "encoded": 7},
        "grown": {"texts": 1, "more": 1, "first_encoded": 1, "again_encoded": 4, "first_seconds": 1.0,
                  "again_seconds": 0.03},
        "first_step": {"first_step_seconds": 0.7, "encoded": 0, "library_imported": False, "encoder_loaded": False,
                       "anonymous_left": 0, "anonymous_highest": 70_000_000},
        "warm": {"epoch_seconds": [1.0], "anonymous_highest": 1_500_000_000},
        "make_images": {"bytes": 55_000},
        "epochs": {"first_ms": 2.0, "again_ms": 1.0},
        "single": {"get_slot_us": 1.0, "set_slot_us": 1.0, "stacked_us": 2.0, "batch_us": 1.0},
    }  # fmt: skip

    def work(module, function, *, python="", **options):
        if module == "loading":
            return [SMALL.rows * 0.4e-6]
        if module == "tiers":
            filled = options["epochs"] == 2 and options["rows"] == SMALL.rows
            return answers["train"] | {"encoded": SMALL.rows if filled else 0}
        if function == "encode":
            np.save(options["target"], np.zeros((1, 1)))
        return answers.get(function, {})

    monkeypatch.setattr(process, "work", work)
    found = {}
    monkeypatch.setattr(settings, "find_spec", lambda package: object())
    monkeypatch.setattr(slots, "straightness", lambda shares, times: 1.0)
    for part in ("epochs", "loading", "disk", "fill", "fill-cheap", "growth", "slots", "warm-start", "large"):
        _, bars = command.PARTS[part](replace(SMALL, folder=tmp_path / "results"), quiet)
        found[part] = [(bar.bar, bar.at_most) for bar in bars if bar.bar is not None]
    assert found == {
        "epochs": [(1.30, True), (1.05, True), (1.05, True), (1.05, True), (2.5, False)],
        "loading": [(0.8, True)],
        "disk": [(1.25, True)],
        "fill": [(1.3, False), (2.5, False)],
        "fill-cheap": [(1.0, False), (1.0, True)],
        "growth": [(1.0, True), (0.05, True), (1.0, True), (0.05, True)],
        "slots": [(1.0, True), (1.0, True), (1.0, True), (0.98, False)],
        "warm-start": [(1.0, True), (0.0, True), (100.0, True), (1.15, True)],
        "large": [(2.0, True), (1.5, True)],
    }


@pytest.mark.filterwarnings("ignore:.*`max_steps=[0-9]*` reached.*")
def test_cache_that_was_extended_trains_as_one_that_was_filled(tmp_path):
    from benchmarks import scale_contender

    for dtype in (None, "float16"):
        folder = tmp_path / str(dtype)
        scale_contender.prepare(str(folder), 5000, 256, dtype)
        found = scale_contender.warm(str(folder), 5000, 256, 1, dtype)  # its first batch is held against its labels
        assert found["encoded"] == 0
        assert len(found["epoch_seconds"]) == 1


def test_pictures_are_drawn_of_what_was_measured(here, debian, tmp_path, quiet, monkeypatch):
    pytest.importorskip("matplotlib")
    target = tmp_path / "figures.json"
    names = ["fill_seconds", "epoch_seconds", "warm_start_seconds", "fill_anonymous_mb", "warm_anonymous_mb"]
    scaled = {"rows": 10, **dict.fromkeys(names, 2.0)}
    merge_json(target, "hits", {"us_per_item_as_tensor": {"dict": 1.0, "quatcache, TensorStore": 0.5}}, [])
    draw = importlib.util.spec_from_file_location("draw_benchmarks", ROOT / "imgs" / "draw_benchmarks.py")
    module = importlib.util.module_from_spec(draw)
    draw.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["draw", str(target), "--folder", str(tmp_path / "drawn")])
    module.main()
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["benchmarks.png"]
    scaling = {"sizes": [scaled, {**scaled, "rows": 100}], "slopes": dict.fromkeys(names, 0.0)}
    merge_json(target, "scale", scaling, [])
    module.main()
    epochs = {"2 workers": {"again_ms": {"uncached": 2.0, "quatcache, CachedDataset": 0.1}}}
    shares = {"shares": [0.0, 0.5, 1.0], "ms": [2.0, 1.1, 0.1], "straightness": 0.99}
    merge_json(target, "slots", {"images": 8, "file_bytes": 5000, "epochs": epochs, "shares": shares}, [])
    module.main()
    drawn = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert drawn == ["benchmarks.png", "growth.png", "slots.png"]


# the store

TINY = Sizes(
    rows=3000, written=2000, filled=(700, 1400), texts=1500, weights=9_000_000, batch=100, shard_bytes=1 << 19, rounds=2
)


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


@linux
def test_write_rate_is_taken_in_another_folder_too_where_one_is_named(tmp_path, in_this_process, quiet):
    given = replace(
        SMALL, store=TINY, store_parts=["hashing"], folder=tmp_path / "disk", tmpfs=tmp_path / "memory", rounds=1
    )
    figures, bars = command.store(given, quiet)
    assert set(figures) == {"sizes", "hashing", "write_rate_tmpfs"}
    assert [bar.bar for bar in bars if bar.what.startswith("on tmpfs, write rate")] == [0.8, None]
    written = [argument for name, *arguments in in_this_process if name == "write" for argument in arguments]
    assert sum(str(tmp_path / "memory") in argument for argument in written) == 3
    assert list((tmp_path / "memory").iterdir()) == []


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
    size = 256 << 20  # much more than what else is freed meanwhile
    (tmp_path / "zeros").write_bytes(bytes(size))
    with Peak() as mapped:
        view = np.memmap(tmp_path / "zeros", mode="r")
        assert int(view.sum()) == 0
    with Peak() as taken:
        kept = np.ones(size, np.uint8)
    with Peak() as given_back:
        taken_again = np.ones(size, np.uint8)
        held = anonymous_bytes()
        for _ in range(1000):  # until the other thread has looked
            if given_back.highest >= size * 0.9:
                break
            threading.Event().wait(0.01)
        del taken_again
    assert mapped.highest < size / 4
    assert taken.left > size * 0.9
    assert given_back.left < size / 2 < size * 0.9 < given_back.highest
    assert held > size
    assert kept[0] == 1
