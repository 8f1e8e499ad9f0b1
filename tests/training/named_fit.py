"""One small cached fit under one of Lightning's two names; run as a script, as a process has one name only.

Usage: python named_fit.py <name that the user imports> <save_dir>
"""

from __future__ import annotations

import json
import sys
from importlib import import_module


def main(name, save_dir):
    pl = import_module(name)
    from torch import nn
    from torch.utils.data import DataLoader

    from quatcache import CacheConfig, TrainableModel
    from tests.encoders_for_tests import LengthEncoder

    class Model(TrainableModel):
        def configure_encoders(self):
            return LengthEncoder()

        def configure_head(self, input_embedding_size):
            return nn.Linear(input_embedding_size, 3)

        def configure_loss(self):
            return nn.CrossEntropyLoss()

        def configure_caches(self):
            return CacheConfig(save_dir=save_dir)

    pl.seed_everything(0, verbose=False)
    model = Model()
    samples = [("x" * (1 + n % 7), n % 3) for n in range(20)]
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, DataLoader(samples, batch_size=4, shuffle=True))
    result = {
        "names": sorted(name for name in ("pytorch_lightning", "lightning.pytorch") if name in sys.modules),
        "is module": isinstance(model, pl.LightningModule),
        "encoded": model.cache_callback.report.encoded,
        "head": model.head.weight.tolist(),
        "encoder": type(model.encoders["default"]).__name__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
