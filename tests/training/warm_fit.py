"""One fit in a process of its own, which tells what it imported, and which files of the model it opened."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

OPENED = []


def watch(folder):
    """Note each file of a folder that Python or safetensors opens, from before any library is imported."""

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], str | bytes) and os.fsdecode(arguments[0]).startswith(folder):
            OPENED.append(Path(os.fsdecode(arguments[0])).name)

    sys.addaudithook(hook)
    import safetensors

    real = safetensors.safe_open  # it opens files by itself, which no hook is told of

    def safe_open(filename, *args, **kwargs):
        if os.fspath(filename).startswith(folder):
            OPENED.append(Path(filename).name)
        return real(filename, *args, **kwargs)

    safetensors.safe_open = safe_open


def main(out, folder, save_dir, adapter, devices):
    watch(folder)
    import pytorch_lightning as pl

    from quatcache import CacheConfig, encoders
    from tests.fits import Model, Texts, head_of, loader, texts, trainer

    logging.basicConfig(level=logging.INFO)
    pl.seed_everything(0, verbose=False)
    model = Model({"default": getattr(encoders, adapter)(folder)}, CacheConfig(save_dir=save_dir))
    settings = {} if devices == "1" else {"devices": int(devices), "strategy": "ddp"}
    run = trainer(enable_model_summary=True, **settings)
    run.fit(model, loader(Texts(texts(20)), shuffle=True), loader(Texts(texts(8))))
    report = model.cache_callback.report
    result = {
        "losses": [model.train_losses, model.val_losses],
        "head": {name: value.tolist() for name, value in head_of(model).items()},
        "encoded": report.encoded,
        "loaded": [encoder.loaded for encoder in report.encoders.values()],
        "imported": "sentence_transformers" in sys.modules,
        "opened": sorted(set(OPENED)),
    }
    result["after"] = model.encode(texts(3)).tolist()
    Path(out, f"rank{run.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
