"""One fit on two processes, run as a script: the launcher of Lightning starts it once for each rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytorch_lightning as pl

from quatcache import CacheConfig
from tests.fits import Model, Texts, loader, texts, trainer


def main(out, save_dir, cached):
    cache = CacheConfig(save_dir=save_dir or None) if cached == "cached" else None
    pl.seed_everything(0, verbose=False)
    model = Model(cache=cache)
    train = loader(Texts(texts(41)), shuffle=True, num_workers=0)
    trainer(devices=2, strategy="ddp", max_epochs=2).fit(model, train, loader(Texts(texts(10))))
    result = {
        "train": model.train_losses,
        "val": model.val_losses,
        "head": {name: value.tolist() for name, value in model.head.state_dict().items()},
        "encoded": model.cache_callback.report.encoded,
    }
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    Path(out, f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
