"""The report: what a cache cost and won, counted in rows that were used and in time that was taken."""

from __future__ import annotations

import csv

import pytest
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger

from quatcache import CacheConfig
from quatcache.errors import StoreError
from quatcache.store.manifest import Manifest
from quatcache.training.report import CacheReport, EncoderReport
from quatcache.units import readable_time
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, loader, texts


class Ticking:
    """A clock that each look moves on."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def monotonic(self):
        self.now += self.step
        return self.now


def one(**changes):
    known = {"rows": 90, "nbytes": 5760, "asked": 100, "encoded": 90, "duplicates": 10, "pace": 0.1}
    return EncoderReport("default", "CPU", **{**known, "served": 300, **changes})


def report(*encoders, **changes):
    known = {"fill_seconds": 12.0, "epoch_seconds": [0.9, 0.1, 0.2]}
    return CacheReport({encoder.name: encoder for encoder in encoders or (one(),)}, **{**known, **changes})


def test_epoch_without_the_cache_is_the_one_with_it_and_the_encoding_of_what_it_used():
    assert report().cached_epoch == 0.2
    assert report().uncached_epoch == pytest.approx(0.2 + 100 * 0.1)
    assert report().break_even_epoch == 2  # 12.0 + 2 * 0.2 < 2 * 10.2, and not yet after one
    assert report(fill_seconds=9.0).break_even_epoch == 1
    both = report(one(), EncoderReport("other", pace=0.5, served=300))
    assert both.uncached_epoch == pytest.approx(0.2 + 10.0 + 50.0)


def test_what_was_not_measured_is_not_told():
    warm = report(one(encoded=0, hits=90, pace=None))
    assert warm.uncached_epoch is None and warm.break_even_epoch is None
    assert warm.gain() == "fill 12.0 s; an epoch 0.2 s"
    assert {"cache/epoch_seconds_uncached", "cache/break_even_epoch"}.isdisjoint(warm.metrics())
    assert report(epoch_seconds=[]).gain() == "fill 12.0 s"
    half = report(one(), EncoderReport("other", hits=9, served=300))
    assert half.uncached_epoch is None


def test_a_fit_counts_the_rows_and_the_time_of_its_epochs(monkeypatch):
    monkeypatch.setattr("quatcache.training.receipt.time", Ticking(1.0))
    monkeypatch.setattr("quatcache.encoders.calls.time", Ticking(0.5))
    model = Model(cache=CacheConfig(batch_size=8))
    fit(model, loader(Texts(texts(40))), loader(Texts(texts(10))), max_epochs=3, limit_train_batches=4)
    found = model.cache_callback.report
    assert found.epoch_seconds == [1.0, 1.0, 1.0]
    assert found.encoders["default"].served == 3 * (4 * 8 + 10)
    assert found.encoders["default"].pace == 7 * 0.5 / 40  # sorted once, and encoded in a short call and five more
    assert found.uncached_epoch == pytest.approx(1.0 + 42 * 3.5 / 40)


def test_encoding_in_steps_counts_as_filling_and_not_as_an_epoch_from_the_cache(monkeypatch):
    for module, step in (("training.receipt", 10.0), ("encoders.calls", 0.25), ("training.session", 0.0)):
        monkeypatch.setattr(f"quatcache.{module}.time", Ticking(step))
    model = Model(cache=CacheConfig(fill="lazy"))
    fit(model, loader(Texts(texts(40))))
    found = model.cache_callback.report
    spent = 5 * 0.5 + 0.25  # five steps, in each of which items are sorted and encoded; in the first one in two calls
    assert found.epoch_seconds == [10.0 - spent, 10.0]
    assert found.fill_seconds == spent


def test_warm_start_knows_the_pace_of_the_fill(tmp_path, monkeypatch):
    monkeypatch.setattr("quatcache.training.receipt.time", Ticking(1.0))
    monkeypatch.setattr("quatcache.encoders.calls.time", Ticking(0.5))
    reports = []
    for count in (40, 40, 80, 80):
        model = Model(cache=CacheConfig(save_dir=tmp_path, batch_size=8))
        fit(model, loader(Texts(texts(count))))
        reports.append(model.cache_callback.report)
    assert [found.encoders["default"].pace for found in reports] == [7 * 0.5 / 40] * 4
    assert [found.encoded for found in reports] == [40, 0, 40, 0]
    assert reports[3].uncached_epoch == 1.0 + 80 * 7 * 0.5 / 40
    (path,) = tmp_path.glob("encoders/*")
    assert Manifest.read(path).effort == (80, 7.0)


def test_pace_that_cannot_be_written_down_harms_nothing(tmp_path, monkeypatch):
    def refuse(*args):
        raise StoreError("read-only")

    monkeypatch.setattr("quatcache.store.recovery.locked", refuse)
    model = Model(cache=CacheConfig(save_dir=tmp_path))
    fit(model, loader(Texts(texts(20))))
    assert model.cache_callback.report.encoded == 20


def test_encoding_too_cheap_to_be_seen_has_no_epoch_after_which_it_pays():
    for pace, epoch in ((1e-20, 1.0), (1e-320, 0.0)):
        cheap = report(one(pace=pace, served=1), epoch_seconds=[epoch])
        assert cheap.uncached_epoch is not None and cheap.break_even_epoch is None
        assert "without the cache about" in cheap.gain() and "ahead" not in cheap.gain()
        assert "cache/break_even_epoch" not in cheap.metrics()


def test_rows_are_counted_through_reloads_of_the_loaders():
    class Reloads(Model):
        reloads = 0

        def train_dataloader(self):
            self.reloads += 1
            return loader(Texts(texts(40 + self.reloads)))

    model = Reloads(cache=CacheConfig())
    fit(model, None, max_epochs=4, reload_dataloaders_every_n_epochs=1)
    assert model.reloads > 1
    assert model.cache_callback.report.encoders["default"].served == sum(41 + epoch for epoch in range(4))


@pytest.mark.parametrize("name", ["[/b]", "[red]x[/red]"])
def test_name_of_an_encoder_is_no_markup(capsys, name):
    fit(Model({name: HashingEncoder()}, CacheConfig()), loader(Texts(texts(8))), enable_progress_bar=True, max_epochs=1)
    assert f"│ {name} " in capsys.readouterr().out


def test_loggers_get_the_numbers(tmp_path):
    model = Model(cache=CacheConfig())
    run = fit(model, loader(Texts(texts(40, distinct=30))), logger=CSVLogger(tmp_path, name="", version=""))
    with (tmp_path / "metrics.csv").open() as file:
        (last,) = [row for row in csv.DictReader(file) if row.get("cache/rows")]
    assert (last["cache/rows"], last["cache/encoded"], last["cache/duplicates"]) == ("30.0", "30.0", "10.0")
    assert float(last["cache/epoch_seconds_uncached"]) > float(last["cache/epoch_seconds"]) > 0
    assert int(last["step"]) == run.global_step


def test_what_is_logged_is_what_was_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("quatcache.training.session.time", Ticking(8.0))
    for count in (10, 50):
        model, logger = Model(cache=CacheConfig(save_dir=tmp_path / "cache")), CSVLogger(tmp_path, name=str(count))
        fit(model, loader(Texts(texts(count, 30))), logger=logger)
    logger.finalize("success")
    with (tmp_path / "50" / "version_0" / "metrics.csv").open() as file:
        (last,) = [row for row in csv.DictReader(file) if row.get("cache/rows")]
    logged = {name.removeprefix("cache/"): float(value) for name, value in last.items() if name.startswith("cache/")}
    counts = {"rows": 30.0, "bytes": 30 * 16 * 4.0, "encoded": 20.0, "encoded_in_steps": 0.0, "hits": 20.0}
    assert {name: logged[name] for name in counts} == counts
    assert (logged["duplicates"], logged["fill_seconds"]) == (10.0, 8.0)


@pytest.mark.parametrize("shown", [True, False])
def test_table_is_shown_where_there_are_progress_bars(capsys, shown):
    fit(Model(cache=CacheConfig()), loader(Texts(texts(40))), enable_progress_bar=shown)
    out = capsys.readouterr().out
    assert ("│ default │ CPU  │   40 │" in out) is shown
    assert ("quatcache: fill " in out and "without the cache about" in out) is shown


def test_nothing_is_told_of_a_run_without_a_cache(capsys, tmp_path):
    for cache, encoder in ((None, HashingEncoder()), (CacheConfig(), TrainableHashing())):
        model = Model({"default": encoder}, cache=cache)
        fit(model, loader(Texts(texts(16))), enable_progress_bar=True, logger=CSVLogger(tmp_path, name="", version=""))
        assert "quatcache" not in capsys.readouterr().out
        written = tmp_path / "metrics.csv"
        assert not written.exists() or "cache/" not in written.read_text()


def test_times_are_readable():
    assert [readable_time(seconds) for seconds in (0.0, 0.09, 99.9, 100, 5999, 6000, 172799, 172800)] == [
        "0.0 ms", "90.0 ms", "99.9 s", "1.7 min", "100.0 min", "1.7 h", "48.0 h", "2.0 days",
    ]  # fmt: skip


def test_table_names_each_encoder():
    columns = {column.header: [str(cell) for cell in column.cells] for column in report(one(hits=3)).table().columns}
    assert columns == {
        "encoder": ["default"], "tier": ["CPU"], "rows": ["90"], "size": ["5.8 kB"], "encoded": ["90"],
        "hits": ["3"], "duplicates": ["10"],
    }  # fmt: skip


def test_epoch_at_which_the_cache_would_be_ahead_is_not_said_to_be_reached():
    assert report(epochs=3).gain().endswith("; ahead after epoch 2")
    slow = report(fill_seconds=520.0, epochs=3)
    assert slow.break_even_epoch == 53
    assert slow.gain().endswith("; not yet ahead: that would take 53 epochs")
    assert slow.metrics()["cache/break_even_epoch"] == 53


def test_epochs_that_the_cache_did_not_serve_are_told():
    class Unfreezes(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.configured.requires_grad_(True)

    class Frozen(TrainableHashing):
        trainable = False

    encoder = Frozen()
    encoder.requires_grad_(False)
    model = Model({"default": encoder}, CacheConfig())
    model.__dict__["configured"] = encoder
    fit(model, loader(Texts(texts(20))), callbacks=[Unfreezes()], max_epochs=3)
    found = model.cache_callback.report
    assert (len(found.epoch_seconds), found.epochs) == (1, 3)
    assert "; cached for 1 of 3 epochs" in found.gain()
    assert "cached for" not in report(epochs=3).gain()


def test_the_line_says_what_was_found_and_the_reason_only_where_labels_are_not_cached(tmp_path):
    lines = []
    for settings in ({}, {}, {"labels": False}):
        model = Model(cache=CacheConfig(save_dir=tmp_path, **settings))
        fit(model, loader(Texts(texts(40))), max_epochs=1)
        lines.append(model.cache_callback.report.line())
    assert "; 40 items encoded in " in lines[0] and "found" not in lines[0] and lines[0].endswith("; labels cached.")
    assert "; 40 rows found, 0 items encoded in " in lines[1] and lines[1].endswith("; labels cached.")
    assert lines[2].endswith("; labels not cached: labels=False.")


def test_one_row_is_not_plural():
    single = report(one(rows=1, encoded=1, hits=1), labels=True).line()
    assert ": 1 row, " in single and "; 1 row found, 1 item encoded in " in single


@pytest.mark.parametrize(
    ("encoders", "cache", "reason"),
    [
        ({"default": TrainableHashing}, CacheConfig(), "encoder 'default' is trainable"),
        ({"a": HashingEncoder, "b": TrainableHashing}, CacheConfig("none"),
         "encoder 'a' is on tier NONE, encoder 'b' is trainable"),
    ],
)  # fmt: skip
def test_that_nothing_is_cached_is_logged_with_the_reason(caplog, encoders, cache, reason):
    model = Model({name: kind() for name, kind in encoders.items()}, cache)
    with caplog.at_level("INFO", logger="quatcache"):
        fit(model, loader(Texts(texts(16))))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("quatcache")] == [
        f"nothing is cached: {reason}."
    ]
    assert str(model.cache_callback.report) == f"nothing is cached: {reason}."


def test_where_something_is_cached_or_no_cache_was_asked_for_nothing_is_said_of_that(caplog):
    with caplog.at_level("INFO", logger="quatcache"):
        fit(Model({"a": HashingEncoder(), "b": TrainableHashing()}, CacheConfig()), loader(Texts(texts(16))))
        fit(Model(), loader(Texts(texts(16))))
    assert "nothing is cached" not in caplog.text


def test_a_report_is_printed_as_its_table_and_its_gain():
    lines = str(report(one(hits=3), epochs=3)).splitlines()
    assert lines[3].split() == [
        "│",
        "default",
        "│",
        "CPU",
        "│",
        "90",
        "│",
        "5.8",
        "kB",
        "│",
        "90",
        "│",
        "3",
        "│",
        "10",
        "│",
    ]
    assert lines[-1] == report(epochs=3).gain()
