"""Countdown with few numbers: a reward on written arithmetic, trained by a population of directions.

    python examples/countdown.py write DIRECTORY            # train.jsonl, dev.jsonl and test.jsonl, made up here
    mezo train --runtime sglang --model HuggingFaceTB/SmolLM2-135M-Instruct --train-file DIRECTORY/train.jsonl \
        --dev-file DIRECTORY/dev.jsonl --test-file DIRECTORY/test.jsonl --objective reward \
        --reward examples/countdown.py:solved --max-new-tokens 8 --temperature 1 --z-score-rewards --center-rewards \
        --num-perturbations 8 --batch-size 16 --tuning lora-xs --r 32 --lora-alpha 32 --output-dir runs/countdown

A puzzle gives two or three numbers and a target. The answer is an expression that has each number once, with + - and *,
and whose value is the target. Every puzzle can be solved. No right answer is stored: the reward works it out.
"""

import ast
import itertools
import json
import operator
import random
import sys
from collections import Counter
from pathlib import Path

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SHOTS = ((3, 4), 7, "3 + 4"), ((9, 2), 7, "9 - 2"), ((2, 5), 10, "2 * 5"), ((8, 6), 14, "8 + 6")
PARTIAL = 0.2  # of a right answer: an expression of the right numbers whose value is another


def solved(example, output):
    """1 for an expression of the given numbers that is the target, PARTIAL for one that is not, else 0.

    Args:
        example: has `numbers` and `target`.
        output: what the model wrote, up to --stop.

    Returns:
        A number in [0, 1].
    """
    try:
        numbers, value = evaluated(ast.parse(output.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    if Counter(numbers) != Counter(example["numbers"]):
        return 0.0
    return 1.0 if value == example["target"] else PARTIAL


def evaluated(node):
    """(the numbers, the value) of an expression; ValueError if it has anything but numbers, + - and *."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [node.value], node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        (left, a), (right, b) = evaluated(node.left), evaluated(node.right)
        return left + right, OPERATORS[type(node.op)](a, b)
    raise ValueError("no arithmetic of integers")


def puzzle(rng, numbers):
    """A puzzle with an answer: its numbers, and a target between 0 and 99."""
    while True:
        given = [rng.randint(1, 12) for _ in range(numbers)]
        value = given[0]
        for number in given[1:]:
            value = SIGNS[rng.choice("+-*")](value, number)
        if 0 <= value < 100 and value not in given:
            return {"numbers": given, "target": value, "prompt": prompt_of(given, value)}


def prompt_of(numbers, target):
    """The puzzle after a few that are solved."""
    solved_ones = [f"Numbers: {shown(given)}. Target: {goal}. Answer: {answer}" for given, goal, answer in SHOTS]
    return "\n".join([*solved_ones, f"Numbers: {shown(numbers)}. Target: {target}. Answer:"])


def shown(numbers):
    """The numbers as text.

    >>> shown((3, 4))
    '3 4'
    """
    return " ".join(map(str, numbers))


def puzzles(seed, sizes, numbers=(2,)):
    """Different puzzles for each split.

    Args:
        seed: of the random numbers.
        sizes: puzzles of each split, by its name.
        numbers: how many numbers a puzzle may give.
    """
    rng, seen, splits = random.Random(seed), set(), {}
    for split, size in sizes.items():
        splits[split] = []
        for _ in range(1000 * size):
            if len(splits[split]) == size:
                break
            row = puzzle(rng, rng.choice(numbers))
            key = (*sorted(row["numbers"]), row["target"])
            if key not in seen:
                seen.add(key)
                splits[split].append(row)
        if len(splits[split]) < size:
            raise ValueError(f"there are not {sum(sizes.values())} puzzles of {numbers} numbers")
    return splits


def write(directory, seed=0, sizes=None, numbers=(2,)):
    """Write the splits as JSON lines; returns the options of `mezo train` that name them."""
    directory, options = Path(directory), {}
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in puzzles(seed, sizes or {"train": 64, "dev": 24, "test": 24}, numbers).items():
        path = directory / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options[f"{split}_file"] = str(path)
    return options


def answers(numbers, target):
    """Every answer to a puzzle, from left to right, each number once."""
    found = []
    for order in set(itertools.permutations(numbers)):
        for signs in itertools.product(SIGNS, repeat=len(order) - 1):
            text, value = str(order[0]), order[0]
            for sign, number in zip(signs, order[1:], strict=True):
                text, value = f"({text}) {sign} {number}", SIGNS[sign](value, number)
            if value == target:
                found.append(text)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] != ["write"] or len(sys.argv) != 3:
        raise SystemExit("usage: python examples/countdown.py write DIRECTORY")
    write(sys.argv[2])
