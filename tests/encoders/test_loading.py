"""What a model is named by: a directory, a name on the hub, or the loaded model itself; else one sentence says so."""

from __future__ import annotations

import pytest
from torch import nn

from quatcache.encoders import SentenceTransformerEncoder, TransformersEncoder
from quatcache.errors import ConfigError


def test_wrong_sentence_transformer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="model is of type Linear; pass a directory, a hub name or a loaded"):
        SentenceTransformerEncoder(nn.Linear(1, 1))
    message = r"missing' cannot be loaded \(there is no such directory\); pass a directory or a name on the hub\."
    for missing in (tmp_path / "missing", str(tmp_path / "missing"), "./missing", "~/missing", "models/text/missing"):
        with pytest.raises(ConfigError, match=message):
            SentenceTransformerEncoder(missing)


def test_name_that_the_library_cannot_find_is_one_sentence(monkeypatch):
    def unknown(*args, **settings):
        raise OSError("some-owner/nothing is not a local folder\nand is not on the hub\n")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer.__init__", unknown)
    message = r"'some-owner/nothing' cannot be loaded \(some-owner/nothing is not a local folder\); pass a directory"
    with pytest.raises(ConfigError, match=message):
        SentenceTransformerEncoder("some-owner/nothing")


def test_wrong_transformer_or_tokenizer_is_named(bert, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="BertModel came without a tokenizer; pass tokenizer="):
        TransformersEncoder(bert)
    with pytest.raises(ConfigError, match="model is a int; pass a directory"):
        TransformersEncoder(3)
    with pytest.raises(ConfigError, match="missing is not a directory"):
        TransformersEncoder(tmp_path / "missing")
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match=r"has no pad_token.*set tokenizer\.pad_token"):
        TransformersEncoder(bert, tokenizer)


def test_side_of_truncation_is_kept_from_the_callers_tokenizer(bert, tokenizer):
    encoder = TransformersEncoder(bert, tokenizer, max_length=4, truncation_side="left")
    assert tokenizer.decode(encoder.collate(["one two three"])["input_ids"][0]) == "[CLS] two three [SEP]"
    assert tokenizer.truncation_side == "right"
    assert encoder.tokenizer.truncation_side == "left"
