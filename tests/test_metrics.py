"""Retrieval over collected embeddings equals its definition, whatever the batches, chunks and ranks."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.retrieval import (
    RetrievalFallOut,
    RetrievalHitRate,
    RetrievalMAP,
    RetrievalMRR,
    RetrievalNormalizedDCG,
    RetrievalPrecision,
    RetrievalPrecisionRecallCurve,
    RetrievalRecall,
    RetrievalRPrecision,
)

from quatcache.errors import ConfigError
from quatcache.heads import LinearHead
from quatcache.metrics import EmbeddingRetrieval

# The definitions: from the relevance of the candidates, nearest first, to the value of one query with a relevant one.


def precision(hits: list[bool], k: int | None) -> float:
    return sum(hits[:k]) / (k or len(hits))


def recall(hits: list[bool], k: int | None) -> float:
    return sum(hits[:k]) / sum(hits)


def hit_rate(hits: list[bool], k: int | None) -> float:
    return float(any(hits[:k]))


def reciprocal_rank(hits: list[bool], k: int | None) -> float:
    return next((1 / (rank + 1) for rank, hit in enumerate(hits[:k]) if hit), 0.0)


def average_precision(hits: list[bool], k: int | None) -> float:
    values = [sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits[:k]) if hit]
    return sum(values) / len(values) if values else 0.0


def r_precision(hits: list[bool], k: int | None) -> float:
    return sum(hits[: sum(hits)]) / sum(hits)


def ndcg(hits: list[bool], k: int | None) -> float:
    def gain(order: list[bool]) -> float:
        return sum(hit / math.log2(rank + 2) for rank, hit in enumerate(order[:k]))

    return gain(hits) / gain(sorted(hits, reverse=True))


Definition = Callable[[list[bool], "int | None"], float]
DEFINITIONS: list[tuple[type, Definition, bool]] = [
    (RetrievalPrecision, precision, True),
    (RetrievalRecall, recall, True),
    (RetrievalHitRate, hit_rate, True),
    (RetrievalMRR, reciprocal_rank, True),
    (RetrievalMAP, average_precision, True),
    (RetrievalRPrecision, r_precision, False),
    (RetrievalNormalizedDCG, ndcg, True),
]


def ranked_hits(similarities: list[list[float]], relevant: list[list[bool]]) -> list[list[bool]]:
    """Relevance of the candidates of each query, nearest first; equal similarities in the order of the items."""
    items = range(len(similarities))
    return [
        [relevant[q][c] for c in sorted((c for c in items if c != q), key=lambda c: (-similarities[q][c], c))]
        for q in items
    ]


def by_hand(embeddings: Tensor, relevant: list[list[bool]], definition: Definition, k: int | None) -> float:
    similarities = (embeddings.double() @ embeddings.double().T).tolist()
    rankings = ranked_hits(similarities, relevant)
    return sum(definition(hits, k) if any(hits) else 0.0 for hits in rankings) / len(rankings)


def same_group(groups: Tensor) -> list[list[bool]]:
    return (groups.unsqueeze(1) == groups).tolist()


def value_of(metric: EmbeddingRetrieval, *batches: tuple[Tensor, ...]) -> float:
    for batch in batches:
        metric.update(*batch)
    result = metric.compute()
    assert result.shape == ()
    return result.item()


def clusters(count: int, width: int = 8, kinds: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, kinds, (count,), generator=generator)
    centres = torch.randn(kinds, width, generator=generator)
    return centres[groups] + torch.randn(count, width, generator=generator), groups


@st.composite
def collections(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Few distinct vectors of small whole numbers: ties everywhere, negative similarities, and no rounding."""
    count = draw(st.integers(2, 12))
    vectors = draw(st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=count, max_size=count))
    groups = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    return torch.tensor(vectors, dtype=torch.float32), torch.tensor(groups)


