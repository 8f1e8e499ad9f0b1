"""A run that finds all of its rows does not load the encoder, and a run that needs it is the run it always was."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import shutil
import time

import pytest
import torch
import torchmetrics
from pytorch_lightning.callbacks import BaseFinetuning, Callback, ModelSummary, StochasticWeightAveraging

from quatcache.encoders import SentenceTransformerEncoder, TransformersEncoder, opening
from quatcache.encoders import identity as identities
from quatcache.encoders.deferred import is_loaded
from quatcache.errors import ConfigError, StaleRowsError
from quatcache.store import CacheDirectory, known
from tests.fits import Failing, Model, Texts, cached, fit, head_of, loader, same_run, texts, trainer
from tests.tiny import edit_json, write_tiny

COUNT = 20


@pytest.fixture(scope="module")
def tiny(minilm_path, tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"), minilm_path)


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def save_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Checksums of files that were just written are kept as well."""
    monkeypatch.setattr(known, "_SETTLED_NS", -(10**18))


def model(folder, save_dir, adapter=SentenceTransformerEncoder, encoder=None, kind=Model, **settings):
    options = settings.pop("options", {})
    cache = None if save_dir is None else cached(save_dir=save_dir, **settings)
    return kind(encoders={"default": encoder or adapter(folder, **options)}, cache=cache)


def run(model, count=COUNT, **settings):
    fit(model, lambda: loader(Texts(texts(count)), shuffle=True), loader(Texts(texts(8))), **settings)
    return model


def encoder_of(model):
    return model.encoders.real()["default"]


def waits(model):
    return not is_loaded(encoder_of(model))


def encoded(model):
    return model.cache_callback.report.encoded


def notes(save_dir):
    return sorted((save_dir / "models").glob("*"))


# What a warm run does not need


@pytest.mark.parametrize("adapter", [SentenceTransformerEncoder, TransformersEncoder])
def test_warm_run_loads_nothing_and_trains_the_same(folder, save_dir, adapter, caplog):
    cold = run(model(folder, save_dir, adapter))
    assert is_loaded(encoder_of(cold)) and encoded(cold) == COUNT
    with caplog.at_level(logging.INFO, "quatcache"):
        warm = run(model(folder, save_dir, adapter))
    assert waits(warm) and encoded(warm) == 0
    assert same_run(cold, warm)
    report = warm.cache_callback.report
    assert not report.encoders["default"].loaded and ", encoder not loaded; " in report.line()
    assert report.line() in caplog.text
    assert cold.cache_callback.report.encoders["default"].loaded
    assert torch.equal(warm.encode(texts(3)), cold.encode(texts(3)))  # and loads it
    assert not waits(warm)


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_other_runs_load_nothing_either(folder, save_dir, what):
    run(model(folder, save_dir))
    warm = model(folder, save_dir)
    data = loader(Texts(texts(COUNT)))
    first = getattr(trainer(), what)(warm, data)
    assert waits(warm)
    again = getattr(trainer(), what)(model(folder, None), data)
    assert torch.allclose(torch.tensor(_numbers(first)), torch.tensor(_numbers(again)), atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError("a step failed"), KeyboardInterrupt()])
def test_warm_run_after_one_that_ended_within_a_hook_loads_nothing(folder, save_dir, error):
    run(model(folder, save_dir))
    warm = model(folder, save_dir)
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        run(warm, callbacks=[Failing(error)])
    assert warm._current_fx_name is not None  # what Lightning leaves behind
    run(warm)
    assert waits(warm)


def _numbers(result):
    return [list(each.values()) for each in result] if isinstance(result[0], dict) else torch.cat(result).tolist()


def test_names_by_which_lightning_is_recognised_exist():
    assert Model()._current_fx_name is None and Model()._trainer is None


def test_summary_and_logged_metrics_load_nothing(folder, save_dir):
    class Measured(Model):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.measure = torchmetrics.MeanMetric()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.measure.update(loss.detach())
            self.log("measured", self.measure)
            return loss

    run(model(folder, save_dir))
    warm = run(model(folder, save_dir, kind=Measured), enable_model_summary=True)
    assert waits(warm)


def test_deep_summary_shows_the_encoder(folder, save_dir):
    run(model(folder, save_dir))
    warm = run(model(folder, save_dir), callbacks=[ModelSummary(max_depth=-1)], enable_model_summary=True)
    assert encoded(warm) == 0


def test_moving_a_model_loads_nothing(folder):
    moved = model(folder, None).cpu().to(torch.float64).to("cpu")
    assert waits(moved) and moved.dtype == torch.float64
    assert {parameter.dtype for parameter in encoder_of(moved).parameters()} == {torch.float64}


