"""``quatcache cache``: what people and machines read, and exit codes, on caches made by hand and by real fits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from quatcache import cli
from quatcache.cli.display import age, timestamp
from quatcache.store import DiskStore
from quatcache.store.manifest import MANIFEST_NAME
from tests import fits
from tests.caches_for_tests import (
    DAY,
    HOUR,
    ONE,
    THREE,
    TWO,
    edit_manifest,
    flip,
    picture,
    set_age,
    shards,
    store_rows,
    store_table,
)

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Ran:
    """What a command left: its exit code and streams."""

    code: int
    out: str
    err: str

    @property
    def document(self):
        return json.loads(self.out)


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A cache that two real fits left, the second with other weights; only to be read."""
    root = tmp_path_factory.mktemp("fitted") / "cache"
    for seed in (0, 1):
        model = fits.Model({"default": fits.HashingEncoder(seed)}, fits.cached(cache_type="CPU", save_dir=str(root)))
        fits.fit(model, fits.loader(fits.Texts(fits.texts(30, distinct=20))), max_epochs=1)
    return root


def aged(path, days):
    set_age(path, days * DAY, now=time.time())


EVERY_COMMAND = [
    ["inspect"],
    ["verify"],
    ["explain"],
    ["prune"],
    ["prune", "--unused-days", "0", "--max-size", "1kB"],
    ["inspect", "--facts"],
]


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_commands_only_look_and_give_one_document_to_machines(fitted, run, command):
    before = picture(fitted)
    for_people = run("cache", command[0], fitted, *command[1:])
    assert for_people.code == 0 and for_people.out and not for_people.err
    for_machines = run("cache", command[0], fitted, *command[1:], "--json")
    assert for_machines.code == 0 and not for_machines.err
    assert for_machines.document["path"] == str(fitted)
    assert picture(fitted) == before


def test_inspect_lists_what_fits_left(fitted, run):
    document = run("cache", "inspect", fitted, "--json").document
    first, second = document["stores"]
    for store in (first, second):
        assert store["class"] == "tests.fits.HashingEncoder"
        assert (store["rows"], store["row_shape"], store["dtype"], store["shards"]) == (20, [16], "float32", 1)
        assert store["problem"] is None and "torch" in store["environment"] and "facts" not in store
    assert document["bytes"] == sum(path.stat().st_size for path in fitted.rglob("*") if path.is_file())
    (dataset,) = document["datasets"]
    assert (dataset["samples"], dataset["encoders"], dataset["targets"]) == (30, ["default"], ["int64"])
    shown = run("cache", "inspect", fitted).out
    for text in ("2 stores, 1 dataset", first["digest"][:8], "HashingEncoder", "16 float32", "torch"):
        assert text in shown


def test_inspect_shows_all_facts_of_one_store(fitted, run):
    first, second = run("cache", "inspect", fitted, "--json").document["stores"]
    document = run("cache", "inspect", fitted, first["digest"][:6], "--facts", "--json").document
    assert [store["digest"] for store in document["stores"]] == [first["digest"]]
    facts = document["stores"][0]["facts"]
    assert facts["class"] == "tests.fits.HashingEncoder" and len(facts["weights.matrix"]) == 32
    shown = run("cache", "inspect", fitted, first["digest"][:6], "--facts").out
    assert "weights.matrix" in shown and facts["weights.matrix"] in shown
    assert second["digest"][:8] not in shown


def test_inspect_shows_leftovers_foreign_files_and_what_is_damaged(tmp_path, run):
    home = store_rows(tmp_path, ONE)
    flip(store_rows(tmp_path, TWO) / MANIFEST_NAME, 5)
    flip(store_table(tmp_path))
    (home / f"shard-{'a' * 16}.safetensors").write_text("left")
    for number in range(7):
        (home / f"mine-{number}.txt").write_text("mine")
    shown = run("cache", "inspect", tmp_path).out
    for text in (
        f"encoders/{ONE}/shard-{'a' * 16}.safetensors  orphan shard  4 bytes",
        f"Not of the cache, left alone: encoders/{ONE}/mine-0.txt",
        "mine-4.txt and 2 more",
        f"encoders/{TWO}/{MANIFEST_NAME}",
        "is damaged",
        "the next run reads the dataset again",
    ):
        assert text in shown
    assert "mine-5.txt" not in shown


