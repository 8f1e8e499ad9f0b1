"""The canary: rows that the encoder no longer gives are refused before one is used, and good ones cost nothing."""

from __future__ import annotations

import json

import pytest
import torch

from quatcache import CacheConfig, CacheType
from quatcache.encoders.canary import relative_differences
from quatcache.errors import ConfigError, StaleRowsError
from quatcache.store import CacheDirectory
from quatcache.store import directory as directory_module
from quatcache.store.manifest import Manifest
from tests.fits import HashingEncoder, Model, Texts, fit, loader, same_run, texts
from tests.stores_for_tests import sealed


class Drifting(HashingEncoder):
    """An encoder whose output depends on something that its identity cannot see, as a library under it."""

    _drift = 0.0

    def forward(self, inputs):
        return super().forward(inputs) + type(self)._drift


@pytest.fixture(autouse=True)
def no_drift():
    Drifting._drift = 0.0
    yield
    Drifting._drift = 0.0


def run(save_dir, data=None, encoder=None, **settings):
    encoder = encoder or Drifting()
    model = Model({"default": encoder}, cache=CacheConfig(save_dir=save_dir, **settings))
    fit(model, loader(data or Texts(texts(40)), shuffle=True))
    return model


def report(model):
    return model.cache_callback.report.encoders["default"]


def manifest_of(save_dir):
    (path,) = save_dir.glob("encoders/*/manifest.json")
    return path, Manifest.read(path.parent)


def elsewhere(monkeypatch, **changes):
    """Be on another machine from now on."""
    real = directory_module.environment
    now = {**real(), **changes}
    monkeypatch.setattr("quatcache.encoders.opening.environment", lambda device: now)
    monkeypatch.setattr(directory_module, "environment", lambda device="cpu": now)
    return now


def test_same_environment_encodes_nothing(tmp_path):
    run(tmp_path)
    Drifting._drift = 1.0  # would be noticed if it were looked for
    model = run(tmp_path)
    assert report(model).verified == 0 and not model.encoders["default"]._collated


def test_another_library_version_has_eight_rows_compared_once(tmp_path, monkeypatch, caplog):
    run(tmp_path)
    now = elsewhere(monkeypatch, tokenizers="99.0")
    with caplog.at_level("INFO", "quatcache"):
        model = run(tmp_path)
    assert report(model).verified == 8 and report(model).encoded == 0
    assert len(model.encoders["default"]._collated) == 8
    assert "8 stored rows agree with what it gives now, after tokenizers" in caplog.text and "-> 99.0" in caplog.text
    assert manifest_of(tmp_path)[1].verified == (now,)
    assert report(run(tmp_path)).verified == 0
    elsewhere(monkeypatch, hardware="another")
    assert report(run(tmp_path)).verified == 8 and len(manifest_of(tmp_path)[1].verified) == 2


@pytest.mark.parametrize("tier", [CacheType.CPU, CacheType.DISK])
def test_rows_that_differ_stop_the_run_before_one_is_used(tmp_path, monkeypatch, tier):
    run(tmp_path)
    elsewhere(monkeypatch, torch="99.0")
    Drifting._drift = 0.5
    model = Model({"default": Drifting()}, cache=CacheConfig(tier, save_dir=tmp_path))
    told = (
        r"8 of 8 rows of encoder 'default' in .* differ from what it gives now, by up to .* \(allowed: 0.001\), after "
        r"torch .* -> 99.0; delete that directory to encode afresh, or .* verify=0"
    )
    with pytest.raises(StaleRowsError, match=told):
        fit(model, loader(Texts(texts(40))))
    assert model.train_losses == [] and type(model.encoders["default"]) is Drifting
    assert manifest_of(tmp_path)[1].verified == ()
    assert report(run(tmp_path, verify=0)).verified == 0
    with pytest.raises(StaleRowsError):
        run(tmp_path)


