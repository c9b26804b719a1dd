"""MeZOTrainer beside transformers' Trainer with AdamW: peak memory of a step, and bytes that two processes exchange.

Run: make bench-trainer, or python bench/trainer.py --output bench/results/MACHINE/trainer.json
"""

import argparse
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from alternatives import forget_peaks
from machine import describe

ROOT = Path(__file__).parents[1]
STEPS, ROWS, TOKENS = 3, 8, 64
KINDS = {
    "MeZO, adapter": "MeZOTrainer, LoRA beside all linear layers of r 8",
    "AdamW, adapter": "Trainer with AdamW on the same adapter",
    "MeZO, all weights": "MeZOTrainer, every weight in float32",
    "AdamW, all weights": "Trainer with AdamW on every weight in float32",
}
ACKED, RECEIVED, TCP_INFO_BYTES = 120, 128, 136
"""Where the kernel's tcp_info has the bytes of a connection that were sent and acknowledged, and those received."""


def make(kind: str, model: str, folder: str, steps: int, **options):
    """A trainer of a kind on random tokens, as many as `ROWS` and `TOKENS` say."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    from mezo import MeZOTrainer

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if kind.endswith("adapter"):
        net = get_peft_model(net, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(0, net.config.vocab_size, (64 * ROWS, TOKENS), generator=numbers).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    size = {"per_device_train_batch_size": ROWS, "max_steps": steps, "save_strategy": "no", "use_cpu": True}
    args = TrainingArguments(folder, report_to="none", disable_tqdm=True, logging_strategy="no", **size, **options)
    more = {"mezo_options": {"eps": 1e-3}} if kind.startswith("MeZO") else {}
    trainer = MeZOTrainer if kind.startswith("MeZO") else Trainer
    return trainer(net, args, default_data_collator, train_dataset=data, **more)


def peak(kind: str, model: str) -> dict:
    """Memory of this process before training and at its peak, and seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(kind, model, folder, STEPS)
        loaded = resident("VmRSS")
        forget_peaks([os.getpid()])
        began = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - began) / STEPS
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        return {"loaded": loaded, "peak": resident("VmHWM"), "seconds": seconds, "trained": trained}


def resident(name: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def exchanged() -> tuple[int, int]:
    """Bytes that this process has sent and received over TCP so far, as its kernel counts them."""
    sent = received = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not entry.readlink().name.startswith("socket:"):
                continue
            with socket.fromfd(int(entry.name), socket.AF_INET, socket.SOCK_STREAM) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        except OSError:  # gone, or no TCP
            continue
        sent += struct.unpack_from("<Q", info, ACKED)[0]
        received += struct.unpack_from("<Q", info, RECEIVED)[0]
    return sent, received


def rank(kind: str, model: str, output: str, steps: int) -> None:
    """One of two processes under torchrun: train, and count what a step sends. Rank 0 writes it."""
    from transformers import TrainerCallback

    seen = {}

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (2, steps):  # the first ones begin with what all ranks must have alike
                seen[state.global_step] = exchanged()

    with tempfile.TemporaryDirectory() as folder:
        trainer = make(kind, model, folder, steps, ddp_backend="gloo")
        trainer.add_callback(Count())
        trainer.train()
    sent, received = ((after - before) / (steps - 2) for before, after in zip(seen[2], seen[steps], strict=True))
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    others = [torch.empty_like(weights) for _ in range(2)]
    torch.distributed.all_gather(others, weights)
    if trainer.is_world_process_zero():
        trained = weights.numel()
        equal = torch.equal(*others)
        Path(output).write_text(json.dumps({"sent": sent, "received": received, "trained": trained, "equal": equal}))
    del trainer
    gc.collect()  # a wrapped model in a cycle would hold the group, whose threads must not outlive the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def two_processes(kind: str, model: str, steps: int = 12) -> dict:
    """What a rank sends and receives a step, in bytes; how many numbers are trained; whether ranks end equal."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, __file__, "--rank", kind, model, str(output), str(steps)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(output.read_text())


def main() -> None:
    """Measure each kind in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "MODEL"))
    parser.add_argument("--rank", nargs=4, metavar=("KIND", "MODEL", "OUTPUT", "STEPS"))
    options = parser.parse_args()
    if options.rank:
        return rank(*options.rank[:3], int(options.rank[3]))
    if options.peak:
        return print(json.dumps(peak(*options.peak)))
    from mezo.studies.assets import fetch_model

    model = str(fetch_model())
    found = {"machine": describe(), "model": "the demo's, float32", "rows": ROWS, "tokens": TOKENS, "kinds": KINDS}
    found |= {"memory": {}, "exchange": {}}
    for kind in KINDS:
        command = [sys.executable, __file__, "--peak", kind, model]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found["memory"][kind] = json.loads(out.splitlines()[-1])
        print(kind, found["memory"][kind], flush=True)
    for kind in list(KINDS)[:2]:  # two copies of the model at once: the adapter is enough to tell
        found["exchange"][kind] = two_processes(kind, model, 4)
        print(kind, found["exchange"][kind], flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
