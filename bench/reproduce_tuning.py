"""The part of `make reproduce-small` that compares what is trained: an adapter, a prefix, every weight of the model."""

from collections.abc import Mapping
from pathlib import Path

from memory import peak
from reproduce_decoder import NUM_TEST, Sample, write_pools

from mezo.api import train
from mezo.run import outcome
from mezo.run.directory import RunDirectory
from mezo.run.replay import rebuild

SEED = 13
SHOTS = {"k_shot": 512, "num_dev": 128, "num_test": NUM_TEST}
STEPS, BATCH, EVALUATIONS = 300, 8, 5
TUNINGS = {
    "lora": {"target_modules": ("q_proj", "v_proj"), "lr": 1e-3, "eps": 1e-2},
    "prefix": {"lr": 1e-2, "eps": 1e-1},
    "full": {"lr": 1e-5, "eps": 1e-3},
}
"""What is trained, in every layer. The prefix's lr and eps and full's eps are the paper's, full's lr is the best of
five by dev loss after 60 to 120 steps on sentences of another seed, the adapter's the demo's: with 4e-3 it diverged."""
MEASURED = ("seconds_training", "seconds_evaluation", "steps_per_second", "tokens_scored", "tokens_computed", "test")


def tuning(
    scratch: Path,
    sample: Sample = Sample(),  # noqa: B008
    shots: Mapping[str, int] = SHOTS,
    steps: int = STEPS,
) -> dict:
    """Part (e): the demo's model, prompts and sentences, once for each of TUNINGS; no trunk can be cached.

    Args:
        scratch: a directory for the runs.
        sample: what they draw from.
        shots: k_shot, num_dev and num_test of a `Config`.
        steps: of each run.
    """
    base = sample.config("it-was", steps, scratch / "unused").replace(
        report=False,
        best_metric="accuracy",
        **write_pools(scratch, sample),
        **shots,
        target_modules=(),
        layers_to_transform=(),
        batch_size=BATCH,
        eval_every=steps // EVALUATIONS,
        seed=SEED,
        data_seed=SEED,
        noise=False,
    )
    found = {}
    for name, options in TUNINGS.items():
        config = base.replace(tuning=name, output_dir=str(scratch / name), **options)
        result = {}
        peak_bytes = peak(lambda config=config, result=result: result.update(train(config)), "cpu")
        run = RunDirectory(Path(config.machine.output_dir))
        theta, header, replayed = rebuild(run.path)
        found[name] = options | {
            "parameters": sum(tensor.numel() for tensor in theta.values()),
            "peak_bytes": peak_bytes,
            **{key: result[key] for key in MEASURED},
            "best_step": replayed,
            "log_bytes": run.trajectory.stat().st_size,
            "first_difference_of_replay": outcome.difference(run, header, theta),
        }
    return {"steps": steps, "batch_size": BATCH, "seed": SEED, **shots, "tunings": found}
