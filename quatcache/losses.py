"""The one loss that the framework brings itself: in-batch negatives for pairs.

Everything else comes from pytorch-metric-learning or torch and is called unmodified as ``loss(embeddings, groups)``.
In-batch negatives are here because those libraries see groups, while a batch of pairs carries scores and subgroups.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from quatcache.errors import ConfigError

__all__ = ["MultipleNegativesRankingLoss"]

_SCALES = {"cosine": 20.0, "dot": 1.0}
_NEGATIVES = ("same_subgroup", "other_subgroups", "all")


class MultipleNegativesRankingLoss(nn.Module):
    """Ranks the second item of each pair above the second items of the other pairs in the batch.

    For pair *i* the loss is the cross-entropy of picking ``b_i`` for ``a_i`` among all candidates ``b_j``, with
    ``scale * similarity(a_i, b_j)`` as logits; the result is the mean over the positive pairs. Also known as InfoNCE
    (https://arxiv.org/abs/1705.00652); with the default arguments and positive labels it is the
    ``MultipleNegativesRankingLoss`` of sentence-transformers and of quaterion.

    A pair is positive when its label is above 0. The other pairs are not averaged over, yet their items stay among
    the candidates: a pair labelled 0 is a hard negative. In a batch without any positive pair the loss is 0, with a
    gradient of 0.

    Subgroups can decide which candidates count as negatives; a positive pair's own item always stays a candidate. The
    default ignores them, as quaterion's loss of this name does. Its other pair losses draw negatives from outside an
    item's subgroup ("other_subgroups").

    The same text in two pairs of a batch is its own false negative; avoid such batches with a batch sampler.

    Args:
        scale: Factor on the similarities (the inverse of a temperature), above 0. None: 20 for "cosine", 1 for "dot".
        symmetric: Whether picking ``a_i`` for ``b_i`` counts too; the loss is then the mean of both directions.
        similarity: "cosine" or "dot".
        negatives: "all": every other pair of the batch. "same_subgroup": items of another subgroup are no negatives
            (separate topics, languages, shops). "other_subgroups": items of the same subgroup are no negatives (several
            right answers to one question).

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> loss = MultipleNegativesRankingLoss()
        >>> embeddings = torch.eye(3).repeat(2, 1)  # a_0, a_1, a_2, b_0, b_1, b_2 with a_i = b_i
        >>> pairs = torch.tensor([[0, 3], [1, 4], [2, 5]])
        >>> labels, subgroups = torch.ones(3), torch.zeros(6, dtype=torch.long)
        >>> bool(loss(embeddings, pairs, labels, subgroups) < 1e-6)
        True
        >>> swapped = torch.tensor([[0, 4], [1, 5], [2, 3]])
        >>> round(loss(embeddings, swapped, labels, subgroups).item(), 3)
        20.0
    """

    def __init__(
        self,
        scale: float | None = None,
        symmetric: bool = False,
        similarity: Literal["cosine", "dot"] = "cosine",
        negatives: Literal["same_subgroup", "other_subgroups", "all"] = "all",
    ) -> None:
        super().__init__()
        if similarity not in _SCALES:
            raise ConfigError(f"similarity is {similarity!r}; choose 'cosine' or 'dot'")
        if negatives not in _NEGATIVES:
            raise ConfigError(f"negatives is {negatives!r}; choose one of {', '.join(map(repr, _NEGATIVES))}")
        if scale is None:
            scale = _SCALES[similarity]
        # The upper bound refuses infinity, and NaN fails every comparison.
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ConfigError(f"scale is {scale!r}; give a finite number above 0, usually 20 for cosine and 1 for dot")
        self.scale = float(scale)
        self.symmetric = symmetric
        self.similarity = similarity
        self.negatives = negatives

    def forward(
        self,
        embeddings: Tensor,
        pairs: Tensor,
        labels: Tensor | None = None,
        subgroups: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean loss of the positive pairs of a batch.

        Args:
            embeddings: The first items of all pairs, then the second ones: floating point, ``(2B, D)``.
            pairs: Rows of ``embeddings`` that form a pair, first and second item: integers, ``(B, 2)``.
            labels: Score per pair, ``(B,)``; above 0 is positive. None: all are positive.
            subgroups: Subgroup per row of ``embeddings``, integers, ``(2B,)``. None: one subgroup for all.

        Returns:
            The loss, of shape ``()``, at least 0.

        Raises:
            ConfigError: If the shapes do not belong together.
        """
        self._check_shapes(embeddings, pairs, labels, subgroups)
        if self.similarity == "cosine":
            embeddings = nn.functional.normalize(embeddings, dim=-1)
        first, second = pairs.unbind(dim=1)
        logits = embeddings[first] @ embeddings[second].T * self.scale
        own = torch.arange(len(pairs), device=logits.device)
        if self.negatives != "all" and subgroups is not None:
            same = subgroups[first].unsqueeze(1) == subgroups[second].unsqueeze(0)
            barred = ~same if self.negatives == "same_subgroup" else same
            barred[own, own] = False
            logits = logits.masked_fill(barred, -torch.inf)
        elif self.negatives == "other_subgroups":
            raise ConfigError("subgroups is None; negatives='other_subgroups' needs one subgroup per embedding")
        losses = nn.functional.cross_entropy(logits, own, reduction="none")
        if self.symmetric:
            losses = (losses + nn.functional.cross_entropy(logits.T, own, reduction="none")) / 2
        if labels is None:
            return losses.mean()
        # Weights instead of a selection by mask: selecting would make the GPU wait for the number of positives.
        positive = labels > 0
        return torch.where(positive, losses, 0.0).sum() / positive.sum().clamp(min=1)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return (
            f"scale={self.scale}, symmetric={self.symmetric}, similarity={self.similarity!r}, "
            f"negatives={self.negatives!r}"
        )

    @staticmethod
    def _check_shapes(embeddings: Tensor, pairs: Tensor, labels: Tensor | None, subgroups: Tensor | None) -> None:
        # Shapes only: values would have to be fetched from the device at every step.
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.shape[0] == 0:
            raise ConfigError(
                f"pairs has shape {tuple(pairs.shape)} but MultipleNegativesRankingLoss needs (B, 2) with B >= 1; "
                "let the dataset return SimilarityPairSample, or take a group loss"
            )
        if embeddings.ndim != 2:
            raise ConfigError(f"embeddings has shape {tuple(embeddings.shape)}; let the head return (2B, D)")
        for name, tensor, size in (("labels", labels, len(pairs)), ("subgroups", subgroups, len(embeddings))):
            if tensor is not None and tensor.shape != (size,):
                raise ConfigError(
                    f"{name} has shape {tuple(tensor.shape)} for {len(pairs)} pairs of {len(embeddings)} embeddings; "
                    f"give ({size},)"
                )
