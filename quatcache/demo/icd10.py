"""Diagnosis texts of ICD-10-CM and the chapter each belongs to, split so that no diagnosis leaks.

The tabular list nests chapter > section > diag > diag. Near-identical texts stand under one three-character category
("... of left arm", "... of right arm"), so a random split would put one variant in training and its twin in validation
and report a far too good accuracy. Whole categories go to one side instead, and a text that stands under two
categories is left out. Chapters differ a thousandfold in size (injuries have 14,901 texts, codes for special purposes
11), hence every chapter gives the same number of texts as far as it has them.

The file is read with the standard library. It comes from a package, yet a document type declaration is refused all the
same: entities are the one part of XML that can blow up a reader, and the list has no use for them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from quatcache.errors import ConfigError, FormatError, MissingDependencyError

__all__ = ["CHAPTERS", "Diagnosis", "Split", "packaged_tabular", "read_tabular", "split_by_category"]

CHAPTERS = 22
"""How many chapters ICD-10-CM has; the classes are 0 to 21."""

VALIDATION_SHARE = 0.2
"""The share of a chapter's categories that goes to validation."""


@dataclass(frozen=True)
class Diagnosis:
    """One text of the tabular list.

    Attributes:
        text: The description of a code, or one of its inclusion terms; white space is single spaces.
        chapter: The chapter's number less one, in ``0 <= chapter < 22``.
        category: The first three characters of the code, for instance ``"E11"``.
    """

    text: str
    chapter: int
    category: str


@dataclass(frozen=True)
class Split:
    """Training and validation texts that share no category.

    Attributes:
        train: ``(text, chapter)`` pairs in a seeded random order.
        validation: ``(text, chapter)`` pairs in a seeded random order.
    """

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]


