# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Text classification from a cache
#
# We sort diagnosis texts into the 22 chapters of ICD-10-CM. A sentence encoder stays frozen; a small head learns.
# The encoder is the expensive part, and it says the same about a text every time it is asked. So we ask once.
#
# In a clone, `pip install ".[tutorials]"` brings all that is needed. The encoder and the texts come as packages, and
# nothing is downloaded from a model hub.

# %%
import logging
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm would like a widget

import matplotlib.pyplot as plt
import pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers.utils import logging as transformers_logging

from quatcache import CacheConfig, TrainableModel
from quatcache.demo.icd10 import read_tabular, split_by_category
from quatcache.demo.model import packaged_encoder
from quatcache.encoders import SentenceTransformerEncoder
from quatcache.heads import StackedProjectionHead

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")
transformers_logging.disable_progress_bar()

CACHE = Path("cache")
EPOCHS = 60

# %% [markdown]
# ## The data
#
# A sample is `(item, target)`: a text and the number of its chapter. Any dataset with `__getitem__` and `__len__` will
# do; a list is one. Near-identical texts ("left arm", "right arm") share the first three characters of their code, so
# whole categories go either to training or to validation.

# %%
split = split_by_category(read_tabular(), train_size=1320, validation_size=440)
for text, chapter in split.train[:4]:
    print(f"chapter {chapter + 1:2}  {text}")


# %% [markdown]
# ## The model
#
# Four hooks make a model: which encoder, which head, which loss, and how to cache. The head may be any `nn.Module`.


# %%
class ChapterClassifier(TrainableModel):
    def __init__(self, lr=3e-3):
        super().__init__()
        self.lr = lr

    def configure_encoders(self):
        return SentenceTransformerEncoder(packaged_encoder())  # a path, a hub name or a loaded model

    def configure_head(self, input_embedding_size):
        return StackedProjectionHead(input_embedding_size, [512, 22], dropout=0.5)

    def configure_loss(self):
        return nn.CrossEntropyLoss()

    def configure_metrics(self):
        return {"accuracy": MulticlassAccuracy(22, average="micro")}

    def configure_caches(self):
        return CacheConfig(batch_size=64, save_dir=CACHE)


# %% [markdown]
# ## The first run
#
# This is plain Lightning. The model brings its cache along: before the first epoch every text is encoded once, training
# and validation alike. From then on a batch is a gather of rows. A small callback of our own notes the curves.


# %%
class Curves(pl.Callback):
    def __init__(self):
        self.values = {"train_loss": [], "val_loss": [], "val_accuracy": []}

    def on_train_epoch_end(self, trainer, pl_module):
        for name, values in self.values.items():
            values.append(float(trainer.callback_metrics[name]))


def run():
    pl.seed_everything(0, verbose=False)
    model, curves = ChapterClassifier(), Curves()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[curves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        model,
        DataLoader(split.train, batch_size=64, shuffle=True),
        DataLoader(split.validation, batch_size=256),
    )
    return model, model.cache_callback.report, curves.values


model, report, curves = run()
print(f"{report.encoded:,} items encoded")

# %% [markdown]
# ## Learning curves

# %%
figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
epochs = range(1, EPOCHS + 1)
loss_axes.plot(epochs, curves["train_loss"], label="training (last batch)", alpha=0.6)
loss_axes.plot(epochs, curves["val_loss"], label="validation")
loss_axes.set(xlabel="epoch", ylabel="cross entropy", title="Loss")
loss_axes.legend()
accuracy_axes.plot(epochs, curves["val_accuracy"], color="tab:green")
accuracy_axes.set(xlabel="epoch", ylabel="share in the right chapter", title="Validation accuracy")
plt.show()

# %% [markdown]
# ## The second run
#
# The rows lie in `cache/`. A new model finds them by the identity of its encoder: weights, tokenizer, pooling and all
# else that decides a vector. Nothing is encoded, and the run ends where the first one did, to the last digit.

# %%
_, second_report, second_curves = run()
print(f"{second_report.encoded} items encoded")
assert second_report.encoded == 0
assert second_curves == curves

# %% [markdown]
# ## Use the model
#
# After the fit the encoder is back in its place, so the model takes texts it has never seen. `encode` gives what the
# head gives: here one score per chapter.

# %%
texts = ["broken wrist", "diabetes with kidney trouble", "cataract of the left eye", "twin pregnancy"]
for text, scores in zip(texts, model.encode(texts), strict=True):
    print(f"chapter {int(scores.argmax()) + 1:2}  {text}")

# %% [markdown]
# ## Where to go from here
#
# * Change the head, the loss or the learning rate and run again: the encoder is not called.
# * Change the encoder, its prompt or its maximal length: that is another identity, and it is filled anew. The old rows
#   stay for the day you change back.
# * Add texts: only the new ones are encoded.
# * `quatcache fit --config configs/icd10.yaml` trains the larger demo from a YAML file.
