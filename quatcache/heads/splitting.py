"""Splitting a transformer in two after one of its layers.

Both halves are the model itself with parts exchanged: the lower one ends after some of its layers, the upper one has in
the place of its embeddings something that passes on what it is given. So each runs the forward of its architecture, in
whichever version of transformers is installed, with its own attention masks and position encodings. The alternative,
calling the layers one by one, would have to repeat all that for each architecture and each version.

Whether it went well is not concluded from names: both halves are run on a few tokens and compared with the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quatcache.errors import ConfigError, ModelDefinitionError

__all__ = ["check_layers", "split_layers"]

_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The halves may differ from the whole by so much of its largest value; 1e-4 for other dtypes."""


class _Given(nn.Module):
    """Stands for the embeddings of a model, and passes on what it is given in their place."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        # transformers 4 asks a model for the dtype of its tensors, and above the last layer there may be none
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Tensor:
        if inputs_embeds is None:
            (inputs_embeds,) = (value for value in args if isinstance(value, Tensor) and value.is_floating_point())
        return inputs_embeds


def check_layers(name: str, value: Any) -> int:
    """Refuse what is no number of layers.

    Raises:
        ConfigError: It is not a whole number, at least 1; the message calls it ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; give a number of layers, at least 1")
    return value


def split_layers(model: Any, layers: int) -> tuple[Any, Any]:
    """Split a model that encodes with a stack of layers.

    Args:
        model: A ``transformers.PreTrainedModel``, as ``AutoModel`` gives it. It is left as it is; the halves share its
            modules.
        layers: How many layers the lower half has, its embeddings not counted: at least 1, at most all.

    Returns:
        The lower half, whose ``last_hidden_state`` is that of the layer, without a norm that follows the last one; and
        the upper half, which takes it as ``inputs_embeds`` together with the attention mask.

    Raises:
        ConfigError: The model has fewer layers.
        ModelDefinitionError: It cannot be split, or its halves do not compute what the whole computes.
    """
    name = type(model).__qualname__
    path, stack = _stack(model)
    if layers > len(stack):
        raise ConfigError(f"{name} has {len(stack)} layers, so it cannot be split after {layers}; give fewer")
    owner = path.rpartition(".")[0]
    around = [("", model)] if not owner else [("", model), (f"{owner}.", model.get_submodule(owner))]
    norms = {
        f"{prefix}{child}": nn.Identity()
        for prefix, module in around
        for child, part in module.named_children()
        if "norm" in type(part).__name__.lower()
    }
    tables = {child: None for child, part in model.named_children() if isinstance(part, nn.Embedding)}
    entrance: dict[str, nn.Module | None] = {
        child: _Given(model.dtype, model.device) if child == "embeddings" else nn.Identity()
        for child, _ in model.named_children()
        if child in ("embeddings", "embeddings_project")
    }
    unused = {child: None for child, _ in model.named_children() if child == "pooler"}
    lower = _with_parts(model, {path: nn.ModuleList(stack[:layers]), **norms, **unused})
    upper = _with_parts(model, {path: nn.ModuleList(stack[layers:]), **tables, **entrance, **unused})
    lower.config = _config_of(model.config, slice(0, layers))
    upper.config = _config_of(model.config, slice(layers, len(stack)))
    if getattr(upper.config, "use_cache", False):  # of keys and values, by layer number: those of its layers are higher
        upper.config.use_cache = False
    reason = _difference(model, lower, upper)
    if reason is not None:
        raise ModelDefinitionError(
            f"{name} cannot be split after layer {layers} ({reason}); cache another part of it with an Encoder of your "
            "own"
        )
    return lower, upper


def _stack(model: Any) -> tuple[str, nn.ModuleList]:
    """Find the layers of a model: the one list of as many modules as its configuration counts."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [
        (path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count
    ]
    if len(found) != 1:
        raise ModelDefinitionError(
            f"{type(model).__qualname__} cannot be split: it has {len(found)} stacks of {count} layers, not one; cache "
            "another part of it with an Encoder of your own"
        )
    return found[0]


def _with_parts(model: Any, parts: Mapping[str, nn.Module | None]) -> Any:
    """Copy a model with some modules exchanged by path; all others are shared."""
    changed = _shallow(model)
    for path, part in parts.items():
        *parents, last = path.split(".")
        place = changed
        for parent in parents:
            place._modules[parent] = _shallow(place._modules[parent])
            place = place._modules[parent]
        place._modules[last] = part
    return changed


def _shallow(module: Any) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _config_of(config: Any, part: slice) -> Any:
    """Give the configuration of some of the layers, which may be of several types."""
    changed = copy.deepcopy(config)
    types = getattr(config, "layer_types", None)
    if isinstance(types, list):
        changed.layer_types = types[part]
    changed.num_hidden_layers = part.stop - part.start
    return changed


def _difference(model: Any, lower: Any, upper: Any) -> str | None:
    """Run a model and its halves on two short texts; say what is otherwise, None: nothing."""
    mask = torch.ones(2, 24, dtype=torch.int64, device=model.device)
    mask[1, 15:] = 0
    ids = torch.arange(3, 51, device=model.device).reshape(2, 24) % model.config.vocab_size
    ids = ids.masked_fill(mask == 0, getattr(model.config, "pad_token_id", None) or 0)
    modes = [(module, module.training) for module in model.modules()]
    model.eval(), lower.eval(), upper.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=mask).last_hidden_state
            states = lower(input_ids=ids, attention_mask=mask).last_hidden_state
            halves = upper(inputs_embeds=states, attention_mask=mask).last_hidden_state
    except Exception as error:  # whatever an architecture makes of parts that it does not expect
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        for module, mode in modes:
            module.training = mode
    whole, halves = whole[mask.bool()].double(), halves[mask.bool()].double()
    allowed = _TOLERANCES.get(states.dtype, 1e-4) * float(whole.abs().max())
    differs = whole.shape != halves.shape or not bool(((whole - halves).abs() <= allowed).all())
    return "its halves do not compute what the whole computes" if differs else None