class _PlainTree(ElementTree.TreeBuilder):
    """A tree builder that stops at a document type declaration, the only door to entity expansion."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise FormatError(f"the tabular list declares a document type {name!r}; only plain XML without one is read")


def packaged_tabular() -> Path:
    """Find the tabular list that the package ``simple-icd-10-cm`` brings along.

    Returns:
        The path of its ``icd10c-tabular-*.xml``.

    Raises:
        MissingDependencyError: The package is not installed, or holds no tabular list.
    """
    # Found, not imported: importing it would build its own tree of all codes, which takes seconds.
    spec = find_spec("simple_icd_10_cm")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "simple-icd-10-cm, which holds the diagnosis texts, is not installed: pip install 'quatcache[demo]'"
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    # Sorted by name, the newest release year comes last within a month; one file is what every release so far had.
    lists = sorted(data.glob("icd10c-tabular-*.xml"))
    if not lists:
        raise MissingDependencyError(
            f"simple-icd-10-cm holds no icd10c-tabular-*.xml in {data}: pip install 'simple-icd-10-cm>=1.5.0'"
        )
    return lists[-1]


def read_tabular(path: str | Path | None = None) -> list[Diagnosis]:
    """Read every description and inclusion term, each text once.

    A text that stands under more than one category is left out: it would be on both sides of a split by category.

    Args:
        path: An ICD-10-CM tabular list in XML; ``None`` takes the packaged one.

    Returns:
        The diagnoses in the order of the list.

    Raises:
        FormatError: The file is no XML, declares a document type, or has chapters other than 1 to 22.
        MissingDependencyError: No path is given and the packaged list is not installed.

    Example:
        >>> diagnoses = read_tabular()
        >>> diagnoses[0]
        Diagnosis(text='Cholera', chapter=0, category='A00')
        >>> len({diagnosis.chapter for diagnosis in diagnoses})
        22
    """
    source = packaged_tabular() if path is None else Path(path)
    try:
        root = ElementTree.parse(source, ElementTree.XMLParser(target=_PlainTree())).getroot()
    except ElementTree.ParseError as error:
        raise FormatError(f"{source} is not readable XML ({error}); give an ICD-10-CM tabular list") from error

    found: dict[str, Diagnosis] = {}
    categories: defaultdict[str, set[str]] = defaultdict(set)
    for chapter in root.findall("chapter"):
        number = chapter.findtext("name", default="").strip()
        if not number.isdigit() or not 1 <= int(number) <= CHAPTERS:
            raise FormatError(f"{source} has a chapter {number!r}; ICD-10-CM has the chapters 1 to {CHAPTERS}")
        for diag in chapter.iter("diag"):
            category = diag.findtext("name", default="").strip()[:3]
            notes = [note.text for term in diag.findall("inclusionTerm") for note in term.findall("note")]
            for raw in (diag.findtext("desc"), *notes):
                text = " ".join((raw or "").split())
                if text:
                    found.setdefault(text, Diagnosis(text, int(number) - 1, category))
                    categories[text].add(category)
    if not found:
        raise FormatError(f"{source} holds no diagnosis; give an ICD-10-CM tabular list")
    return [diagnosis for text, diagnosis in found.items() if len(categories[text]) == 1]


def split_by_category(
    diagnoses: Sequence[Diagnosis], train_size: int = 4000, validation_size: int = 1000, seed: int = 0
) -> Split:
    """Draw a training and a validation set that share no category, every chapter in equal parts.

    Of each chapter, a fifth of the categories (one at least) goes to validation. From each side the chapter then gives
    its equal share of texts; what a small chapter cannot give, the larger ones give in its place.

    Args:
        diagnoses: What :func:`read_tabular` returned; every chapter needs two categories or more.
        train_size: Number of training texts, > 0; fewer come back when there are not so many.
        validation_size: Number of validation texts, > 0; likewise.
        seed: The same seed gives the same split, in every process and on every machine.

    Returns:
        The two sides.

    Raises:
        ConfigError: A size is not positive, or a chapter has a single category, which cannot be on both sides.

    Example:
        >>> split = split_by_category(read_tabular(), train_size=440, validation_size=220)
        >>> len(split.train), len(split.validation)
        (440, 220)
    """
    if train_size <= 0 or validation_size <= 0:
        raise ConfigError(
            f"train_size={train_size} and validation_size={validation_size} must both be positive numbers of texts"
        )
    by_chapter: defaultdict[int, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for diagnosis in diagnoses:
        by_chapter[diagnosis.chapter][diagnosis.category].append(diagnosis.text)

    # Pools in chapter order, each shuffled by a generator of its own: the split of one chapter does not depend on
    # what the others hold. Seeding with a string goes through a digest, so it is the same in every process.
    pools: dict[str, list[list[tuple[str, int]]]] = {"train": [], "validation": []}
    for chapter in sorted(by_chapter):
        rng = random.Random(f"{seed}/{chapter}")
        categories = sorted(by_chapter[chapter])
        if len(categories) < 2:
            raise ConfigError(
                f"chapter {chapter + 1} has the single category {categories[0]!r}; two are needed to split by category"
            )
        rng.shuffle(categories)
        held_out = max(1, round(VALIDATION_SHARE * len(categories)))
        for side, names in (("validation", categories[:held_out]), ("train", categories[held_out:])):
            pool = [(text, chapter) for name in names for text in by_chapter[chapter][name]]
            rng.shuffle(pool)
            pools[side].append(pool)

    def draw(side: str, total: int) -> list[tuple[str, int]]:
        shares = _equal_shares([len(pool) for pool in pools[side]], total)
        drawn = [pair for pool, share in zip(pools[side], shares, strict=True) for pair in pool[:share]]
        random.Random(f"{seed}/{side}").shuffle(drawn)
        return drawn

    return Split(train=draw("train", train_size), validation=draw("validation", validation_size))


def _equal_shares(available: Sequence[int], total: int) -> list[int]:
    """Divide ``total`` into equal parts, none above what is available; the smallest are served first.

    Args:
        available: How many each party can give.
        total: How many are wanted in all.

    Returns:
        One share per party, in the order of ``available``; they add up to ``min(total, sum(available))``.

    Example:
        >>> _equal_shares([100, 3, 100], 23)
        [10, 3, 10]
    """
    shares = [0] * len(available)
    left = total
    for served, party in enumerate(sorted(range(len(available)), key=lambda party: (available[party], -party))):
        shares[party] = min(available[party], left // (len(available) - served))
        left -= shares[party]
    return shares
