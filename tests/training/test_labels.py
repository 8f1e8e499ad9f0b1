"""Labels are cached where the rules allow it; then the dataset is not read while training."""

from __future__ import annotations

import pytest
from pytorch_lightning.callbacks import Callback

from quatcache import CacheConfig
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, loader, texts


class CountsReads(Callback):
    """Notes how often a dataset was read between the fill and the end of training."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_sanity_check_start(self, trainer, pl_module):
        self.before = self.dataset.reads

    def on_train_start(self, trainer, pl_module):
        self.before = self.dataset.reads

    def on_train_end(self, trainer, pl_module):
        self.during = self.dataset.reads - self.before


def run(encoders=None, groups=None, **settings):
    train = Texts(texts(40), groups)
    counts = CountsReads(train)
    model = Model(encoders, CacheConfig(**settings))
    fit(model, loader(train, shuffle=True), callbacks=[counts], max_epochs=3)
    return model.cache_callback.report, counts.during


def test_with_default_keys_and_a_single_process_fill_the_dataset_is_never_read():
    report, reads = run()
    assert (report.labels, reads) == (True, 0)
    assert "keys are the default ones" in report.labels_reason


def test_warm_the_dataset_is_read_for_the_comparison_only(tmp_path):
    run(save_dir=tmp_path)
    report, reads = run(save_dir=tmp_path)
    assert (report.labels, report.read, reads) == (True, 0, 0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"key_extractors": str.upper}, "keys come from key_extractors"),
        ({"num_workers": 1}, "the fill has 1 worker "),
        ({"labels": False}, "labels=False"),
    ],
)
def test_otherwise_labels_are_read_each_epoch(settings, reason):
    report, reads = run(**settings)
    assert (report.labels, reads) == (False, 3 * 40)
    assert reason in report.labels_reason


def test_beside_a_trainable_encoder_labels_are_not_cached():
    report, _ = run({"a": HashingEncoder(), "b": TrainableHashing()})
    assert not report.labels
    assert report.labels_reason == "encoder 'b' is not cached, so the dataset is read anyway"


@pytest.mark.parametrize("settings", [{"key_extractors": str.upper}, {"num_workers": 2}])
def test_labels_true_caches_them_with_extractors_and_workers(settings):
    report, reads = run(labels=True, **settings)
    assert (report.labels, reads) == (True, 0)


@pytest.mark.parametrize("settings", [{"key_extractors": str.upper}, {"key_extractors": str.upper, "num_workers": 2}])
def test_labels_true_keeps_them_for_the_runs_that_follow(settings, tmp_path):
    for samples in (40, 0):
        report, reads = run(labels=True, save_dir=tmp_path, **settings)
        assert (report.labels, report.read, reads) == (True, samples, 0)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([i % 5 if i < 30 else float(i % 5) for i in range(40)], "do not make tensors of one shape"),
        (["a class"] * 40, "targets such as 'a class' do not make tensors"),
    ],
)
def test_targets_that_make_no_tensor_are_not_cached(groups, reason):
    import torch

    class AnyTarget(torch.nn.Module):
        def forward(self, embeddings, groups):
            return embeddings.square().mean()

    train = Texts(texts(40), groups)
    model = Model(cache=CacheConfig(), loss=AnyTarget())
    fit(model, loader(train))
    assert not model.cache_callback.report.labels
    assert reason in model.cache_callback.report.labels_reason


def test_one_line_says_what_is_cached_and_why_labels_are(caplog, tmp_path):
    with caplog.at_level("INFO", logger="quatcache"):
        run(save_dir=tmp_path)
    lines = [record.getMessage() for record in caplog.records if "labels" in record.getMessage()]
    assert len(lines) == 1
    assert "encoder 'default' on CPU (AUTO: 2.6 kB of " in lines[0] and "): 40 rows, 2.6 kB from " in lines[0]
    assert "40 items encoded in" in lines[0]
    assert lines[0].endswith("; labels cached.")  # the reason is given where they are not
