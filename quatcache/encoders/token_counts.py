"""What a text costs an encoder: its characters, or its tokens as they are after truncation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["are_texts", "count_tokens", "known_limit", "text_length"]

_CHARACTERS_OF_TOKEN = 8
"""Twice what a token has in English, and more than in most languages."""

_UNBOUNDED = 10**9
"""A tokenizer without a limit names a number beyond this."""


def text_length(item: Any) -> int:
    """Estimate the cost of an item by its characters, through lists, tuples and dicts; 0 for what is no text."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, Mapping):
        return sum(text_length(value) for value in item.values())
    if isinstance(item, list | tuple):
        return sum(text_length(value) for value in item)
    return 0


def are_texts(items: Sequence[Any]) -> bool:
    """Whether all items are texts; some models take images or messages as well."""
    return all(isinstance(item, str) for item in items)


def known_limit(length: object) -> int | None:
    """Give a maximal length as the libraries tell it; None: there is none.

    Example:
        >>> known_limit(512), known_limit(int(1e30)), known_limit(None)
        (512, None, None)
    """
    return length if isinstance(length, int) and 0 < length < _UNBOUNDED else None


def count_tokens(tokenizer: Any, texts: Sequence[str], prompt: str | None, limit: int | None) -> list[int]:
    """Count the tokens of texts after truncation, in one call of the tokenizer and without padding.

    Of a text that is much longer than what is left of it, the beginning is tokenized only, if that is enough.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: N texts.
        prompt: Text put before each of them.
        limit: Tokens that are left of a text, special ones included; None: all.

    Returns:
        N numbers.
    """
    whole = [prompt + text for text in texts] if prompt else list(texts)

    def count(some: list[str]) -> list[int]:
        encoded = tokenizer(some, padding=False, truncation=limit is not None, max_length=limit,
                            return_attention_mask=False, return_token_type_ids=False)  # fmt: skip
        return [len(ids) for ids in encoded["input_ids"]]

    if limit is None:
        return count(whole)
    heads = [_beginning(text, limit * _CHARACTERS_OF_TOKEN) for text in whole]
    counts = count(heads)
    unsure = [place for place, text in enumerate(whole) if len(text) > len(heads[place]) and counts[place] < limit]
    if unsure:
        for place, tokens in zip(unsure, count([whole[place] for place in unsure]), strict=True):
            counts[place] = tokens
    return counts


def _beginning(text: str, characters: int) -> str:
    """Cut a text at a space: within a word, its pieces would be others than those of the whole word."""
    end = text.rfind(" ", 0, characters) if len(text) > characters else -1
    return text if end < 0 else text[:end]