@pytest.mark.parametrize(("kind", "definition", "takes_k"), DEFINITIONS)
@settings(max_examples=40, deadline=None)
@given(collection=collections(), k=st.sampled_from([None, 1, 2, 3, 8, 20]), chunk=st.sampled_from([1, 25, 10**6]))
def test_value_is_that_of_the_definition(
    kind: type, definition: Definition, takes_k: bool, collection: tuple[Tensor, Tensor], k: int | None, chunk: int
) -> None:
    embeddings, groups = collection
    k = k if takes_k else None
    inner = kind(top_k=k) if takes_k else kind()
    metric = EmbeddingRetrieval(inner, similarity="dot", chunk_elements=chunk)
    expected = by_hand(embeddings, same_group(groups), definition, k)
    assert value_of(metric, (embeddings, groups)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("action", ["neg", "pos", "skip"])
@pytest.mark.parametrize(("kind", "definition", "takes_k"), DEFINITIONS)
def test_queries_without_a_relevant_item_count_as_the_metric_says(
    kind: type, definition: Definition, takes_k: bool, action: str
) -> None:
    embeddings, groups = clusters(30)
    groups[:7] = torch.arange(100, 107)
    k = 2 if takes_k else None
    rankings = ranked_hits((embeddings.double() @ embeddings.double().T).tolist(), same_group(groups))
    lonely = {"neg": [0.0], "pos": [1.0], "skip": []}[action]
    values = [value for hits in rankings for value in ([definition(hits, k)] if any(hits) else lonely)]
    inner = kind(empty_target_action=action, **({"top_k": k} if takes_k else {}))
    metric = EmbeddingRetrieval(inner, similarity="dot", chunk_elements=90)
    assert value_of(metric, (embeddings, groups)) == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_query_without_a_relevant_item_can_be_an_error() -> None:
    for inner in (RetrievalMRR(empty_target_action="error"), RetrievalPrecision("error", top_k=1)):
        with pytest.raises(ValueError, match="no positive target"):
            value_of(EmbeddingRetrieval(inner), (torch.eye(3), torch.tensor([0, 0, 1])))


def test_value_is_zero_when_every_query_is_skipped() -> None:
    metric = EmbeddingRetrieval(RetrievalMRR(empty_target_action="skip"))
    assert value_of(metric, (torch.eye(3), torch.arange(3))) == 0.0


@pytest.mark.parametrize("aggregation", ["mean", "median", "min", "max", lambda values, dim: values.sum()])
@pytest.mark.parametrize("chunk", [1, 10**6])
def test_aggregation_of_the_metric_runs_over_all_queries(aggregation: object, chunk: int) -> None:
    embeddings, groups = clusters(25)
    metric = EmbeddingRetrieval(RetrievalMRR(aggregation=aggregation), similarity="dot", chunk_elements=chunk)
    rankings = ranked_hits((embeddings.double() @ embeddings.double().T).tolist(), same_group(groups))
    values = torch.tensor([reciprocal_rank(hits, None) for hits in rankings])
    expected = aggregation(values, dim=None) if callable(aggregation) else getattr(torch, aggregation)(values)
    assert value_of(metric, (embeddings, groups)) == pytest.approx(expected.item(), abs=1e-6)


def test_metric_without_a_shortcut_sees_every_candidate() -> None:
    """Fall-out counts the irrelevant items, and a subclass may do anything."""

    class Depth(RetrievalMRR):
        def _metric(self, preds: Tensor, target: Tensor) -> Tensor:
            return torch.tensor(float(len(preds)))

    embeddings, groups = clusters(20)
    assert value_of(EmbeddingRetrieval(Depth()), (embeddings, groups)) == 19.0

    def fall_out(hits: list[bool], k: int | None) -> float:
        return sum(not hit for hit in hits[:k]) / sum(not hit for hit in hits)

    metric = EmbeddingRetrieval(RetrievalFallOut(top_k=4), similarity="dot", chunk_elements=60)
    expected = by_hand(embeddings, same_group(groups), fall_out, 4)
    assert value_of(metric, (embeddings, groups)) == pytest.approx(expected, abs=1e-6)
    assert not metric.higher_is_better and EmbeddingRetrieval(RetrievalMRR()).higher_is_better


def test_precision_at_one_is_the_leave_one_out_accuracy_of_scikit_learn() -> None:
    embeddings, groups = clusters(200)
    _, neighbours = NearestNeighbors(n_neighbors=2, metric="cosine").fit(embeddings.numpy()).kneighbors()
    expected = (groups[neighbours[:, 0]] == groups).float().mean().item()
    assert 0.3 < expected < 0.95
    assert value_of(EmbeddingRetrieval(RetrievalPrecision(top_k=1)), (embeddings, groups)) == pytest.approx(expected)


def test_average_precision_and_ndcg_are_those_of_scikit_learn() -> None:
    embeddings, groups = clusters(60)
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    similarities = (unit @ unit.T).numpy()
    others = ~np.eye(60, dtype=bool)
    precisions, gains = [], []
    for query in range(60):
        relevant = (groups == groups[query]).numpy()[others[query]]
        scores = similarities[query][others[query]]
        precisions.append(average_precision_score(relevant, scores))
        gains.append(ndcg_score([relevant], [scores], k=10))
    for inner, expected in ((RetrievalMAP(), precisions), (RetrievalNormalizedDCG(top_k=10), gains)):
        metric = EmbeddingRetrieval(inner, chunk_elements=700)
        assert value_of(metric, (embeddings, groups)) == pytest.approx(np.mean(expected), abs=1e-6)


def test_cosine_ignores_length_and_dot_does_not() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.1, 0.01], [0.0, 1.0], [50.0, 60.0]])
    groups = torch.tensor([0, 0, 1, 1])
    at_one = RetrievalPrecision(top_k=1)
    assert value_of(EmbeddingRetrieval(at_one), (embeddings, groups)) == 1.0
    assert value_of(EmbeddingRetrieval(at_one, similarity="dot"), (embeddings, groups)) == 0.5


