"""Exporting: other tools read the rows that a run would get, in whole files or not at all."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from quatcache.errors import (
    CacheMissError,
    ConfigError,
    FormatError,
    MissingDependencyError,
    StoreError,
)
from quatcache.sequences import PaddedSequences
from quatcache.store import CacheDirectory, DatasetTable, DiskStore, selection
from quatcache.store.export import export_rows
from quatcache.store.inspection import inspect_cache
from quatcache.store.manifest import MANIFEST_NAME, Manifest
from tests.caches_for_tests import (
    ONE,
    TWO,
    add_rows,
    edit_manifest,
    flip,
    keys_of,
    picture,
    rows_of,
    shards,
    store_rows,
    store_table,
)


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet")


def export(root, target, **options):
    """Export the one store of a cache; a dataset may be given by its file."""
    summary = inspect_cache(root)
    if "dataset" in options:
        (options["dataset"],) = (table for table in summary.tables if table.path == options["dataset"])
    return export_rows(summary.stores[0], target, **options)


def load(path):
    return np.load(path, allow_pickle=False)


def by_key(target):
    """The rows of an exported array by key."""
    keys = load(target.with_name(f"{target.stem}.keys.npy"))
    assert keys.dtype == np.int64 and keys.shape == (len(load(target)), 2)
    return {tuple(key): row for key, row in zip(keys.tolist(), load(target), strict=True)}


def names_in(path):
    return sorted(one.name for one in path.iterdir())


def test_every_row_is_exported_once_with_its_key(tmp_path):
    store_rows(tmp_path / "cache", numbers=tuple(range(10)), commits=4)
    target = tmp_path / "vectors.npy"
    written = export(tmp_path / "cache", target)
    assert written.files == (target, tmp_path / "vectors.keys.npy")
    assert (written.rows, written.shape, written.dtype, written.notes) == (10, (10, 2), "float32", ())
    rows = by_key(target)
    assert len(rows) == 10
    for number, key in enumerate(keys_of(*range(10)).tolist()):
        assert rows[tuple(key)].tolist() == [number, -number]


def test_of_a_key_that_was_put_twice_the_later_row_is_exported(tmp_path):
    home = store_rows(tmp_path / "cache", numbers=(1, 2, 3))
    add_rows(home, 2, 4, rows=rows_of(20, 40))
    export(tmp_path / "cache", tmp_path / "v.npy")
    rows = by_key(tmp_path / "v.npy")
    expected = {1: 1.0, 2: 20.0, 3: 3.0, 4: 40.0}
    assert {number: rows[tuple(keys_of(number)[0].tolist())][0] for number in expected} == expected
    assert len(rows) == 4


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_rows_of_any_shape_and_dtype_come_out_as_they_are(tmp_path, parquet, dtype, shape):
    rows = (torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)) * 3).abs().to(dtype)
    store_rows(tmp_path / "cache", rows=rows, numbers=range(5), commits=2)
    plain = rows.float().numpy() if dtype is torch.bfloat16 else rows.numpy()
    keys = keys_of(*range(5))

    export(tmp_path / "cache", tmp_path / "v.npy")
    found = by_key(tmp_path / "v.npy")
    exported = np.stack([found[tuple(key)] for key in keys.tolist()])
    assert exported.dtype == plain.dtype and exported.shape == (5, *shape)
    assert np.array_equal(exported, plain)

    written = export(tmp_path / "cache", tmp_path / "v.parquet")
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["vector", "key"]
    vectors = np.array(table["vector"].to_pylist()).reshape(5, *shape)
    order = [table["key"].to_pylist().index(key) for key in keys.tolist()]
    assert np.array_equal(vectors[order].astype(plain.dtype), plain)
    assert bool(written.notes) == (dtype is torch.bfloat16)


def test_bfloat16_says_what_it_became(tmp_path):
    store_rows(tmp_path / "cache", dtype=torch.bfloat16)
    written = export(tmp_path / "cache", tmp_path / "v.npy")
    assert written.dtype == "float32" and load(tmp_path / "v.npy").dtype == np.float32
    assert written.notes == ("vectors became float32: neither numpy nor parquet has bfloat16.",)


def test_rows_that_are_stored_narrower_are_exported_as_stored(tmp_path):
    store_rows(tmp_path / "cache", dtype=torch.float16)
    assert export(tmp_path / "cache", tmp_path / "v.npy").dtype == "float16"


def test_dataset_is_exported_in_its_order_with_its_duplicates_and_targets(tmp_path, parquet):
    store_rows(tmp_path / "cache", numbers=tuple(range(6)), commits=3)
    weights = torch.arange(8.0).reshape(4, 2)
    table = store_table(tmp_path / "cache", (5, 0, 5, 2), [torch.tensor([9, 8, 7, 6]), weights.bfloat16()])
    written = export(tmp_path / "cache", tmp_path / "v.npy", dataset=table)
    assert [path.name for path in written.files] == ["v.npy", "v.keys.npy", "v.targets.0.npy", "v.targets.1.npy"]
    assert load(tmp_path / "v.npy").tolist() == rows_of(5, 0, 5, 2).tolist()
    assert np.array_equal(load(tmp_path / "v.keys.npy"), keys_of(5, 0, 5, 2))
    assert load(tmp_path / "v.targets.0.npy").tolist() == [9, 8, 7, 6]
    assert load(tmp_path / "v.targets.1.npy").tolist() == weights.tolist()
    assert written.notes == ("targets.1 became float32: neither numpy nor parquet has bfloat16.",)

    export(tmp_path / "cache", tmp_path / "v.parquet", dataset=table)
    columns = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert list(columns) == ["vector", "key", "target.0", "target.1"]
    assert columns["vector"] == rows_of(5, 0, 5, 2).tolist() and columns["target.0"] == [9, 8, 7, 6]
    assert columns["target.1"] == weights.tolist()


def test_pairs_have_an_axis_of_their_own(tmp_path, parquet):
    store_rows(tmp_path / "cache", numbers=tuple(range(4)))
    table = store_table(tmp_path / "cache", (0, 3, 3, 1), [torch.tensor([1.0, 0.0])], width=2)
    written = export(tmp_path / "cache", tmp_path / "v.npy", dataset=table)
    assert written.shape == (2, 2, 2) and written.rows == 2
    assert load(tmp_path / "v.npy").tolist() == rows_of(0, 3, 3, 1).reshape(2, 2, 2).tolist()
    assert load(tmp_path / "v.keys.npy").shape == (2, 2, 2)
    export(tmp_path / "cache", tmp_path / "v.parquet", dataset=table)
    columns = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert list(columns) == ["vector.0", "vector.1", "key.0", "key.1", "target.0"]
    assert columns["vector.1"] == rows_of(3, 1).tolist() and columns["key.0"] == keys_of(0, 3).tolist()


def test_dataset_with_items_that_have_no_row_is_refused(tmp_path):
    store_rows(tmp_path / "cache", numbers=(1, 2))
    table = store_table(tmp_path / "cache", (1, 2, 3, 4))
    with pytest.raises(CacheMissError, match=f"2 of the 4 items of the dataset .* no row in store {ONE}"):
        export(tmp_path / "cache", tmp_path / "v.npy", dataset=table)
    assert names_in(tmp_path) == ["cache"]


def test_encoder_of_the_dataset_is_found_by_its_rows_and_asked_for_where_several_fit(tmp_path):
    root = tmp_path / "cache"
    store_rows(root, numbers=(1, 2, 3, 4))
    keys = {name: keys_of(*numbers).reshape(-1, 1, 2) for name, numbers in (("a", (7, 8)), ("b", (3, 1)))}
    table = CacheDirectory(root).write_table(DatasetTable(keys, None, "group"))
    export(root, tmp_path / "found.npy", dataset=table)
    assert load(tmp_path / "found.npy").tolist() == rows_of(3, 1).tolist()
    keys["a"] = keys_of(2, 4).reshape(-1, 1, 2)
    table = CacheDirectory(root).write_table(DatasetTable(keys, None, "group"))
    with pytest.raises(ConfigError, match="several encoders of the dataset; name one of 'a', 'b'"):
        export(root, tmp_path / "v.npy", dataset=table)
    export(root, tmp_path / "v.npy", dataset=table, encoder="a")
    assert load(tmp_path / "v.npy").tolist() == rows_of(2, 4).tolist()
    with pytest.raises(ConfigError, match="no encoder 'c'; it has 'a', 'b'"):
        export(root, tmp_path / "v2.npy", dataset=table, encoder="c")


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_rows_are_written_in_blocks(tmp_path, monkeypatch, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    store_rows(tmp_path / "cache", numbers=tuple(range(10)), commits=3)
    export(tmp_path / "cache", tmp_path / f"whole{suffix}")
    monkeypatch.setattr(selection, "BLOCK_BYTES", 4 * 8)  # four rows of two floats
    told = []
    export(tmp_path / "cache", tmp_path / f"blocks{suffix}", advance=told.append)
    assert told == [4, 4, 2]
    if suffix == ".npy":
        assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "blocks.npy").read_bytes()
        table = store_table(tmp_path / "cache", tuple(range(10)), width=2)
        told.clear()
        export(tmp_path / "cache", tmp_path / "pairs.npy", dataset=table, advance=told.append)
        assert told == [2, 2, 1]
        assert load(tmp_path / "pairs.npy").tolist() == rows_of(*range(10)).reshape(5, 2, 2).tolist()
    else:
        from pyarrow.parquet import ParquetFile

        one, other = ParquetFile(tmp_path / "whole.parquet"), ParquetFile(tmp_path / "blocks.parquet")
        assert one.read().equals(other.read()) and other.num_row_groups == 3


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest", "newer", "renamed"])
def test_damaged_store_is_refused_and_nothing_is_written(tmp_path, damage):
    home = store_rows(tmp_path / "cache", numbers=tuple(range(6)), commits=3)
    shard = shards(home)[1]
    if damage == "flipped":
        flip(shard)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "gone":
        shard.unlink()
    elif damage == "manifest":
        flip(home / MANIFEST_NAME, 5)
    elif damage == "newer":
        edit_manifest(home, version=3)
    else:
        home = home.rename(home.with_name(TWO))
    with pytest.raises(FormatError, match=f"store {home.name} cannot be exported: .*; run with it once"):
        export(tmp_path / "cache", tmp_path / "v.npy")
    assert names_in(tmp_path) == ["cache"]


def test_damaged_dataset_is_refused(tmp_path):
    store_rows(tmp_path / "cache")
    table = store_table(tmp_path / "cache")
    flip(table)
    with pytest.raises(FormatError, match="cannot be exported; choose another dataset"):
        export(tmp_path / "cache", tmp_path / "v.npy", dataset=table)


def test_store_that_lost_all_its_rows_gives_an_empty_array(tmp_path, parquet):
    home = store_rows(tmp_path / "cache")
    DiskStore(home, ONE).manifest.without([path.name for path in shards(home)]).write(home)
    export(tmp_path / "cache", tmp_path / "v.npy")
    assert load(tmp_path / "v.npy").shape == (0, 2)
    export(tmp_path / "cache", tmp_path / "v.parquet")
    assert parquet.read_table(tmp_path / "v.parquet").num_rows == 0


def test_store_that_never_had_rows_is_refused(tmp_path):
    store = tmp_path / "cache" / "encoders" / ONE
    store.mkdir(parents=True)
    Manifest(ONE, {}, {}).write(store)
    with pytest.raises(ConfigError, match=f"store {ONE} has no rows; fill it first"):
        export(tmp_path / "cache", tmp_path / "v.npy")


@pytest.mark.parametrize("existing", ["v.npy", "v.keys.npy", "v.targets.0.npy", "v.targets.7.npy"])
def test_existing_file_is_not_overwritten_unless_it_is_permitted(tmp_path, existing):
    store_rows(tmp_path / "cache")
    (tmp_path / existing).write_text("mine")
    with pytest.raises(ConfigError, match=f"{existing} exists; name another file, or permit overwriting"):
        export(tmp_path / "cache", tmp_path / "v.npy")
    assert (tmp_path / existing).read_text() == "mine" and names_in(tmp_path) == ["cache", existing]
    export(tmp_path / "cache", tmp_path / "v.npy", force=True)
    assert load(tmp_path / "v.npy").shape == (3, 2)


def test_targets_of_an_earlier_export_do_not_stay_beside_other_rows(tmp_path):
    store_rows(tmp_path / "cache", numbers=(1, 2, 3))
    table = store_table(tmp_path / "cache", (1, 2), [torch.tensor([1, 2]), torch.tensor([3, 4])])
    export(tmp_path / "cache", tmp_path / "v.npy", dataset=table)
    (tmp_path / "v.targets.mine.npy").write_text("mine")
    (tmp_path / "other.targets.0.npy").write_text("mine")
    export(tmp_path / "cache", tmp_path / "v.npy", force=True)
    assert names_in(tmp_path) == ["cache", "other.targets.0.npy", "v.keys.npy", "v.npy", "v.targets.mine.npy"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_export_that_breaks_off_leaves_the_old_files_and_no_new_ones(tmp_path, monkeypatch, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    store_rows(tmp_path / "cache", numbers=tuple(range(10)))
    target = tmp_path / f"v{suffix}"
    export(tmp_path / "cache", target)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path) if name != "cache"}
    monkeypatch.setattr(selection, "BLOCK_BYTES", 16)

    def interrupt(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "cache", target, force=True, advance=interrupt)
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path) if name != "cache"} == before


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_file_that_cannot_grow_is_an_error_that_names_it_and_leaves_nothing(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    store_rows(tmp_path / "cache", rows=torch.randn(64, 512), numbers=tuple(range(64)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # as a full disk does, the system refuses to write
    try:
        with pytest.raises(StoreError, match=rf"cannot write .*v\{suffix}: .*; free space or permit writing there"):
            export(tmp_path / "cache", tmp_path / f"v{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == ["cache"]


def test_directory_that_does_not_exist_is_an_error_that_names_the_file(tmp_path):
    store_rows(tmp_path / "cache")
    with pytest.raises(StoreError, match=r"v\.npy: No such file or directory"):
        export(tmp_path / "cache", tmp_path / "nowhere" / "v.npy")


@pytest.mark.parametrize("name", ["v", "v.csv", "v.npz", "v.pkl"])
def test_other_formats_are_refused(tmp_path, name):
    store_rows(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"export to \.npy or \.parquet"):
        export(tmp_path / "cache", tmp_path / name)


def test_missing_pyarrow_names_the_extra_before_anything_is_read(tmp_path, monkeypatch):
    home = store_rows(tmp_path / "cache")
    flip(shards(home)[0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'quatcache\[export\]'"):
        export(tmp_path / "cache", tmp_path / "v.parquet")
    assert names_in(tmp_path) == ["cache"]


def test_exporting_changes_nothing_in_the_cache(tmp_path):
    store_rows(tmp_path / "cache", TWO)
    table = store_table(tmp_path / "cache")
    before = picture(tmp_path / "cache")
    export(tmp_path / "cache", tmp_path / "v.npy", dataset=table)
    assert picture(tmp_path / "cache") == before


# Sequences -------------------------------------------------------------------------------------------------------

SPELT = {number: [[float(number), float(step)] for step in range(number % 4)] for number in range(10)}


def sequences_of(*numbers):
    mask = torch.tensor([[step < number % 4 for step in range(4)] for number in numbers])
    values = torch.full((len(numbers), 4, 2), 9.0)
    for place, number in enumerate(numbers):
        if SPELT[number]:
            values[place, : number % 4] = torch.tensor(SPELT[number])
    return PaddedSequences(values, mask)


def lists_in(target):
    elements, offsets = load(target).tolist(), load(target.with_name(f"{target.stem}.offsets.npy"))
    assert offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(elements)
    return [elements[start:end] for start, end in itertools.pairwise(offsets.tolist())]


@pytest.mark.parametrize("block", [8, 1 << 20])
def test_sequences_are_exported_as_elements_and_offsets_or_as_lists(tmp_path, parquet, monkeypatch, block):
    monkeypatch.setattr(selection, "BLOCK_BYTES", block)
    home = store_rows(tmp_path / "cache", numbers=tuple(range(9)), rows=sequences_of(*range(9)), commits=3)
    add_rows(home, 2, rows=sequences_of(7))  # of a key that was put twice the later sequence counts
    expected = {number: SPELT[7 if number == 2 else number] for number in range(9)}
    written = export(tmp_path / "cache", tmp_path / "v.npy")
    assert [path.name for path in written.files] == ["v.npy", "v.offsets.npy", "v.keys.npy"]
    elements = sum(map(len, expected.values()))
    assert (written.rows, written.shape, written.dtype) == (9, (elements, 2), "float32")
    keys = load(tmp_path / "v.keys.npy").tolist()
    found = dict(zip(map(tuple, keys), lists_in(tmp_path / "v.npy"), strict=True))
    assert {number: found[tuple(keys_of(number)[0].tolist())] for number in range(9)} == expected

    export(tmp_path / "cache", tmp_path / "v.parquet")
    columns = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert list(columns) == ["vector", "key"]
    assert [found[tuple(key)] for key in columns["key"]] == columns["vector"]


@pytest.mark.parametrize("block", [8, 1 << 20])
def test_sequences_of_a_dataset_are_exported_in_its_order(tmp_path, parquet, monkeypatch, block):
    monkeypatch.setattr(selection, "BLOCK_BYTES", block)
    root, order = tmp_path / "cache", (5, 3, 3, 0, 8, 6)
    store_rows(root, numbers=tuple(range(9)), rows=sequences_of(*range(9)), commits=3)
    single = store_table(root, order, [torch.arange(6)])
    export(root, tmp_path / "v.npy", dataset=single)
    assert lists_in(tmp_path / "v.npy") == [SPELT[number] for number in order]
    pairs = store_table(root, order, [torch.arange(3)], width=2)
    export(root, tmp_path / "p.npy", dataset=pairs)
    assert lists_in(tmp_path / "p.npy") == [SPELT[number] for number in order]
    assert load(tmp_path / "p.keys.npy").shape == (3, 2, 2)
    export(root, tmp_path / "p.parquet", dataset=pairs)
    columns = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    assert list(columns) == ["vector.0", "vector.1", "key.0", "key.1", "target.0"]
    assert columns["vector.0"] == [SPELT[number] for number in order[::2]]
    assert columns["vector.1"] == [SPELT[number] for number in order[1::2]]


def test_sequences_of_numbers_without_a_shape_are_exported(tmp_path, parquet):
    lengths = PaddedSequences(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, 1], [1, 0]]))
    store_rows(tmp_path / "cache", numbers=(1, 2), rows=lengths)
    export(tmp_path / "cache", tmp_path / "v.npy")
    assert lists_in(tmp_path / "v.npy") == [[1, 2], [3]]
    export(tmp_path / "cache", tmp_path / "v.parquet")
    assert parquet.read_table(tmp_path / "v.parquet")["vector"].to_pylist() == [[1, 2], [3]]
