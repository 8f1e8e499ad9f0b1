"""The pair loss is that of sentence-transformers; group losses of other libraries take a head's output unmodified."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

from quatcache.errors import ConfigError
from quatcache.heads import LinearHead, SkipConnectionHead
from quatcache.losses import MultipleNegativesRankingLoss

PAIRS, WIDTH = 5, 7


def batch(count: int = PAIRS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Embeddings of ``count`` pairs, first items before second ones, and the pairs' row numbers."""
    embeddings = torch.randn(2 * count, WIDTH, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return embeddings, torch.stack([torch.arange(count), torch.arange(count) + count], dim=1)


def by_hand(
    embeddings: Tensor,
    pairs: Tensor,
    labels: list[float],
    subgroups: list[int],
    negatives: str = "same_subgroup",
    scale: float = 20.0,
) -> float:
    """The definition, one Python number at a time."""
    rows = [[float(value) for value in row] for row in embeddings]

    def cosine(left: int, right: int) -> float:
        dot = sum(a * b for a, b in zip(rows[left], rows[right], strict=True))
        return dot / math.hypot(*rows[left]) / math.hypot(*rows[right])

    losses = []
    for i, (first, own) in enumerate(pairs.tolist()):
        if labels[i] <= 0:
            continue
        total = 0.0
        for j, (_, other) in enumerate(pairs.tolist()):
            same = subgroups[first] == subgroups[other]
            if i == j or negatives == "all" or same == (negatives == "same_subgroup"):
                total += math.exp(scale * cosine(first, other))
        losses.append(math.log(total) - scale * cosine(first, own))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("sentence_transformers.sentence_transformer.losses")


def test_value_and_gradient_are_those_of_sentence_transformers(reference) -> None:
    embeddings, pairs = batch(count=32)
    for scale in (1.0, 20.0, 50.0):
        ours = embeddings.clone().requires_grad_()
        theirs = embeddings.clone().requires_grad_()
        expected = reference.MultipleNegativesRankingLoss(nn.Identity(), scale=scale).compute_loss_from_embeddings(
            list(theirs.chunk(2)), torch.empty(0)
        )
        loss = MultipleNegativesRankingLoss(scale=scale)(ours, pairs, torch.ones(32), torch.zeros(64))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_default_scale_is_that_of_sentence_transformers(reference) -> None:
    embeddings, pairs = batch()
    expected = reference.MultipleNegativesRankingLoss(nn.Identity()).compute_loss_from_embeddings(
        list(embeddings.chunk(2)), torch.empty(0)
    )
    torch.testing.assert_close(MultipleNegativesRankingLoss()(embeddings, pairs), expected)


def test_dot_similarity_is_that_of_sentence_transformers_at_scale_one(reference) -> None:
    from sentence_transformers.util import dot_score

    embeddings, pairs = batch()
    expected = reference.MultipleNegativesRankingLoss(
        nn.Identity(), scale=1.0, similarity_fct=dot_score
    ).compute_loss_from_embeddings(list(embeddings.chunk(2)), torch.empty(0))
    torch.testing.assert_close(MultipleNegativesRankingLoss(similarity="dot")(embeddings, pairs), expected)


def test_symmetric_loss_is_that_of_sentence_transformers_in_both_directions(reference) -> None:
    embeddings, pairs = batch()
    expected = reference.MultipleNegativesRankingLoss(
        nn.Identity(), directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    ).compute_loss_from_embeddings(list(embeddings.chunk(2)), torch.empty(0))
    torch.testing.assert_close(MultipleNegativesRankingLoss(symmetric=True)(embeddings, pairs), expected)


def test_pair_labelled_zero_is_a_hard_negative_of_sentence_transformers(reference) -> None:
    generator = torch.Generator().manual_seed(2)
    anchors, positives, negatives = torch.randn(3, PAIRS, WIDTH, generator=generator)
    expected = reference.MultipleNegativesRankingLoss(nn.Identity()).compute_loss_from_embeddings(
        [anchors, positives, negatives], torch.empty(0)
    )
    embeddings = torch.cat([anchors, anchors, positives, negatives])
    pairs = torch.stack([torch.arange(2 * PAIRS), torch.arange(2 * PAIRS) + 2 * PAIRS], dim=1)
    labels = torch.cat([torch.ones(PAIRS), torch.zeros(PAIRS)])
    loss = MultipleNegativesRankingLoss()(embeddings, pairs, labels, torch.zeros(4 * PAIRS, dtype=torch.long))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("negatives", ["same_subgroup", "other_subgroups", "all"])
def test_labels_and_subgroups_follow_the_definition(negatives: str) -> None:
    embeddings, pairs = batch(count=6, dtype=torch.float64)
    draw = random.Random(4)
    for _ in range(20):
        labels = [draw.choice([1.0, 0.4, 0.0, -1.0]) for _ in range(6)]
        subgroups = [draw.randrange(3) for _ in range(12)]
        loss = MultipleNegativesRankingLoss(negatives=negatives)(
            embeddings, pairs, torch.tensor(labels), torch.tensor(subgroups)
        )
        assert loss.item() == pytest.approx(by_hand(embeddings, pairs, labels, subgroups, negatives), abs=1e-9)


def test_pairs_say_which_rows_belong_together() -> None:
    embeddings, pairs = batch(dtype=torch.float64)
    order = torch.randperm(2 * PAIRS, generator=torch.Generator().manual_seed(5))
    where = order.argsort()
    subgroups = torch.tensor([0, 0, 1, 1, 1] * 2)
    loss = MultipleNegativesRankingLoss(negatives="same_subgroup")
    torch.testing.assert_close(
        loss(embeddings[order], where[pairs], torch.ones(PAIRS), subgroups[order]),
        loss(embeddings, pairs, torch.ones(PAIRS), subgroups),
    )


def test_items_of_another_subgroup_get_no_gradient() -> None:
    embeddings, pairs = batch(count=4)
    embeddings.requires_grad_()
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0])
    loss = MultipleNegativesRankingLoss(negatives="same_subgroup")
    loss(embeddings, pairs, labels, torch.tensor([0, 0, 1, 1] * 2)).backward()
    touched = embeddings.grad.abs().sum(dim=1) > 0
    assert touched.tolist() == [True, True, False, False] * 2


