"""The demo's data: read from the packaged list, split so that nothing leaks."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from quatcache.demo.icd10 import CHAPTERS, Diagnosis, packaged_tabular, read_tabular, split_by_category
from quatcache.errors import ConfigError, FormatError, MissingDependencyError

pytest.importorskip("simple_icd_10_cm")

LIST = """<?xml version="1.0"?>
<ICD10CM.tabular>
  <chapter><name>4</name><desc>Endocrine</desc><section>
    <diag><name>E10</name><desc>Type 1   diabetes
      mellitus</desc>
      <inclusionTerm><note>brittle diabetes</note><note>juvenile onset diabetes</note></inclusionTerm>
      <diag><name>E10.1</name><desc>Type 1 with ketoacidosis</desc></diag>
    </diag>
    <diag><name>E11</name><desc>Type 2 diabetes mellitus</desc>
      <inclusionTerm><note>diabetes NOS</note></inclusionTerm></diag>
    <diag><name>E13</name><desc>Other diabetes</desc>
      <inclusionTerm><note>diabetes NOS</note></inclusionTerm></diag>
  </section></chapter>
</ICD10CM.tabular>
"""


@pytest.fixture(scope="module")
def diagnoses() -> list[Diagnosis]:
    return read_tabular()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.xml"
    path.write_text(text, encoding="utf-8")
    return path


def test_descriptions_and_inclusion_terms_carry_their_category_and_chapter(tmp_path):
    assert read_tabular(written(tmp_path, LIST)) == [
        Diagnosis("Type 1 diabetes mellitus", 3, "E10"),
        Diagnosis("brittle diabetes", 3, "E10"),
        Diagnosis("juvenile onset diabetes", 3, "E10"),
        Diagnosis("Type 1 with ketoacidosis", 3, "E10"),
        Diagnosis("Type 2 diabetes mellitus", 3, "E11"),
        Diagnosis("Other diabetes", 3, "E13"),
    ]


def test_packaged_list_has_all_chapters_and_each_text_once(diagnoses):
    assert {diagnosis.chapter for diagnosis in diagnoses} == set(range(CHAPTERS))
    assert len({diagnosis.text for diagnosis in diagnoses}) == len(diagnoses) > 40_000


def test_no_category_and_no_text_is_on_both_sides(diagnoses):
    category = {diagnosis.text: diagnosis.category for diagnosis in diagnoses}
    split = split_by_category(diagnoses)
    train, validation = ({category[text] for text, _ in side} for side in (split.train, split.validation))
    assert train.isdisjoint(validation)
    assert len(dict(split.train)) == 4000
    assert len(dict(split.validation)) == 1000


def test_every_chapter_is_on_both_sides_in_equal_parts(diagnoses):
    split = split_by_category(diagnoses)
    for side in (split.train, split.validation):
        counts = Counter(chapter for _, chapter in side)
        small = counts.pop(CHAPTERS - 1)  # codes for special purposes: 11 texts in all
        assert set(counts) == set(range(CHAPTERS - 1))
        assert max(counts.values()) - min(counts.values()) <= 1
        assert 0 < small < 11


def test_labels_are_the_chapters_of_the_texts(diagnoses):
    chapter = {diagnosis.text: diagnosis.chapter for diagnosis in diagnoses}
    split = split_by_category(diagnoses, train_size=300, validation_size=100)
    assert all(chapter[text] == label for text, label in split.train + split.validation)


def test_same_seed_same_split_and_another_seed_another(diagnoses):
    first = split_by_category(diagnoses, seed=1)
    assert first == split_by_category(diagnoses, seed=1)
    assert first != split_by_category(diagnoses, seed=2)


def test_training_texts_do_not_depend_on_the_validation_size(diagnoses):
    small = split_by_category(diagnoses, validation_size=100)
    assert small.train == split_by_category(diagnoses, validation_size=1000).train


def test_more_than_there_is_gives_all_there_is(tmp_path):
    split = split_by_category(read_tabular(written(tmp_path, LIST)), train_size=99, validation_size=99)
    assert len(split.train) + len(split.validation) == 6


@pytest.mark.parametrize("sizes", [{"train_size": 0}, {"validation_size": -1}])
def test_size_that_is_not_positive_is_refused(diagnoses, sizes):
    with pytest.raises(ConfigError, match=str(next(iter(sizes.values())))):
        split_by_category(diagnoses, **sizes)


def test_single_category_cannot_be_split():
    with pytest.raises(ConfigError, match=r"chapter 4 .*'E10'"):
        split_by_category([Diagnosis("a", 3, "E10"), Diagnosis("b", 3, "E10")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no xml at all", "not readable XML"),
        ("<ICD10CM.tabular/>", "holds no diagnosis"),
        (LIST.replace("<name>4</name>", "<name>23</name>"), "chapter '23'"),
        (LIST.replace("<name>4</name>", "<name>x</name>"), "chapter 'x'"),
    ],
)
def test_file_that_is_no_tabular_list_is_named(tmp_path, text, message):
    with pytest.raises(FormatError, match=message):
        read_tabular(written(tmp_path, text))


def test_document_type_is_refused_before_any_entity_expands(tmp_path):
    bomb = '<!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><ICD10CM.tabular>&b;</ICD10CM.tabular>'
    with pytest.raises(FormatError, match="document type 'lolz'"):
        read_tabular(written(tmp_path, bomb))


def test_missing_data_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    with pytest.raises(MissingDependencyError, match=r"quatcache\[demo\]"):
        packaged_tabular()
