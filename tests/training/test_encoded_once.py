"""Law 2: a distinct item is encoded once, over epochs, splits and runs; and what was not changed is not read again."""

from __future__ import annotations

import pytest

from quatcache import CacheConfig, SimilarityPairSample
from quatcache.encoders.calls import PROVING
from quatcache.errors import CollateError
from quatcache.losses import MultipleNegativesRankingLoss
from tests.fits import HashingEncoder, Model, Texts, fit, loader, same_run, texts


def run(train, val=None, encoder=None, **settings):
    encoder = encoder or HashingEncoder()
    model = Model({"default": encoder}, CacheConfig(**settings))
    fit(model, loader(train, shuffle=True), None if val is None else loader(val))
    return model.cache_callback.report, encoder


def test_each_distinct_text_is_encoded_once_in_run_one_and_never_in_run_two(tmp_path):
    train, val = Texts(texts(90, 40)), Texts(texts(50))  # duplicates inside, and overlap between the two
    report, encoder = run(train, val, save_dir=tmp_path)
    assert sorted(encoder._collated) == sorted(set(train.texts) | set(val.texts))
    assert encoder._rows == 50 + PROVING  # the smallest items are encoded twice, as proof that it is frozen
    assert (report.encoded, report.hits + report.duplicates) == (50, 90)
    again, encoder = run(train, val, save_dir=tmp_path)
    assert (encoder._collated, encoder._rows) == ([], 0)
    assert (again.encoded, again.hits, again.read) == (0, 140, 0)


def test_both_items_of_pairs_share_one_store():
    words = texts(20)
    pairs = [SimilarityPairSample(a, b) for a in words[:5] for b in words[:6]]
    encoder = HashingEncoder()
    model = Model({"default": encoder}, CacheConfig(), MultipleNegativesRankingLoss())
    fit(model, loader(pairs))
    assert sorted(encoder._collated) == sorted(words[:6])


def test_a_grown_dataset_encodes_and_reads_its_new_part_only(tmp_path):
    run(Texts(texts(40)), save_dir=tmp_path)
    report, encoder = run(Texts(texts(44)), save_dir=tmp_path)
    assert sorted(encoder._collated) == sorted(texts(44)[40:])
    assert (report.encoded, report.read) == (4, 4)


@pytest.mark.parametrize(
    ("change", "encoded"),
    [
        (lambda texts: texts[::-1], 0),
        (lambda texts: texts[5:], 0),
        (lambda texts: [*texts[:7], "quite another text", *texts[8:]], 1),
        (lambda texts: texts + texts, 0),
    ],
    ids=["reversed", "shrunk at the front", "edited", "doubled"],
)
def test_a_changed_dataset_trains_as_if_it_had_never_been_cached(change, encoded, tmp_path):
    run(Texts(texts(40)), save_dir=tmp_path)
    changed = Texts(change(texts(40)))

    def train(cache):
        model = Model(cache=cache)
        fit(model, loader(changed, shuffle=True))
        return model

    cached = train(CacheConfig(save_dir=tmp_path))
    assert cached.cache_callback.report.encoded == encoded
    assert same_run(train(None), cached)


def test_new_labels_for_known_texts_are_noticed(tmp_path):
    run(Texts(texts(40), [0] * 40), save_dir=tmp_path)

    def train(cache):
        model = Model(cache=cache)
        fit(model, loader(Texts(texts(40), [i % 5 for i in range(40)])))
        return model

    cached = train(CacheConfig(save_dir=tmp_path))
    assert cached.cache_callback.report.encoded == 0
    assert same_run(train(None), cached)


def test_a_changed_encoder_is_never_served_the_old_rows(tmp_path, caplog):
    run(Texts(texts(40)), save_dir=tmp_path)
    other = HashingEncoder()
    other.matrix[3, 2] += 1e-3
    with caplog.at_level("INFO", logger="quatcache"):
        report, _ = run(Texts(texts(40)), encoder=other, save_dir=tmp_path)
    assert report.encoded == 40
    assert "closest one there differs: weights differ" in caplog.text


def test_two_storage_dtypes_are_kept_apart(tmp_path):
    run(Texts(texts(40)), save_dir=tmp_path)
    report, _ = run(Texts(texts(40)), save_dir=tmp_path, dtype="bfloat16")
    assert report.encoded == 40


class Limited(HashingEncoder):
    """Runs out of memory after so many rows."""

    def __init__(self, limit):
        super().__init__()
        self._limit = limit

    def forward(self, inputs):
        if self._rows >= self._limit:
            raise MemoryError("out of memory")
        return super().forward(inputs)


def test_a_fill_that_failed_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(MemoryError):
        run(Texts(texts(40)), encoder=Limited(24), save_dir=tmp_path, batch_size=4)
    report, encoder = run(Texts(texts(40)), encoder=Limited(1000), save_dir=tmp_path, batch_size=4)
    assert report.encoded == 40 - 20  # 24 rows less the 4 of the proof
    assert len(encoder._collated) == 20


def test_items_without_canonical_bytes_are_cached_by_index_for_one_run(tmp_path, caplog):
    class Opaque:
        def __init__(self, text):
            self.text = text

    class Unwraps(HashingEncoder):
        def collate(self, items):
            return super().collate([item.text for item in items])

        def length(self, item):
            return 0

    train = Texts([Opaque(text) for text in texts(20)], [i % 5 for i in range(20)])
    with caplog.at_level("WARNING", logger="quatcache"):
        report, _ = run(train, encoder=Unwraps(), save_dir=tmp_path)
    assert report.encoded == 20
    assert "Opaque that has no canonical bytes" in caplog.text
    assert "for this run only" in caplog.text
    report, _ = run(train, encoder=Unwraps(), save_dir=tmp_path)
    assert report.encoded == 20


