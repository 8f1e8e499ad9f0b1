"""The command line: Lightning's own, with the model, the data and the cache chosen in a YAML file."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from quatcache import cli

ROOT = Path(__file__).resolve().parents[1]

# Lightning 2.6 calls jsonargparse by names that the latter has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s).*was deprecated in v4"),
    pytest.mark.filterwarnings("ignore:(?s).*JSONARGPARSE_DEPRECATION_WARNINGS"),
]


@pytest.fixture
def jsonargparse():
    return pytest.importorskip("jsonargparse")


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A run leaves its files in the current folder; and LightningCLI reads sys.argv beside what it is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quatcache"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_package_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quatcache", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("quatcache", run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("quatcache ")


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


def test_unknown_command_is_refused_and_the_known_ones_named(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["traine"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "traine" in err
    assert "fit" in err


def test_missing_jsonargparse_names_the_extra(monkeypatch, capsys):
    from quatcache.training import command_line

    real = importlib.util.find_spec
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == "jsonargparse" else real(name))
    assert cli.main(["fit", "--config", "any.yaml"]) == 1
    assert "pip install 'quatcache[cli]'" in capsys.readouterr().err


def test_config_of_the_repository_is_complete_and_the_command_line_overrides_the_cache(jsonargparse, in_folder, capsys):
    config = str(ROOT / "configs" / "icd10.yaml")
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", config, "--model.init_args.cache.batch_size", "128", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    cache = printed["model"]["init_args"]["cache"]
    assert cache["batch_size"] == 128
    assert cache["save_dir"] == "cache"
    assert printed["model"]["class_path"] == "quatcache.demo.model.DiagnosisClassifier"


def test_unknown_cache_field_is_refused_by_name(jsonargparse, in_folder, capsys):
    config = str(ROOT / "configs" / "icd10.yaml")
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", config, "--model.init_args.cache.batchsize", "128"])
    assert stop.value.code == 2
    assert "batchsize" in capsys.readouterr().err


def test_cache_setting_that_cannot_work_is_one_line(jsonargparse, in_folder, capsys):
    config = str(ROOT / "configs" / "icd10.yaml")
    assert cli.main(["fit", "--config", config, "--model.init_args.cache.batch_size", "0"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("quatcache: batch_size is 0")


def test_error_that_is_not_quatcaches_own_is_not_swallowed(monkeypatch):
    def broken(arguments):
        raise RuntimeError("not ours")

    monkeypatch.setitem(cli.COMMANDS, "fit", ("", broken))
    with pytest.raises(RuntimeError, match="not ours"):
        cli.main(["fit"])


MODEL_BESIDE_THE_YAML = """
import torch
from torch import nn
from torch.utils.data import DataLoader
from quatcache import CacheConfig, CacheType, Encoder, TrainableModel
from quatcache.training.lightning import LightningDataModule

CALLS = []

class Numbers(Encoder):
    trainable = False
    embedding_size = 4
    def __init__(self):
        super().__init__()
        self.table = torch.arange(40.0).reshape(10, 4)
    def collate(self, items):
        return torch.tensor(items)
    def forward(self, inputs):
        CALLS.extend(inputs.tolist())
        return self.table[inputs]

class Tiny(TrainableModel):
    def __init__(self, lr: float = 0.1, cache: CacheConfig | None = None):
        super().__init__()
        self.lr, self.cache = lr, cache
    def configure_encoders(self):
        return Numbers()
    def configure_head(self, input_embedding_size):
        return nn.Linear(input_embedding_size, 2)
    def configure_loss(self):
        return nn.CrossEntropyLoss()
    def configure_caches(self):
        return self.cache

class Parity(LightningDataModule):
    def train_dataloader(self):
        return DataLoader([(i, i % 2) for i in range(10)], batch_size=5)
    def val_dataloader(self):
        return DataLoader([(i, i % 2) for i in range(10)], batch_size=5)
"""

TINY_CONFIG = {
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    "model": {
        "class_path": "tiny_model_beside.Tiny",
        "init_args": {"cache": {"cache_type": "CPU", "save_dir": "rows"}},
    },
    "data": {"class_path": "tiny_model_beside.Parity"},
}


@pytest.fixture
def tiny(in_folder):
    """A folder with a model, its data and a YAML that names both."""
    (in_folder / "tiny_model_beside.py").write_text(MODEL_BESIDE_THE_YAML, encoding="utf-8")
    (in_folder / "tiny.yaml").write_text(json.dumps(TINY_CONFIG), encoding="utf-8")  # JSON is YAML
    yield in_folder
    sys.modules.pop("tiny_model_beside", None)


def test_model_that_lies_beside_the_yaml_trains_and_its_second_run_encodes_nothing(jsonargparse, tiny):
    assert cli.main(["fit", "--config", "tiny.yaml"]) == 0
    calls = sys.modules["tiny_model_beside"].CALLS
    assert set(calls) == set(range(10))
    calls.clear()
    assert cli.main(["fit", "--config", "tiny.yaml"]) == 0
    assert calls == []


def test_config_that_a_run_leaves_behind_repeats_it(jsonargparse, tiny):
    assert cli.main(["fit", "--config", "tiny.yaml", "--model.init_args.lr", "0.25"]) == 0
    saved = yaml.safe_load((tiny / "config.yaml").read_text())
    assert saved["model"]["init_args"]["lr"] == 0.25
    assert cli.main(["fit", "--config", "config.yaml"]) == 0


def test_optimizer_of_the_command_line_takes_the_place_of_the_models(jsonargparse, tiny, monkeypatch):
    stepped = []
    real = torch.optim.SGD.step

    def counted(self, closure=None):
        stepped.append(type(self))
        return real(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    assert cli.main(["fit", "--config", "tiny.yaml", "--optimizer", "SGD", "--optimizer.lr", "0.1"]) == 0
    assert len(stepped) == 6  # three epochs of two batches
