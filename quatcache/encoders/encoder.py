"""The contract of an encoder: collate items in a loader's worker, turn the collated batch into rows.

Two habits of PyTorch modules shaped this class. A module is in training mode until somebody says otherwise, and
``model.train()`` at the start of an epoch reaches every child: a frozen encoder would then answer with dropout, in
silence. So :meth:`Encoder.train` ignores the wish of a parent while :attr:`Encoder.trainable` is false. And a module
whose author forgets ``super().__init__()``, or calls it after the first assignment, fails far from the mistake; here
the module's state is made in ``__new__``, and the order of statements in a subclass does not matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import Self

from quatcache.encoders.deferred import Deferred, is_loaded, passing_over
from quatcache.encoders.facts import module_facts
from quatcache.encoders.saved import load_weights, save_weights
from quatcache.encoders.serialised import JSON
from quatcache.errors import ModelDefinitionError
from quatcache.sequences import PaddedSequences

__all__ = ["Encoder"]


class _Required:
    """A class attribute that a subclass must define; reading it before that says so.

    It has no ``__set__``, so a plain attribute on the instance, a class attribute and a property all override it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        raise ModelDefinitionError(
            f"{owner.__qualname__} has no {self._name}: define it as a class attribute, an attribute or a property"
        )


class Encoder(nn.Module):
    """Turns items into rows; the part of a model whose results can be cached while it is frozen.

    A subclass defines :meth:`collate`, :meth:`forward` and :attr:`embedding_size`. Everything else has a default.

    Attributes:
        trainable: Whether training may change the encoder. A frozen one (the default) never leaves eval mode, and its
            rows may be cached; call ``requires_grad_(False)`` on its parameters, or it is refused. A class attribute,
            an attribute or a property.
        embedding_size: Size of the last dimension of a row. A class attribute, an attribute or a property.
        version: Raise it when the meaning of :meth:`collate` or :meth:`forward` changes: code is not part of the
            identity, this number is.

    Tensors held in parameters, buffers or plain attributes count as weights. Attributes that are numbers, strings,
    booleans, None, or tuples, lists and dicts of these count as settings, unless their names begin with an
    underscore: a counter or a memo belongs in such a private attribute, or each run would look like another encoder.

    Example:
        >>> import torch
        >>> class TableEncoder(Encoder):
        ...     embedding_size = 2
        ...     def __init__(self):
        ...         self.table = torch.eye(2)
        ...     def collate(self, items):
        ...         return torch.tensor(items)
        ...     def forward(self, inputs):
        ...         return self.table[inputs]
        >>> encoder = TableEncoder()
        >>> encoder(encoder.collate([1, 0]))
        tensor([[0., 1.],
                [1., 0.]])
    """

    version: int = 1
    _deferred: Deferred | None = None

    if TYPE_CHECKING:

        @property
        def trainable(self) -> bool:
            """Whether training may change the encoder."""

        @property
        def embedding_size(self) -> int:
            """Size of the last dimension of a row."""
    else:
        trainable = False
        embedding_size = _Required()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the module's own state before any ``__init__`` runs."""
        encoder = super().__new__(cls)
        nn.Module.__init__(encoder)
        # A frozen encoder is never in training mode itself. Its submodules keep their own modes: dropout that was
        # left on is the author's mistake to see, not ours to hide.
        encoder.training = getattr(cls, "trainable", False) is not False
        return encoder

    def __init__(self) -> None:
        """Make an encoder; ``super().__init__()`` may be called or left out."""
        # The state exists already, and making it again would drop what a subclass has set.

    def collate(self, items: Sequence[Any]) -> Any:
        """Turn a batch of items into the input of :meth:`forward`; runs in the workers of a loader.

        Args:
            items: One or more items, as the dataset gave them.

        Returns:
            What :meth:`forward` takes, usually a tensor or a dict of tensors on the CPU.

        Raises:
            ModelDefinitionError: If the subclass has no ``collate``.
        """
        raise ModelDefinitionError(
            f"{type(self).__qualname__} has no collate: define collate(self, items) to turn a list of items into the "
            "input of forward"
        )

    def forward(self, inputs: Any) -> Tensor | PaddedSequences:
        """Encode a collated batch.

        Args:
            inputs: What :meth:`collate` returned for B items; it must not be changed in place.

        Returns:
            Rows of shape (B, D) or (B, *shape), in the order of the items; or, where the value of an item is a
            sequence, :class:`~quatcache.sequences.PaddedSequences` of B of them.

        Raises:
            ModelDefinitionError: If the subclass has no ``forward``.
        """
        raise ModelDefinitionError(
            f"{type(self).__qualname__} has no forward: define forward(self, inputs) to turn what collate returned "
            "into a tensor of shape (B, D)"
        )

    def content(self, item: Any) -> Any:
        """Give the part of an item that the encoder sees: items of equal content share one cached row.

        Args:
            item: An item, as the dataset gave it.

        Returns:
            The item itself unless a subclass narrows it (to a text without its id, for instance).
        """
        return item

    def length(self, item: Any) -> int:
        """Estimate what an item costs, cheaply, so that a fill can batch items of like size.

        Args:
            item: An item, as the dataset gave it.

        Returns:
            Any non-negative number that grows with the cost (for a text: its characters); 0 keeps the dataset's order.
        """
        return 0

    def token_counts(self, items: Sequence[Any]) -> Sequence[int] | None:
        """Count the tokens of items as :meth:`collate` gives them, so that a fill can batch without much padding.

        With these counts, items are sorted by them and not by :meth:`length`, and on the CPU a call takes no more items
        than make about 2,048 tokens, padding included. An accelerator encodes texts faster than their tokens are
        counted: there they are not, where :meth:`length` says something of texts.

        Args:
            items: One or more items, as the dataset gave them.

        Returns:
            For each item its tokens after truncation, prompt and special ones included, without padding; None if items
            are not padded to the longest of a batch, or counting costs too much.
        """
        return None

    def collates_apart(self, items: Sequence[Any]) -> bool:
        """Say whether a thread may collate items while :meth:`forward` encodes those before them, as a fill then does.

        Args:
            items: One or more items, as the dataset gave them.

        Returns:
            True only if collate and forward share nothing: no attribute that one of them writes, no random numbers, and
            no setting of the process, such as the default dtype, which mixed precision changes during forward.
        """
        return False

    def identity(self) -> Mapping[str, JSON]:
        """Name what else decides the output, beside the weights and settings that are found by themselves.

        Returns:
            JSON values by name, for instance the checksum of a file that ``collate`` reads.
        """
        return {}

    def facts(self) -> dict[str, JSON]:
        """List what decides the output: the digest of every tensor, and every setting of every submodule.

        The adapters override it to name what their libraries hide (tokenizer, pooling, prompt) and to leave out what
        does not matter (paths). A user adds to it through :meth:`identity`.

        Returns:
            JSON values by flat name.
        """
        return module_facts(self)

    def collate_fn(self) -> Callable[[Sequence[Any]], Any]:
        """Give the callable that a loader's worker runs; it pickles under the spawn start method.

        Returns:
            The bound :meth:`collate`, which takes this encoder along, weights included. The adapters return an
            object without weights.
        """
        return self.collate

    def train(self, mode: bool = True) -> Self:
        """Set training mode, but only if the encoder is trainable: a frozen one stays in eval mode.

        Args:
            mode: What a parent module asks for.

        Returns:
            The encoder itself.
        """
        with passing_over([self]):
            return super().train(mode and self.trainable)

    # An encoder whose model is loaded when it is needed

    def ensure_loaded(self) -> None:
        """Load the model, unless it is.

        Raises:
            ConfigError: It cannot be loaded.
            ModelDefinitionError: Its embeddings are not of the size that its files told.
        """
        if self._deferred is not None and not is_loaded(self):
            self._deferred.load_into(self)

    def _loads_with(self) -> dict[str, JSON]:
        """List the settings that a model which is not loaded will be loaded with, beside the encoder's own facts."""
        return {}

    def _reveal(self) -> None:
        """Load the model for whoever looks inside, unless modules are walked through in passing."""
        if self._deferred is not None and not self._deferred.held:
            self.ensure_loaded()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Give all modules, and so parameters and buffers; what is not loaded is loaded first."""
        self._reveal()
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Give the modules directly inside; what is not loaded is loaded first."""
        self._reveal()
        return super().named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Collect all weights; what is not loaded is loaded first."""
        self._reveal()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if not prefix or any(key.startswith(prefix) for key in state_dict):
            self._reveal()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse and self._deferred is not None and not is_loaded(self) and not self._deferred.note(fn):
            self.ensure_loaded()
        with passing_over([self]):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Write the encoder's tensors as safetensors, with a small JSON file beside them.

        Args:
            path: A directory; it is created if it does not exist.
        """
        save_weights(path, self, {"kind": "custom", "name": type(self).__qualname__, "version": self.version})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Make an encoder and fill in the tensors that :meth:`save` wrote.

        Args:
            path: The directory that was given to :meth:`save`.

        Returns:
            An encoder in eval mode.

        Raises:
            ModelDefinitionError: If the class cannot be made without arguments.
            FormatError: If the file is missing or damaged, or holds other tensors than the class has.
        """
        required = [
            parameter.name
            for parameter in inspect.signature(cls).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if required:
            raise ModelDefinitionError(
                f"{cls.__qualname__} needs {', '.join(required)} to be made: make it yourself and call load_weights, "
                "or override load"
            )
        encoder = cls()
        encoder.load_weights(path)
        encoder.eval()
        return encoder

    def load_weights(self, path: str | PathLike[str]) -> None:
        """Fill in the tensors that :meth:`save` wrote; every one of them must fit.

        Args:
            path: The directory that was given to :meth:`save`.

        Raises:
            FormatError: If the file is missing or damaged, or holds other tensors than this encoder has.
        """
        load_weights(path, self)
