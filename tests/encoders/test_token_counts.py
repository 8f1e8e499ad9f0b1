"""Tokens are counted as collate gives them, and costs estimated by characters, with both adapters of texts."""

from __future__ import annotations

import pytest

from quatcache.encoders import SentenceTransformerEncoder, TransformersEncoder

LONG = [
    "cholera",
    "Injury of the left ankle, subsequent encounter, with sequela",
    "",
    "a",
    "long words " * 400,
    "x" * 5000,
    "x" * 5000 + " y",
    " " * 9000 + "the end",
]


@pytest.mark.parametrize(
    ("settings", "query_length"),
    [({}, None), ({"prompt": "query: "}, None), ({"max_seq_length": 5, "prompt": "a b"}, None), ({"role": "query"}, 7)],
    ids=["plain", "prompt", "short", "role"],
)
def test_counts_of_sentence_transformers_are_those_of_collate(own_minilm, settings, query_length):
    own_minilm[0].query_length = query_length
    encoder = SentenceTransformerEncoder(own_minilm, **settings)
    assert encoder.token_counts(LONG) == encoder.collate(LONG)["attention_mask"].sum(1).tolist()


def test_tokens_are_not_counted_where_nothing_is_padded_or_a_subclass_decides(minilm, wordllama):
    class Collates(SentenceTransformerEncoder):
        def collate(self, items):
            return super().collate([item["text"] for item in items])

    class Sorts(SentenceTransformerEncoder):
        def length(self, item):
            return -len(item)

    static = SentenceTransformerEncoder(wordllama)
    assert static.token_counts(["a text"]) is None and static.length("a text") == 0
    assert SentenceTransformerEncoder(minilm).token_counts(["a text", {"text": "b"}]) is None
    assert Collates(minilm).token_counts(["a text"]) is None and Sorts(minilm).token_counts(["a text"]) is None


@pytest.mark.parametrize("settings", [{}, {"prompt": "a long prompt: "}, {"max_length": 6, "truncation_side": "left"}])
def test_counts_of_transformers_are_those_of_collate(bert, tokenizer, settings):
    encoder = TransformersEncoder(bert, tokenizer, **settings)
    assert encoder.token_counts(LONG) == encoder.collate(LONG)["attention_mask"].sum(1).tolist()
    assert encoder.token_counts([("a", "pair")]) is None


def test_items_of_sentence_transformers_are_seen_whole_and_cost_their_characters(minilm):
    encoder = SentenceTransformerEncoder(minilm)
    assert encoder.content("A text ") == "A text "
    item = {"text": "abc", "image": object()}
    assert encoder.content(item) is item
    assert [encoder.length(each) for each in ("abcd", item, ("ab", "c"), 5)] == [4, 3, 3, 0]


def test_texts_of_transformers_are_seen_whole_and_cost_their_characters(bert, tokenizer):
    encoder = TransformersEncoder(bert, tokenizer)
    assert (encoder.content("a text"), encoder.length("a text"), encoder.embedding_size) == ("a text", 6, 384)