def test_symmetric_subgroups_hold_in_both_directions() -> None:
    embeddings, pairs = batch(dtype=torch.float64)
    labels, subgroups = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 1, 1, 0, 1] * 2)
    loss = MultipleNegativesRankingLoss(negatives="same_subgroup")
    there = loss(embeddings, pairs, labels, subgroups)
    back = loss(embeddings, pairs.flip(1), labels, subgroups)
    both = MultipleNegativesRankingLoss(symmetric=True, negatives="same_subgroup")(embeddings, pairs, labels, subgroups)
    torch.testing.assert_close(both, (there + back) / 2)
    assert not torch.allclose(there, back)


@pytest.mark.parametrize("negatives", ["same_subgroup", "other_subgroups", "all"])
def test_batch_without_a_positive_pair_gives_zero_and_a_gradient_of_zero(negatives: str) -> None:
    embeddings, pairs = batch()
    embeddings.requires_grad_()
    loss = MultipleNegativesRankingLoss(negatives=negatives)(
        embeddings, pairs, torch.zeros(PAIRS), torch.zeros(2 * PAIRS, dtype=torch.long)
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def test_gradients_are_those_of_the_function() -> None:
    embeddings, pairs = batch(count=4, dtype=torch.float64)
    labels, subgroups = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1] * 2)
    for settings in ({}, {"symmetric": True}, {"similarity": "dot"}, {"negatives": "other_subgroups"}):
        loss = MultipleNegativesRankingLoss(**settings)
        assert torch.autograd.gradcheck(
            lambda x, loss=loss: loss(x, pairs, labels, subgroups), (embeddings.requires_grad_(),), atol=1e-5
        )


def test_zero_vectors_of_the_encoder_give_finite_gradients() -> None:
    embeddings, pairs = batch()
    embeddings[0] = 0.0
    embeddings.requires_grad_()
    MultipleNegativesRankingLoss()(embeddings, pairs).backward()
    assert torch.isfinite(embeddings.grad).all()


