"""One EmbeddingCache in several threads, and one save_dir in several processes: each item is encoded once in total."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quatcache import EmbeddingCache
from tests.embedding_processes import YIELDED, encode
from tests.fits import HashingEncoder, texts
from tests.processes import Job, context, linux_only, run
from tests.training.killed_fit import ENCODED, logged

TEXTS = texts(240)
ROWS = torch.cat([HashingEncoder()(HashingEncoder().collate([text])) for text in TEXTS]).tolist()


def shuffled(seed, count=None):
    return random.Random(seed).sample(TEXTS, count or len(TEXTS))


def expected(items):
    return [ROWS[TEXTS.index(item)] for item in items]


class TestThreads:
    @pytest.mark.parametrize("on_disk", [False, True])
    def test_eight_threads_encode_each_item_once_and_get_the_right_rows(self, tmp_path, on_disk):
        cache = EmbeddingCache(HashingEncoder(), tmp_path if on_disk else None)
        begins = threading.Barrier(8)

        def work(number):
            begins.wait(60)
            items = shuffled(number, 120)
            return [
                (items[start : start + 10], cache.encode(items[start : start + 10], 4)) for start in range(0, 120, 10)
            ]

        with ThreadPoolExecutor(8) as threads:
            for found in threads.map(work, range(8)):
                for items, rows in found:
                    assert rows.tolist() == expected(items)
        assert max(Counter(cache.encoder._collated).values()) == 1
        assert cache.stats.asked == 8 * 120 and cache.stats.computed == cache.stats.rows

    def test_a_thread_whose_rows_are_there_does_not_wait_for_the_encoder(self, tmp_path):
        encoding, go_on = threading.Event(), threading.Event()

        class Slow(HashingEncoder):
            def forward(self, inputs):
                if self._waits:
                    encoding.set()
                    assert go_on.wait(60)
                return super().forward(inputs)

        encoder = Slow()
        encoder._waits = False
        cache = EmbeddingCache(encoder, tmp_path)
        cache.encode(TEXTS[:5])
        encoder._waits = True
        with ThreadPoolExecutor(1) as thread:
            later = thread.submit(cache.encode, TEXTS[:9])
            try:
                assert encoding.wait(60)
                assert cache.encode(TEXTS[:5]).tolist() == expected(TEXTS[:5])
                assert cache.contains(TEXTS[:6]).tolist() == [True] * 5 + [False]
                assert not later.done()
            finally:
                go_on.set()
            assert later.result().tolist() == expected(TEXTS[:9])

    def test_an_error_in_one_thread_is_no_error_in_another(self):
        class Choosy(HashingEncoder):
            def collate(self, items):
                if TEXTS[0] in items:
                    raise ValueError("not this one")
                return super().collate(items)

        cache = EmbeddingCache(Choosy())
        with ThreadPoolExecutor(2) as threads:
            wrong, right = threads.submit(cache.encode, TEXTS[:1]), threads.submit(cache.encode, TEXTS[1:9])
            assert "not this one" in str(wrong.exception()) and right.result().tolist() == expected(TEXTS[1:9])


@pytest.mark.slow
@linux_only
class TestProcesses:
    @pytest.mark.parametrize("window", [None, 8], ids=["one call", "stream"])
    def test_four_processes_encode_each_item_once_in_total(self, tmp_path, window):
        begins = context().Barrier(4, timeout=60)
        orders = [shuffled(number) for number in range(4)]
        jobs = [
            Job(
                encode, tmp_path / f"{number}.json", save_dir=tmp_path / "cache", log=tmp_path / "log", number=number,
                items=items, window=window, begins=begins.wait,
            )
            for number, items in enumerate(orders)
        ]  # fmt: skip
        results = [job.result() for job in jobs]
        for items, result in zip(orders, results, strict=True):
            assert result["rows"] == expected(items)
        encoded = Counter(text for words in logged(tmp_path / "log", ENCODED).values() for text in words)
        assert encoded == Counter(TEXTS)
        assert sum(result["computed"] for result in results) == len(TEXTS)

    @pytest.mark.parametrize("window", [None, 8], ids=["one call", "stream"])
    def test_a_process_that_was_killed_goes_on_where_it_stopped(self, tmp_path, window):
        save_dir, log = tmp_path / "cache", tmp_path / "log"
        given = {"save_dir": save_dir, "log": log, "items": TEXTS, "window": window, "commit_seconds": 0.0}
        for number in range(3):
            assert Job(encode, tmp_path / "killed.json", number=number, kill_at=9, **given).status() < 0
        last = run(encode, tmp_path / "last.json", number=3, **given)
        assert last["rows"] == expected(TEXTS)
        attempts, given_out = logged(log, ENCODED), logged(log, YIELDED)
        assert 0 < last["computed"] < len(TEXTS) - 3 * 8
        for number, words in given_out.items():
            later = {text for other, encoded in attempts.items() if other > number for text in encoded}
            assert not later & set(words)