def test_nothing_is_added_to_rows_that_differ(tmp_path, monkeypatch):
    run(tmp_path)
    elsewhere(monkeypatch, torch="99.0")
    Drifting._drift = 0.5
    with pytest.raises(StaleRowsError):
        run(tmp_path, Texts(texts(400)))
    assert manifest_of(tmp_path)[1].rows == 40


def test_difference_of_padding_or_kernels_is_within_the_tolerance(tmp_path, monkeypatch):
    run(tmp_path)
    elsewhere(monkeypatch, torch="99.0")
    Drifting._drift = 1e-4
    assert report(run(tmp_path)).verified == 8


@pytest.mark.parametrize(("dtype", "drift"), [("float16", 0.01), ("bfloat16", 0.03)])
def test_tolerance_minds_the_storage_dtype(tmp_path, dtype, drift):
    run(tmp_path, dtype=dtype)
    Drifting._drift = drift
    assert report(run(tmp_path, dtype=dtype, verify=8)).verified == 8
    Drifting._drift = 100 * drift
    with pytest.raises(StaleRowsError):
        run(tmp_path, dtype=dtype, verify=8)


def test_number_compares_so_many_rows_in_each_run(tmp_path):
    run(tmp_path, verify=3)
    for _ in range(2):
        model = run(tmp_path, verify=3)
        assert report(model).verified == 3 and len(model.encoders["default"]._collated) == 3
    assert report(run(tmp_path, verify=1000)).verified == 40  # there are no more
    Drifting._drift = 0.5
    with pytest.raises(StaleRowsError, match="3 of 3 rows"):
        run(tmp_path, verify=3)


def test_fresh_cache_has_nothing_to_compare(tmp_path):
    assert report(run(tmp_path, verify=5)).verified == 0


def test_rows_of_a_lost_manifest_are_compared(tmp_path):
    run(tmp_path)
    manifest_of(tmp_path)[0].unlink()
    model = run(tmp_path)
    assert report(model).verified == 8 and report(model).encoded == 0
    assert report(run(tmp_path)).verified == 0


def test_new_data_on_old_rows_is_compared_where_they_meet(tmp_path, monkeypatch):
    run(tmp_path)
    elsewhere(monkeypatch, torch="99.0")
    Drifting._drift = 0.5
    other = Texts([f"new {number}" for number in range(3000)] + texts(40)[:1])
    with pytest.raises(StaleRowsError, match="1 of 1 rows"):  # sampled or met in the course of the fill
        run(tmp_path, other)


def test_canary_leaves_the_random_numbers_of_training_alone(tmp_path):
    plain = run(tmp_path)
    assert same_run(run(tmp_path, verify=4), plain)


def test_read_only_directory_is_verified_at_each_start(tmp_path, monkeypatch):
    run(tmp_path)
    elsewhere(monkeypatch, torch="99.0")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("quatcache.store.files.FileLock.acquire", refuse)
    for _ in range(2):
        assert report(run(tmp_path)).verified == 8
    assert manifest_of(tmp_path)[1].verified == ()


def test_extracted_keys_are_compared_only_where_a_row_is_surely_that_of_the_item(tmp_path):
    def first_word(text):
        return text.split()[0]

    many = ["oak a", "oak b", "elm a", "fir a", "fir b", "elm a"]
    run(tmp_path, Texts(many), key_extractors=first_word)
    model = run(tmp_path, Texts(many), key_extractors=first_word, verify=8)
    assert report(model).verified == 3 and sorted(model.encoders["default"]._collated) == ["elm a", "fir a", "oak a"]
    Drifting._drift = 0.5
    with pytest.raises(StaleRowsError, match="3 of 3"):
        run(tmp_path, Texts(many), key_extractors=first_word, verify=8)


def test_grown_dataset_is_compared_where_it_was_before(tmp_path, monkeypatch):
    run(tmp_path, Texts(texts(8)))
    elsewhere(monkeypatch, torch="99.0")
    Drifting._drift = 0.5
    with pytest.raises(StaleRowsError):
        run(tmp_path, Texts([*texts(8), *(f"new {number}" for number in range(8000))]))
    assert manifest_of(tmp_path)[1].rows == 8