def test_negative_similarity_of_a_relevant_item_is_no_miss() -> None:
    """Item 0 is unlike all others, and the relevant one is still its nearest; torchmetrics alone would count 0."""
    embeddings = torch.tensor([[1.0, 0.0], [-0.1, 1.0], [-1.0, 0.0]])
    groups = torch.tensor([0, 0, 1])
    assert ((embeddings @ embeddings.T)[0, 1:] < 0).all()
    metric = EmbeddingRetrieval(RetrievalMRR(), similarity="dot")
    assert value_of(metric, (embeddings, groups)) == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_pairs_find_their_partner_in_both_directions() -> None:
    generator = torch.Generator().manual_seed(3)
    batches, relevant_pairs, vectors, offset = [], [], [], 0
    for count in (4, 7, 1):
        embeddings = torch.randint(-2, 3, (2 * count, 4), generator=generator).float()
        pairs = torch.stack([torch.arange(count), torch.arange(count) + count], dim=1)
        labels = torch.randint(0, 2, (count,), generator=generator).float()
        batches.append((embeddings, pairs, labels, torch.zeros(2 * count)))
        relevant_pairs += [
            (a + offset, b + offset) for (a, b), label in zip(pairs.tolist(), labels, strict=True) if label
        ]
        vectors.append(embeddings)
        offset += 2 * count
    relevant = [[(q, c) in relevant_pairs or (c, q) in relevant_pairs for c in range(offset)] for q in range(offset)]
    assert 3 < len(relevant_pairs) < 12
    for chunk in (1, 60, 10**6):
        for inner, definition, k in (
            (RetrievalMRR(), reciprocal_rank, None),
            (RetrievalPrecision(top_k=3), precision, 3),
        ):
            metric = EmbeddingRetrieval(inner, similarity="dot", chunk_elements=chunk)
            expected = by_hand(torch.cat(vectors), relevant, definition, k)
            assert value_of(metric, *batches) == pytest.approx(expected, abs=1e-6)


def test_batches_and_chunks_do_not_change_the_value() -> None:
    embeddings, groups = clusters(101)
    whole = value_of(EmbeddingRetrieval(RetrievalMRR()), (embeddings, groups))
    for batch_size in (1, 8, 101):
        for chunk in (1, 500, 10**6):
            metric = EmbeddingRetrieval(RetrievalMRR(), chunk_elements=chunk)
            batches = zip(embeddings.split(batch_size), groups.split(batch_size), strict=True)
            assert value_of(metric, *batches) == pytest.approx(whole, abs=1e-6)


def test_no_more_similarities_than_allowed_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from quatcache import metrics

    shapes: list[torch.Size] = []
    original = metrics._rank

    def rank(ranker: RetrievalMRR, queries: Tensor, similarities: Tensor, relevant: Tensor) -> None:
        shapes.append(similarities.shape)
        original(ranker, queries, similarities, relevant)
        assert ranker.preds == [], "a chunk is forgotten once it is ranked"

    monkeypatch.setattr(metrics, "_rank", rank)
    value_of(EmbeddingRetrieval(RetrievalMRR(), chunk_elements=450), clusters(100))
    assert max(shape.numel() for shape in shapes) <= 450
    assert sum(shape[0] for shape in shapes) == 100


