"""Bad input gives one clear error before anything is lost: the value, and what to do."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from quatcache import CacheCallback, CacheConfig, Encoder, SimilarityPairSample, TrainableModel
from quatcache.errors import (
    CollateError,
    ConfigError,
    EncoderOutputError,
    KeyTypeError,
    LoaderError,
    ModelDefinitionError,
    NotFrozenError,
    SampleError,
    StoreError,
)
from quatcache.losses import MultipleNegativesRankingLoss
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, loader, texts, trainer


def run(encoders=None, cache=None, train=None, **settings):
    model = Model(encoders, cache or CacheConfig())
    fit(model, loader(Texts(texts(20))) if train is None else train, **settings)
    return model


class WithDropout(HashingEncoder):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs):
        return self.drop(super().forward(inputs))


class TestFrozen:
    def test_dropout_left_on_names_the_module(self):
        class Leaves(Callback):
            def setup(self, trainer, pl_module, stage):
                pl_module.encoders["default"].drop.train()

        with pytest.raises(
            NotFrozenError, match=r"encoder 'default'.*module 'drop' \(Dropout\) is in training mode.*eval"
        ):
            run({"default": WithDropout()}, callbacks=[Leaves()])

    def test_dropout_in_an_encoder_as_it_was_built_is_switched_off(self):
        model = run({"default": WithDropout()})
        assert model.cache_callback.report.encoded == 20

    @pytest.mark.parametrize("cache", [None, CacheConfig()])
    def test_a_frozen_encoder_stays_in_eval_mode_during_training(self, cache):
        modes = []

        class Looks(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                modes.append(pl_module.encoders.real()["default"].drop.training)

        model = Model({"default": WithDropout()}, cache)
        fit(model, loader(Texts(texts(20))), loader(Texts(texts(8))), callbacks=[Looks()])
        assert set(modes) == {False}

    def test_a_parameter_that_requires_grad_is_named(self):
        class Warm(HashingEncoder):
            def __init__(self):
                super().__init__()
                self.project = nn.Linear(16, 16)

        with pytest.raises(NotFrozenError, match=r"parameter 'project\.weight' requires a gradient.*requires_grad_"):
            run({"default": Warm()})

    def test_two_passes_that_differ_are_refused(self):
        class Noisy(HashingEncoder):
            def forward(self, inputs):
                return super().forward(inputs) + 1e-2 * torch.rand(len(inputs), 16)

        with pytest.raises(NotFrozenError, match=r"'default' \(Noisy\).*two passes over the same items differ by"):
            run({"default": Noisy()})

    def test_a_dataset_that_augments_is_refused(self):
        class Augments(Texts):
            def __getitem__(self, index):
                text, group = super().__getitem__(index)
                return f"{text} {torch.rand(()).item()}", group

        with pytest.raises(ConfigError, match="item 0 of the train dataset differs between two reads"):
            run(train=loader(Augments(texts(20))))


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"cache_type": "tape"}, "cache_type is 'tape'; use one of CacheType.NONE"),
            ({"mapping": {"a": 3}}, r"mapping\['a'\] is 3; use one of"),
            ({"batch_size": 0}, "batch_size is 0; give the items"),
            ({"batch_size": True}, "batch_size is True"),
            ({"num_workers": -1}, "num_workers is -1"),
            ({"labels": "yes"}, "labels is 'yes'; use 'auto', True or False"),
            ({"labels": 1}, "labels is 1"),
            ({"dtype": torch.int8}, "dtype is torch.int8; use one of float64"),
            ({"dtype": "half"}, "dtype is 'half'"),
            ({"key_extractors": {"a": "id"}}, "key_extractors holds 'id'; give a function"),
            ({"key_extractors": 3}, "key_extractors is 3; give a function from an item to its key, or a dict"),
            ({"key_extractors": [len]}, r"key_extractors is \[<built-in function len>\]; give a function"),
            ({"mapping": ["default"]}, r"mapping is \['default'\]; give a dict of encoder names to tiers"),
            ({"mapping": "CPU"}, "mapping is 'CPU'; give a dict"),
            ({"save_dir": ""}, "save_dir is ''; name a directory, or leave it unset"),
            ({"save_dir": 3}, "save_dir is 3; name a directory"),
            ({"savedir": "x"}, r"CacheConfig has no setting savedir; did you mean save_dir\?"),
            ({"colour": 3}, r"CacheConfig has no setting colour; there are cache_type, mapping, .*memory_map\."),
            ({"cache_type": "disk"}, "tier DISK keeps rows in files, but save_dir is None"),
            ({"mapping": {"a": "DISK"}}, "save_dir is None"),
        ],
    )
    def test_a_wrong_value_is_refused_when_the_config_is_built(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            CacheConfig(**settings)

    def test_an_unknown_encoder_lists_those_there_are(self):
        with pytest.raises(
            ConfigError, match="mapping names encoder 'text', the model has 'default'; use one of these"
        ):
            run(cache=CacheConfig(mapping={"text": "cpu"}))
        with pytest.raises(ConfigError, match="key_extractors names encoder 'text'"):
            run(cache=CacheConfig(key_extractors={"text": len}))

    def test_a_trainable_encoder_cannot_have_a_tier(self):
        with pytest.raises(ConfigError, match="tier CPU for encoder 'default', which is trainable"):
            run({"default": TrainableHashing()}, CacheConfig(mapping={"default": "cpu"}))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so the tier is allowed")
    def test_tier_gpu_needs_a_gpu(self):
        with pytest.raises(ConfigError, match="tier GPU was asked for, but CUDA is not available here; use CPU"):
            run(cache=CacheConfig("gpu"))

    def test_an_unwritable_save_dir_is_told_before_anything_is_encoded(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        encoder = HashingEncoder()
        with pytest.raises(
            StoreError, match=r"cannot write into save_dir .*: .*file.* leads through a file; name another"
        ):
            run({"default": encoder}, CacheConfig(save_dir=tmp_path / "file" / "cache"))
        assert encoder._rows == 0


class Answers(HashingEncoder):
    """Turns its rows into something else."""

    def __init__(self, change):
        super().__init__()
        self._change = change

    def forward(self, inputs):
        return self._change(super().forward(inputs))


def with_nan(rows):
    rows[2, 3] = float("nan")
    return rows


def with_infinities(rows):
    rows[1, 3], rows[2, 3] = float("inf"), -float("inf")
    return rows


class TestEncoderOutput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda rows: rows[1:], r"returned shape \(3, 16\) for 4 items; return one row per item"),
            (lambda rows: rows[:, 0], r"returned shape \(4,\) for 4 items"),
            (lambda rows: rows[:, :4], "returned rows of size 4, its embedding_size says 16"),
            (lambda rows: [rows], "returned a list for 4 items; return a tensor"),
            (with_nan, "returned NaN or infinity for item '"),
            (with_infinities, "returned NaN or infinity for item '"),
        ],
    )
    def test_a_wrong_answer_is_refused_and_nothing_is_stored(self, change, message, tmp_path):
        cache = CacheConfig(batch_size=20, save_dir=tmp_path)
        with pytest.raises(EncoderOutputError, match=message):
            run({"default": Answers(change)}, cache)
        assert not list(tmp_path.glob("encoders/*/shard-*"))

    def test_large_values_are_no_infinity_though_their_sum_is(self):
        model = run({"default": Answers(lambda rows: rows.sign() * 3e38)}, CacheConfig(batch_size=20))
        assert model.cache_callback.report.encoded == 20

    def test_values_too_large_for_the_storage_dtype_are_refused(self):
        with pytest.raises(EncoderOutputError, match=r"does not fit the storage dtype torch.float16; use .*bfloat16"):
            run({"default": Answers(lambda rows: rows * 1e6)}, CacheConfig(dtype="float16"))

    def test_a_collate_error_names_the_item(self):
        class Picky(HashingEncoder):
            def collate(self, items):
                if any("elm 3" in item for item in items):
                    raise ValueError("no elms")
                return super().collate(items)

        with pytest.raises(CollateError, match=r"could not collate item '.*elm 3' \(ValueError: no elms\)"):
            run({"default": Picky()}, train=loader(Texts(["oak 1", "elm 3", "fir 2"])))


class TestData:
    def test_an_empty_dataset(self):
        class Empty(Texts):
            pass

        sampler = torch.utils.data.SequentialSampler([1])
        with pytest.raises(ConfigError, match="the val dataset has 0 samples"):
            model = Model(cache=CacheConfig())
            fit(model, loader(Texts(texts(9))), loader(Empty([]), sampler=sampler))

    def test_a_key_extractor_that_returns_an_unsupported_type(self):
        with pytest.raises(KeyTypeError, match=r"key extractor returned \['alder'.*holds a list; return str, bytes"):
            run(cache=CacheConfig(key_extractors=str.split))

    def test_a_key_extractor_that_fails_names_the_item(self):
        with pytest.raises(KeyTypeError, match=r"failed on item 'alder 0' \(AttributeError: .*id"):
            run(cache=CacheConfig(key_extractors=lambda item: item.id))

    @pytest.mark.parametrize("cache", [None, CacheConfig()])
    def test_a_sample_of_no_known_kind(self, cache):
        model = Model(cache=cache)
        with pytest.raises(SampleError, match=r"the dataset returned 'alder 0', a str; return \(item, target\)"):
            fit(model, loader(texts(9)))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (lambda data: DataLoader(data, batch_size=None), "the train loader has batch_size=None"),
            (lambda data: loader(data, collate_fn=list), "the train loader has a collate_fn of its own .list."),
            (lambda data: [[1, 2], [3, 4]], "the train 0 loader is a list; pass a torch.utils.data.DataLoader"),
            (lambda data: OwnIteration(data, 4), "a OwnIteration with an __iter__ of its own"),
        ],
        ids=["no batches", "own collate", "list", "own iteration"],
    )
    def test_a_loader_whose_batches_cannot_be_reproduced(self, given, message):
        with pytest.raises(LoaderError, match=message):
            run(train=given(Texts(texts(20))))

    def test_a_dataset_without_a_length(self):
        class Lengthless:
            def __getitem__(self, index):
                return f"text {index}", 0

        with pytest.raises(
            ConfigError, match=r"the train dataset is a Lengthless without length and index, so .*map-s"
        ):
            run(train=DataLoader(Lengthless(), batch_sampler=[[0, 1], [2, 3]]))

    @pytest.mark.parametrize("cache", [None, CacheConfig()])
    def test_a_pair_whose_score_is_no_number(self, cache):
        model = Model(cache=cache, loss=MultipleNegativesRankingLoss())
        with pytest.raises(SampleError, match="a pair has score 'high' and subgroup 0; give a number each"):
            fit(model, loader([SimilarityPairSample("a", "b", score="high")] * 4))

    def test_rows_that_are_nowhere_on_disk_cannot_be_trained_from_there(self, tmp_path):
        class Unwraps(HashingEncoder):
            def collate(self, items):
                return super().collate([str(item) for item in items])

            def length(self, item):
                return 0

        with pytest.raises(ConfigError, match="tier DISK was asked for encoder 'default', whose items have no content"):
            run(
                {"default": Unwraps()}, CacheConfig("disk", save_dir=tmp_path),
                loader(Texts([object() for _ in range(8)], range(8)), collate_fn=None),
            )  # fmt: skip


class OwnIteration(DataLoader):
    def __iter__(self):
        return iter([])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Texts(texts(20)))


class TestModel:
    def test_each_missing_hook_is_named(self):
        class NoEncoders(TrainableModel):
            pass

        class NoHead(NoEncoders):
            def configure_encoders(self):
                return HashingEncoder()

        class NoLoss(NoHead):
            def configure_head(self, input_embedding_size):
                return nn.Linear(input_embedding_size, 2)

        for model, message in (
            (NoEncoders, "NoEncoders has no configure_encoders; return an Encoder"),
            (NoHead, "NoHead has no configure_head; return a torch.nn.Module that takes vectors of size 16"),
            (NoLoss, "NoLoss has no configure_loss; return a torch.nn.Module"),
        ):
            with pytest.raises(ModelDefinitionError, match=message):
                model()

    @pytest.mark.parametrize("returned", [nn.Linear(2, 2), {}, {"a": nn.Linear(2, 2)}])
    def test_something_else_than_encoders_is_refused(self, returned):
        class Wrong(Model):
            def configure_encoders(self):
                return returned

        with pytest.raises(ModelDefinitionError, match="configure_encoders returned"):
            Wrong()

    def test_a_model_with_nothing_to_train(self):
        with pytest.raises(ModelDefinitionError, match="has no trainable parameter"):
            fit(Model(head=nn.Identity()), loader(Texts(texts(9))))

    def test_a_plain_module_without_encoders(self):
        from pytorch_lightning.demos.boring_classes import BoringModel

        with pytest.raises(ModelDefinitionError, match=r"BoringModel.encoders is None; make it a torch.nn.ModuleDict"):
            trainer(callbacks=[CacheCallback(CacheConfig())]).fit(BoringModel())

    def test_a_plain_module_with_something_else_among_its_encoders(self):
        from pytorch_lightning.demos.boring_classes import BoringModel

        model = BoringModel()
        model.encoders = nn.ModuleDict({"a": HashingEncoder(), "b": nn.Linear(2, 2)})
        message = (
            r"BoringModel.encoders is a ModuleDict whose encoder 'b' is of type Linear; wrap it in a ModuleEncoder"
        )
        with pytest.raises(ModelDefinitionError, match=message):
            trainer(callbacks=[CacheCallback(CacheConfig())]).fit(model)

    def test_an_encoder_without_its_methods(self):
        class Bare(Encoder):
            embedding_size = 3

        with pytest.raises(ModelDefinitionError, match="Bare has no collate"):
            run({"default": Bare()})