def test_model_is_left_as_found_after_an_error(folder, save_dir):
    run(model(folder, save_dir))
    warm = model(folder, save_dir)
    with pytest.raises(SystemExit):
        run(warm, callbacks=[Failing(KeyboardInterrupt())])
    assert waits(warm) and warm.encoders["default"] is encoder_of(warm)
    assert run(warm).encode(["x"]).shape == (1, 5)


def test_copy_of_a_model_in_a_warm_run_is_light_and_whole(folder, save_dir):
    class Copying(Model):
        def on_train_epoch_start(self):
            self.copies = [copy.deepcopy(self.encoders), pickle.loads(pickle.dumps(self.encoders))]

    run(model(folder, save_dir))
    warm = run(model(folder, save_dir, kind=Copying))
    assert waits(warm)
    for copied in warm.copies:
        assert not is_loaded(copied["default"])
        assert [*copied.parameters()]


# What does need it


def test_item_without_a_row_loads_the_encoder(folder, save_dir, tmp_path):
    run(model(folder, save_dir))
    grown = run(model(folder, save_dir), count=COUNT + 5)
    assert not waits(grown) and encoded(grown) == 5
    fresh = run(model(folder, tmp_path / "other"), count=COUNT + 5)
    assert grown.train_losses == pytest.approx(fresh.train_losses, abs=1e-5)


def test_item_that_is_met_in_a_step_loads_the_encoder(folder, save_dir):
    run(model(folder, save_dir))
    lazy = model(folder, save_dir, fill="lazy")
    run(lazy, count=COUNT + 5)
    assert not waits(lazy) and encoded(lazy) == 5
    plain = run(model(folder, None), count=COUNT + 5)
    assert lazy.train_losses == pytest.approx(plain.train_losses, abs=1e-5)


def test_item_that_is_met_behind_a_worker_loads_the_encoder_here(folder, save_dir):
    run(model(folder, save_dir))
    lazy = model(folder, save_dir, fill="lazy")
    fit(lazy, lambda: loader(Texts(texts(COUNT + 5)), num_workers=1))
    assert not waits(lazy) and encoded(lazy) == 5


def test_run_without_a_cache_loads_the_encoder_before_anything_is_set_up(folder):
    class Looking(Model):
        def setup(self, stage):
            self.seen = is_loaded(self.encoders["default"])

    assert run(model(folder, None, kind=Looking)).seen


def test_canary_loads_the_encoder(folder, save_dir, monkeypatch):
    run(model(folder, save_dir))
    asked = run(model(folder, save_dir, verify=4))
    assert not waits(asked) and asked.cache_callback.report.encoders["default"].verified == 4
    monkeypatch.setattr(opening, "environment", lambda device: {"hardware": "another"})
    elsewhere = run(model(folder, save_dir))
    assert not waits(elsewhere) and elsewhere.cache_callback.report.encoders["default"].verified == 8
    assert encoded(elsewhere) == 0


def test_servable_is_whole(folder, save_dir, tmp_path):
    from quatcache.servable import ServableModel

    run(model(folder, save_dir))
    warm = run(model(folder, save_dir))
    warm.head = torch.nn.Linear(32, 2)
    warm.save_servable(tmp_path / "servable")
    again = ServableModel.load(tmp_path / "servable", head=torch.nn.Linear(32, 2))
    assert torch.allclose(again.encode(["x"]), warm.encode(["x"]))


class Unfreeze(BaseFinetuning):
    def __init__(self, find):
        super().__init__()
        self.find = find

    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(self.find(pl_module), optimizer, lr=1e-3)


class UnfreezeByHand(Callback):
    """Unfreezes without looking at the whole model first, as BaseFinetuning does."""

    def __init__(self, find):
        self.find = find

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            found = self.find(pl_module).requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": [*found.parameters()], "lr": 1e-3})


FOUND = {
    "encoder": lambda model: model.encoders["default"],
    "encoders": lambda model: model.encoders,
    "part": lambda model: model.encoders["default"].model[0],
    "child": lambda model: next(model.encoders["default"].children()),
}


@pytest.mark.parametrize("find", sorted(FOUND))
@pytest.mark.parametrize("callback", [Unfreeze, UnfreezeByHand])
def test_unfreezing_in_the_middle_trains_the_encoder(folder, save_dir, callback, find):
    run(model(folder, save_dir))
    settings = {"max_epochs": 3}
    warm = run(model(folder, save_dir), callbacks=[callback(FOUND[find])], **settings)
    plain = run(model(folder, None), callbacks=[callback(FOUND[find])], **settings)
    assert warm.train_losses == pytest.approx(plain.train_losses, abs=1e-4)
    frozen = SentenceTransformerEncoder(folder).state_dict()
    assert any(not torch.equal(value, frozen[name]) for name, value in encoder_of(warm).state_dict().items())


