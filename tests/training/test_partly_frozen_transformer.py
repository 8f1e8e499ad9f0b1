"""MiniLM whose first four layers are cached and whose last two are trained, on real texts."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from quatcache import CacheConfig, SimilarityPairSample
from quatcache.encoders import LowerLayersEncoder
from quatcache.heads import UpperLayersHead
from quatcache.losses import MultipleNegativesRankingLoss
from tests.fits import Model, fit, loader


class Recording(LowerLayersEncoder):
    """Counts the texts that it encodes."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self._rows = 0

    def forward(self, inputs):
        states = super().forward(inputs)
        self._rows += len(states)
        return states


class PartlyFrozen(Model):
    """Trains the upper layers, and perhaps a line above them, with plain SGD."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.05)


@pytest.fixture(scope="module")
def diagnoses():
    """ICD-10-CM diagnosis texts of mixed lengths with their chapters, numbered from 0."""
    pytest.importorskip("simple_icd_10_cm")
    from quatcache.demo.icd10 import packaged_tabular, read_tabular

    found = read_tabular(packaged_tabular())[:: 46_000 // 176][:176]
    chapters = sorted({one.chapter for one in found})
    return [(one.text, chapters.index(one.chapter)) for one in found]


def trained(path, data, cache=None, loss=None, **settings):
    torch.manual_seed(6)
    upper = UpperLayersHead(path, after=4)
    head = upper if loss else nn.Sequential(upper, nn.Linear(384, 24))
    model = PartlyFrozen({"default": Recording(path, layers=4)}, cache, loss, head)
    run = fit(model, functools.partial(loader, data, shuffle=True), max_epochs=1, **settings)
    assert run.global_step == len(data) // 8 >= 20
    return model


def farthest(one, other):
    return max(abs(a - b) for a, b in zip(one.train_losses, other.train_losses, strict=True))


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_cached_lower_layers_train_the_upper_ones_alike(minilm_path, diagnoses, tier, tmp_path):
    config = CacheConfig(tier, save_dir=tmp_path, batch_size=16)
    plain = trained(minilm_path, diagnoses)
    filled = trained(minilm_path, diagnoses, config)
    assert filled.cache_callback.report.encoded == len({text for text, _ in diagnoses})
    assert len(plain.train_losses) >= 20 and max(plain.train_losses) > 2
    assert farthest(plain, filled) <= 1e-4
    warm = trained(minilm_path, diagnoses, config)
    assert warm.cache_callback.report.encoded == 0 and warm.encoders["default"]._rows == 0
    assert warm.train_losses == filled.train_losses
    start = UpperLayersHead(minilm_path, after=4).state_dict()
    moved = [name for name, weight in filled.head[0].state_dict().items() if not torch.equal(weight, start[name])]
    assert any(".0." in name for name in moved) and any(".1." in name for name in moved)  # both layers were trained


def test_pairs_train_the_upper_layers_alike(minilm_path, diagnoses, tmp_path):
    data = [
        SimilarityPairSample(a, b, score=1.0, subgroup=0)
        for (a, _), (b, _) in zip(diagnoses[:160], diagnoses[5:165], strict=True)
    ]
    plain = trained(minilm_path, data, loss=MultipleNegativesRankingLoss())
    cached = trained(minilm_path, data, CacheConfig("disk", save_dir=tmp_path), MultipleNegativesRankingLoss())
    assert farthest(plain, cached) <= 1e-4


def test_half_precision_storage_stays_close(minilm_path, diagnoses, tmp_path):
    plain = trained(minilm_path, diagnoses)
    cached = trained(minilm_path, diagnoses, CacheConfig(save_dir=tmp_path, dtype="float16"))
    assert 0 < farthest(plain, cached) <= 2e-2
