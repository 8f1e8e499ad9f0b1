"""Sequences and feature maps through real fits: cached training is uncached training, whatever shape a value has."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn

from quatcache import CacheConfig, PaddedSequences, SimilarityPairSample, cli
from quatcache.encoders.canary import relative_differences
from quatcache.errors import EncoderOutputError, NotFrozenError, StaleRowsError
from quatcache.losses import MultipleNegativesRankingLoss
from quatcache.store import CacheDirectory
from quatcache.store.inspection import check_cache, inspect_cache
from quatcache.training.plan import plan
from tests.fits import Failing, HashingEncoder, Model, Texts, fit, loader, same_run, texts
from tests.ragged import LettersEncoder, MapHead, PatchesEncoder, SumHead

pairs = [
    SimilarityPairSample(a, b, score=float(i % 4 > 0), subgroup=i % 2)
    for i, (a, b) in enumerate(zip(texts(50, 30), texts(50, 40)[::-1], strict=True))
]
SAMPLES = {
    "groups": (lambda: Texts(texts(50, 30)), nn.CrossEntropyLoss),
    "pairs": (lambda: pairs, MultipleNegativesRankingLoss),
}


def model_of(cache=None, encoder=None, head=None, loss=None):
    torch.manual_seed(2)
    return Model({"default": encoder or LettersEncoder()}, cache, loss, head or SumHead())


def run(cache=None, samples="groups", encoder=None, **settings):
    data, loss = SAMPLES[samples]
    model = model_of(cache, encoder, loss=loss())
    fit(model, functools.partial(loader, data(), shuffle=True), functools.partial(loader, data()), **settings)
    return model


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels cached", "labels read"])
def test_sequences_give_the_same_losses_and_head(samples, tier, labels, tmp_path):
    config = CacheConfig(tier, labels=labels, save_dir=tmp_path, batch_size=7)
    plain, filled, warm = run(None, samples), run(config, samples), run(config, samples)
    assert same_run(plain, filled) and same_run(plain, warm)
    assert filled.cache_callback.report.encoded == (30 if samples == "groups" else 40)
    assert warm.cache_callback.report.encoded == 0 and warm.encoders["default"]._rows == 0


def test_sequences_in_memory_alone_give_the_same_losses_and_head():
    assert same_run(run(None), run(CacheConfig()))


def test_many_shards_give_the_same_losses_and_head(monkeypatch, tmp_path):
    monkeypatch.setattr("quatcache.store.disk.SHARD_BYTES", 1)  # each batch of the fill is a shard of its own
    cached = run(CacheConfig("disk", save_dir=tmp_path, batch_size=4))
    assert len(list(tmp_path.rglob("shard-*"))) == 8
    assert same_run(run(None), cached)


def test_what_an_encoder_leaves_in_the_padding_changes_nothing(tmp_path):
    plain = run(encoder=LettersEncoder(tidy=False))
    assert same_run(plain, run(CacheConfig("disk", save_dir=tmp_path), encoder=LettersEncoder(tidy=False)))


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_storage_gives_rounded_sequences_in_the_dtype_of_the_encoder(tmp_path, tier, dtype):
    rounded = LettersEncoder()
    rounded.table = rounded.table.to(getattr(torch, dtype)).float()
    cached = run(CacheConfig(tier, save_dir=tmp_path, dtype=dtype))
    assert same_run(run(encoder=rounded), cached)
    (store,) = inspect_cache(tmp_path).stores
    assert store.stored == dtype and store.manifest.row_shape == (None, 8)
    assert store.manifest.longest == max(map(len, texts(50, 30)))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_every_precision_gives_the_same_losses_and_head(precision, tmp_path):
    cached = run(CacheConfig(save_dir=tmp_path), precision=precision)
    assert same_run(run(precision=precision), cached)


def test_grown_dataset_encodes_what_is_new(tmp_path):
    config = CacheConfig("disk", save_dir=tmp_path, labels=True)
    small, grown = Texts(texts(40)), Texts(texts(60))
    first, second = model_of(config), model_of(config)
    fit(first, loader(small))
    fit(second, loader(grown))
    assert (first.cache_callback.report.encoded, second.cache_callback.report.encoded) == (40, 20)
    plain = model_of()
    fit(plain, loader(grown))
    assert same_run(plain, second)


def test_fill_that_was_interrupted_goes_on_after_its_last_commit(monkeypatch, tmp_path):
    monkeypatch.setattr("quatcache.store.disk.SHARD_BYTES", 1)
    forward = LettersEncoder.forward

    def failing(encoder, inputs):
        if encoder._rows >= 16:
            raise RuntimeError("the machine went away")
        return forward(encoder, inputs)

    monkeypatch.setattr(LettersEncoder, "forward", failing)
    config = CacheConfig("disk", save_dir=tmp_path, batch_size=4)
    with pytest.raises(RuntimeError, match="went away"):
        run(config)
    monkeypatch.setattr(LettersEncoder, "forward", forward)
    again = run(config)
    done = 30 - again.cache_callback.report.encoded
    assert done == 14  # the first batch, of the two shortest, was encoded twice
    assert same_run(run(None), again)


def test_damaged_shard_of_sequences_is_encoded_again(monkeypatch, tmp_path):
    monkeypatch.setattr("quatcache.store.disk.SHARD_BYTES", 1)
    config = CacheConfig("disk", save_dir=tmp_path, batch_size=10)
    run(config)
    shard = sorted(tmp_path.rglob("shard-*"))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 0xFF
    shard.write_bytes(bytes(content))
    assert [found.path for found in check_cache(inspect_cache(tmp_path)).findings] == [shard]
    again = run(config)
    assert 0 < again.cache_callback.report.encoded <= 10
    assert same_run(run(None), again)
    assert not check_cache(inspect_cache(tmp_path)).findings


def test_lost_manifest_of_sequences_is_made_again(tmp_path):
    config = CacheConfig("disk", save_dir=tmp_path, verify=0)
    run(config)
    (manifest,) = tmp_path.rglob("manifest.json")
    before = json.loads(manifest.read_text())
    manifest.unlink()
    again = run(config)
    assert again.cache_callback.report.encoded == 0 and same_run(run(None), again)
    after = json.loads(manifest.read_text())
    assert [after[name] for name in ("version", "row_shape", "shards")] == [2, [None, 8], before["shards"]]


@pytest.mark.parametrize("change", ["values", "lengths"])
def test_canary_compares_sequences(monkeypatch, tmp_path, change):
    run(CacheConfig(save_dir=tmp_path))
    same = run(CacheConfig(save_dir=tmp_path, verify=6))
    assert same.cache_callback.report.encoders["default"].verified == 6
    forward = LettersEncoder.forward

    def changed(encoder, inputs):
        given = forward(encoder, inputs)
        if change == "values":
            return PaddedSequences(given.values * 1.5, given.mask)
        return PaddedSequences(given.values[:, 1:], given.mask[:, 1:])

    monkeypatch.setattr(LettersEncoder, "forward", changed)  # the identity cannot see it
    with pytest.raises(StaleRowsError, match="3 of 3 rows"):
        run(CacheConfig(save_dir=tmp_path, verify=6))


def test_difference_of_sequences_is_that_of_all_their_elements_and_infinite_where_lengths_differ():
    stored = PaddedSequences(torch.tensor([[3.0, 4.0, 0.0], [3.0, 4.0, 0.0], [1.0, 2.0, 2.0]]).unsqueeze(-1),
                             torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]))  # fmt: skip
    now = PaddedSequences(torch.tensor([[3.0, 4.5], [3.0, 4.0], [1.0, 2.0]]).unsqueeze(-1), torch.ones(3, 2).long())
    assert relative_differences(stored, now).tolist() == [0.1, float("inf"), float("inf")]
    assert relative_differences(now, stored).tolist()[1:] == [float("inf")] * 2
    assert relative_differences(stored, stored.to(torch.float64)).tolist() == [float("inf")] * 3
    assert relative_differences(stored, stored.values[..., 0]).tolist() == [float("inf")] * 3


def test_partial_cache_of_sequences_gives_the_same_losses_and_head(tmp_path):
    cached = run(CacheConfig(max_size="6kB"))
    report = cached.cache_callback.report
    assert report.encoders["default"].nbytes <= 6000
    assert 5 <= report.encoders["default"].rows < 30
    assert same_run(run(None), cached)


def test_lazy_cache_of_sequences_gives_the_same_losses_and_head(tmp_path):
    cached = run(CacheConfig(fill="lazy", save_dir=tmp_path, dtype="float16"))
    rounded = LettersEncoder()
    rounded.table = rounded.table.half().float()
    assert same_run(run(encoder=rounded), cached)


def test_encoder_that_gives_other_lengths_each_time_is_refused():
    encoder = LettersEncoder()
    forward, calls = encoder.forward, []

    def unsteady(inputs):
        calls.append(1)
        given = forward(inputs)
        return PaddedSequences(given.values, given.mask & (torch.arange(given.shape[1]) >= len(calls) % 2))

    encoder.__dict__["forward"] = unsteady
    with pytest.raises(NotFrozenError, match="differ in the lengths of sequences"):
        run(CacheConfig(), encoder=encoder)


def test_encoder_that_gives_nan_is_refused_but_padding_may_be_nan():
    encoder = LettersEncoder()
    encoder.table[ord("z")] = float("nan")
    with pytest.raises(EncoderOutputError, match="NaN or infinity for item"):
        run(CacheConfig(), encoder=encoder)  # hazel
    encoder = LettersEncoder()
    forward = encoder.forward

    def careless(inputs):
        given = forward(inputs)
        return PaddedSequences(given.values.masked_fill(~given.mask[..., None], float("nan")), given.mask)

    encoder.__dict__["forward"] = careless
    assert run(CacheConfig(), encoder=encoder).cache_callback.report.encoded == 30


@pytest.mark.parametrize("cache", [None, CacheConfig()], ids=["uncached", "cached"])
def test_sequences_beside_another_encoder_are_refused_in_a_sentence(cache):
    model = Model({"a": HashingEncoder(), "letters": LettersEncoder()}, cache)
    with pytest.raises(EncoderOutputError, match="'letters' gives sequences, which cannot be concatenated"):
        fit(model, loader(Texts(texts(20))))


def test_model_of_sequences_encodes_and_serves(tmp_path):
    model = run(CacheConfig())
    model.eval()
    words = ["elm", "a longer text", "fir"]
    expected = torch.cat([model({"default": model.encoders["default"].collate([word])}) for word in words])
    assert torch.allclose(model.encode(words, batch_size=2), expected.detach(), atol=1e-6)
    assert torch.equal(model.encode(words), model.servable().encode(words))


def test_plan_counts_the_bytes_of_sequences(tmp_path):
    data = Texts(texts(30))
    found = plan(model_of(CacheConfig(save_dir=tmp_path)), loader(data), sample=30)
    (encoder,) = found.encoders
    assert encoder.row_shape == (None, 8) and encoder.to_encode == 30
    _, (row,) = found.table()
    assert "Lx8 float32" in row
    fit(model := model_of(CacheConfig(save_dir=tmp_path)), loader(data))
    assert encoder.total_bytes == pytest.approx(model.cache_callback.report.encoders["default"].nbytes, rel=0.02)
    assert json.loads(json.dumps(found.to_json()))["encoders"][0]["row_shape"] == [None, 8]


def test_inspecting_shows_the_longest_sequence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run(CacheConfig(save_dir=tmp_path))
    longest = max(map(len, texts(50, 30)))
    assert cli.main(["cache", "inspect", str(tmp_path)]) == 0
    assert f"<={longest}x8 float32" in capsys.readouterr().out
    assert cli.main(["cache", "inspect", str(tmp_path), "--json"]) == 0
    (store,) = json.loads(capsys.readouterr().out)["stores"]
    assert (store["row_shape"], store["longest"]) == ([None, 8], longest)
    assert cli.main(["cache", "verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_feature_maps_give_the_same_losses_and_head(tmp_path, tier, dtype):
    data = [((seed % 30, 1.0 + seed % 2), seed % 5) for seed in range(40)]

    def trained(cache, encoder=None):
        model = model_of(cache, encoder or PatchesEncoder(), MapHead())
        fit(model, functools.partial(loader, data, shuffle=True), loader(data[:16]))
        return model

    class Rounded(PatchesEncoder):
        def forward(self, inputs):
            return super().forward(inputs).half().float()

    config = CacheConfig(tier, save_dir=tmp_path, dtype=dtype)
    plain = trained(None, Rounded() if dtype else None)
    filled, warm = trained(config), trained(config)
    assert same_run(plain, filled) and same_run(plain, warm)
    assert filled.cache_callback.report.encoded == 30 and warm.cache_callback.report.encoded == 0
    (store,) = CacheDirectory(tmp_path).path.glob("encoders/*")
    assert json.loads((store / "manifest.json").read_text())["row_shape"] == [3, 4, 5]


def test_model_is_left_as_found_after_an_error():
    model = model_of(CacheConfig())
    encoder = model.encoders["default"]
    with pytest.raises(ValueError, match="stop"):
        fit(model, loader(Texts(texts(30))), callbacks=[Failing(ValueError("stop"))])
    assert model.encoders["default"] is encoder
    assert isinstance(encoder(encoder.collate(["elm"])), PaddedSequences)