def test_embeddings_are_not_written_to() -> None:
    embeddings, pairs = batch()
    before = embeddings.clone()
    MultipleNegativesRankingLoss(symmetric=True)(
        embeddings, pairs, torch.ones(PAIRS), torch.tensor([0, 1, 0, 1, 0] * 2)
    )
    assert torch.equal(embeddings, before)


def test_loss_trains_a_head_to_find_shuffled_partners() -> None:
    torch.manual_seed(0)
    first = torch.randn(24, 16)
    second = first @ torch.linalg.qr(torch.randn(16, 16)).Q
    embeddings = torch.cat([first, second])
    pairs = torch.stack([torch.arange(24), torch.arange(24) + 24], dim=1)
    head, loss = SkipConnectionHead(16), MultipleNegativesRankingLoss(symmetric=True)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(head(embeddings), pairs, torch.ones(24), torch.zeros(48, dtype=torch.long))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"scale": 0}, "scale is 0"),
        ({"scale": -1.0}, r"scale is -1\.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"scale": "20"}, "scale is '20'"),
        ({"scale": True}, "scale is True"),
        ({"similarity": "euclidean"}, "similarity is 'euclidean'; choose 'cosine' or 'dot'"),
        ({"negatives": "none"}, "negatives is 'none'; choose one of 'same_subgroup'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        MultipleNegativesRankingLoss(**settings)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pairs": torch.arange(PAIRS)}, r"pairs has shape \(5,\).*SimilarityPairSample"),
        ({"pairs": torch.zeros(0, 2, dtype=torch.long)}, r"pairs has shape \(0, 2\)"),
        ({"embeddings": torch.zeros(2 * PAIRS, 3, 4)}, r"embeddings has shape \(10, 3, 4\)"),
        ({"labels": torch.ones(PAIRS - 1)}, r"labels has shape \(4,\) for 5 pairs"),
        ({"labels": torch.ones(PAIRS, 1)}, r"labels has shape \(5, 1\)"),
        ({"subgroups": torch.zeros(PAIRS)}, r"subgroups has shape \(5,\) for 5 pairs of 10 embeddings; give \(10,\)"),
    ],
)
def test_batch_of_the_wrong_shape_is_one_clear_error(change: dict[str, Tensor], match: str) -> None:
    embeddings, pairs = batch()
    arguments = {"embeddings": embeddings, "pairs": pairs, "labels": None, "subgroups": None, **change}
    with pytest.raises(ConfigError, match=match):
        MultipleNegativesRankingLoss()(**arguments)


def test_other_subgroups_without_subgroups_are_refused_instead_of_ignored() -> None:
    embeddings, pairs = batch()
    with pytest.raises(ConfigError, match="subgroups is None"):
        MultipleNegativesRankingLoss(negatives="other_subgroups")(embeddings, pairs)


def test_settings_show_in_the_printed_model() -> None:
    assert "scale=1.0, symmetric=True, similarity='dot'" in repr(
        MultipleNegativesRankingLoss(symmetric=True, similarity="dot")
    )


def group_losses() -> dict[str, nn.Module]:
    library = pytest.importorskip("pytorch_metric_learning.losses")
    return {
        "triplet": library.TripletMarginLoss(),
        "supervised contrastive": library.SupConLoss(),
        "contrastive": library.ContrastiveLoss(),
        "arcface": library.ArcFaceLoss(num_classes=3, embedding_size=6),
        "proxy anchor": library.ProxyAnchorLoss(num_classes=3, embedding_size=6),
        "torch cross-entropy": nn.CrossEntropyLoss(),
        "torch multi-margin": nn.MultiMarginLoss(),
    }


@pytest.mark.parametrize(
    "name",
    [
        "triplet",
        "supervised contrastive",
        "contrastive",
        "arcface",
        "proxy anchor",
        "torch cross-entropy",
        "torch multi-margin",
    ],
)
def test_group_loss_of_another_library_trains_a_head_unmodified(name: str) -> None:
    torch.manual_seed(0)
    groups = torch.arange(30) % 3
    embeddings = torch.randn(3, 8)[groups] + torch.randn(30, 8)
    head, loss = LinearHead(8, 6), group_losses()[name]
    optimizer = torch.optim.Adam([*head.parameters(), *loss.parameters()], lr=0.02)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(head(embeddings), groups)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]