def test_the_directory_can_be_moved(tmp_path):
    run(Texts(texts(40)), save_dir=tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    report, _ = run(Texts(texts(40)), save_dir=tmp_path / "there")
    assert (report.encoded, report.read) == (0, 0)


def test_extracted_keys_decide_which_items_share_a_row():
    report, _ = run(Texts(texts(40)), key_extractors=lambda text: text.split()[0])
    assert report.encoded == len({text.split()[0] for text in texts(40)})


def first_letter(text):
    return text[0]


@pytest.mark.parametrize(
    ("extractors", "rows"),
    [
        ({"a": first_letter, "b": len}, {"a": 2, "b": 3, "c": 4}),
        ({"c": first_letter}, {"a": 4, "b": 4, "c": 2}),
        (first_letter, {"a": 2, "b": 2, "c": 2}),
    ],
    ids=["two functions", "one encoder's function", "one function for all"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_each_encoder_has_the_extractor_that_it_was_given(extractors, rows, workers):
    encoders = {name: HashingEncoder(seed) for seed, name in enumerate("abc")}
    model = Model(encoders, CacheConfig(key_extractors=extractors, num_workers=workers))
    fit(model, loader(Texts(["oak", "acer", "olive", "alder", "oak"], range(5))))
    assert {name: one.rows for name, one in model.cache_callback.report.encoders.items()} == rows


def test_unlike_items_of_one_extracted_key_are_counted_and_shown_once(caplog):
    with caplog.at_level("WARNING", logger="quatcache"):
        run(Texts(["a first", "a second", "b", "a third"]), key_extractors=lambda text: text[0])
    warnings = [record.getMessage() for record in caplog.records if "extracted key" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("Encoder 'default': 2 items have the extracted key")
    assert "'a first' and 'a second'" in warnings[0]


class Ids:
    """Items with a number, keyed by it."""

    def __init__(self, size, edited=()):
        self.items = [({"id": i, "text": f"{'new' if i in edited else 'old'} text {i}"}, i % 5) for i in range(size)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class TextOfItem(HashingEncoder):
    def collate(self, items):
        return super().collate([item["text"] for item in items])

    def length(self, item):
        return 0


def test_an_item_edited_under_its_extracted_key_is_encoded_again(tmp_path):
    def train(data, cache):
        model = Model({"default": TextOfItem()}, cache)
        fit(model, loader(data, shuffle=True))
        return model

    cache = CacheConfig(save_dir=tmp_path, key_extractors=lambda item: item["id"])
    train(Ids(40), cache)
    for edited, encoded in (((), 0), ((3, 17), 2), ((3, 17), 0), ((3,), 0), ((), 0)):  # known contents keep their rows
        model = train(Ids(40, edited), cache)
        assert model.cache_callback.report.encoded == encoded
        assert same_run(train(Ids(40, edited), None), model)


def test_datasets_whose_extracted_keys_look_alike_have_rows_of_their_own(tmp_path):
    def count(text):
        return text.split()[-1]

    one, two = ([f"{word} {number}" for number in range(20)] for word in ("alder", "willow"))
    for number, data in enumerate((one, two, one, two)):
        runs = [Model(cache=cache) for cache in (None, CacheConfig(save_dir=tmp_path, key_extractors=count))]
        for model in runs:
            fit(model, loader(Texts(data), shuffle=True))
        assert same_run(*runs)
        assert runs[1].cache_callback.report.encoded == (20 if number < 2 else 0)


def test_item_edited_after_a_fill_that_failed_is_not_served_its_old_row(tmp_path):
    first = [f"alder {number}" for number in range(600)] + ["bad 600"]
    second = [f"willow {number}" for number in range(600)] + ["good 600"]
    settings = {"save_dir": tmp_path, "key_extractors": lambda text: text.split()[-1]}
    with pytest.raises(CollateError):
        fit(Model({"default": Refusing()}, CacheConfig(**settings)), loader(Texts(first)))
    runs = [Model({"default": Refusing()}, cache) for cache in (None, CacheConfig(**settings))]
    for model in runs:
        fit(model, loader(Texts(second)))
    assert same_run(*runs) and runs[1].cache_callback.report.hits == 0


def test_shared_row_that_was_lost_is_made_from_an_item_that_is_there(tmp_path):
    def letter(text):
        return text[0]

    settings = {"save_dir": tmp_path, "key_extractors": letter, "labels": True}
    words = ["alder 1", "alder 2", "birch 1", "birch 2"]
    fit(Model(cache=CacheConfig(**settings)), loader(Texts(words)))
    for path in tmp_path.glob("encoders/*/shard-*"):
        path.unlink()
    shorter = Texts(["alder 1", "alder 2", "birch 2"])
    model = Model(cache=CacheConfig(**settings))
    fit(model, loader(shorter))
    alike = Model()
    fit(alike, loader(Texts(["alder 1", "alder 1", "birch 2"], shorter.groups)))
    assert same_run(model, alike) and model.cache_callback.report.encoded == 2


class Refusing(HashingEncoder):
    def collate(self, items):
        if any("bad" in item for item in items):
            raise ValueError("a bad item")
        return super().collate(items)


def test_another_extractor_with_the_same_values_is_not_served_the_rows_of_the_first(tmp_path):
    words = ["alder birch", "birch cedar", "cedar alder"] * 5
    for place in (0, 1):
        runs = []
        for cache in (
            None,
            CacheConfig(save_dir=tmp_path, key_extractors=lambda text, place=place: text.split()[place]),
        ):
            runs.append(Model(cache=cache))
            fit(runs[-1], loader(Texts(words)))
        assert same_run(*runs)
        assert runs[1].cache_callback.report.encoded == (3 if place == 0 else 0)
