"""A sentence-transformers model of random weights, 4 MB on disk, that loads in a tenth of a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

SIZE = 32


def write_tiny(folder: Path, minilm: Path, seed=0) -> Path:
    """Write a BERT of one layer with the tokenizer of MiniLM, and mean pooling."""
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "modules.json"):
        shutil.copyfile(minilm / name, folder / name)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": SIZE, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=SIZE, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes) -> None:
    """Change entries of a JSON object in a file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
