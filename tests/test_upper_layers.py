"""A transformer in two halves: both together are the whole, whatever its architecture, or it is refused."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from quatcache import PaddedSequences, ServableModel
from quatcache.encoders import LowerLayersEncoder, TransformersEncoder, identify
from quatcache.errors import ConfigError, FormatError, ModelDefinitionError
from quatcache.heads import UpperLayersHead, head_from_config, head_to_config
from quatcache.heads.splitting import split_layers

TEXTS = ["a short one", "elm", "a text of rather more words than the other two have together"]
SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
}
ENCODERS = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 16},
    "mpnet": {},
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64},
    "modernbert": {
        "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2,
        "local_attention": 4,
    },
    "llama": {"pad_token_id": 0},
    "gemma3_text": {
        "pad_token_id": 0, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
REFUSED = {
    "albert": ({"embedding_size": 16}, "has 0 stacks of 4 layers"),
    "gpt2": ({"n_embd": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}, "cannot be split after"),
    "t5": ({"d_model": 32, "num_layers": 4, "d_kv": 8, "num_heads": 4}, "has 2 stacks of 4 layers"),
}


def small(kind, **settings):
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(1)
    return AutoModel.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings})).eval()


def tokens():
    mask = torch.ones(3, 60, dtype=torch.int64)
    mask[1, 30:], mask[2, 1:] = 0, 0
    ids = torch.randint(3, 100, (3, 60), generator=torch.Generator().manual_seed(2))
    return ids, mask


@pytest.mark.parametrize("layers", [1, 3, 4])
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_halves_compute_what_the_whole_computes(kind, layers):
    model = small(kind, **ENCODERS[kind])
    before = copy.deepcopy(model.state_dict())
    ids, mask = tokens()
    lower, upper = split_layers(model, layers)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).last_hidden_state
        states = lower(input_ids=ids, attention_mask=mask).last_hidden_state
        halves = upper(inputs_embeds=states, attention_mask=mask).last_hidden_state
    assert torch.allclose(whole[mask.bool()], halves[mask.bool()], atol=1e-5)
    assert not torch.allclose(states[mask.bool()], whole[mask.bool()], atol=1e-3) or layers == 4
    assert before.keys() == model.state_dict().keys()  # the model itself is left as it was
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("kind", REFUSED)
def test_model_that_cannot_be_split_is_refused_in_a_sentence(kind):
    settings, message = REFUSED[kind]
    with pytest.raises(ModelDefinitionError, match=message):
        split_layers(small(kind, **settings), 3)


def test_model_whose_layers_look_at_more_than_states_is_refused():
    """One whose halves run, but compute something else: its last layer knows whether the first one ran before it."""
    model, ran = small("bert"), [1.0]
    above = model.encoder.layer[3].forward
    model.encoder.layer[0].register_forward_hook(lambda *_: ran.append(2.0))
    model.encoder.register_forward_hook(lambda *_: ran.append(1.0))
    model.encoder.layer[3].forward = lambda states, *args, **kwargs: above(states * ran[-1], *args, **kwargs)
    with pytest.raises(ModelDefinitionError, match="its halves do not compute what the whole computes"):
        split_layers(model, 2)


@pytest.mark.parametrize("layers", [0, -1, True, 2.0, "4"])
def test_what_is_no_number_of_layers_is_refused(minilm_path, layers):
    with pytest.raises(ConfigError, match="at least 1"):
        LowerLayersEncoder(minilm_path, layers=layers)
    with pytest.raises(ConfigError, match="at least 1"):
        UpperLayersHead(minilm_path, after=layers)


def test_more_layers_than_there_are_are_refused(minilm_path):
    with pytest.raises(ConfigError, match="has 6 layers, so it cannot be split after 7"):
        LowerLayersEncoder(minilm_path, layers=7)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
def test_both_halves_of_minilm_give_the_rows_of_the_whole(minilm_path, pooling):
    whole = TransformersEncoder(minilm_path, pooling=pooling, normalize=True)
    encoder = LowerLayersEncoder(minilm_path, layers=4)
    head = UpperLayersHead(minilm_path, after=4, pooling=pooling, normalize=True).eval()
    states = encoder(encoder.collate(TEXTS))
    assert isinstance(states, PaddedSequences) and states.shape[::2] == (3, 384)
    assert not states.values[~states.mask].any() and states.lengths.tolist() == [5, 3, 14]
    assert torch.allclose(head(states), whole(whole.collate(TEXTS)), atol=1e-6)
    wider = PaddedSequences(nn.functional.pad(states.values, (0, 0, 0, 7)), nn.functional.pad(states.mask, (0, 7)))
    assert torch.allclose(head(wider), head(states), atol=1e-6)


def test_what_is_frozen_and_what_is_trained(minilm_path):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm_path).requires_grad_(False)
    encoder = LowerLayersEncoder(model, minilm_path, layers=4)
    head = UpperLayersHead(model, after=4)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert {name.split(".")[3] for name, _ in head.named_parameters()} == {"0", "1"}
    assert len(encoder.model.encoder.layer) == 4 and len(head.upper.encoder.layer) == 2
    with torch.no_grad():
        next(head.parameters()).add_(1)
    assert len(model.encoder.layer) == 6 and not torch.equal(
        model.encoder.layer[4].attention.self.query.weight, head.upper.encoder.layer[0].attention.self.query.weight
    )  # of a loaded model the upper layers are copied


def test_identity_has_the_number_of_layers_and_nothing_above_them(minilm_path):
    from transformers import AutoModel

    def identity(model, layers):
        return identify(LowerLayersEncoder(model, minilm_path, layers=layers))

    model = AutoModel.from_pretrained(minilm_path)
    four = identity(model, 4)
    assert four.facts["layers"] == 4
    assert four.digest == identity(minilm_path, 4).digest != identity(minilm_path, 3).digest
    with torch.no_grad():
        model.encoder.layer[5].output.dense.weight.add_(1)
    assert identity(model, 4).digest == four.digest
    with torch.no_grad():
        model.encoder.layer[3].output.dense.weight.add_(1)
    assert identity(model, 4).digest != four.digest


def test_encoder_is_saved_and_loaded_with_its_layers(minilm_path, tmp_path):
    encoder = LowerLayersEncoder(minilm_path, layers=2, max_length=9, prompt="query: ")
    encoder.save(tmp_path)
    again = LowerLayersEncoder.load(tmp_path)
    assert identify(again).digest == identify(encoder).digest
    one, other = encoder(encoder.collate(TEXTS)), again(again.collate(TEXTS))
    assert torch.equal(one.values, other.values) and torch.equal(one.mask, other.mask)
    with pytest.raises(FormatError, match="kind"):
        TransformersEncoder.load(tmp_path)


def test_whole_model_is_saved_and_loaded(minilm_path, tmp_path):
    torch.manual_seed(3)
    head = UpperLayersHead(minilm_path, after=4, pooling="cls", normalize=True)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model = ServableModel({"default": LowerLayersEncoder(minilm_path, layers=4)}, head)
    model.save(tmp_path / "model")
    again = ServableModel.load(tmp_path / "model")
    assert type(again.head) is UpperLayersHead and again.head.after == 4
    assert torch.equal(again.encode(TEXTS), model.encode(TEXTS))
    assert again.encode([]).shape == (0, 384)
    assert str(minilm_path) not in (tmp_path / "model" / "servable.json").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "has model 'bert'"),
        ({"model": {"model_type": "no such model"}}, "no transformers model can be made"),
        ({"model": {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
                    "auto_map": {"AutoModel": "evil.py"}}}, "save the model again"),
        ({"after": 9}, "cannot be split after 9"),
        ({"pooling": "os.system"}, "pooling is 'os.system'"),
        ({"unknown": 1}, "does not fit"),
    ],
)  # fmt: skip
def test_hostile_description_of_a_head_is_refused(changes, message):
    described = head_to_config(UpperLayersHead(small("bert"), after=2))
    assert head_from_config(described).after == 2
    described["config"].update(changes)
    with pytest.raises(ConfigError, match=message):
        head_from_config(described)


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 384), PaddedSequences(torch.zeros(2, 3, 5), torch.ones(2, 3).long())]
)
def test_head_refuses_what_is_no_sequence_of_its_width(inputs):
    with pytest.raises(ConfigError, match=r"UpperLayersHead got a .*; give it the PaddedSequences \(B, L, 32\)"):
        UpperLayersHead(small("bert"), after=2)(inputs)


def test_importing_the_heads_loads_no_transformers():
    code = "import sys, quatcache.heads; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
