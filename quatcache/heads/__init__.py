"""Heads: the small trainable part that turns the embeddings of frozen encoders into the embeddings of a model.

The heads and their semantics are those of quaterion-models, so that a model moved from there trains alike;
``LinearHead`` is the one that a classifier needs. Any ``torch.nn.Module`` can be a head. These can be saved, too.

Example:
    >>> import torch
    >>> from quatcache.heads import SkipConnectionHead, head_from_config, head_to_config
    >>> head = SkipConnectionHead(384, dropout=0.1).eval()
    >>> again = head_from_config(head_to_config(head)).eval()
    >>> again.load_state_dict(head.state_dict())
    <All keys matched successfully>
    >>> embeddings = torch.randn(2, 384)
    >>> torch.equal(again(embeddings), head(embeddings))
    True
"""

from quatcache.heads.encoder_head import EncoderHead
from quatcache.heads.gates import EmptyHead, GatedHead, SkipConnectionHead
from quatcache.heads.inputs import head_input
from quatcache.heads.projections import ACTIVATIONS, LinearHead, StackedProjectionHead, WideningHead
from quatcache.heads.registry import HEADS, head_from_config, head_to_config, register_head
from quatcache.heads.sequential import SequentialHead
from quatcache.heads.upper_layers import UpperLayersHead

__all__ = [
    "ACTIVATIONS",
    "HEADS",
    "EmptyHead",
    "EncoderHead",
    "GatedHead",
    "LinearHead",
    "SequentialHead",
    "SkipConnectionHead",
    "StackedProjectionHead",
    "UpperLayersHead",
    "WideningHead",
    "head_from_config",
    "head_input",
    "head_to_config",
    "register_head",
]
