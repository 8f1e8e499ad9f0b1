"""Encoders make room on the GPU: when they leave, what calls them back, and that they are back at the end."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import IterableDataset

from quatcache import CacheConfig, CacheType
from quatcache.training import encoder_moves, session
from tests.fits import Failing, HashingEncoder, Model, Texts, fit, loader, same_run, texts
from tests.training.test_unfreezing import Thawable, ThawsAtStep

AWAY = torch.device("cpu", 0)  # main memory under a name of its own, so that a fake GPU can be told from it


class Moving(Thawable):
    """Writes down when it moves and when it encodes."""

    def __init__(self, seed=0, events=None):
        super().__init__(seed)
        self._events = [] if events is None else events

    def to(self, device):
        if device == AWAY or "left" in self._events:
            self._events.append("left" if device == AWAY else "returned")
        return super().to(device)

    def forward(self, inputs):
        if self._events[-1:] != ["encoded"]:
            self._events.append("encoded")
        return super().forward(inputs)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Take the CPU for a GPU with memory of its own."""
    monkeypatch.setattr(encoder_moves, "MAIN_MEMORY", AWAY)
    monkeypatch.setattr(encoder_moves, "has_own_memory", lambda device: True)


@pytest.fixture
def events(monkeypatch):
    """What happened in which order, the placing of rows included."""
    happened = []
    place = session.place_rows

    def placed(*args, **kwargs):
        happened.append("placed")
        return place(*args, **kwargs)

    monkeypatch.setattr(session, "place_rows", placed)
    return happened


def run(events, cache=None, train=None, val=None, callbacks=(), model=Model, **settings):
    made = model({"default": Moving(events=events)}, cache or CacheConfig())
    fit(made, train or loader(Texts(texts(40)), shuffle=True), val, callbacks=list(callbacks), **settings)
    return made


ROUND = ["encoded", "left", "placed", "returned"]


@pytest.mark.parametrize("ending", ["finishes", "error", "ctrl-c", "aside"])
def test_encoder_leaves_before_rows_are_placed_and_is_back_however_the_run_ends(events, ending):
    error = {"error": RuntimeError("boom"), "ctrl-c": KeyboardInterrupt()}.get(ending)
    model = Model({"default": Moving(events=events)}, CacheConfig())
    callbacks = [Failing(error)] if error else [ThawsAtStep(3)] if ending == "aside" else []
    handler = signal.getsignal(signal.SIGINT)
    try:
        fit(model, loader(Texts(texts(40)), shuffle=True), callbacks=callbacks)
    except (RuntimeError, SystemExit):
        assert error is not None
    finally:
        signal.signal(signal.SIGINT, handler)
    happened = [event for event, before in zip(events, [None, *events], strict=False) if event != before]
    assert happened[:4] == ROUND
    assert happened[4:] == (["encoded"] if ending == "aside" else [])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_do_alike(events, stage):
    from tests.fits import trainer

    model = Model({"default": Moving(events=events)}, CacheConfig())
    getattr(trainer(), stage)(model, loader(Texts(texts(20))))
    assert [event for event, before in zip(events, [None, *events], strict=False) if event != before] == ROUND


def test_error_in_the_middle_of_leaving_brings_the_encoder_back(events, monkeypatch):
    class Interrupted(Moving):
        def to(self, device):
            super().to(device)
            if device == AWAY:
                raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(Model({"default": Interrupted(events=events)}, CacheConfig()), loader(Texts(texts(20))))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert events[-2:] == ["left", "returned"] or events[-3:] == ["left", "returned", "returned"]


def test_warm_start_moves_an_encoder_that_encodes_nothing(events, tmp_path):
    run(events, CacheConfig(save_dir=tmp_path))
    del events[:]
    run(events, CacheConfig(save_dir=tmp_path))
    assert events[:3] == ["left", "placed", "returned"]


def test_parameters_stay_the_objects_that_an_optimizer_holds():
    model = Model({"default": Moving()}, CacheConfig())
    before = [id(parameter) for parameter in model.encoders.parameters()]
    fit(model, loader(Texts(texts(20))))
    assert [id(parameter) for parameter in model.encoders.parameters()] == before


