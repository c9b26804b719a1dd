"""What a newcomer knows, on the rows of the demo: TF-IDF with logistic regression, and AdamW on the demo's adapter."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from mezo.api import loaded
from mezo.config import Config
from mezo.data.jsonl import read_jsonl
from mezo.method.batches import Batches
from mezo.method.objectives import cross_entropy, evaluate
from mezo.studies.demo import demo_config
from mezo.training.evaluation import score_split
from mezo_kernels import lora_init

EPOCHS, LRS = 8, (3e-4, 1e-3, 3e-3)  # the better of dev losses over all epochs and learning rates is kept


def peers(scratch: Path, config: Config | None = None, epochs: int = EPOCHS, lrs: Sequence[float] = LRS) -> dict:
    """Test accuracy of both on the demo's train, dev and test rows, and seconds.

    Args:
        scratch: nothing is written there.
        config: rows, model and adapter; None is the demo's.
        epochs, lrs: of AdamW.
    """
    config = config or demo_config("it-was", 1, scratch / "unused")
    return {"tf-idf": _tf_idf(config), "adamw": _adamw(config, epochs, lrs)}


def _tf_idf(config: Config) -> dict:
    """scikit-learn's defaults, words and pairs of words."""
    rows = {split: list(read_jsonl(getattr(config.data, f"{split}_file"))) for split in ("train", "test")}
    texts = {split: [row["text"] for row in own] for split, own in rows.items()}
    labels = {split: [row["label"] for row in own] for split, own in rows.items()}
    began = time.process_time()
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit(texts["train"], labels["train"])
    accuracy = model.score(texts["test"], labels["test"])
    return {
        "train": len(rows["train"]),
        "test": len(rows["test"]),
        "accuracy": accuracy,
        "cpu_s": time.process_time() - began,
    }


def _adamw(config: Config, epochs: int, lrs: Sequence[float]) -> dict:
    """The demo's adapter by backpropagation, from the demo's start, over the demo's cached trunk."""
    with loaded(config.replace(steps=10**6, noise=False), need="train") as (runtime, splits, _):
        start = {
            name: lora_init(config.method.seed, name, shape) if "lora_A" in name else torch.zeros(shape)
            for name, shape in runtime.spec.shapes.items()
        }
        labels = {split: torch.tensor([example.label for example in own]) for split, own in splits.items()}
        size, n, tried = config.method.batch_size, len(splits["train"]), []
        for lr in lrs:
            theta = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
            optimizer, batches = torch.optim.AdamW(theta.values(), lr=lr), Batches(n, size, config.method.seed)
            for epoch in range(epochs):
                began = time.process_time()
                for step in range(epoch * (n // size), (epoch + 1) * (n // size)):
                    batch = batches(step)
                    runtime.load({name: tensor.detach() for name, tensor in theta.items()})
                    grads = runtime.gradient("train", batch, lambda s, b=batch: cross_entropy(s, labels["train"][b]))
                    for name, tensor in theta.items():
                        tensor.grad = grads[name]
                    optimizer.step()
                seconds = time.process_time() - began
                runtime.load({name: tensor.detach() for name, tensor in theta.items()})
                figures = {
                    split: evaluate(score_split(runtime, split, len(labels[split]), 64), labels[split], "cross_entropy")
                    for split in ("dev", "test")
                }
                tried.append(
                    {"lr": lr, "epoch": epoch + 1, "steps": (epoch + 1) * (n // size), "cpu_s": seconds, **figures}
                )
    best = min(tried, key=lambda row: row["dev"]["loss"])
    return {"accuracy": best["test"]["accuracy"], "best": best, "tried": tried}