@pytest.mark.parametrize(
    ("inner", "most"),
    [(RetrievalPrecision(top_k=5), 6), (RetrievalMRR(), 1), (RetrievalMAP(), 1), (RetrievalMRR(top_k=3), 3)],
)
def test_metrics_of_torchmetrics_get_few_of_the_candidates(
    inner: RetrievalMRR, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here no query has a relevant item, or its nearest neighbour is the only one."""
    seen: list[int] = []
    original = type(inner).update

    def update(self: RetrievalMRR, preds: Tensor, target: Tensor, indexes: Tensor) -> None:
        seen.append(len(preds))
        original(self, preds, target, indexes)

    monkeypatch.setattr(type(inner), "update", update)
    embeddings, _ = clusters(150)
    twins = torch.cat([embeddings, 1.001 * embeddings])
    for groups in (torch.arange(300), torch.arange(150).repeat(2)):
        seen.clear()
        value_of(EmbeddingRetrieval(inner), (twins, groups))
        assert 0 < sum(seen) <= 300 * most


def test_forward_gives_the_batch_and_compute_everything() -> None:
    embeddings, groups = clusters(40)
    metric = EmbeddingRetrieval(RetrievalMRR(), similarity="dot")
    for start in (0, 20):
        part = slice(start, start + 20)
        expected = by_hand(embeddings[part], same_group(groups[part]), reciprocal_rank, None)
        assert metric(embeddings[part], groups[part]).item() == pytest.approx(expected, abs=1e-6)
    expected = by_hand(embeddings, same_group(groups), reciprocal_rank, None)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


def test_forward_keeps_the_pairs_of_earlier_batches_apart() -> None:
    pairs, labels = torch.tensor([[0, 1]]), torch.ones(1)
    metric = EmbeddingRetrieval(RetrievalMRR(), similarity="dot")
    for direction in torch.eye(3):
        assert metric(torch.stack([direction, 2 * direction]), pairs, labels).item() == 1.0
    assert metric.compute().item() == 1.0


def test_reset_forgets_and_allows_the_other_kind_of_targets() -> None:
    metric = EmbeddingRetrieval(RetrievalMRR())
    value_of(metric, clusters(10))
    with pytest.raises(ConfigError, match=r"mix groups and pairs; call reset"):
        metric.update(torch.eye(2), torch.tensor([[0, 1]]), torch.ones(1))
    assert value_of(metric) == value_of(EmbeddingRetrieval(RetrievalMRR()), clusters(10)), "a refusal loses nothing"
    metric.reset()
    assert value_of(metric, (torch.eye(2), torch.tensor([[0, 1]]), torch.ones(1))) == 1.0
    with pytest.raises(ConfigError, match=r"mix groups and pairs"):
        metric.update(torch.eye(2), torch.tensor([0, 1]))


def test_template_is_not_updated_and_can_serve_several_metrics() -> None:
    inner = RetrievalMRR()
    first, second = EmbeddingRetrieval(inner), EmbeddingRetrieval(inner)
    batch = clusters(10)
    assert value_of(first, batch) == value_of(second, batch)
    assert inner.indexes == [] and inner.aggregation == "mean" and not inner.update_called


def test_clones_pickles_and_collections_keep_the_value() -> None:
    batch = clusters(30)
    metric = EmbeddingRetrieval(RetrievalPrecision(top_k=2), chunk_elements=100)
    expected = value_of(metric, batch)
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        copy.reset()
        assert value_of(copy, batch) == expected
    together = MetricCollection(
        {"p2": EmbeddingRetrieval(RetrievalPrecision(top_k=2)), "mrr": EmbeddingRetrieval(RetrievalMRR())}
    )
    for part in range(3):
        together.update(batch[0][part::3], batch[1][part::3])
    order = torch.cat([torch.arange(30)[part::3] for part in range(3)])
    shuffled = (batch[0][order], batch[1][order])
    assert together.compute()["p2"].item() == pytest.approx(expected)
    assert together.compute()["mrr"].item() == value_of(EmbeddingRetrieval(RetrievalMRR()), shuffled)


def test_state_is_not_part_of_a_checkpoint() -> None:
    metric = EmbeddingRetrieval(RetrievalMRR())
    metric.update(*clusters(10))
    assert metric.state_dict() == {}


def test_graph_of_the_embeddings_is_not_kept() -> None:
    metric = EmbeddingRetrieval(RetrievalMRR())
    head = LinearHead(8, 4)
    embeddings, groups = clusters(10)
    metric.update(head(embeddings), groups)
    assert not metric.embeddings[0].requires_grad
    assert not metric.compute().requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_similarities_of_any_dtype_are_computed_in_at_least_single_precision(dtype: torch.dtype) -> None:
    embeddings, groups = clusters(60)
    embeddings = embeddings.to(dtype)
    metric = EmbeddingRetrieval(RetrievalMRR(), similarity="dot")
    expected = by_hand(embeddings, same_group(groups), reciprocal_rank, None)
    metric.update(embeddings, groups)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embedding_that_is_not_finite_makes_the_value_nan(bad: float) -> None:
    embeddings, groups = clusters(10)
    embeddings[3, 2] = bad
    assert math.isnan(value_of(EmbeddingRetrieval(RetrievalMRR()), (embeddings, groups)))


def test_single_item_has_no_neighbours_and_counts_as_nothing() -> None:
    assert value_of(EmbeddingRetrieval(RetrievalMRR()), (torch.ones(1, 4), torch.zeros(1))) == 0.0


def test_compute_without_items_says_so() -> None:
    metric = EmbeddingRetrieval(RetrievalMRR())
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(ConfigError, match="0 items"):
        metric.compute()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"metric": RetrievalPrecisionRecallCurve()}, "one number per query"),
        ({"metric": MulticlassAccuracy(3)}, "one number per query"),
        ({"metric": RetrievalMRR}, "one number per query"),
        ({"metric": RetrievalMRR(), "similarity": "l2"}, "similarity is 'l2'"),
        ({"metric": RetrievalMRR(), "chunk_elements": 0}, "chunk_elements is 0"),
        ({"metric": RetrievalMRR(), "chunk_elements": 1.5}, "chunk_elements is 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        EmbeddingRetrieval(**arguments)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((torch.zeros(4, 2, 2), torch.zeros(4)), r"embeddings has shape \(4, 2, 2\)"),
        ((torch.zeros(4, 2),), r"targets of shapes none came with 4 embeddings; give groups \(4,\)"),
        ((torch.zeros(4, 2), torch.zeros(3)), r"shapes \(3,\) came with 4 embeddings"),
        ((torch.zeros(4, 2), torch.zeros(4, 1)), r"shapes \(4, 1\) came"),
        ((torch.zeros(4, 2), torch.zeros(2, 2), torch.zeros(3)), r"shapes \(2, 2\), \(3,\) came"),
    ],
)
def test_batch_of_the_wrong_shape_is_one_clear_error(batch: tuple[Tensor, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        EmbeddingRetrieval(RetrievalMRR()).update(*batch)


def test_classification_metric_of_torchmetrics_needs_no_wrapper() -> None:
    embeddings, groups = clusters(50)
    logits = LinearHead(8, 4)(embeddings)
    metric = MulticlassAccuracy(num_classes=4, average="micro")
    metric.update(logits, groups)
    assert metric.compute().item() == pytest.approx((logits.argmax(dim=1) == groups).float().mean().item())


def group_batches() -> list[tuple[Tensor, ...]]:
    embeddings, groups = clusters(37)
    return list(zip(embeddings.split(5), groups.split(5), strict=True))


def pair_batches() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(9)
    return [
        (
            torch.randn(2 * count, 6, generator=generator),
            torch.stack([torch.arange(count), torch.arange(count) + count], dim=1),
            torch.randint(0, 2, (count,), generator=generator).float(),
        )
        for count in (3, 5, 2, 4, 1, 6, 2)
    ]


def inner_metrics() -> list[EmbeddingRetrieval]:
    return [
        EmbeddingRetrieval(inner, chunk_elements=200)
        for inner in (RetrievalMRR(), RetrievalPrecision(top_k=2), RetrievalFallOut(top_k=3))
    ]


def one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = []
    for batches in (group_batches(), pair_batches()):
        for metric in inner_metrics():
            for batch in batches[rank::2]:  # four batches and three, of unequal sizes
                metric.update(*batch)
            values.append(metric.compute())
            local = sum(len(batch[0]) for batch in batches[rank::2])
            assert sum(len(part) for part in metric.embeddings) == local, "the local state is back after compute"
    torch.save(torch.stack(values), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed package")
def test_ranks_of_a_distributed_run_get_the_value_of_a_single_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    expected = []
    for batches in (group_batches(), pair_batches()):
        joined = [*batches[0::2], *batches[1::2]]
        expected += [value_of(metric, *joined) for metric in inner_metrics()]
    for rank in range(2):
        values = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(values, torch.tensor(expected))
