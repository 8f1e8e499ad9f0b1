"""The collating half of a sentence-transformers model: what turns items into its features, without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["Collator", "pads_nothing", "task_of"]


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
                return dict(first.preprocess(list(items), prompt=self.prompt, **task))
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


def task_of(model: SentenceTransformer, role: str | None) -> dict[str, str]:
    """Give the argument that chooses a route; versions before 5 have no routes by role."""
    return {"task": role} if role is not None and hasattr(model, "encode_query") else {}
