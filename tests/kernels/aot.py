"""Compiles every kernel ahead of time, without a GPU, and reports what the compiler made of it as JSON.

Run as a script, without TRITON_INTERPRET: `python tests/kernels/aot.py [TARGET ...] > report.json`; all targets where
none is named. With `--elements 4096` programs are of that many elements, and those of the flat kernels alone are
counted. The ops are called as always, on CPU tensors, under a driver that names a target and a launch that stops
after compiling: signatures, alignments and constants are those of a real run. Counts of NVIDIA code are of the machine
code (SASS), of AMD code of the assembly.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import mezo_kernels as mk
from mezo_kernels import dispatch, rules
from mezo_kernels import triton as ops
from mezo_kernels.triton import table
from mezo_kernels.triton.table import LAUNCH

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class NoDevice:
    """A driver whose device number is a position in TARGETS: each target has its own cache of compiled kernels."""

    target = next(iter(TARGETS))

    def get_current_device(self):
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.target]


@functools.cache
def compile_only() -> list:
    """From now on a kernel call compiles and does not launch. Returns the list that compiled kernels are added to."""
    compiled, run = [], JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = warm_up
    driver.set_active(NoDevice())
    return compiled


def flat(*dtypes: torch.dtype, n: int = 4096) -> mk.ParamLayout:
    """Contiguous, aligned parameters: the fast path."""
    return mk.ParamLayout({f"w{i}": torch.zeros(n, dtype=dtype) for i, dtype in enumerate(dtypes)})


def ragged(*dtypes: torch.dtype) -> mk.ParamLayout:
    """Parameters that need the kernel which handles every shape."""
    return mk.ParamLayout({f"w{i}": torch.zeros(5, 7, dtype=dtype).t() for i, dtype in enumerate(dtypes)})


def perturb(layout: mk.ParamLayout, distribution: str = "normal", seed: int = 5, scale: float = 0.1) -> None:
    ops.perturb_(layout.tensors, [layout.geometry], scale, seed, distribution)


def step(layout, dtypes, updates=((3, 0.1, 1.0),), next_seeds=(7,), eps: float = 1e-3) -> None:
    """A step whose plus and minus are of the given dtypes, one a parameter."""
    tensors = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(layout.tensors, dtypes, strict=True)]
    plus, minus = ([t.clone() for _ in next_seeds for t in tensors] for _ in range(2))
    ops.step_(layout.tensors, plus, minus, [layout.geometry] * 3, list(updates), list(next_seeds), eps, "normal")


def rule_step(layout, dtypes, rule: mk.Rule, n_updates: int = 1, seed: int = 3, next_seeds=(7,), eps: float = 1e-3):
    """A step by a rule, from zero state."""
    state = [torch.zeros_like(t) for _ in range(rule.states) for t in layout.tensors]
    tensors = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(layout.tensors, dtypes, strict=True)]
    plus, minus = ([t.clone() for _ in next_seeds for t in tensors] for _ in range(2))
    updates, geometry = [(seed, 0.5, 1.0, 0.1, 1.0, 1.0)] * n_updates, [layout.geometry] * 5
    kind, numbers = rules.KINDS[rule.kind], rule.constants
    ops.rule_step_(
        layout.tensors, state, plus, minus, geometry, kind, numbers, updates, list(next_seeds), eps, "normal"
    )  # fmt: skip


def normal(start: int) -> None:
    ops.standard_normal(5, 9, start, 4096, "normal", "cpu")


# name -> (call, payload bytes an element read, and written); None where slow paths stand beside the fast one
VARIANTS = {
    **{f"perturb_{NAMES[d]}": (lambda d=d: perturb(flat(d)), d.itemsize, d.itemsize) for d in NAMES},
    "perturb_mixed": (lambda: perturb(flat(*NAMES)), 4 + 2 + 2, 4 + 2 + 2),
    "perturb_rademacher_fp32": (lambda: perturb(flat(FP32), "rademacher"), 4, 4),
    "perturb_rademacher_bf16": (lambda: perturb(flat(BF16), "rademacher"), 2, 2),
    **{f"step_{NAMES[d]}": (lambda d=d: step(flat(FP32), [d]), 4, 4 + 2 * d.itemsize) for d in NAMES},
    "update_bf16": (lambda: step(flat(BF16), [BF16]), 2, 6),
    **{
        f"{kind}_{NAMES[d]}": (
            lambda kind=kind, d=d: rule_step(flat(FP32), [d], mk.Rule(kind)),
            4 + 4 * rules.STATES[kind],
            4 + 4 * rules.STATES[kind] + 2 * d.itemsize,
        )
        # sign has the least to hold
        for kind, d in (("momentum", FP32), ("momentum", BF16), ("adam", FP32), ("adam", BF16), ("sign", BF16))
    },
    "any_adam_bf16": (lambda: rule_step(ragged(FP32), [BF16], mk.Rule("adam")), None, None),
    "standard_normal": (lambda: normal(0), 0, 4),
    "any_perturb_mixed": (lambda: perturb(ragged(*NAMES)), None, None),
    "any_step_bf16": (lambda: step(ragged(FP32), [BF16]), None, None),
    "any_standard_normal": (lambda: normal(1), None, None),
}


def compile_variant(target: str, variant: str) -> dict:
    """Compile one variant and count what matters in its code."""
    compiled = compile_only()
    driver.active.target = target
    call, read, written = VARIANTS[variant]
    compiled.clear()
    call()
    (kernel,) = compiled
    report = {"target": target, "variant": variant, "kernel": kernel.metadata.name, "shared": kernel.metadata.shared}
    report |= {"read": read, "written": written}
    return report | (_nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel))


def _nvidia(kernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (_dump(file.name, flag) for flag in ("--dump-resource-usage", "-sass"))
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass, re.M)
    # a branch to itself ends the kernel; subroutines (the square root of a subnormal) stand behind it
    end = next(i for i, (at, op, to) in enumerate(code) if op == "BRA" and int(at, 16) == int(to.split()[-1], 16))
    opcodes = Counter(op for _, op, _ in code[:end] if op != "NOP")
    decays = _decays(code[:end])
    lanes = LAUNCH["num_warps"] * 32
    inline = re.findall(r"// begin inline asm(.*?)// end inline asm", kernel.asm["ptx"], re.S)
    ptx = re.sub(r"// begin inline asm.*?// end inline asm", "", kernel.asm["ptx"], flags=re.S)
    ours = sum(len(re.findall(r"\bfma\.rn\.f32\b", text)) for text in inline)
    roots = len(re.findall(r"\bsqrt\.rn\.f32", ptx))
    quotients = len(re.findall(r"\bdiv\.rn\.f32", ptx))
    fused = sum(op.startswith("FFMA") for _, op, _ in code)
    return {
        "registers": resources["REG"],
        "stack": resources["STACK"] + resources["LOCAL"],
        "spills": sum(op.startswith(("LDL", "STL")) for _, op, _ in code),
        "slots": (sum(opcodes.values()) - decays) / (table.BLOCK_SIZE / lanes),
        "decays": decays,
        "loads": _widths(opcodes, "LDG"),
        "stores": _widths(opcodes, "STG"),
        "lanes": lanes,
        "barriers": sum(n for op, n in opcodes.items() if op.startswith("BAR")),
        # what stands in inline assembly is exact; a correctly rounded square root is refined by two of these, and by
        # three in its subroutine for subnormals; a quotient by five, and by twelve in its subroutine
        "fused": len(re.findall(r"\bfma\.\w+\.(?:ftz\.)?f32", ptx))
        + fused
        - ours
        - (2 * roots + 3 * (roots > 0))
        - (5 * quotients + 12 * (quotients > 0)),
        "roots": roots + sum("rsqrt" in text for text in inline),
        "inexact": len(re.findall(r"\.ftz|\.approx|\bsin\.|\bcos\.", ptx)),
    }


def _decays(code: list[tuple[str, str, str]]) -> int:
    """Products by decay, which stand behind branches of their own: a step without decay passes them over."""
    at = {int(address, 16): i for i, (address, _, _) in enumerate(code)}
    blocks = (code[i + 1 : at.get(int(to.split()[-1], 16), 0)] for i, (_, op, to) in enumerate(code) if op == "BRA")
    return sum(len(block) for block in blocks if all(op == "FMUL" for _, op, _ in block))


def _dump(path: str, flag: str) -> str:
    env = {**os.environ, "PATH": BIN + os.pathsep + os.environ["PATH"]}
    return subprocess.run([f"{BIN}/cuobjdump", flag, path], capture_output=True, text=True, check=True, env=env).stdout


def _widths(opcodes: Counter, prefix: str) -> dict[str, int]:
    widths = Counter()
    for op, n in opcodes.items():
        if op.split(".")[0] == prefix:
            widths[(re.search(r"\.[US]?(128|64|16)\b", op) or ["", "32"])[1]] += n
    return widths


def _amd(kernel) -> dict:
    assembly = kernel.asm["amdgcn"]
    opcodes = Counter(re.findall(r"^\s+([a-z]+_\w+)", assembly, re.M))
    lanes = LAUNCH["num_warps"] * 64
    fused = sum(n for op, n in opcodes.items() if re.match(r"v_(pk_)?(fma|fmac|mad|mac)_f32", op))

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    def widths(kind: str) -> dict[str, int]:
        names = {"dwordx4": "128", "dwordx2": "64", "dword": "32", "ushort": "16", "short": "16", "short_d16_hi": "16"}
        count = Counter()
        for name, width in names.items():
            count[width] += opcodes[f"global_{kind}_{name}"] + opcodes[f"buffer_{kind}_{name}"]
        return +count

    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count") + sum(op.startswith("scratch_") * n for op, n in opcodes.items()),
        "slots": sum(n for op, n in opcodes.items() if op.startswith(("v_", "s_", "ds_", "global_", "buffer_")))
        / (table.BLOCK_SIZE / lanes),
        "loads": widths("load"),
        "stores": widths("store"),
        "lanes": lanes,
        "barriers": opcodes["s_barrier"],
        # a correctly rounded square root is refined by two of these, a quotient by five
        "fused": fused - 2 * opcodes["v_sqrt_f32_e32"] - 5 * opcodes["v_div_fixup_f32"],
        "roots": opcodes["v_sqrt_f32_e32"],
        "inexact": int(".amdhsa_float_denorm_mode_32 3" not in assembly) + opcodes["v_sin_f32_e32"],
    }


def variants_of_a_run() -> dict[str, int]:
    """Compiled variants of each kernel after runs that differ in every per-step value and in the layout's sizes."""
    compiled = compile_only()
    compiled.clear()
    for seed in (0, 1, 16, 2**31, 2**32 + 1, 2**63, 2**64 - 1):
        layout = flat(*[FP32] * (1 + seed % 3), n=4096 + 16 * (seed % 5))
        updates = [(seed, 0.0, 1.0), (seed, 1.0, 0.5), *[(seed, 0.1, 1.0)] * 14][: 1 + seed % 16]
        perturb(layout, seed=seed, scale=seed / 2**60)
        step(layout, [FP32] * len(layout.tensors), updates, [seed] * (1 + seed % 2), eps=seed + 1.0)
        betas = (0.5, 0.25) if seed % 2 else (0.9, 0.0)
        rule = mk.Rule("adam", *betas, eps=1e-8 * (1 + seed % 4), l2=float(seed % 3))
        rule_step(layout, [FP32] * len(layout.tensors), rule, len(updates), seed, [seed] * (1 + seed % 2), seed + 1.0)
        ops.standard_normal(seed, seed % 2**32, 4 * (seed % 2**60), 4096 + 4 * (seed % 5), "normal", "cpu")
    return Counter(name for name, _ in {(kernel.metadata.name, id(kernel)) for kernel in compiled})


def kernels_of_ops() -> dict[str, list[str]]:
    """The kernels that each op of the table launches in its cases; nothing is compiled."""
    launched, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: launched.append(self.fn.__name__)
    found = {}
    for op in dispatch.OPS.values():
        launched.clear()
        for _, arguments in op.cases("cpu"):
            op(*arguments, "triton")
        found[op.name] = sorted(set(launched))
    JITFunction.run = run
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all where none is named"
    )
    parser.add_argument("--elements", type=int, help="of a program, in place of what runs have; of flat kernels alone")
    options = parser.parse_args()
    variants = list(VARIANTS)
    if options.elements:
        table.BLOCK_SIZE = options.elements  # processes that are forked have it too
        variants = [name for name, (_, read, _) in VARIANTS.items() if read]
    jobs = [(target, variant) for target in options.targets or TARGETS for variant in variants]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        found = {"reports": list(pool.map(compile_variant, *zip(*jobs, strict=True)))}
    if not options.elements:
        found |= {"variants_of_a_run": variants_of_a_run(), "kernels_of_ops": kernels_of_ops()}
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
