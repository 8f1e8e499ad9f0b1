"""How a fill splits items into encoder calls, and collates the next call while one is encoded."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from quatcache import CacheConfig
from quatcache.encoders import SentenceTransformerEncoder, TransformersEncoder
from quatcache.encoders.calls import PROVING, TOKENS_PER_CALL, CallPlan
from quatcache.encoders.identity import identify
from quatcache.errors import BatchLengthError, CollateError
from quatcache.keys import content_keys
from tests.fits import HashingEncoder, Model, Texts, fit, loader, same_run, texts

CPU = torch.device("cpu")


def fill(encoder, items, **settings):
    model = Model({"default": encoder}, CacheConfig(**settings))
    fit(model, loader(Texts(items)), max_epochs=1)
    return model


def left_behind():
    return [thread.name for thread in threading.enumerate() if thread.name == "quatcache-collate"]


class Recording(HashingEncoder):
    """Keeps the texts of each call, in the order in which they are collated."""

    def __init__(self):
        super().__init__()
        self._calls = []

    def collate(self, items):
        self._calls.append(list(items))
        return super().collate(items)

    def collates_apart(self, items):
        return True


class Unsized(Recording):
    """Says nothing about what its items cost."""

    length = SentenceTransformerEncoder.__mro__[1].length


class Words(Unsized):
    """A token is a word, and a long one."""

    def __init__(self, tokens=500):
        super().__init__()
        self._tokens, self._counted = tokens, []

    def token_counts(self, items):
        self._counted.extend(items)
        return [self._tokens * len(item.split()) for item in items]


class Padded(SentenceTransformerEncoder):
    """Keeps the shape of each call, padding included."""

    def forward(self, inputs):
        self.__dict__.setdefault("_shapes", []).append(tuple(inputs["input_ids"].shape))
        return super().forward(inputs)


# splitting


def test_calls_of_a_real_encoder_keep_to_both_bounds_and_rows_equal_encode(own_minilm):
    items = [" ".join(f"word{number}" for number in range(place % 23)) + f" {place}" for place in range(100)]
    expected = torch.from_numpy(own_minilm.encode(items, batch_size=32))
    encoder = Padded(own_minilm)
    model = Model({"default": encoder}, CacheConfig(batch_size=50))
    kept = {}

    def keep(*_):
        store = model.cache_callback._session._fill.encoders["default"].store
        kept["rows"] = store.gather(torch.from_numpy(store.rows_of(content_keys(items))))

    model.on_train_batch_end = keep
    fit(model, loader(Texts(items)), max_epochs=1)
    (proof, size), *calls = encoder._shapes[1:]
    assert (proof, size) == encoder._shapes[0]  # the first call is encoded twice
    assert proof + sum(number for number, _ in calls) == len(set(items))
    assert all(number <= 50 and number * size <= TOKENS_PER_CALL for number, size in [(proof, size), *calls])
    sizes = [size for _, size in calls]
    assert sizes == sorted(sizes, reverse=True) and size <= sizes[-1]
    assert torch.allclose(kept["rows"], expected, atol=1e-5)


def test_call_takes_items_until_their_padded_tokens_reach_the_budget():
    items = ["a"] * 9 + ["a b c d e"] + ["a b"] * 3
    calls = CallPlan("words", Words(), CPU).split(items, batch_size=3)
    found = [[len(items[place].split()) for place in call] for call in calls]
    assert found == [[5], [2, 2], [2, 1], [1, 1, 1], [1, 1, 1], [1, 1]]
    assert sorted(np.concatenate(calls).tolist()) == list(range(len(items)))


def test_accelerator_gets_calls_of_the_batch_size():
    items = ["a b c d e"] * 7
    calls = CallPlan("words", Words(), torch.device("cuda")).split(items, batch_size=3)
    assert [len(call) for call in calls] == [3, 3, 1]


class Sized(Words):
    def length(self, item):
        return len(item)


def test_accelerator_sorts_texts_by_their_characters_and_counts_no_tokens():
    items, encoder = ["a b", "abcdefgh", "abcde", "a b c d e f"], Sized()
    plan = CallPlan("words", encoder, torch.device("cuda"))
    assert [call.tolist() for call in plan.split(items, batch_size=2)] == [[3, 1], [2, 0]]
    assert encoder._counted == [] and plan.window(32, 0.001) == 2048
    assert [call.tolist() for call in CallPlan("words", encoder, CPU).split(items, batch_size=2)] == [[3], [0, 1], [2]]


def test_window_grows_for_items_that_have_token_counts_and_not_beyond_half_a_minute():
    plan = CallPlan("words", Words(), CPU)
    assert plan.window(32, 0.001) == 512  # nothing was looked at: it may be images
    plan.look(["a"])
    assert [plan.window(32, pace) for pace in (None, 0.001, 0.02, 1.0)] == [1024, 2048, 1500, 512]
    assert plan.window(256, 0.001) == 4096
    plain = CallPlan("plain", HashingEncoder(), CPU)
    plain.look(["a"])
    assert plain.window(32, 0.001) == 512


def test_wrong_number_of_token_counts_is_refused():
    class Forgets(Words):
        def token_counts(self, items):
            return super().token_counts(items)[1:]

    with pytest.raises(BatchLengthError, match="'default' returned 11 numbers for 12 items; return one per item"):
        fill(Forgets(), texts(12))


def test_item_whose_tokens_cannot_be_counted_is_named():
    class Picky(Words):
        def token_counts(self, items):
            if any("elm" in item for item in items):
                raise ValueError("no elms")
            return super().token_counts(items)

    with pytest.raises(CollateError, match=r"could not collate item 'cedar elm fir 2' \(ValueError: no elms\)"):
        fill(Picky(), ["alder 1", "cedar elm fir 2"])


def test_encoder_with_lengths_only_has_its_calls_sorted_by_them():
    encoder = Recording()
    items = texts(40)
    fill(encoder, items, batch_size=8)
    first, *others = encoder._calls
    lengths = [len(item) for call in others for item in call]
    assert lengths == sorted(lengths, reverse=True) and [len(call) for call in others] == [8, 8, 8, 8, 4]
    assert len(first) == PROVING and max(map(len, first)) <= lengths[-1]  # few short items are encoded twice
    assert encoder._rows == 40 + PROVING


def test_encoder_without_lengths_gets_items_in_the_order_of_the_dataset():
    encoder = Unsized()
    items = texts(20)
    fill(encoder, items, batch_size=8)
    assert encoder._calls == [items[16:], items[:8], items[8:16]]


def test_tokens_are_counted_of_distinct_misses_only(tmp_path):
    encoder = Words()
    fill(encoder, texts(60, 40), save_dir=tmp_path)
    assert encoder._counted == texts(40)
    encoder = Words()
    fill(encoder, texts(50), save_dir=tmp_path)
    assert encoder._counted == texts(50)[40:]


def test_calls_are_no_part_of_the_identity(own_minilm):
    encoder = SentenceTransformerEncoder(own_minilm)
    before = identify(encoder)
    encoder.token_counts(["a text", "another"])
    assert identify(encoder) == before


# collating ahead


@pytest.fixture
def ahead(monkeypatch):
    """Collate in a thread however short a forward is."""
    monkeypatch.setattr("quatcache.encoders.frozen.sys.getswitchinterval", lambda: 0.0)


class Meeting(Recording):
    """A forward goes on when the next batch was collated; the last one has none."""

    def __init__(self, calls):
        super().__init__()
        self._met, self._left, self._threads = threading.Semaphore(0), calls - 1, set()

    def collate(self, items):
        self._threads.add(threading.current_thread() is threading.main_thread())
        if self._threads != {True}:
            self._met.release()
        return super().collate(items)

    def forward(self, inputs):
        if False in self._threads or self._rows > 8:  # after the proof
            self._left -= 1
            if self._left > 0:
                assert self._met.acquire(timeout=60)
        return super().forward(inputs)


def test_next_call_is_collated_while_one_is_encoded(ahead):
    encoder = Meeting(5)
    runs = [Model(), Model({"default": encoder}, CacheConfig(batch_size=8))]
    for model in runs:
        fit(model, loader(Texts(texts(40)), shuffle=True))
    assert encoder._threads == {True, False}
    assert sorted(encoder._collated) == sorted(texts(40))  # each once, nothing that was not needed
    assert same_run(*runs) and not left_behind()


class Failing(Recording):
    """Refuses a text, or raises after so many rows."""

    def __init__(self, refused=None, error=None, rows=0):
        super().__init__()
        self._refused, self._error, self._after = refused, error, rows

    def collate(self, items):
        if self._refused in items:
            raise ValueError("a bad item")
        return super().collate(items)

    def forward(self, inputs):
        if self._error is not None and self._rows >= self._after:
            raise self._error
        return super().forward(inputs)


def test_item_that_fails_in_the_thread_is_named_and_what_was_encoded_is_kept(ahead, tmp_path):
    items = texts(40)
    message = rf"could not collate item '{items[20]}' \(ValueError: a bad item\)"
    with pytest.raises(CollateError, match=message) as caught:
        fill(Failing(items[20]), items, batch_size=4, save_dir=tmp_path)
    assert isinstance(caught.value.__cause__, ValueError) and not left_behind()
    encoder = Failing()
    fill(encoder, items, batch_size=4, save_dir=tmp_path)
    assert 4 <= len(encoder._collated) <= 32 and items[20] in encoder._collated


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no memory")], ids=["Ctrl-C", "no memory"])
def test_error_in_the_encoder_leaves_no_thread_and_a_second_run_goes_on(ahead, error, tmp_path):
    with pytest.raises((type(error), SystemExit)):
        fill(Failing(error=error, rows=24), texts(40), batch_size=4, save_dir=tmp_path)
    assert not left_behind()
    encoder = Failing()
    fill(encoder, texts(40), batch_size=4, save_dir=tmp_path)
    assert len(encoder._collated) == 40 - 20  # 24 rows less the 4 of the proof


class Bound(Recording):
    """Reads through something that only the thread which made it may use, as a database connection."""

    def __init__(self):
        super().__init__()
        self._owner, self._tried = threading.get_ident(), 0

    def collate(self, items):
        if threading.get_ident() != self._owner:
            self._tried += 1
            raise RuntimeError("made in another thread")
        return super().collate(items)


def test_collate_that_is_bound_to_its_thread_works_and_is_tried_in_another_once(ahead):
    encoder = Bound()
    fill(encoder, texts(40), batch_size=8)
    assert encoder._tried == 1
    assert sorted(encoder._collated) == sorted(texts(40))


class Leaving(HashingEncoder):
    """Leaves something to forward beside what it returns, and reads a setting of the process."""

    def collate(self, items):
        self._lengths, self._alone = (
            torch.tensor([float(len(item)) for item in items]),
            threading.current_thread() is threading.main_thread(),
        )
        return super().collate(items)

    def forward(self, inputs):
        assert self._alone
        return super().forward(inputs) * self._lengths[:, None].to(self.matrix.dtype)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_collate_is_left_alone_with_forward_unless_the_encoder_says_that_they_share_nothing(ahead, precision):
    runs = [Model({"default": Leaving()}, cache) for cache in (None, CacheConfig(batch_size=4))]
    for model in runs:
        fit(model, loader(Texts(texts(40)), shuffle=True), precision=precision)
    assert same_run(*runs)


def test_adapters_tokenize_texts_apart_and_nothing_else(minilm_path):
    class Own(SentenceTransformerEncoder):
        def collate(self, items):
            return super().collate(items)

    for adapter in (SentenceTransformerEncoder, TransformersEncoder):
        encoder = adapter(minilm_path)
        assert encoder.collates_apart(["a", "b"]) and not encoder.collates_apart(["a", {"text": "b"}])
        encoder.trainable = False
    assert not Own(minilm_path).collates_apart(["a"]) and not HashingEncoder().collates_apart(["a"])


def test_fill_goes_on_where_the_system_has_no_more_threads(ahead, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    encoder = Recording()
    with monkeypatch.context() as patched:
        patched.setattr("quatcache.encoders.frozen.threading.Thread.start", refuse)
        fill(encoder, texts(40), batch_size=8)
    assert sorted(encoder._collated) == sorted(texts(40))


def test_no_thread_is_started_in_a_training_step(ahead):
    encoder = Bound()
    model = Model({"default": encoder}, CacheConfig(batch_size=2, fill="lazy"))
    fit(model, loader(Texts(texts(40))))
    assert encoder._tried == 0 and len(encoder._collated) == 40
