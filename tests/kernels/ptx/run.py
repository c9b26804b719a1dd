"""Runs compiled kernels on the CPU (`mezo_kernels.ptx`) and prints what came of it as JSON.

A script without TRITON_INTERPRET, since a process that chose Triton's interpreter cannot compile:
`python tests/kernels/ptx/run.py cases TARGET`, `texts TARGET`, or `mutants LIST ...` for lists of `mutants.py`.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

import mezo_kernels
from mezo_kernels.ptx import emulated
from tests.kernels.ptx import mutants

verify = sys.modules["mezo_kernels.verify"]  # the module, which the function of its name hides
# these compile in seconds and see every line of `tile.py`: its modes, 4 and 8 elements a lane, one dtype and three
QUICK = (
    "perturb_ float32 normal aligned", "perturb_ bfloat16 normal aligned", "perturb_ float32 normal",
    "perturb_ bfloat16 rademacher", "perturb_ mixed rademacher", "step_ bfloat16 aligned",
)  # fmt: skip
ABSENT = "absent"


def of_cases(target: str) -> list:
    """(check, whether it passed, detail) of every case of every op."""
    return [(row.check, row.ok, row.detail) for row in mezo_kernels.verify(compiled=target)]


def of_texts(target: str, every: str = "") -> list:
    """Hashes of the kernels' code without its header or where it comes from, of the quick cases or of every one."""
    texts = []

    def keep(text):
        texts.append(text[text.index(".visible .entry") :].partition("\t.file")[0])
        return text

    with emulated(target, edit=keep):
        for name, check in verify._comparisons():
            if every or name in QUICK:
                check("triton", "cpu")
    return sorted(hashlib.sha256(text.encode()).hexdigest() for text in texts)


def of_mutants(*names: str) -> dict:
    """Name of a bug -> (check that found it, how), or None where none did; the program as it is goes by "none"."""
    chosen = [mutants.Mutant("none", "ptx", "", ""), *(mutant for name in names for mutant in getattr(mutants, name))]
    # a process for each, so that it imports its own source
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        return dict(pool.map(found, chosen, chunksize=1))


def found(mutant: mutants.Mutant) -> tuple:
    """The mutant's name, and what the first check that sees it says; of one whose text no kernel has, (ABSENT, "")."""
    texts = []

    def edit(text):
        texts.append((text, mutant(text) if mutant.where == "ptx" else text))
        return texts[-1][1]

    with tempfile.TemporaryDirectory() as folder:
        if mutant.where != "ptx":
            sources = Path(folder) / "triton"
            shutil.copytree(mezo_kernels.__path__[0] + "/triton", sources)
            file = sources / mutant.where
            file.write_text(mutant(file.read_text()))
            mezo_kernels.__path__.insert(0, folder)
        with emulated("sm_90", edit=edit):
            for name, expected in EXPECTED.items():
                row = verify._row("triton", "cpu", name, CHECKS[name], expected)
                if not row.ok:
                    return mutant.name, (name, row.detail)
    absent = mutant.old and mutant.where == "ptx" and all(before == after for before, after in texts)
    return mutant.name, (ABSENT, "") if absent else None


def main(what: str, *names: str) -> None:
    json.dump({"cases": of_cases, "texts": of_texts, "mutants": of_mutants}[what](*names), sys.stdout, indent=1)


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    CHECKS = {name: check for name, check in verify._comparisons() if name in QUICK}
    EXPECTED = {name: CHECKS[name]("reference", "cpu") for name in QUICK}
    main(*sys.argv[1:])