def test_explain_has_nothing_to_say_of_a_cache_without_stores(tmp_path, run):
    store_table(tmp_path)
    assert run("explain", tmp_path).out == "There is nothing to compare.\n"


def test_export_tells_what_became_another_type(tmp_path, run):
    store_rows(tmp_path / "cache", dtype=torch.bfloat16)
    done = run("cache", "export", tmp_path / "cache", "--to", tmp_path / "v.npy")
    assert "vectors became float32: neither numpy nor parquet has bfloat16." in done.out


def test_prune_says_what_it_must_leave(tmp_path, run):
    edit_manifest(store_rows(tmp_path, ONE), version=99)
    done = run("cache", "prune", tmp_path, "--max-size", "0")
    assert f"encoders/{ONE} was written by a newer version, and is left alone." in done.out


def test_digest_that_means_nothing_or_too_much_is_one_sentence(tmp_path, run):
    for digest in (ONE, TWO):
        store_rows(tmp_path, digest)
    done = run("cache", "inspect", tmp_path, "x")
    assert done.code == 1 and not done.out
    assert done.err.count("\n") == 1 and done.err.startswith("quatcache: 'x' is the beginning of no store's name")


@pytest.mark.parametrize(
    "command", [["inspect"], ["verify"], ["explain"], ["prune", "--apply"], ["export", "--to", "v.npy"]]
)
def test_directory_that_is_no_cache_is_refused_in_one_sentence(tmp_path, run, command):
    (tmp_path / "notes.txt").write_text("mine")
    done = run("cache", command[0], tmp_path, *command[1:])
    assert done.code == 1 and not done.out
    assert done.err.startswith(f"quatcache: {tmp_path} is not a cache: it has neither encoders/<digest> nor ")
    assert done.err.endswith("; pass the save_dir of a CacheConfig.\n") and done.err.count("\n") == 1
    done = run("cache", command[0], tmp_path, *command[1:], "--json")
    assert done.code == 1 and "is not a cache" in done.document["error"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_verify_says_that_all_is_whole(fitted, run):
    done = run("cache", "verify", fitted)
    assert done.code == 0 and "5 files" in done.out and "all of them are whole" in done.out
    assert run("cache", "verify", fitted, "--json").document["damaged"] == []


def test_verify_lists_each_damaged_file_with_reason_and_remedy(tmp_path, run):
    home = store_rows(tmp_path, numbers=(1, 2, 3), commits=3)
    table = store_table(tmp_path)
    flip(shards(home)[0])
    shards(home)[1].write_bytes(b"garbage")
    flip(table)
    done = run("cache", "verify", tmp_path, "--json")
    assert done.code == 1
    damaged = {found["path"]: (found["reason"], found["remedy"]) for found in done.document["damaged"]}
    assert set(damaged) == {
        f"datasets/{table.name}",
        *(f"encoders/{ONE}/{path.name}" for path in shards(home)[:2]),
    }
    assert all(reason and remedy for reason, remedy in damaged.values())
    shown = run("cache", "verify", tmp_path)
    assert shown.code == 1 and "3 problems" in shown.out
    assert all(path in re.sub(r"[│\s]", "", shown.out) for path in damaged)


def test_explain_names_the_weights_that_differ_between_two_runs(fitted, run):
    for command in (("cache", "explain"), ("explain",)):
        shown = run(*command, fitted).out
        assert "the first of its class here" in shown
        assert shown.count("weights differ in matrix") == 1
    (first, second) = run("explain", fitted, "--json").document["comparisons"]
    assert first["against"] is None and first["differences"] == []
    assert second["against"] == first["store"] and second["differences"] == ["weights differ in matrix"]


SETTINGS = {
    ONE: {"class": "m.Text", "max_seq_length": 256, "pooling": "mean"},
    TWO: {"class": "m.Text", "max_seq_length": 128, "pooling": "mean"},
    THREE: {"class": "m.Text", "max_seq_length": 128, "pooling": "cls"},
    "4" * 32: {"class": "m.Image", "image_size": 224},
}


@pytest.fixture
def four(tmp_path):
    for day, (digest, facts) in enumerate(SETTINGS.items(), start=1):
        edit_manifest(store_rows(tmp_path, digest, facts=facts), created=f"2026-01-0{day}T00:00:00+00:00")
    return tmp_path


def compared(done):
    return {
        (one["store"][0], one["against"][0] if one["against"] else None): one["differences"]
        for one in done.document["comparisons"]
    }


def test_explain_compares_each_store_with_the_closest_before_it(four, run):
    assert compared(run("explain", four, "--json")) == {
        ("1", None): [],
        ("2", "1"): ["max_seq_length 256 -> 128"],
        ("3", "2"): ['pooling "mean" -> "cls"'],
        ("4", None): [],
    }
    shown = run("explain", four).out
    assert "against 11111111: max_seq_length 256 -> 128" in shown


def test_explain_compares_one_store_with_all_others(four, run):
    assert compared(run("explain", four, "22", "--json")) == {
        ("2", "1"): ["max_seq_length 256 -> 128"],
        ("2", "3"): ['pooling "cls" -> "mean"'],
        ("2", "4"): [
            'class "m.Image" -> "m.Text"',
            "image_size 224 -> (none)",
            "max_seq_length (none) -> 128",
            'pooling (none) -> "mean"',
        ],
    }


def test_explain_compares_two_stores_in_the_order_given(four, run):
    assert compared(run("explain", four, "3", "1", "--json")) == {
        ("1", "3"): ["max_seq_length 128 -> 256", 'pooling "cls" -> "mean"']
    }


def test_explain_knows_the_same_identity_in_another_dtype(tmp_path, run):
    store_rows(tmp_path, ONE)
    edit_manifest(store_rows(tmp_path, ONE, dtype=torch.float16), created="2099-01-01T00:00:00+00:00")
    assert "the identity of 11111111, stored as float16 instead of float32" in run("explain", tmp_path).out
    assert run("explain", tmp_path, "11").code == 0  # the identity is clear, whatever the dtype


def test_explain_leaves_out_what_cannot_be_read_and_says_so(four, run):
    flip(four / "encoders" / ONE / MANIFEST_NAME, 5)
    done = run("explain", four, "--json")
    assert done.document["not_explained"] == [ONE] and ("2", None) in compared(done)
    assert "11111111  not explained: manifest.json is damaged" in run("explain", four).out
    refused = run("explain", four, "1", "2")
    assert refused.code == 1 and "cannot be explained" in refused.err


def test_explain_tells_whether_an_encoder_would_find_its_rows(tmp_path, run, minilm_path):
    from quatcache.encoders import SentenceTransformerEncoder, identify

    identity = identify(SentenceTransformerEncoder(minilm_path))
    store_rows(tmp_path, identity.digest, facts=dict(identity.facts))
    store_rows(tmp_path, identity.digest, (1, 2), facts=dict(identity.facts), dtype=torch.float16)
    assert run("explain", tmp_path, "--encoder", minilm_path).out.splitlines() == [
        f"hit: 3 rows in {identity.digest[:8]}, stored as float32",
        f"hit: 2 rows in {identity.digest[:8]}-float16, stored as float16",
    ]
    settings = ["--max-seq-length", 64, "--prompt", "query: ", "--normalize-embeddings", "--precision", "bf16-mixed"]
    done = run("explain", tmp_path, "--encoder", minilm_path, *settings, "--json")
    assert done.code == 0 and not done.document["hit"] and not done.document["stores"]
    assert done.document["closest"]["differences"] == [
        'autocast null -> "bf16-mixed"',
        "max_seq_length 256 -> 64",
        "normalize_embeddings false -> true",
        'prompt null -> "query: "',
    ]


def test_explain_says_which_classes_there_are_if_the_encoders_is_not(four, run, minilm_path):
    done = run("explain", four, "--encoder", minilm_path)
    assert done.code == 0
    assert done.out.strip() == "miss: SentenceTransformerEncoder has no rows here; there are rows of Image, Text"


def test_encoder_that_cannot_be_loaded_is_one_sentence(four, run, tmp_path):
    done = run("explain", four, "--encoder", tmp_path / "nowhere" / "model")
    assert done.code == 1 and "cannot be loaded" in done.err.splitlines()[-1]


def test_three_digests_or_digests_beside_an_encoder_are_refused(four, run):
    for arguments in (["1", "2", "3"], ["1", "--encoder", "x"]):
        done = run("explain", four, *arguments)
        assert done.code == 1 and "give up to two, or none with --encoder" in done.err


def test_prune_shows_first_and_removes_when_it_is_told_to(tmp_path, run):
    aged(store_rows(tmp_path, ONE), 100)
    aged(store_rows(tmp_path, TWO), 1)
    before = picture(tmp_path)
    shown = run("cache", "prune", tmp_path, "--unused-days", "30")
    assert shown.code == 0 and picture(tmp_path) == before
    assert f"encoders/{ONE}" in shown.out and TWO not in shown.out
    assert "unused for 100 days" in shown.out and "Nothing was removed: add --apply" in shown.out
    document = run("cache", "prune", tmp_path, "--unused-days", "30", "--json").document
    assert document["applied"] is False and [one["removed"] for one in document["removals"]] == [False]

    done = run("cache", "prune", tmp_path, "--unused-days", "30", "--apply", "--json")
    assert done.code == 0 and done.document["applied"]
    assert [(one["path"], one["removed"], one["note"]) for one in done.document["removals"]] == [
        (f"encoders/{ONE}", True, "")
    ]
    assert done.document["freed_bytes"] == document["freed_bytes"] > 0
    assert [store["digest"] for store in run("cache", "inspect", tmp_path, "--json").document["stores"]] == [TWO]
    assert "Nothing to remove" in run("cache", "prune", tmp_path, "--unused-days", "30").out


def test_prune_shows_what_was_removed_and_what_stayed(tmp_path, run):
    home = store_rows(tmp_path, ONE)
    orphan = home / f"shard-{'a' * 16}.safetensors"
    orphan.write_text("left")
    set_age(orphan, 2 * HOUR, now=time.time())
    done = run("cache", "prune", tmp_path, "--apply")
    assert "orphan shard" in done.out and "removed" in done.out and "4 bytes freed" in done.out
    assert not orphan.exists()
    (home / ".tmp-0").symlink_to(orphan)
    aged(home, 1)
    done = run("cache", "prune", tmp_path, "--max-size", "0", "--apply")
    assert done.code == 1 and "1 of its files cannot be deleted" in done.out


def test_prune_takes_sizes_as_people_write_them(tmp_path, run):
    for days, digest in enumerate((ONE, TWO, THREE)):
        aged(store_rows(tmp_path, digest, tuple(range(200))), days)
    one = run("cache", "inspect", tmp_path, "--json").document["stores"][0]["bytes"]
    for text, count in ((f"{2.5 * one / 1000:.3f}kB", 1), (f"{1.5 * one / 1024:.3f} KiB", 2), (str(4 * one), 0)):
        removals = run("cache", "prune", tmp_path, "--max-size", text, "--json").document["removals"]
        assert [removal["path"][-1] for removal in removals] == ["3", "2"][:count]


@pytest.mark.parametrize("text", ["much", "8 GiX", "-1", "1e9", "", "9" * 26, "9" * 400, "9999999TiB"])
def test_size_that_is_none_is_refused_with_an_example(tmp_path, run, capsys, text):
    with pytest.raises(SystemExit) as stop:
        run("cache", "prune", tmp_path, f"--max-size={text}")
    assert stop.value.code == 2
    assert re.search("give (one|a size) such as .*8GiB", capsys.readouterr().err)


def test_export_writes_the_dataset_that_a_fit_left(fitted, tmp_path, run):
    document = run("cache", "inspect", fitted, "--json").document
    digest, dataset = document["stores"][0]["digest"], document["datasets"][0]["digest"]
    target = tmp_path / "v.npy"
    done = run("cache", "export", fitted, digest[:6], "--to", target, "--dataset", dataset[:6], "--json")
    assert done.code == 0
    assert done.document["shape"] == [30, 16] and done.document["dtype"] == "float32"
    assert done.document["files"] == [str(tmp_path / name) for name in ("v.npy", "v.keys.npy", "v.targets.0.npy")]
    encoder, texts = fits.HashingEncoder(0), fits.texts(30, distinct=20)
    assert np.array_equal(np.load(target), encoder(encoder.collate(texts)).numpy())
    assert np.load(tmp_path / "v.targets.0.npy").tolist() == [len(text) % 5 for text in texts]

    refused = run("cache", "export", fitted, digest[:6], "--to", target)
    assert refused.code == 1 and "v.npy exists" in refused.err
    forced = run("cache", "export", fitted, digest[:6], "--to", target, "--force")
    assert forced.code == 0 and f"{target}: 20 x 16 float32" in forced.out


def test_export_needs_no_digest_where_there_is_one_store(tmp_path, run):
    store_rows(tmp_path / "cache", ONE)
    assert run("cache", "export", tmp_path / "cache", "--to", tmp_path / "v.npy").code == 0
    store_rows(tmp_path / "cache", TWO)
    done = run("cache", "export", tmp_path / "cache", "--to", tmp_path / "w.npy")
    assert done.code == 1 and "has 2 stores; name one" in done.err


def test_plan_hands_its_arguments_on_and_shows_what_comes_back(monkeypatch, run):
    from quatcache.training import plan

    class Planned:
        def table(self):
            return ["encoder", "rows"], [["default", "[red]5,000"]]

        def summary(self):
            return "The cache is ahead after epoch 2."

        def to_json(self):
            return {"rows": 5000}

    given = []

    def plan_from_config(arguments):
        print("Seed set to 0")  # as libraries do
        given.append(list(arguments))
        return Planned()

    monkeypatch.setattr(plan, "plan_from_config", plan_from_config)
    arguments = ["--config", "x.yaml", "--model.init_args.cache.dtype", "float16", "--trainer.max_epochs=3"]
    shown = run("cache", "plan", *arguments)
    assert shown.code == 0 and "[red]5,000" in shown.out and "ahead after epoch 2." in shown.out
    assert run("cache", "plan", *arguments, "--json").document == {"rows": 5000}
    assert given == [arguments, arguments]


@pytest.mark.parametrize("command", ["inspect", "verify", "explain", "plan", "prune", "export"])
def test_help_of_each_command_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main(["cache", command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"\n  quatcache cache {command} " in out.partition("examples:")[2] and "--json" in out


def test_help_loads_neither_torch_nor_lightning():
    code = (
        "import sys\nfrom quatcache.cli import main\n"
        "for given in (['--help'], ['cache', '--help'], ['cache', 'prune', '--help'], ['explain', '--help']):\n"
        "    try:\n        main(given)\n    except SystemExit as stop:\n        assert stop.code == 0\n"
        "print(sorted({'torch', 'pytorch_lightning', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_unknown_options_and_commands_are_refused(tmp_path, capsys):
    for given in (["cache"], ["cache", "purge", str(tmp_path)], ["cache", "inspect", str(tmp_path), "--aply"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(given)
        assert stop.value.code == 2
        assert "usage: quatcache cache" in capsys.readouterr().err


def test_module_runs_as_the_program_does_and_a_reader_that_has_enough_is_no_error(tmp_path):
    store_rows(tmp_path)
    command = [sys.executable, "-m", "quatcache.cli", "cache", "inspect", str(tmp_path)]
    unfolded = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=unfolded)
    assert "1 store, 0 datasets" in done.stdout
    reading, writing = os.pipe()
    os.close(reading)
    for form in ([], ["--json"]):
        cut = subprocess.run([*command, *form], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
        assert cut.stderr == ""
    os.close(writing)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_characters_that_stdout_does_not_have_are_escaped(tmp_path, encoding):
    store_rows(tmp_path, ONE, facts={"class": "m.Encoder", "prompt": "名前"})
    store_rows(tmp_path, TWO, facts={"class": "m.Encoder", "prompt": "vorher"})
    for command in ("inspect", "explain"):
        done = subprocess.run(
            [sys.executable, "-m", "quatcache.cli", "cache", command, str(tmp_path)],
            cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": encoding}, check=True,
        )  # fmt: skip
        assert r"\u540d\u524d" in done.stdout.decode(encoding)


def test_times_beyond_the_calendar_are_its_ends():
    assert timestamp(253_402_300_800.0) == timestamp(1e300) == "9999-12-31T23:59:59+00:00"
    assert timestamp(-62_135_596_801.0) == timestamp(-1e300) == "0001-01-01T00:00:00+00:00"
    assert timestamp(1_800_000_000.7) == "2027-01-15T08:00:00+00:00"
    assert (age(-1e300), age(1e12)) == ("just now", "11574074 days ago")


def test_what_files_say_steers_no_terminal_and_is_no_markup(tmp_path, run):
    hostile = "\x1b[2J[bold red]Evil[/]\u202e\n"
    facts = {"class": f"m.{hostile}", "pooling": hostile, hostile: [hostile]}
    home = store_rows(tmp_path, ONE, facts=facts)
    edit_manifest(home, environment={hostile: hostile}, created=hostile)
    store_rows(tmp_path, TWO, facts={"class": f"m.{hostile}"})
    store_table(tmp_path, encoders=(hostile,))
    edit_manifest(store_rows(tmp_path, THREE), version=f"99{hostile}")
    for command in (["inspect"], ["inspect", "--facts"], ["verify"], ["explain"], ["prune", "--max-size", "0"]):
        done = run("cache", command[0], tmp_path, *command[1:])
        assert "\x1b" not in done.out + done.err and "\u202e" not in done.out + done.err
        assert run("cache", command[0], tmp_path, *command[1:], "--json").document
    assert "[bold red]Evil[/]" in re.sub(r"[│\n ]", "", run("cache", "inspect", tmp_path).out).replace(
        "boldred", "bold red"
    )


def test_hostile_directory_is_shown_checked_and_pruned_without_leaving_it(tmp_path, run):
    outside = tmp_path / "outside"
    store_rows(outside, TWO)
    (outside / "precious.txt").write_text("mine")
    for path in outside.rglob("*"):
        aged(path, 100)
    root = tmp_path / "cache"
    whole = store_rows(root, ONE)
    (root / "encoders" / TWO).symlink_to(outside / "encoders" / TWO, target_is_directory=True)
    (whole / f"shard-{'a' * 16}.safetensors").symlink_to(outside / "precious.txt")
    newer = store_rows(root, THREE)
    edit_manifest(newer, version=3)
    damaged = store_rows(root, "4" * 32)
    (damaged / MANIFEST_NAME).write_text(
        '{"format": "quatcache", "shards": [{"file": "../../../outside/precious.txt"}]}'
    )
    (root / "encoders" / ("5" * 32)).write_text("a file in the place of a directory")
    (root / "datasets").mkdir()
    (root / "datasets" / f"{'6' * 32}.safetensors").mkdir()
    (root / "datasets" / "..").joinpath("notes.txt").write_text("mine")
    for home in (whole, newer, damaged):
        aged(home, 100)
    before = picture(outside)

    document = run("cache", "inspect", root, "--json").document
    assert {store["digest"][0] for store in document["stores"]} == {"1", "2", "3", "4"}
    assert {path.rpartition("/")[2][0] for path in document["foreign"]} == {"5"}
    verified = run("cache", "verify", root, "--json")
    assert verified.code == 1
    assert {found["path"].split("/")[1][0] for found in verified.document["damaged"]} == {"3", "4", "6"}

    pruned = run("cache", "prune", root, "--unused-days", "30", "--max-size", "0", "--apply", "--json")
    removed = {one["path"].split("/")[1][0]: one for one in pruned.document["removals"]}
    assert removed["1"]["note"] and removed["4"]["removed"] and not set(removed) & {"2", "3"}
    assert len(pruned.document["notes"]) == 3  # the link, the newer version, and the budget
    assert picture(outside) == before and (root / "notes.txt").read_text() == "mine"
    assert len(shards(newer)) == 1 and len(DiskStore(outside / "encoders" / TWO, TWO)) == 3


def test_leftovers_that_prune_must_leave_are_marked_in_both(tmp_path, run):
    home = store_rows(tmp_path, ONE)
    orphan = home / f"shard-{'a' * 16}.safetensors"
    orphan.write_text("left")
    assert "leaves it until it is an hour old" in run("cache", "inspect", tmp_path).out
    shown = run("cache", "prune", tmp_path).out
    assert "1 leftover is younger than an hour" in shown and "Nothing to remove" in shown
    set_age(orphan, 2 * HOUR, now=time.time())
    assert "removes it" in run("cache", "inspect", tmp_path).out
    shown = run("cache", "prune", tmp_path).out
    assert "younger than an hour" not in shown and "4 bytes would be freed" in shown


@pytest.mark.parametrize(
    "setting",
    [["--max-seq-length", "3"], ["--normalize-embeddings"], ["--precision", "32-true"], ["--prompt", ""]],
    ids=lambda setting: setting[0],
)
def test_settings_of_an_encoder_that_is_not_given_are_refused(tmp_path, run, capsys, setting):
    store_rows(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run("cache", "explain", tmp_path, *setting)
    assert stop.value.code == 2
    assert f"{setting[0]} is a setting of --encoder, which is not given: add it" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "nan", "soon"])
def test_days_that_are_none_are_refused(tmp_path, run, capsys, text):
    with pytest.raises(SystemExit) as stop:
        run("cache", "prune", tmp_path, "--unused-days", text)
    assert stop.value.code == 2
    assert f"'{text}' is no number of days; give one of at least 0, such as 90" in capsys.readouterr().err


def test_one_is_not_plural_and_facts_are_written_as_the_log_does(tmp_path, run):
    facts = {"class": "tests.Numbers", "prompt": None, "scaled": False, "weights.a": "00"}
    store_rows(tmp_path, ONE, (1,), facts=facts)
    shown = run("cache", "inspect", tmp_path, "--facts").out
    assert "1 tensor " in shown and "1 tensors" not in shown
    assert re.search(r"prompt +null", shown) and re.search(r"scaled +false", shown) and "None" not in shown
    assert "Numbers, 1 row, created" in run("explain", tmp_path).out


def test_errors_of_a_plan_are_told_in_a_few_lines(run, capsys, monkeypatch, tmp_path):
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(tmp_path)
    for wrong in (["--config", "nowhere.yaml"], ["--trainer.max_epoch", "3"]):
        with pytest.raises(SystemExit) as stop:
            run("cache", "plan", *wrong)
        told = capsys.readouterr().err
        assert stop.value.code == 2
        assert "quatcache cache plan: error: " in told and "quatcache fit --help" in told
        assert "usage:" not in told and len(told.splitlines()) < 8


def test_plan_for_a_config_without_a_cache_says_where_to_set_one(run, minilm_path, monkeypatch, tmp_path):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("simple_icd_10_cm")
    monkeypatch.chdir(tmp_path)
    done = run("cache", "plan", "--config", ROOT / "configs" / "icd10.yaml", "--model.init_args.cache", "null")
    assert done.code == 1 and done.err.splitlines()[-1].endswith("gives None; set cache in the configuration.")