def test_every_dataset_is_compared_before_an_environment_counts_as_verified(tmp_path, monkeypatch):
    old, new = Texts(texts(40)), Texts([f"new {number}" for number in range(400)])
    run(tmp_path, old)
    elsewhere(monkeypatch, torch="99.0")
    Drifting._drift = 0.5
    run(tmp_path, new)  # nothing of it is stored: there is nothing to compare
    model = Model({"default": Drifting()}, cache=CacheConfig(save_dir=tmp_path))
    with pytest.raises(StaleRowsError):
        fit(model, loader(new), loader(old))
    assert manifest_of(tmp_path)[1].verified == ()


def test_rows_that_were_added_elsewhere_are_compared_back_home(tmp_path, monkeypatch):
    new = Texts([f"new {number}" for number in range(40)])
    run(tmp_path)
    with monkeypatch.context() as patched:
        elsewhere(patched, torch="99.0")
        Drifting._drift = 0.5
        run(tmp_path, new)
        Drifting._drift = 0.0
    with pytest.raises(StaleRowsError):
        run(tmp_path, new)


def test_canary_minds_the_batch_size(tmp_path):
    sizes = []

    class Counting(Drifting):
        def collate(self, items):
            sizes.append(len(items))
            return super().collate(items)

    Counting.__qualname__ = Drifting.__qualname__
    run(tmp_path, batch_size=4)
    model = run(tmp_path, encoder=Counting(), batch_size=4, verify=30)
    assert report(model).verified == 30 and max(sizes) == 4


def test_small_rows_are_compared_as_they_are_stored(tmp_path):
    class Small(Drifting):
        def forward(self, inputs):
            return super().forward(inputs) * 1e-7

    run(tmp_path, encoder=Small(), dtype="float16")
    assert report(run(tmp_path, encoder=Small(), dtype="float16", verify=8)).verified == 8


def test_environment_of_an_older_manifest_without_the_field_is_enough(tmp_path):
    run(tmp_path)
    path, _ = manifest_of(tmp_path)
    content = json.loads(path.read_text())
    content.pop("verified")
    path.write_text(json.dumps(sealed(content)))
    assert report(run(tmp_path)).verified == 0


@pytest.mark.parametrize("verify", [-1, 1.5, True, None, "always"])
def test_setting_that_means_nothing_is_refused(verify):
    with pytest.raises(ConfigError, match=r"verify is .*; give a number of rows, 0 for none, or 'auto'"):
        CacheConfig(verify=verify)


def test_differences_are_relative_to_the_stored_row():
    stored = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0], [0.0, 0.0], [1.0, float("nan")]])
    now = torch.tensor([[3.0, 4.5], [300.0, 400.5], [0.0, 0.0], [0.0, 1e-3], [1.0, 1.0]])
    differences = relative_differences(stored, now)
    assert differences[:3].tolist() == pytest.approx([0.1, 0.001, 0.0])
    assert differences[3] > 1 and differences[4].isnan()
    assert relative_differences(torch.tensor([[1, 2]]), torch.tensor([[1, 2]])).tolist() == [0]
    assert relative_differences(torch.tensor([[1, 2]]), torch.tensor([[1, 3]])).tolist() == [float("inf")]
    assert relative_differences(stored[:1], now[:1].double()).tolist() == [float("inf")]
    assert relative_differences(stored[:1], now[:1, :1]).tolist() == [float("inf")]


def test_environment_is_that_of_the_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert directory_module.environment("cuda:1")["hardware"] == "card 1"
    assert directory_module.environment("mps")["hardware"] == "mps"
    store = CacheDirectory(tmp_path).store("0" * 32, {}, device="cuda:1")
    assert store.manifest.environment["hardware"] == "card 1"
