"""The collating half of a sentence-transformers model: what turns items into its features, without its weights.

Which prompt stands before an item, which route it takes through a model and how much of it is left is decided here, as
``encode``, ``encode_query`` and ``encode_document`` decide it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from quatcache.encoders.token_counts import known_limit
from quatcache.encoders.weights import package_of
from quatcache.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["Collator", "own_prompt", "pads_nothing", "task_of", "tokenizer_of"]

_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Collator:
    """Collates items as a model's ``encode`` does; it pickles without the encoder.

    Args:
        model: The model, or a copy of it without weights.
        prompt: Put before each item.
        role: "query" or "document"; None: neither.
    """

    def __init__(self, model: SentenceTransformer, prompt: str | None, role: str | None) -> None:
        """Share the model."""
        self.model, self.prompt, self.role = model, prompt, role

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """Give the features of some items by name: tensors, and a few settings."""
        task = task_of(self.model, self.role)
        if hasattr(self.model, "preprocess"):
            first: Any = self.model[0]
            if pads_nothing(self.model) and hasattr(first, "preprocess") and all(type(item) is str for item in items):
                # The model itself would only ask of each text whether it is the path of an image, at a fifth of the
                # cost of its tokens.
                return dict(_without_places(first).preprocess(list(items), prompt=self.prompt, **task))
            return dict(self.model.preprocess(list(items), prompt=self.prompt, **task))
        texts = [self.prompt + item for item in items] if self.prompt else list(items)
        features: dict[str, Any] = dict(self.model.tokenize(texts))
        if self.prompt:
            prompt = self.model.tokenize([self.prompt])
            if "input_ids" in prompt:
                features["prompt_length"] = prompt["input_ids"].shape[-1] - 1
        return features


def pads_nothing(model: SentenceTransformer) -> bool:
    """Whether texts are looked up token by token, one after another, as static embeddings do."""
    return isinstance(getattr(model[0], "embedding", None), nn.EmbeddingBag)


class _TokensAlone:
    """A tokenizer that does not say where in its text each token stands; nothing else of the result differs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.encode_batch = tokenizer.encode_batch_fast

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _without_places(embedding: Any) -> Any:
    """Give static embeddings whose own ``preprocess`` takes a fifth less time, for it never reads those places."""
    known = type(embedding).__name__ == "StaticEmbedding" and package_of(type(embedding)) == "sentence_transformers"
    if not known or not hasattr(embedding.tokenizer, "encode_batch_fast"):  # a subclass may read them
        return embedding
    quick = copy.copy(embedding)  # shares everything; the model is left as it is
    quick.tokenizer = _TokensAlone(embedding.tokenizer)
    return quick


def task_of(model: SentenceTransformer, role: str | None) -> dict[str, str]:
    """Give the argument that chooses a route; versions before 5 have no routes by role."""
    return {"task": role} if role is not None and hasattr(model, "encode_query") else {}


def own_prompt(model: SentenceTransformer, name: str | None, role: str | None) -> str | None:
    """Choose among the prompts of a model.

    Args:
        model: The model.
        name: The one that is asked for; None: that of the role, else the default one.
        role: "query" or "document"; None: neither.

    Returns:
        The prompt; None: nothing is put before an item.

    Raises:
        ConfigError: The model has none of that name.
    """
    prompts: Mapping[str, str] = getattr(model, "prompts", None) or {}
    if name is not None:
        if name not in prompts:
            raise ConfigError(f"prompt_name is {name!r}; the model has {sorted(prompts)}")
        return prompts[name]
    candidates = {"query": ("query",), "document": _DOCUMENT_PROMPTS}.get(role or "", ())
    default = getattr(model, "default_prompt_name", None)
    return next((prompts[each] for each in (*candidates, default) if each is not None and each in prompts), None)


def tokenizer_of(model: SentenceTransformer, role: str | None) -> tuple[Any, int | None] | None:
    """Find the tokenizer of a model that is a transformer.

    Args:
        model: The model.
        role: "query" or "document", which may have lengths of their own; None: neither.

    Returns:
        The tokenizer, and how many tokens it leaves of a text (None: all); None for other models.
    """
    first: Any = model[0]
    if not hasattr(first, "auto_model") or not callable(getattr(first, "tokenizer", None)):
        return None
    length = getattr(first, f"{role}_length", None) or getattr(model, "max_seq_length", None)
    return first.tokenizer, known_limit(length)
