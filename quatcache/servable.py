"""What remains of a model after training: encoders and head, ready to encode, and to be saved in one directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor, nn
from typing_extensions import Self

from quatcache.data.devices import to_device
from quatcache.encoders.encoder import Encoder
from quatcache.errors import ConfigError, EncoderOutputError, ModelDefinitionError
from quatcache.heads import head_input
from quatcache.servable_files import load_parts, save_parts

__all__ = ["ServableModel"]


class ServableModel(nn.Module):
    """Encoders and a head, ready to encode items and to be saved.

    Args:
        encoders: One or more encoders by name. Their rows are concatenated in the order of the sorted names.
        head: Takes a batch of shape (B, sum of the embedding sizes).

    Attributes:
        encoders: The encoders by name, sorted.
        head: The head.

    Raises:
        ConfigError: If there is no encoder, a name is not a string, or the head expects rows of another size.
        ModelDefinitionError: If something that is no encoder, or no module, was passed.

    Example:
        >>> import tempfile
        >>> from quatcache.encoders import ModuleEncoder
        >>> from quatcache.heads import LinearHead
        >>> def encoder():
        ...     return ModuleEncoder(nn.Embedding(5, 4), torch.tensor, 4)
        >>> model = ServableModel({"default": encoder()}, LinearHead(4, 2))
        >>> rows = model.encode([0, 3, 3])
        >>> rows.shape
        torch.Size([3, 2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(folder)
        ...     again = ServableModel.load(folder, encoders={"default": encoder()})
        >>> torch.equal(again.encode([0, 3, 3]), rows)
        True
    """

    def __init__(self, encoders: Mapping[str, Encoder], head: nn.Module) -> None:
        super().__init__()
        if not isinstance(encoders, Mapping) or not encoders:
            raise ConfigError(f"encoders is {encoders!r:.80}; pass a dict with one or more encoders by name")
        for name, encoder in encoders.items():
            if not isinstance(name, str):
                raise ConfigError(f"an encoder is named {name!r}; names are strings")
            if not isinstance(encoder, Encoder):
                raise ModelDefinitionError(
                    f"encoder {name!r} is a {type(encoder).__qualname__}; pass a quatcache.encoders.Encoder"
                )
        if not isinstance(head, nn.Module):
            raise ModelDefinitionError(f"head is a {type(head).__qualname__}; pass a torch.nn.Module")
        self._names = tuple(sorted(encoders))
        # Not a ModuleDict: that one refuses names with dots, and names like "keys".
        self._encoders = nn.ModuleList(encoders[name] for name in self._names)
        self.head = head
        size, expected = self.embedding_size, getattr(head, "input_embedding_size", None)
        if expected is not None and expected != size:
            raise ConfigError(f"the encoders give {size} values per item, the head takes {expected}; make them agree")
        self.eval()

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders by name, sorted."""
        return {name: cast("Encoder", module) for name, module in zip(self._names, self._encoders, strict=True)}

    @property
    def embedding_size(self) -> int:
        """Size of the head's input: the sum over the encoders."""
        return sum(encoder.embedding_size for encoder in self.encoders.values())

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Encode collated items.

        Args:
            inputs: For each encoder's name, what its ``collate`` returned for the same B items.

        Returns:
            What the head makes of the concatenated rows, of shape (B, D).
        """
        result: Tensor = self.head(head_input({name: encoder(inputs[name]) for name, encoder in self.encoders.items()}))
        return result

    def encode(self, items: Sequence[Any], batch_size: int = 32, show_progress_bar: bool = False) -> Tensor:
        """Encode items, in eval mode and without gradients; the modes of the modules are left as they were found.

        Args:
            items: N items. Items of like length are batched together, the result is in their order.
            batch_size: Items per call of the encoders, at least 1.
            show_progress_bar: Whether to show a progress bar.

        Returns:
            Rows of shape (N, D), on the device of the model.

        Raises:
            ConfigError: If ``items`` is a single string, or ``batch_size`` is below 1.
            EncoderOutputError: If the head returned another number of rows than there were items.
        """
        if isinstance(items, str | bytes):
            raise ConfigError(f"items is the single text {items[:40]!r}; pass a list of items")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; pass a number of at least 1")
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                return self._encode(items, batch_size, show_progress_bar)
        finally:
            for module, mode in modes:
                module.training = mode

    def _encode(self, items: Sequence[Any], batch_size: int, show_progress_bar: bool) -> Tensor:
        encoders, device = self.encoders, _device(self)
        if len(items) == 0:
            # The head alone knows the size of its output.
            dtype = next((parameter.dtype for parameter in self.head.parameters()), torch.float32)
            empty: Tensor = self.head(torch.zeros(0, self.embedding_size, device=device, dtype=dtype))
            return empty
        costs = [sum(encoder.length(item) for encoder in encoders.values()) for item in items]
        order = sorted(range(len(items)), key=costs.__getitem__, reverse=True)
        rows: list[Tensor] = []
        starts = range(0, len(items), batch_size)
        for start in track(starts, "encoding", disable=not show_progress_bar):
            batch = [items[index] for index in order[start : start + batch_size]]
            inputs = {name: to_device(encoder.collate(batch), _device(encoder)) for name, encoder in encoders.items()}
            encoded = self(inputs)
            if encoded.dim() == 0 or len(encoded) != len(batch):
                raise EncoderOutputError(
                    f"the head returned shape {tuple(encoded.shape)} for {len(batch)} items; return one row per item"
                )
            rows.append(encoded)
        together = torch.cat(rows)
        result = torch.empty_like(together)
        result[torch.tensor(order, device=together.device)] = together
        return result

    def save(self, path: str | PathLike[str]) -> None:
        """Write encoders and head as safetensors and JSON; a model that was saved there before is replaced.

        Args:
            path: A directory that does not exist, is empty, or holds a saved model.

        Raises:
            ConfigError: If the directory holds something else, which is left alone.
            ModelDefinitionError: If an encoder cannot be saved as data.
            StoreError: If the directory cannot be written; what it held before is intact.
        """
        save_parts(Path(path), self.encoders, self.head)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        encoders: Mapping[str, Encoder] | None = None,
        head: nn.Module | None = None,
    ) -> Self:
        """Rebuild a model from what :meth:`save` wrote.

        Args:
            path: The directory that was given to :meth:`save`.
            encoders: Instances, by name, of the encoders that are not among the built-in kinds (your own classes, and
                ``ModuleEncoder``); the saved tensors are copied into them.
            head: An instance of the head if it is not among the registered kinds; the saved state is copied into it.

        Returns:
            A model in eval mode, on the CPU.

        Raises:
            ConfigError: If an instance is missing, or was passed where none is needed.
            FormatError: If a file is missing, damaged or from a newer version, or could run code.
        """
        return cls(*load_parts(Path(path), encoders or {}, head))


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