def test_state_of_a_cached_encoder_is_that_of_the_encoder(folder, save_dir):
    class Looking(Model):
        def on_train_epoch_start(self):
            self.seen = self.encoders["default"].state_dict()

    run(model(folder, save_dir))
    warm = run(model(folder, save_dir, kind=Looking))
    assert warm.seen.keys() == SentenceTransformerEncoder(folder).state_dict().keys()


def test_averaging_of_weights_has_the_same_parameters_on_both_sides(folder, save_dir):
    def averaging():
        return [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]

    run(model(folder, save_dir))
    warm = run(model(folder, save_dir), count=COUNT + 5, callbacks=averaging(), max_epochs=3)
    plain = run(model(folder, None), count=COUNT + 5, callbacks=averaging(), max_epochs=3)
    for name, value in head_of(plain).items():
        assert torch.allclose(value, head_of(warm)[name], atol=1e-4)


class Everything(Model):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def test_optimizer_over_all_parameters_has_the_same_groups_and_checkpoints_fit(folder, save_dir, tmp_path):
    cold = run(model(folder, save_dir, kind=Everything))
    runs = {name: model(folder, place, kind=Everything) for name, place in (("warm", save_dir), ("plain", None))}
    for name, one in runs.items():
        fit(one, lambda: loader(Texts(texts(COUNT)))).save_checkpoint(tmp_path / name)
    states = [torch.load(tmp_path / name, weights_only=False)["optimizer_states"][0] for name in runs]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert len(states[0]["param_groups"][0]["params"]) == len([*cold.parameters()])
    assert encoded(runs["warm"]) == 0
    for name in runs:
        for place in (save_dir, None):
            resumed = model(folder, place, kind=Everything)
            trainer(max_epochs=3).fit(resumed, loader(Texts(texts(COUNT))), ckpt_path=tmp_path / name)
            assert len(resumed.train_losses) == 3


def test_checkpoints_of_warm_runs_fit_uncached_ones(folder, save_dir, tmp_path):
    run(model(folder, save_dir))
    for first, second in ((save_dir, None), (None, save_dir), (save_dir, save_dir)):
        fit(model(folder, first), loader(Texts(texts(COUNT)))).save_checkpoint(tmp_path / "checkpoint")
        assert not any("encoders" in name for name in torch.load(tmp_path / "checkpoint")["state_dict"])
        resumed = model(folder, second)
        trainer(max_epochs=3).fit(resumed, loader(Texts(texts(COUNT))), ckpt_path=tmp_path / "checkpoint")
        assert len(resumed.train_losses) == 3
        assert waits(resumed) == (second is not None)


def test_checkpoint_with_an_unfrozen_encoder_is_loaded_into_it(folder, save_dir, tmp_path):
    run(model(folder, save_dir))
    warm = model(folder, save_dir)
    run(warm, max_epochs=3, callbacks=[Unfreeze(FOUND["encoder"])])
    trainer().strategy.connect(warm)
    state = warm.state_dict()
    fresh = model(folder, save_dir)
    fresh.load_state_dict(state)
    for name, value in encoder_of(warm).state_dict().items():
        assert torch.equal(encoder_of(fresh).state_dict()[name], value)


