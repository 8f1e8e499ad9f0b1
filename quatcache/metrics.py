"""Retrieval metrics over embeddings: torchmetrics ranks what is handed to it, this module decides what to hand over.

A retrieval metric of torchmetrics takes scores, targets and query numbers. Here each collected item is a query and all
the others are its candidates, so a validation set of 10,000 items has 100 million scores. Three constraints shaped the
code:

* The scores are never held together: queries go through in chunks, and each chunk through a metric of its own, whose
  ``aggregation`` is replaced by a collector of the values per query.
* torchmetrics takes a candidate with a score of 0 or below for a miss (``torch.where(preds > 0, ...)`` in precision,
  recall, MAP and MRR). Half of all cosine similarities are negative, so ranks go in, not similarities.
* torchmetrics spends a Python iteration and a sort per query. For its own metrics only the candidates that can change
  the value are handed over (``_needed``), which is most of the time of a validation epoch saved. A metric that is not
  listed there gets every candidate.

Classification metrics need nothing of this: torchmetrics takes ``(logits, groups)`` as they come.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.retrieval import (
    RetrievalHitRate,
    RetrievalMAP,
    RetrievalMRR,
    RetrievalNormalizedDCG,
    RetrievalPrecision,
    RetrievalRecall,
    RetrievalRPrecision,
)
from torchmetrics.retrieval.base import RetrievalMetric
from torchmetrics.utilities.data import dim_zero_cat

from quatcache.errors import ConfigError

__all__ = ["EmbeddingRetrieval"]


_AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "median": torch.median,
    "min": torch.min,
    "max": torch.max,
}


class EmbeddingRetrieval(Metric):
    """Computes a retrieval metric of torchmetrics by nearest neighbours among the items of a validation set.

    Every item is a query once, and every other item a candidate for it, ranked by similarity; equal similarities rank
    in the order the items came in. Relevant are the items of the same group or, for pairs, the partners in pairs with
    a label above 0, in both directions. A query without any relevant item counts as the metric's
    ``empty_target_action`` says: as 0 unless told otherwise.

    Embeddings are collected until :meth:`reset`. In a distributed run those of all ranks are gathered, so that the
    value is the one a single process would get from the same items; each rank must have collected some. A sampler
    that pads with repeated items gives these a copy of themselves as nearest neighbour. The work is quadratic in the
    number of items.

    Args:
        metric: A retrieval metric of torchmetrics, or a subclass of its ``RetrievalMetric``, that gives one number per
            query. It serves as a template and is never updated itself.
        similarity: "cosine" or "dot".
        chunk_elements: Upper bound of similarities held at once, at least 1; one row of them is held in any case. The
            default needs about 250 MB at most.
        **kwargs: Arguments of ``torchmetrics.Metric``, such as ``compute_on_cpu=True`` to keep embeddings off the GPU.

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> from torchmetrics.retrieval import RetrievalPrecision
        >>> precision_at_1 = EmbeddingRetrieval(RetrievalPrecision(top_k=1))
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]])
        >>> precision_at_1.update(embeddings, torch.tensor([0, 0, 1, 1]))
        >>> precision_at_1.compute()  # the nearest neighbours are items 1, 0 or 3, 3 and 1
        tensor(0.7500)
    """

    is_differentiable = False
    full_state_update = False

    embeddings: list[Tensor]
    groups: list[Tensor]
    pairs: list[Tensor]
    labels: list[Tensor]
    sizes: list[Tensor]

    def __init__(
        self,
        metric: RetrievalMetric,
        *,
        similarity: Literal["cosine", "dot"] = "cosine",
        chunk_elements: int = 2**21,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(metric, RetrievalMetric):
            raise ConfigError(
                f"metric is {metric!r}; give a retrieval metric of torchmetrics with one number per query, as in "
                "RetrievalPrecision(top_k=1)"
            )
        if similarity not in ("cosine", "dot"):
            raise ConfigError(f"similarity is {similarity!r}; choose 'cosine' or 'dot'")
        if isinstance(chunk_elements, bool) or not isinstance(chunk_elements, int) or chunk_elements < 1:
            raise ConfigError(f"chunk_elements is {chunk_elements!r}; give a whole number, at least 1")
        self.metric = metric
        self.similarity = similarity
        self.chunk_elements = chunk_elements
        for state in ("embeddings", "groups", "pairs", "labels", "sizes"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether a larger value is better, as for the metric inside."""
        return bool(self.metric.higher_is_better)

    def update(self, embeddings: Tensor, *targets: Tensor) -> None:
        """Collect a batch.

        Args:
            embeddings: What the model returned, floating point, ``(N, D)``.
            *targets: ``groups`` of shape ``(N,)``; or ``pairs`` ``(B, 2)`` of rows of ``embeddings`` and ``labels``
                ``(B,)``. The subgroups that follow them in a batch of pairs are accepted and not used.

        Raises:
            ConfigError: If the shapes do not belong together, or groups and pairs are mixed.
        """
        if embeddings.ndim != 2:
            raise ConfigError(f"embeddings has shape {tuple(embeddings.shape)}; let the head return (N, D)")
        count = len(embeddings)
        shapes = ", ".join(str(tuple(target.shape)) for target in targets)
        grouped = len(targets) == 1 and targets[0].shape == (count,)
        if not grouped and not (len(targets) in (2, 3) and targets[0].shape == (len(targets[1]), 2)):
            raise ConfigError(
                f"targets of shapes {shapes or 'none'} came with {count} embeddings; give groups ({count},), or pairs "
                "(B, 2) and labels (B,)"
            )
        if len(self.pairs if grouped else self.groups):
            raise ConfigError(f"targets of shapes {shapes} mix groups and pairs; call reset() between the two")
        if grouped:
            self.groups.append(targets[0].detach())
        else:
            self.pairs.append(targets[0].detach())
            self.labels.append(targets[1].detach())
        # How far each batch reaches, for the pairs of later batches count from their own first row. A running total
        # would be wrong as soon as the states of several ranks are joined.
        pair_count = 0 if grouped else len(targets[1])
        self.sizes.append(torch.tensor([[count, pair_count]], device=embeddings.device))
        self.embeddings.append(embeddings.detach())

    def compute(self) -> Tensor:
        """Compute the metric over everything collected.

        Returns:
            The aggregated value, of shape ``()``; NaN if an embedding is not finite, 0 if no query counts.

        Raises:
            ConfigError: If nothing was collected.
        """
        if len(self.embeddings) == 0:
            raise ConfigError("0 items were collected; call update() before compute()")
        # Autocast, active when validation_step computes the metric, would undo the promotion below.
        with torch.autocast(self.embeddings[0].device.type, enabled=False):
            embeddings = dim_zero_cat(self.embeddings)
            # Half precision would tie neighbours that the model tells apart.
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            if not bool(torch.isfinite(embeddings).all()):
                return embeddings.new_tensor(torch.nan)
            if self.similarity == "cosine":
                embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
            values = _Collector()
            ranker = copy.deepcopy(self.metric).to(embeddings.device)
            ranker.aggregation = values
            ranker.dist_sync_on_step = False  # every rank has all rows already
            rows = max(1, self.chunk_elements // len(embeddings))
            for start, relevant in self._relevant(rows, len(embeddings)):
                queries = torch.arange(start, start + len(relevant), device=embeddings.device)
                _rank(ranker, queries, embeddings[start : start + rows] @ embeddings.T, relevant)
            return values.aggregate(self.metric.aggregation).to(embeddings)

    def _relevant(self, rows: int, items: int) -> Iterator[tuple[int, Tensor]]:
        """Go through the queries by ``rows``: number of the first, and which items are relevant, bool ``(Q, N)``."""
        if len(self.groups):
            groups = dim_zero_cat(self.groups)
            for start in range(0, items, rows):
                yield start, groups[start : start + rows].unsqueeze(1) == groups
            return
        partners = self._partners()
        for start in range(0, items, rows):
            stop = min(start + rows, items)
            relevant = torch.zeros(stop - start, items, dtype=torch.bool, device=partners.device)
            here = partners[(partners[:, 0] >= start) & (partners[:, 0] < stop)]
            relevant[here[:, 0] - start, here[:, 1]] = True
            yield start, relevant

    def _partners(self) -> Tensor:
        """Give (query, relevant candidate) numbers, ``(P, 2)``, from the pairs of all batches, in both directions."""
        sizes = dim_zero_cat(self.sizes)
        first_rows = sizes[:, 0].cumsum(0) - sizes[:, 0]
        pairs = dim_zero_cat(self.pairs).long() + first_rows.repeat_interleave(sizes[:, 1]).unsqueeze(1)
        pairs = pairs[dim_zero_cat(self.labels) > 0]
        return torch.cat([pairs, pairs.flip(1)])


class _Collector:
    """Stands in for a metric's aggregation and keeps the value of each query."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def __call__(self, values: Tensor, dim: int | None = None) -> Tensor:
        self.parts.append(values)
        return values.mean()  # the metric wants a number; nobody reads it

    def aggregate(self, aggregation: str | Callable[..., Tensor]) -> Tensor:
        if not self.parts:
            return torch.zeros(())  # as torchmetrics has it when every query is skipped
        values = torch.cat(self.parts)
        return _AGGREGATIONS[aggregation](values) if isinstance(aggregation, str) else aggregation(values, dim=None)


def _rank(ranker: RetrievalMetric, queries: Tensor, similarities: Tensor, relevant: Tensor) -> None:
    """Pass a chunk of queries through ``ranker``.

    Args:
        ranker: The metric, whose aggregation collects the values.
        queries: Item numbers of the queries, ``(Q,)``.
        similarities: Similarity of each query to each item, ``(Q, N)``; overwritten.
        relevant: Whether an item is relevant, bool, ``(Q, N)``; overwritten.
    """
    own = torch.arange(len(queries), device=queries.device)
    similarities[own, queries] = -torch.inf
    relevant[own, queries] = False
    needed = _needed(ranker, similarities, relevant)
    needed[own, queries] = False
    query, candidate = needed.nonzero(as_tuple=True)
    if not len(query):
        return  # a single item has no candidates
    scores = similarities[query, candidate]
    # By query, and within a query from the most to the least similar; stable, so that ties keep the items' order.
    order = scores.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    query, candidate = query[order], candidate[order]
    # Ranks counted from the end: above 0, and distinct also where similarities are equal.
    counts = needed.sum(dim=1)
    ranks = counts.cumsum(0)[query] - torch.arange(len(query), device=query.device)
    # forward() and not compute(): the latter would synchronise the ranks of a distributed run once per chunk.
    ranker(ranks.float(), relevant[query, candidate], indexes=query)
    ranker.reset()


def _needed(metric: RetrievalMetric, similarities: Tensor, relevant: Tensor) -> Tensor:
    """Tell which candidates can change the value of ``metric``, at least one per query; bool ``(Q, N)``.

    What is left out ranks below everything that the metric looks at, and is not counted by it either.
    """
    kind, top_k = type(metric), getattr(metric, "top_k", None)
    others = similarities.shape[1] - 1
    best_relevant = similarities.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    if top_k is not None and top_k < others:
        threshold = similarities.topk(top_k, dim=1).values[:, -1:]
        if kind in (RetrievalPrecision, RetrievalHitRate, RetrievalMRR):
            # One relevant item, at whatever rank, lets torchmetrics tell a miss from a query that has none.
            return (similarities >= threshold) | (relevant & (similarities >= best_relevant))
        if kind in (RetrievalRecall, RetrievalNormalizedDCG, RetrievalMAP):
            return (similarities >= threshold) | relevant
    elif top_k is None and kind in (RetrievalMRR, RetrievalMAP, RetrievalRPrecision):
        nearest = similarities.amax(dim=1, keepdim=True)
        if kind is not RetrievalMRR:
            best_relevant = similarities.masked_fill(~relevant, torch.inf).amin(dim=1, keepdim=True)
        threshold = torch.where(relevant.any(dim=1, keepdim=True), best_relevant, nearest)
        return similarities >= threshold
    return torch.ones_like(relevant)