def test_a_second_fill_calls_the_encoder_back_and_lets_it_go_again(events):
    class Reloading(Model):
        def train_dataloader(self):
            self.asked = getattr(self, "asked", 0) + 1
            return loader(Texts(texts(20 + self.asked)), shuffle=True)

    model = Reloading({"default": Moving(events=events)}, CacheConfig())
    fit(model, None, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    happened = [event for event, before in zip(events, [None, *events], strict=False) if event != before]
    assert happened == ["encoded", "left", "placed", "returned", "encoded", "left", "placed", "returned"]


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((text + " new", len(text) % 5) for text in texts(12))


def test_a_miss_in_a_step_calls_the_encoder_back_for_the_rest_of_the_run(events):
    models = []
    for cache in (None, CacheConfig()):
        del events[:]
        models.append(Model({"default": Moving(events=events)}, cache))
        fit(models[-1], loader(Texts(texts(40))), loader(Stream()), num_sanity_val_steps=0)
    assert same_run(*models)
    happened = [event for event in events if event != "placed"]
    assert happened[:4] == ["encoded", "left", "returned", "encoded"] and events.count("left") == 1


@pytest.mark.parametrize("config", [{"fill": "lazy"}, {"max_size": "300B"}], ids=["lazy", "budget"])
def test_an_encoder_that_every_step_may_need_does_not_leave(events, config):
    seen = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 0:
                seen.append("left" in events)

    run(events, CacheConfig(**config), callbacks=[Looks()])
    assert not any(seen)


def test_encoding_by_hand_in_the_middle_of_a_fit_calls_it_back(events):
    made = []

    class Encodes(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            events.append("asked")
            made.append(pl_module.encode(["a text that no dataset has"]))

    run(events, callbacks=[Encodes()], max_epochs=1)
    start = events.index("asked")
    assert events[start : start + 3] == ["asked", "returned", "encoded"]
    assert made[0].shape == (1, 5)


def test_a_copy_of_the_model_is_on_the_device_of_the_model(events):
    class Copies(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            del events[:]
            self.copy = copy.deepcopy(pl_module)

    copies = Copies()
    run(events, callbacks=[copies], max_epochs=1)
    copied = copies.copy.encoders["default"]
    assert type(copied) is Moving and copied._events[-1:] != ["left"]
    assert copies.copy.encode(["oak"]).shape == (1, 5)


class Tied(Model):
    """Its head computes with the matrix of the encoder."""

    def configure_head(self, input_embedding_size):
        head = super().configure_head(input_embedding_size)
        head.tied = self.encoders["default"].matrix
        return head


def test_an_encoder_that_shares_weights_with_the_head_stays(events):
    run(events, model=Tied)
    assert "left" not in events


def test_of_two_encoders_that_share_weights_both_leave_unless_one_stays(events):
    one, other = Moving(0, events), Moving(1, events)
    other.matrix = one.matrix
    fit(Model({"a": one, "b": other}, CacheConfig()), loader(Texts(texts(20))))
    assert events.count("left") == 2
    del events[:]
    one, other = Moving(0, events), Moving(1, events)
    other.matrix = one.matrix
    fit(Model({"a": one, "b": other}, CacheConfig(mapping={"b": CacheType.NONE})), loader(Texts(texts(20))))
    assert "left" not in events


def test_an_encoder_that_refuses_to_move_stays_and_trains(events, caplog):
    class Refuses(Moving):
        def to(self, device):
            if device == AWAY:
                raise ValueError("`.to` is not supported for 4-bit models")
            return super().to(device)

    model = Model({"default": Refuses(events=events)}, CacheConfig())
    with caplog.at_level("INFO", "quatcache"):
        fit(model, loader(Texts(texts(20))))
    assert "Encoder 'default' stays on cpu: `.to` is not supported for 4-bit models" in caplog.text
    assert len(model.train_losses) == 6


def test_an_encoder_stays_where_main_memory_has_no_room(events, caplog, monkeypatch):
    monkeypatch.setattr(encoder_moves, "free_memory", lambda: 0)
    with caplog.at_level("INFO", "quatcache"):
        run(events)
    assert "left" not in events
    assert "Encoders stay on cpu: main memory has 0" in caplog.text and "left for their 8.2 kB." in caplog.text


def test_nothing_moves_on_a_device_that_shares_main_memory(events, monkeypatch):
    monkeypatch.setattr(encoder_moves, "has_own_memory", lambda device: device.type == "cuda")
    run(events)
    assert "left" not in events


def test_a_trainable_encoder_beside_stays():
    from tests.fits import TrainableHashing

    class Still(TrainableHashing):
        def to(self, device):
            assert device != AWAY
            return super().to(device)

    events = []
    encoders = {"frozen": Moving(0, events), "trained": Still(2)}
    fit(Model(encoders, CacheConfig()), loader(Texts(texts(20))))
    assert "left" in events


def test_a_strategy_that_shards_weights_keeps_them(events, monkeypatch):
    from pytorch_lightning.strategies import SingleDeviceStrategy

    class Sharding(SingleDeviceStrategy):
        strategy_name = "sharding"

    monkeypatch.setattr(encoder_moves.pl.strategies, "SingleDeviceStrategy", Sharding)
    run(events)
    assert "left" not in events


def test_layers_of_a_library_that_places_them_itself_stay():
    class Quantised(nn.Linear):
        pass

    Quantised.__module__ = "bitsandbytes.nn"
    encoder = HashingEncoder()
    encoder.extra = Quantised(2, 2).requires_grad_(False)
    assert not encoder_moves._is_movable(encoder, torch.device("cpu"))
    assert encoder_moves._is_movable(HashingEncoder(), torch.device("cpu"))
