"""Facts of pretrained models: those of transformers, and the chain of modules that sentence-transformers makes of them.

The facts are chosen, not collected: a model of transformers carries its origin, its training settings and its
library's defaults along, and the names of its tensors depend on who wraps it. What is left is meant to survive an
upgrade of the libraries and a move to another folder, and to change with everything else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quatcache.encoders.facts import adapter_facts, describe, foreign_facts, hook_facts, module_facts
from quatcache.encoders.serialised import JSON, flatten, read_config, tokenizer_facts
from quatcache.encoders.weights import package_of, tensors_in, weight_facts

__all__ = [
    "chain_facts",
    "model_facts",
    "model_tensors",
    "processor_facts",
]

# Counted from 0 by the code of the model; some versions of transformers store them, some do not.
_DERIVED = ("position_ids", "token_type_ids")

# Values that mean "a text model, as ever": versions of sentence-transformers before 5.2 do not name them.
_DEFAULTS: dict[str, tuple[object, ...]] = {
    "transformer_task": ("feature-extraction",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "module_input_name": ("sentence_embedding",),
}
_OUTPUT_DEFAULTS = {"Transformer": "token_embeddings"}
# Told by the tokenizer's normalizer and by the encoder's own fact, or without effect on the result.
_TOLD_ELSEWHERE = frozenset({"max_seq_length", "do_lower_case", "unpad_inputs"})


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name the tensors of a transformers model that hold information.

    Args:
        model: The model itself, without the module that wraps it.

    Returns:
        Parameters and persistent buffers by name, packed weights of quantised layers included, as if neither a peft
        adapter nor ``torch.compile`` were wrapped around them. Buffers that are not saved are computed from the
        configuration, on whatever device, so they would differ without a difference.
    """
    tensors: dict[str, Tensor] = {}
    for name, saved in getattr(model, "_orig_mod", model).state_dict(keep_vars=True).items():
        if not name.endswith(_DERIVED):
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace("._orig_mod.", ".")
            tensors.update((f"{plain}.{rest}".rstrip("."), tensor) for rest, tensor in tensors_in(saved))
    return tensors


def model_facts(model: Any, prefix: str = "") -> dict[str, JSON]:
    """List architecture, configuration and adapters of a transformers model, without its weights.

    Args:
        model: A ``transformers.PreTrainedModel``, or a peft model around one.
        prefix: Put before every name, with its dot.

    Returns:
        "architecture": class name, "config.<entry>" where it differs from the default, "adapter.<entry>" if any, and
        the settings of modules that are not the library's own.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps around it is no part of it
    facts: dict[str, JSON] = {f"{prefix}architecture": type(model).__name__}
    config = getattr(model, "config", None)
    if config is not None:
        flatten(read_config(config), f"{prefix}config", facts)
    return {**facts, **adapter_facts(model, prefix), **foreign_facts(model, prefix)}


def processor_facts(processor: Any, prefix: str = "") -> dict[str, JSON]:
    """List the facts of a tokenizer, or of a processor with its tokenizer and image, audio or video parts.

    Args:
        processor: What transformers' ``AutoProcessor`` or ``AutoTokenizer`` gives.
        prefix: Put before every name, with its dot.

    Returns:
        Facts named "tokenizer.<...>", "image_processor.<...>" and so on.
    """
    facts: dict[str, JSON] = {}
    tokenizer = processor if hasattr(processor, "convert_tokens_to_ids") else getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        facts.update(tokenizer_facts(tokenizer, f"{prefix}tokenizer."))
    parts = {
        name: getattr(processor, name, None) for name in ("image_processor", "feature_extractor", "video_processor")
    }
    if tokenizer is None and not any(part is not None for part in parts.values()):
        parts = {"processor": processor}
    for name, part in parts.items():
        if part is not None and hasattr(part, "to_dict"):
            # The class counts: the torchvision and the PIL version of one processor give different pixels.
            facts[f"{prefix}{name}"] = type(part).__name__
            flatten(part.to_dict(), f"{prefix}{name}", facts)
    return facts


def chain_facts(model: nn.Module) -> dict[str, JSON]:
    """List the facts of a ``SentenceTransformer``: of every module in its chain, tokenizer and weights included.

    Args:
        model: The model.

    Returns:
        "modules": their classes, "pooling", "weights.<n>.<tensor>", "tokenizer.<entry>", "<module>.<setting>".
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, JSON] = {}
    names = [type(module).__name__ for module in model.children()]
    for index, (path, module) in enumerate(model.named_children()):
        label = names[index].lower() if names.count(names[index]) == 1 else f"{names[index].lower()}_{index}"
        facts.update(_module_in_chain(module, label, "" if index == 0 else f"{label}.", f"{path}.", tensors))
    return {**facts, **hook_facts(model), **weight_facts(tensors), "modules": list(names)}