def test_penalty_on_all_parameters_is_the_same(folder, save_dir):
    class Penalised(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 1e-3 * sum(p.pow(2).sum() for p in self.parameters())

    cold = run(model(folder, save_dir, kind=Penalised))
    assert same_run(cold, run(model(folder, save_dir, kind=Penalised)))


# Stale is never served


def reweigh(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reweigh_in_place(folder):
    file = folder / "model.safetensors"
    times = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(torch.tensor([0.5]).numpy().tobytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = {
    "weights": reweigh,
    "weights in place, times put back": reweigh_in_place,
    "tokenizer": lambda folder: edit_json(folder / "tokenizer_config.json", do_lower_case=False),
    "configuration": lambda folder: edit_json(folder / "config.json", layer_norm_eps=1e-3),
    "pooling": lambda folder: edit_json(
        folder / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False
    ),
    "length in the files": lambda folder: edit_json(folder / "sentence_bert_config.json", max_seq_length=4),
}
OPTIONS = [
    {"prompt": "query: "}, {"prompt_name": "query"}, {"role": "query"}, {"max_seq_length": 4},
    {"normalize_embeddings": True, "truncate_dim": 8}, {"truncate_dim": 16},
]  # fmt: skip


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_changed_file_is_noticed(folder, save_dir, change):
    run(model(folder, save_dir))
    CHANGES[change](folder)
    changed = run(model(folder, save_dir))
    assert not waits(changed) and encoded(changed) == COUNT
    assert waits(run(model(folder, save_dir)))  # and noted in its turn


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_changed_setting_is_noticed(folder, save_dir, options):
    run(model(folder, save_dir))
    changed = run(model(folder, save_dir, options=options))
    assert not waits(changed) and encoded(changed) == COUNT
    assert waits(run(model(folder, save_dir)))
    assert waits(run(model(folder, save_dir, options=options)))


class Noted(SentenceTransformerEncoder):
    said = "one"

    def identity(self):
        return {"said": self.said}


class Versioned(SentenceTransformerEncoder):
    version = 2


@pytest.mark.parametrize("kind", [Noted, Versioned])
def test_subclass_and_what_it_says_count(folder, save_dir, monkeypatch, kind):
    run(model(folder, save_dir))
    assert encoded(run(model(folder, save_dir, kind))) == COUNT
    assert waits(run(model(folder, save_dir, kind)))
    monkeypatch.setattr(Noted, "said", "another")
    assert encoded(run(model(folder, save_dir, Noted))) == COUNT


def test_precision_counts(folder, save_dir):
    run(model(folder, save_dir))
    assert encoded(run(model(folder, save_dir), precision="bf16-mixed")) == COUNT
    assert waits(run(model(folder, save_dir), precision="bf16-mixed"))
    run(model(folder, save_dir), precision="64-true")
    again = run(model(folder, save_dir), precision="64-true")
    assert waits(again)
    assert {parameter.dtype for parameter in encoder_of(again).parameters()} == {torch.float64}


def test_cast_counts(folder, save_dir):
    class Half(Model):
        def configure_head(self, input_embedding_size):
            return torch.nn.Linear(input_embedding_size, 5, dtype=torch.bfloat16)

    run(model(folder, save_dir))
    for wait in (False, True):
        half = run(model(folder, save_dir, encoder=SentenceTransformerEncoder(folder).to(torch.bfloat16), kind=Half))
        assert waits(half) == wait and encoded(half) == (0 if wait else COUNT)


def test_facts_of_a_subclass_are_not_taken_from_a_note(folder, save_dir):
    class Telling(SentenceTransformerEncoder):
        told = "one"

        def facts(self):
            return {**super().facts(), "told": self._told}

    for told in ("one", "two"):
        encoder = Telling(folder)
        encoder._told = told
        assert encoded(run(model(folder, save_dir, encoder=encoder))) == COUNT
    assert notes(save_dir) == []


def test_another_version_of_a_library_is_looked_at_anew(folder, save_dir, monkeypatch):
    run(model(folder, save_dir))
    versions = identities.deciding_versions()
    monkeypatch.setattr(identities, "deciding_versions", lambda: {**versions, "tokenizers": "99"})
    again = run(model(folder, save_dir))
    assert not waits(again) and encoded(again) == 0  # the identity is what it was


def test_encoder_that_was_changed_in_memory_is_not_noted(folder, save_dir):
    changed = model(folder, save_dir)
    with torch.no_grad():
        next(encoder_of(changed).parameters()).add_(1.0)
    run(changed)
    assert notes(save_dir) == []
    assert encoded(run(model(folder, save_dir))) == COUNT


def test_model_that_was_assigned_is_not_noted(folder, save_dir):
    encoder, other = SentenceTransformerEncoder(folder), SentenceTransformerEncoder(folder, max_seq_length=4)
    encoder.model = other.model
    run(model(folder, save_dir, encoder=encoder))
    assert notes(save_dir) == []
    assert encoded(run(model(folder, save_dir))) == COUNT


def test_change_of_an_encoder_that_was_loaded_in_the_run_stops_it(folder, save_dir):
    from quatcache.errors import NotFrozenError

    class Changing(Model):
        def on_train_epoch_end(self):
            with torch.no_grad():
                next(self.encoders["default"].parameters()).add_(1.0)

    run(model(folder, save_dir))
    with pytest.raises(NotFrozenError, match="were changed after its rows were cached"):
        run(model(folder, save_dir, kind=Changing))


def test_touched_and_moved_models_stay_warm(folder, save_dir, tmp_path):
    run(model(folder, save_dir))
    (note,) = notes(save_dir)
    before = json.loads(note.read_text())["files"]
    os.utime(folder / "model.safetensors", (time.time() + 10, time.time() + 10))
    assert waits(run(model(folder, save_dir)))
    after = json.loads(note.read_text())["files"]
    assert before.keys() != after.keys() and [*before.values()] == [*after.values()]
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    assert waits(run(model(tmp_path / "elsewhere", save_dir)))
    assert len(notes(save_dir)) == 1


def test_large_file_is_read_once_for_all_runs(folder, save_dir, monkeypatch):
    run(model(folder, save_dir))
    read = []
    checksum = known.checksum
    monkeypatch.setattr(known, "checksum", lambda path: read.append(path.name) or checksum(path))
    assert waits(run(model(folder, save_dir)))
    assert "config.json" in read and "model.safetensors" not in read


def test_file_that_was_just_written_is_read_again(folder, save_dir, monkeypatch):
    monkeypatch.setattr(known, "_SETTLED_NS", 10**18)
    run(model(folder, save_dir))
    (note,) = notes(save_dir)
    assert json.loads(note.read_text())["files"] == {}
    assert waits(run(model(folder, save_dir)))


# Notes


def reseal(note, **changes):
    content = {**json.loads(note.read_text()), **changes}
    del content["xxh3"]
    content["xxh3"] = known._seal(content)
    note.write_text(json.dumps(content))


DAMAGES = {
    "empty": lambda note: note.write_text(""),
    "cut": lambda note: note.write_text(note.read_text()[:1000]),
    "a list": lambda note: note.write_text("[1]"),
    "nested without end": lambda note: note.write_text("[" * 100_000),
    "another fact": lambda note: note.write_text(note.read_text().replace('"mean"', '"cls"')),
    "newer": lambda note: reseal(note, version=2),
    "no facts": lambda note: reseal(note, identity={"digest": "0" * 32, "facts": None}),
    "digest that is a path": lambda note: reseal(note, identity={"digest": "../../x", "facts": {}}),
    "not a number": lambda note: note.write_text('{"identity": {"facts": {"x": NaN}, "digest": "0"}}'),
    "a directory": lambda note: (note.unlink(), note.mkdir()),
    "gone": lambda note: note.unlink(),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_damaged_note_is_passed_over_and_made_again(folder, save_dir, damage):
    run(model(folder, save_dir))
    (note,) = notes(save_dir)
    DAMAGES[damage](note)
    again = run(model(folder, save_dir))
    assert not waits(again) and encoded(again) == 0
    assert waits(run(model(folder, save_dir))) == (damage != "a directory")


def test_note_that_lies_is_removed_when_the_encoder_is_loaded(folder, save_dir):
    run(model(folder, save_dir))
    (note,) = notes(save_dir)
    facts = json.loads(note.read_text())["identity"]["facts"]
    reseal(note, identity={"digest": "0" * 32, "facts": {**facts, "pooling": "cls"}})
    with pytest.raises(StaleRowsError, match=r'"cls" -> "mean".*run again'):
        run(model(folder, save_dir))
    again = run(model(folder, save_dir))
    assert encoded(again) == 0 and waits(run(model(folder, save_dir)))


def test_cache_that_cannot_be_written_keeps_working(folder, save_dir, monkeypatch):
    def refuse(path, content):
        raise known.StoreError("no room")

    monkeypatch.setattr(known, "write_json", refuse)
    run(model(folder, save_dir))
    assert encoded(run(model(folder, save_dir))) == 0
    assert notes(save_dir) == []


def test_cache_in_memory_notes_nothing(folder, tmp_path):
    run(model(folder, None))
    fit(Model({"default": SentenceTransformerEncoder(folder)}, cached()), loader(Texts(texts(8))))
    assert not [*tmp_path.rglob("models/*.json")]


def test_notes_are_no_other_files_of_the_directory(folder, save_dir, caplog):
    with caplog.at_level(logging.INFO, "quatcache"):
        run(model(folder, save_dir))
    assert "holds other files" not in caplog.text
    assert CacheDirectory(save_dir).models.recall(notes(save_dir)[0].stem)["pooling"] == "mean"


def test_cache_inside_the_folder_of_the_model_is_warm_too(folder):
    save_dir = folder / "cache"
    run(model(folder, save_dir))
    for _ in range(2):
        warm = run(model(folder, save_dir))
        assert waits(warm) and len(notes(save_dir)) == 1


def test_encoder_that_cannot_be_loaded_leaves_the_trainer_as_it_was(folder):
    (folder / "model.safetensors").write_bytes(b"damaged")
    trained = trainer()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        trained.fit(model(folder, None), loader(Texts(texts(COUNT))))
    assert type(trained.fit_loop._data_source).__module__.startswith("pytorch_lightning")
