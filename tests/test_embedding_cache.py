"""EmbeddingCache: rows as the encoder gives them, each distinct item encoded once, shared with fits."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quatcache import CacheConfig, EmbeddingCache, PaddedSequences
from quatcache.encoders import ModuleEncoder, SentenceTransformerEncoder, TransformersEncoder, encoder_rows
from quatcache.encoders.deferred import is_loaded
from quatcache.errors import (
    CollateError,
    ConfigError,
    EncoderOutputError,
    KeyTypeError,
    NotFrozenError,
    StaleRowsError,
    StoreError,
)
from quatcache.store import directory as directory_module
from tests.caches_for_tests import shards
from tests.committed import committed_rows
from tests.encoders_for_tests import TableEncoder
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, loader, texts
from tests.ragged import LettersEncoder
from tests.tiny import write_tiny

TEXTS = texts(40)


def direct(encoder, items):
    """Rows as the encoder itself gives them, one by one."""
    with torch.no_grad():
        return torch.cat([encoder(encoder.collate([item])) for item in items])


def cache(save_dir=None, encoder=None, **given):
    return EmbeddingCache(encoder or HashingEncoder(), save_dir, **given)


def collated(cached):
    return cached.encoder._collated


class TestRows:
    @given(
        calls=st.lists(st.lists(st.integers(0, 31), max_size=20), min_size=1, max_size=5),
        batch_size=st.integers(1, 7),
        rows=st.none() | st.integers(1, 12),
        on_disk=st.booleans(),
        dtype=st.sampled_from([None, "float16"]),
    )
    @settings(max_examples=60, deadline=None)
    def test_rows_are_those_of_the_encoder_whatever_was_asked_before(
        self, tmp_path_factory, calls, batch_size, rows, on_disk, dtype
    ):
        encoder = TableEncoder()
        save_dir = tmp_path_factory.mktemp("cache") if on_disk else None
        cached = cache(save_dir, encoder, max_size=None if rows is None else rows * 16, dtype=dtype)
        exact = encoder.table if dtype is None else encoder.table.half().float()
        for items in calls:
            found = cached.encode(items, batch_size)
            assert found.shape == (len(items), 4) and torch.equal(found, exact[items])
            iterated = list(cached.encode_iter(iter(items), batch_size, window=batch_size))
            assert torch.equal(torch.cat([*iterated, torch.empty(0, 4)]), exact[items])
        stats = cached.stats
        assert stats.asked == 2 * sum(map(len, calls)) == stats.hits + stats.computed + stats.duplicates
        if rows is None:
            assert stats.rows == stats.computed == len({item for items in calls for item in items})
        else:
            assert stats.rows <= max(rows, 1) * (2 if dtype else 1)

    def test_rows_equal_those_of_sentence_transformers(self, minilm):
        items = [*TEXTS, TEXTS[0], "a much longer text " * 30]
        found = cache(encoder=minilm).encode(items)
        assert torch.allclose(found, minilm.encode(items, convert_to_tensor=True), atol=1e-6)
        assert found.device.type == "cpu" and not found.requires_grad and not found.is_inference()

    def test_a_transformers_model_is_cached_by_its_adapter(self, bert, tokenizer):
        encoder = TransformersEncoder(bert, tokenizer, normalize=True)
        cached = cache(encoder=encoder)
        assert torch.allclose(cached.encode(TEXTS[:3]), direct(encoder, TEXTS[:3]), atol=1e-6)
        cached.encode(TEXTS[:3])
        assert cached.stats.computed == 3 and cached.stats.hits == 3

    def test_items_may_come_in_anything_that_can_be_made_a_list(self):
        cached, expected = cache(), direct(HashingEncoder(), TEXTS[:5])
        for items in (TEXTS[:5], tuple(TEXTS[:5]), np.array(TEXTS[:5]), iter(TEXTS[:5])):
            assert torch.equal(cached.encode(items), expected)
        assert cached.stats.computed == 5  # a text is the same item in a list and in an array

    def test_no_items_give_no_rows_of_the_same_width(self, tmp_path):
        assert cache(tmp_path).encode([]).shape == (0, 16)
        assert cache(encoder=lambda items: [[1.0, 2.0] for _ in items]).encode([]).shape == (0, 0)
        filled = cache(encoder=lambda items: np.ones((len(items), 2), np.float16))
        filled.encode(["a"])
        assert filled.encode([]).shape == (0, 2) and filled.encode([]).dtype is torch.float16
        assert len(list(filled.encode_iter([]))) == 0 and filled.contains([]).tolist() == []

    def test_an_array_is_given_where_one_is_wanted(self):
        found = cache().encode(TEXTS[:3], convert_to_numpy=True)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (3, 16)
        halved = cache(encoder=lambda items: torch.ones(len(items), 2, dtype=torch.bfloat16))
        assert halved.encode(["a"], convert_to_numpy=True).dtype == np.float32

    def test_sequences_are_given_padded(self, tmp_path):
        cached = cache(tmp_path, LettersEncoder())
        for again in (cached, cache(tmp_path, LettersEncoder())):
            found = again.encode(["oak", "a", "oak"])
            assert isinstance(found, PaddedSequences) and found.lengths.tolist() == [3, 1, 3]
            assert torch.equal(found.values[1, 0], LettersEncoder().table[ord("a")])
        assert len(again.encode([])) == 0
        with pytest.raises(ConfigError, match="the encoder gives sequences of different lengths; leave it False"):
            cached.encode(["oak"], convert_to_numpy=True)

    def test_an_answer_may_be_written_to(self):
        cached = cache()
        cached.encode(TEXTS[:2]).zero_()
        cached.encode(TEXTS[:2]).zero_()
        assert torch.equal(cached.encode(TEXTS[:2]), direct(HashingEncoder(), TEXTS[:2]))

    def test_autocast_of_the_caller_is_not_that_of_the_rows(self):
        linear = nn.Linear(4, 4)

        def made(**given):
            return cache(encoder=ModuleEncoder(linear, torch.tensor, 4), **given)

        items, plain = [[0.1, 0.2, 0.3, 0.4]], made()
        mixed = made(precision="bf16-mixed")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert plain.encode(items).dtype is torch.float32
        assert mixed.encode(items).dtype is torch.bfloat16
        assert plain.identity.digest != mixed.identity.digest

    def test_rows_in_memory_are_gone_with_the_cache(self):
        cached = cache()
        cached.encode(TEXTS[:3])
        kept = weakref.ref(cached._current.open().inner)
        gc.disable()  # memory of tensors does not hasten it
        try:
            del cached
            assert kept() is None
        finally:
            gc.enable()

    def test_a_bar_is_shown_where_one_is_wanted(self, capsys):
        cache().encode(TEXTS[:3], show_progress_bar=True)
        assert "Encoding" in capsys.readouterr().out
        cache().encode(TEXTS[:3])
        assert capsys.readouterr().out == ""


class TestOnce:
    def test_each_distinct_item_is_encoded_once_in_a_call_in_all_calls_and_on_disk_for_ever(self, tmp_path):
        cached = cache(tmp_path)
        cached.encode([*TEXTS[:10], *TEXTS[:10]])
        cached.encode(TEXTS[5:15])
        assert sorted(collated(cached)) == sorted(TEXTS[:15])
        assert (cached.stats.computed, cached.stats.duplicates, cached.stats.hits) == (15, 10, 5)
        again = cache(tmp_path)
        assert torch.equal(again.encode(TEXTS[:16]), direct(HashingEncoder(), TEXTS[:16]))
        assert collated(again) == [TEXTS[15]] and again.stats.rows == 16 and again.stats.nbytes == 16 * 64

    def test_rows_of_a_fit_are_found_and_a_fit_finds_rows(self, tmp_path):
        first, other = tmp_path / "first", tmp_path / "other"
        fit(Model({"default": HashingEncoder()}, CacheConfig(save_dir=first)), loader(Texts(TEXTS)), max_epochs=1)
        cached = cache(first)
        assert torch.equal(cached.encode(TEXTS), direct(HashingEncoder(), TEXTS)) and collated(cached) == []
        assert cache(first).contains([*TEXTS, "another"]).tolist() == [True] * len(TEXTS) + [False]

        cache(other).encode(TEXTS)
        model = Model({"default": HashingEncoder()}, CacheConfig(save_dir=other))
        fit(model, loader(Texts(TEXTS)), max_epochs=1)
        assert model.cache_callback.report.encoded == 0
        assert committed_rows(first).keys() == committed_rows(other).keys()

    @pytest.mark.parametrize("given", [{"dtype": "float16"}, {"precision": "bf16-mixed"}], ids=str)
    def test_settings_mean_the_same_rows_as_in_a_fit(self, tmp_path, given):
        cache(tmp_path, **given).encode(TEXTS)
        trainer = {"precision": given["precision"]} if "precision" in given else {}
        model = Model({"default": HashingEncoder()}, CacheConfig(save_dir=tmp_path, dtype=given.get("dtype")))
        fit(model, loader(Texts(TEXTS)), max_epochs=1, **trainer)
        assert model.cache_callback.report.encoded == 0

    def test_a_model_is_not_loaded_if_all_of_its_rows_are_there(self, tmp_path, minilm_path):
        path = write_tiny(tmp_path / "model", minilm_path)
        first = cache(tmp_path / "cache", str(path))
        rows = first.encode(TEXTS[:5])
        warm = cache(tmp_path / "cache", SentenceTransformerEncoder(path))
        assert warm.contains(TEXTS[:6]).tolist() == [True] * 5 + [False] and torch.equal(warm.encode(TEXTS[:5]), rows)
        assert warm.encode([]).shape == (0, 32) and warm.stats.rows == 5
        assert not is_loaded(warm.encoder)
        warm.encode(TEXTS[:6])
        assert is_loaded(warm.encoder) and warm.stats.computed == 1

    def test_a_note_that_tells_of_another_model_is_found_out_when_the_model_is_loaded(self, tmp_path, minilm_path):
        path = write_tiny(tmp_path / "model", minilm_path)
        cache(tmp_path / "cache", str(path)).encode(TEXTS[:3])
        warm = cache(tmp_path / "cache", str(path))
        warm.encode(TEXTS[:3])
        warm._current._watch._due = float("inf")
        write_tiny(path, minilm_path, seed=1)  # after its files were looked at, and before they are loaded
        with pytest.raises(StaleRowsError, match="is not what was noted of its files"):
            warm.encode(TEXTS[:5])
        fresh = cache(tmp_path / "cache", str(path))
        assert torch.equal(warm.encode(TEXTS[:5]), fresh.encode(TEXTS[:5]))
        assert warm.stats.rows == 5

    def test_contains_encodes_nothing_and_makes_nothing(self, tmp_path):
        cached = cache(tmp_path / "cache")
        assert cached.contains(TEXTS[:3]).tolist() == [False] * 3
        assert collated(cached) == [] and not (tmp_path / "cache").exists()

    def test_contains_sees_what_others_have_committed_since(self, tmp_path):
        cached, other = cache(tmp_path), cache(tmp_path)
        assert not cached.contains(TEXTS[:2]).any()
        other.encode(TEXTS[:2])
        assert cached.contains(TEXTS[:3]).tolist() == [True, True, False]
        cached.encode(TEXTS[:3])
        assert collated(cached) == [TEXTS[2]]

    def test_many_small_calls_leave_few_shards(self, tmp_path, monkeypatch):
        monkeypatch.setattr(encoder_rows, "PACK_AFTER", 8)
        cached = cache(tmp_path)
        for text in TEXTS:
            cached.encode([text])
        (home,) = tmp_path.glob("encoders/*")
        assert len(shards(home)) < 24
        assert cache(tmp_path).contains(TEXTS).all() and sorted(collated(cached)) == sorted(TEXTS)

    def test_how_long_encoding_took_is_written_down_with_the_rows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(encoder_rows, "NOTED_SECONDS", 0.0)
        cached = cache(tmp_path)
        cached.encode(TEXTS[:9])
        items, seconds = cached._current.open().disk.manifest.effort
        assert items == 9 and seconds == pytest.approx(cached.stats.seconds) and seconds > 0


class TestStreams:
    def test_a_stream_gives_batches_in_its_order(self):
        cached, stream = cache(), (text for text in [*TEXTS, *TEXTS])
        batches = list(cached.encode_iter(stream, batch_size=7, window=14))
        assert [len(rows) for rows in batches] == [7] * 11 + [3]
        assert torch.equal(torch.cat(batches), direct(HashingEncoder(), [*TEXTS, *TEXTS]))
        assert cached.stats.computed == len(TEXTS)

    def test_no_more_than_a_window_is_read_ahead_and_what_was_yielded_is_committed(self, tmp_path):
        taken = []

        def stream():
            for text in TEXTS:
                taken.append(text)
                yield text

        given_out = 0
        for rows in cache(tmp_path).encode_iter(stream(), batch_size=4, window=10):  # whole batches: 12
            given_out += len(rows)
            assert len(taken) <= given_out - len(rows) + 12
            assert cache(tmp_path).contains(TEXTS[:given_out]).all()
        assert given_out == len(TEXTS)

    def test_a_stream_that_breaks_off_loses_nothing_that_was_yielded(self, tmp_path):
        def stream():
            yield from TEXTS[:10]
            raise OSError("the line is cut")

        cached, given_out = cache(tmp_path), 0
        with pytest.raises(OSError, match="the line is cut"):
            for rows in cached.encode_iter(stream(), batch_size=2, window=4):
                given_out += len(rows)
        assert given_out == 8 and cache(tmp_path).contains(TEXTS[:8]).all()

    def test_a_stream_may_encode_with_the_same_cache(self, tmp_path):
        cached = cache(tmp_path)
        nested = (text if cached.encode([text]) is not None else None for text in TEXTS[:6])
        assert len(torch.cat(list(cached.encode_iter(nested, batch_size=2)))) == 6
        assert cached.stats.computed == 6


class TestStale:
    @pytest.mark.parametrize("on_disk", [False, True])
    def test_an_encoder_that_was_changed_between_two_calls_gives_its_own_rows(self, tmp_path, on_disk, caplog):
        cached = cache(tmp_path if on_disk else None)
        before = cached.encode(TEXTS[:4])
        cached.encoder.matrix.mul_(2)
        with caplog.at_level("INFO", logger="quatcache"):
            assert torch.equal(cached.encode(TEXTS[:4]), 2 * before)
        assert "was changed (weights differ in matrix): it has other rows from now on" in caplog.text
        cached.encoder.matrix.div_(2)
        assert torch.equal(cached.encode(TEXTS[:4]), before)
        assert cached.stats.computed == (8 if on_disk else 12)  # on disk the rows of before are still there

    def test_a_changed_setting_of_a_model_gives_other_rows(self, tmp_path, minilm_path):
        path = write_tiny(tmp_path / "model", minilm_path)
        cached = cache(tmp_path / "cache", SentenceTransformerEncoder(path))
        long = " ".join(TEXTS)
        before = cached.encode([long])
        cached.encoder.model.max_seq_length = 8
        after = cached.encode([long])
        assert not torch.allclose(before, after)
        assert torch.allclose(after, direct(cached.encoder, [long]))
        cached.encoder.prompt = "query: "
        assert torch.allclose(cached.encode([long]), direct(cached.encoder, [long]))
        assert cached.stats.computed == 3

    def test_the_prompt_of_a_model_that_is_not_loaded_is_its_own_rows(self, tmp_path, minilm_path):
        path = write_tiny(tmp_path / "model", minilm_path)
        for prompt in ("", "query: "):
            cache(tmp_path / "cache", SentenceTransformerEncoder(path, prompt=prompt)).encode(TEXTS[:2])
        encoder = SentenceTransformerEncoder(path, prompt="")
        warm = cache(tmp_path / "cache", encoder)
        plain = warm.encode(TEXTS[:2])
        encoder.prompt = "query: "
        assert not torch.allclose(warm.encode(TEXTS[:2]), plain)
        assert not is_loaded(encoder)

    def test_a_write_that_leaves_no_mark_is_found_when_time_has_passed(self, monkeypatch):
        cached = cache()
        before = cached.encode(TEXTS[:2])
        used = ord(TEXTS[0][0])  # its row, and not the value that is looked at
        cached.encoder.matrix.data[used].mul_(2)
        monkeypatch.setattr(cached._current._watch, "_time", lambda: float("inf"))
        after = cached.encode(TEXTS[:2])
        assert torch.equal(after, direct(cached.encoder, TEXTS[:2])) and not torch.equal(after, before)

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_rows_that_were_encoded_while_the_encoder_was_changed_are_not_kept(self, tmp_path, on_disk):
        class Changing(HashingEncoder):
            _changes = True

            def forward(self, inputs):
                rows = super().forward(inputs)
                if self._changes and self._rows > 12:
                    self._changes = False
                    self.matrix.mul_(2)
                return rows

        cached = cache(tmp_path if on_disk else None, Changing())
        with pytest.raises(NotFrozenError, match=r"was changed while items were encoded .*between two calls"):
            cached.encode(TEXTS[:20], batch_size=4)
        assert committed_rows(tmp_path) == {}
        assert torch.equal(cached.encode(TEXTS[:20]), direct(cached.encoder, TEXTS[:20]))

    def test_stored_rows_are_compared_where_libraries_have_changed(self, tmp_path, monkeypatch, caplog):
        cache(tmp_path).encode(TEXTS)
        now = {**directory_module.environment(), "torch": "99.0"}
        for place in ("quatcache.encoders.opening.environment", "quatcache.store.directory.environment"):
            monkeypatch.setattr(place, lambda device="cpu": now)
        cached = cache(tmp_path)
        with caplog.at_level("INFO", logger="quatcache"):
            cached.encode(TEXTS[:5])
            cached.encode(TEXTS[:20])
        assert cached.stats.verified == 8 and cached.stats.computed == 0
        assert caplog.text.count("stored rows agree with what it gives now, after torch") == 1
        later = cache(tmp_path)
        later.encode(TEXTS)
        assert later.stats.verified == 0 and collated(later) == []

    def test_rows_that_the_encoder_no_longer_gives_are_refused_before_one_is_used(self, tmp_path):
        class Drifting(HashingEncoder):
            _drift = 0.0

            def forward(self, inputs):
                return super().forward(inputs) + type(self)._drift

        cache(tmp_path, Drifting()).encode(TEXTS)
        Drifting._drift = 0.5
        drifted = cache(tmp_path, Drifting(), verify=3)
        for _ in range(2):
            with pytest.raises(StaleRowsError, match=r"3 of 3 rows of encoder '.*Drifting' .* with verify=0"):
                drifted.encode(TEXTS)
        assert len(cache(tmp_path, Drifting(), verify=0).encode(TEXTS)) == len(TEXTS)

    def test_fewer_rows_than_are_to_be_compared_are_compared_once(self, tmp_path):
        cache(tmp_path).encode(TEXTS[:2])
        cached = cache(tmp_path, verify=8)
        for _ in range(3):
            cached.encode(TEXTS[:2])
        assert cached.stats.verified == 2 and len(collated(cached)) == 2


class TestFrozen:
    def test_an_encoder_that_can_change_is_refused_before_a_row_is_stored(self, tmp_path):
        unfrozen = ModuleEncoder(nn.Linear(2, 2), torch.tensor, 2)
        unfrozen.module.weight.requires_grad_(True)
        with pytest.raises(NotFrozenError, match=r"parameter 'module.weight' requires a gradient"):
            cache(tmp_path, unfrozen).encode([[1.0, 2.0]])
        training = ModuleEncoder(nn.Dropout(0.5), torch.tensor, 2)
        training.module.train()
        with pytest.raises(NotFrozenError, match="is in training mode"):
            cache(tmp_path, training).encode([[1.0, 2.0]])
        random = cache(tmp_path, lambda items: torch.rand(len(items), 2), identity="random, 1")
        with pytest.raises(NotFrozenError, match="two passes over the same items differ"):
            random.encode(["a", "b"])
        assert committed_rows(tmp_path) == {}

    def test_an_encoder_that_is_unfrozen_later_is_refused_when_something_must_be_encoded(self):
        cached = cache(encoder=ModuleEncoder(nn.Linear(1, 2), torch.tensor, 2))
        cached.encode([[1.0]])
        cached.encoder.module.weight.requires_grad_(True)
        assert cached.encode([[1.0]]).shape == (1, 2)
        with pytest.raises(NotFrozenError, match="requires a gradient"):
            cached.encode([[1.0], [2.0]])


class TestTrouble:
    def test_what_was_encoded_before_an_error_is_kept(self, tmp_path):
        class Choosy(HashingEncoder):
            def collate(self, items):
                if TEXTS[3] in items:
                    raise ValueError("not this one")
                return super().collate(items)

        cached = cache(tmp_path, Choosy())
        items = sorted(TEXTS[:8], key=len)
        with pytest.raises(CollateError, match="not this one"):
            cached.encode(items, batch_size=1)
        kept = collated(cached)
        assert 0 < len(kept) < 8 and cached.stats.computed == len(kept)
        again = cache(tmp_path, Choosy())
        assert again.contains(kept).all() and torch.equal(again.encode(kept), direct(HashingEncoder(), kept))

    def test_a_directory_that_cannot_be_made_is_refused_before_anything_is_encoded(self, tmp_path):
        (tmp_path / "file").write_text("no directory")
        for place in (tmp_path / "file", tmp_path / "file" / "cache"):
            cached = cache(place)
            with pytest.raises(StoreError, match=r"is a file; name a directory|leads through a file; name another"):
                cached.encode(TEXTS[:3])
            assert collated(cached) == []

    def test_a_disk_that_fills_up_costs_no_answer_and_is_tried_again(self, tmp_path, caplog, monkeypatch):
        def full(*_):
            raise StoreError("cannot write: No space left on device; free space.")

        monkeypatch.setattr("quatcache.store.disk.COMMIT_SECONDS", 0.0)

        cached = cache(tmp_path)
        cached.encode(TEXTS[:2])
        with monkeypatch.context() as patched:
            patched.setattr("quatcache.store.disk.begin_commit", full)
            for _ in range(2):
                assert torch.equal(cached.encode(TEXTS[:20], 4), direct(HashingEncoder(), TEXTS[:20]))
        assert caplog.text.count("No space left") == 1
        cached.encode(TEXTS[:20])
        assert cache(tmp_path).contains(TEXTS[:20]).all()

    def test_a_directory_that_may_only_be_read_serves_what_is_there(self, tmp_path, monkeypatch):
        cache(tmp_path).encode(TEXTS[:3])

        def refuse(_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(directory_module.CacheDirectory, "_try_writing", staticmethod(refuse))
        cached = cache(tmp_path)
        assert torch.equal(cached.encode(TEXTS[:5]), direct(HashingEncoder(), TEXTS[:5]))
        assert sorted(collated(cached)) == sorted(TEXTS[3:5])
        (rows,) = committed_rows(tmp_path).values()
        assert len(rows) == 3


class TestKeys:
    def test_items_of_one_extracted_key_share_the_row_of_the_first(self, tmp_path, caplog):
        cached = cache(tmp_path, key_extractor=str.lower)
        assert not cached.contains(["oaK", "elm"]).any()  # whoever is only looked for is not the first
        rows = cached.encode(["Oak", "oak", "elm"])
        assert torch.equal(rows, direct(HashingEncoder(), ["Oak", "Oak", "elm"]))
        assert torch.equal(cached.encode(["OAK"]), rows[:1]) and sorted(collated(cached)) == ["Oak", "elm"]
        assert caplog.text.count("have the extracted key of another item but other content") == 1
        assert cached.contains(["oAk", "fir"]).tolist() == [True, False]
        assert cache(tmp_path).contains(["Oak", "oak"]).tolist() == [True, False]  # rows go by content

    def test_items_without_canonical_bytes_need_an_extractor(self, tmp_path):
        class Tree:
            def __init__(self, name):
                self.name = name

        class Trees(HashingEncoder):
            def collate(self, items):
                return super().collate([item.name for item in items])

            def length(self, item):
                return 0

        with pytest.raises(KeyTypeError, match=r"has no canonical bytes; give a key extractor, .*EmbeddingCache"):
            cache(tmp_path, Trees()).encode([Tree("oak")])
        for computed in (1, 0):
            cached = cache(tmp_path, Trees(), key_extractor=lambda tree: tree.name)
            assert torch.equal(cached.encode([Tree("oak"), Tree("oak")])[1:], direct(HashingEncoder(), ["oak"]))
            assert cached.stats.computed == computed

    def test_rows_of_an_encoder_that_narrows_items_go_by_what_it_sees(self):
        class First(HashingEncoder):
            def content(self, item):
                return item[0]

            def collate(self, items):
                return super().collate([item[0] for item in items])

        cached = cache(encoder=First())
        cached.encode([("oak", 1), ("oak", 2)])
        assert cached.contains([("oak", 3)]).all() and cached.stats.computed == 1

    def test_rows_beyond_the_budget_are_encoded_each_time(self):
        cached = cache(max_size=5 * 64)
        for _ in range(2):
            assert torch.equal(cached.encode(TEXTS[:8]), direct(HashingEncoder(), TEXTS[:8]))
        assert cached.stats.rows == 5 and cached.stats.computed == 8 + 3


class TestCopies:
    def test_a_cache_travels_without_its_rows_and_finds_those_on_disk(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        cached = cache("cache", dtype="float16", key_extractor=str.lower)
        rows = cached.encode(TEXTS[:3])
        monkeypatch.chdir("/")
        for twin in (pickle.loads(pickle.dumps(cached)), copy.deepcopy(cached)):
            twin.encoder._collated.clear()
            assert torch.equal(twin.encode(TEXTS[:3]), rows) and collated(twin) == []
            assert repr(twin) == repr(cached) == f"EmbeddingCache(HashingEncoder, save_dir='{tmp_path}/cache')"
        in_memory = cache()
        in_memory.encode(TEXTS[:3])
        assert not pickle.loads(pickle.dumps(in_memory)).contains(TEXTS[:3]).any()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: cache(save_dir=3), "save_dir is 3; name a directory"),
        (lambda: cache(verify=-1), "verify is -1; give a number of rows, 0 for none, or 'auto'"),
        (lambda: cache(dtype="int8"), "dtype is 'int8'; use one of float64"),
        (lambda: cache(max_size="much"), "max_size: 'much' is not a size"),
        (lambda: cache(key_extractor="id"), "key_extractor is 'id'; give a function from an item to its key"),
        (lambda: cache(precision="bf16"), "precision is 'bf16'; use one of '32-true', 'bf16-mixed', '16-mixed'"),
        (lambda: cache(identity="x"), "identity is 'x' and the encoder is a HashingEncoder, whose identity is found"),
        (lambda: cache(encoder=TrainableHashing()), "TrainableHashing with trainable = True, so its rows change"),
        (lambda: cache(encoder=nn.Linear(2, 2)), "a Linear, a module that does not say how items are collated"),
        (lambda: cache(encoder=HashingEncoder), "pass an Encoder, a SentenceTransformer or its name, or a function"),
        (lambda: cache(encoder=7), "encoder is 7; pass an Encoder"),
        (lambda: cache(encoder="./nowhere/model"), "there is no such directory"),
        (lambda: cache("c", len), "the function len without an identity, .*pass identity='a name, a version'"),
        (lambda: cache(encoder=len, identity=""), "identity is ''; give a name with a version"),
        (lambda: cache(encoder=len, identity={"model": len}), "identity is .*or a dict of JSON values by name"),
        (lambda: cache().encode("oak"), "items is the single text 'oak'; pass a list of items"),
        (lambda: cache().encode({"oak": 1}), "items is .*, a dict; pass a list of items"),
        (lambda: cache().encode({"oak"}), "a set; pass a list of items"),
        (lambda: cache().encode(np.array("oak")), "a ndarray; pass a list of items"),
        (lambda: cache().encode(bytearray(b"oak")), "items is the single text .*; pass a list of items"),
        (lambda: cache().encode(pytest.importorskip("pandas").DataFrame({"a": [1]})), "a DataFrame; pass a list of it"),
        (lambda: cache().encode(5), "items is 5, a int; pass a list of items"),
        (lambda: cache().contains("oak"), "items is the single text 'oak'; pass a list of items"),
        (lambda: cache().encode_iter("oak"), "items is the single text 'oak'; pass a list of items"),
        (lambda: cache().encode(["oak"], 0), "batch_size is 0; give the items per encoder call, at least 1"),
        (lambda: cache().encode_iter(["oak"], 8, window=7), "window is 7; give the items that are read ahead"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


class TestFunctions:
    @pytest.mark.parametrize(
        "function",
        [
            lambda items: [[float(len(item)), 1.0] for item in items],
            lambda items: [np.array([len(item), 1], np.float32) for item in items],
            lambda items: [torch.tensor([len(item), 1.0]) for item in items],
            lambda items: np.array([[len(item), 1] for item in items], np.float32),
            lambda items: np.array([[1, len(item)] for item in items], np.float32)[:, ::-1],
            lambda items: torch.tensor([[len(item), 1.0] for item in items]),
        ],
        ids=["lists", "arrays", "tensors", "array", "reversed array", "tensor"],
    )
    def test_a_batch_function_may_return_its_rows_in_any_form(self, tmp_path, function):
        cached = cache(tmp_path, function, identity="lengths, 1")
        for _ in range(2):
            assert torch.equal(cached.encode(["oak", "maple", "oak"]), torch.tensor([[3.0, 1], [5, 1], [3, 1]]))
        assert cached.stats.computed == 2

    def test_a_function_is_given_lists_of_at_most_batch_size_items(self):
        calls = []
        cached = cache(encoder=lambda items: calls.append(items) or [[1.0] for _ in items])
        cached.encode(TEXTS[:10], batch_size=3)
        assert all(isinstance(call, list) and len(call) <= 3 for call in calls)

    def test_rows_of_a_function_are_found_by_the_identity_that_was_given(self, tmp_path, caplog):
        for identity, factor in (({"model": "a", "size": 2}, 1.0), ({"model": "b", "size": 2}, 2.0), ("a", 3.0)):
            for computed in (1, 0):
                with caplog.at_level("INFO", logger="quatcache"):
                    cached = cache(tmp_path, lambda items, by=factor: [[by] for _ in items], identity=identity)
                    assert cached.encode(["oak"]).tolist() == [[factor]] and cached.stats.computed == computed
        assert 'function.model "a" -> "b"' in caplog.text

    @pytest.mark.parametrize(
        ("returned", "told"),
        [
            (lambda items: [[1.0]], "returned shape (1, 1) for 2 items; return one row per item"),
            (lambda items: [[1.0], [1.0, 2.0]], "return one vector per item, all of one length"),
            (lambda items: ([1.0] for _ in items), "returned <generator object"),
            (lambda items: None, "returned None; return one vector per item"),
            (lambda items: [1.0, 2.0], "returned shape (2,) for 2 items"),
            (lambda items: [["a"], ["b"]], "returned [['a'], ['b']]; return one vector per item"),
            (lambda items: [[float("nan")], [1.0]], "returned NaN or infinity for item 'oak'"),
            (lambda items: np.ones((2, 1), np.uint16), "returned rows of torch.uint16; return one of float64"),
        ],
    )
    def test_a_function_that_returns_no_rows_is_refused_and_nothing_is_stored(self, tmp_path, returned, told):
        with pytest.raises(EncoderOutputError) as caught:
            cache(tmp_path, returned, identity="wrong, 1").encode(["oak", "elm"])
        assert told in str(caught.value)
        assert committed_rows(tmp_path) == {}

    def test_rows_of_two_lengths_are_refused_also_in_two_calls(self):
        cached = cache(encoder=lambda items: [[1.0] * len(items[0]) for _ in items], max_size=1)
        cached.encode(["oak"])
        with pytest.raises(EncoderOutputError, match=r"returned rows of shape \(5,\) after rows of shape \(3,\)"):
            cached.encode(["maple"])

    def test_vectors_keep_their_precision_and_numbers_of_python_become_float32(self):
        precise = cache(encoder=lambda items: [np.array([0.1]) for _ in items])
        assert precise.encode(["oak"]).dtype is torch.float64
        assert cache(encoder=lambda items: [[0.1] for _ in items]).encode(["oak"]).dtype is torch.float32

    @pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
    def test_a_function_that_gives_other_rows_each_time_in_one_memory_is_refused(self, kind):
        memory, numbers = np.zeros((40, 2)), np.random.default_rng(0)

        def random(items):
            memory[:] = numbers.random(memory.shape)
            return kind(memory[: len(items)])

        with pytest.raises(NotFrozenError, match="two passes over the same items differ"):
            cache(encoder=random).encode(TEXTS)

    @pytest.mark.parametrize("padded", [False, True])
    def test_a_function_may_use_its_memory_again(self, padded):
        memory, every = torch.zeros(8, 1, 2), torch.ones(8, 1, dtype=torch.bool)

        def numbers(items):
            memory[: len(items), 0, 0] = torch.tensor(items)
            rows = memory[: len(items)]
            return PaddedSequences(rows, every[: len(items)]) if padded else rows[:, 0]

        found = cache(encoder=numbers).encode([float(number) for number in range(20)], batch_size=8)
        rows = found.values[:, 0] if padded else found
        assert rows[:, 0].tolist() == list(range(20))

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_a_function_may_ask_the_cache_that_calls_it(self, tmp_path, on_disk):
        def length(items):
            return [[1.0 + (float(cached.encode([item[1:]])) if item[1:] else 0.0)] for item in items]

        cached = cache(tmp_path if on_disk else None, length, identity="length, 1")
        assert cached.encode(["maple", "oak"]).tolist() == [[5.0], [3.0]]
        assert cached.contains(["aple", "ple", "le", "e", "ak", "k"]).all()
        if on_disk:
            assert cache(tmp_path, length, identity="length, 1").contains(["maple", "oak", "le"]).all()

    def test_an_error_of_the_function_is_raised_as_it_is(self):
        def failing(items):
            raise TimeoutError("no answer")

        with pytest.raises(TimeoutError, match="no answer"):
            cache(encoder=failing).encode(["oak"])


def test_nothing_is_said_at_warning_level_when_all_is_well(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="quatcache"):
        cache(tmp_path).encode(TEXTS)
        cache(tmp_path).encode(TEXTS)
    assert caplog.text == ""