def _module_in_chain(module: Any, label: str, prefix: str, path: str, tensors: dict[str, Tensor]) -> dict[str, JSON]:
    """List the facts of one module of the chain, and collect its tensors.

    Args:
        module: The module.
        label: Begins the names of its facts.
        prefix: Begins the names of the facts of its tokenizer, with its dot; routes have one each.
        path: Begins the names of its tensors, with its dot.
        tensors: Receives the tensors; their names do not depend on how a version calls the model inside.
    """
    facts = hook_facts(module, f"{label}.")
    inner = getattr(module, "auto_model", None)
    routes = getattr(module, "sub_modules", None)
    if isinstance(inner, nn.Module):
        tensors.update((path + name, tensor) for name, tensor in model_tensors(inner).items())
        facts.update(model_facts(inner, f"{label}."))
        facts.update(processor_facts(getattr(module, "processor", None) or module.tokenizer, prefix))
        if not hasattr(module, "processor"):  # before version 5.2, and then the normalizer does not tell
            facts[f"{label}.do_lower_case"] = bool(getattr(module, "do_lower_case", False))
    elif isinstance(routes, nn.ModuleDict):
        for route, stages in routes.items():
            for name, stage in stages.named_children():
                nested = f"{label}.{route}.{name}"
                facts[nested] = type(stage).__name__
                facts.update(_module_in_chain(stage, nested, f"{nested}.", f"{path}{route}.{name}.", tensors))
        for key, target in getattr(module, "route_mappings", {}).items():
            facts[f"{label}.routes.{key}"] = target
        facts[f"{label}.default_route"] = getattr(module, "default_route", None)
        return facts
    elif package_of(type(module)) != "sentence_transformers":
        return module_facts(module, path)
    else:
        tensors.update((path + name, tensor) for name, tensor in module.state_dict(keep_vars=True).items())
        facts.update(foreign_facts(module, f"{label}."))
        if getattr(module, "tokenizer", None) is not None:
            describe(module.tokenizer, f"{prefix}tokenizer", facts)
    length = getattr(module, "max_seq_length", None)
    if prefix and isinstance(length, int):
        facts[f"{prefix}max_seq_length"] = length
    config = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
    if hasattr(module, "pooling_mode") or hasattr(module, "get_pooling_mode_str"):
        mode = module.pooling_mode if hasattr(module, "pooling_mode") else module.get_pooling_mode_str()
        facts[label] = mode if isinstance(mode, str) else "+".join(mode)
        config = {"include_prompt": getattr(module, "include_prompt", True)}
    expected_output = _OUTPUT_DEFAULTS.get(type(module).__name__, "sentence_embedding")
    for name, value in config.items():
        usual = (expected_output,) if name == "module_output_name" else _DEFAULTS.get(name, ())
        if value is not None and name not in _TOLD_ELSEWHERE and value not in usual:
            flatten(value, f"{label}.{name}", facts)
    return facts
