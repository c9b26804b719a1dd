"""Train on a reward of your own: any function of an example and of the text that the model writes for it.

python examples/reward.py train --model PATH_OR_HUB_ID --task replies --objective reward \
    --reward examples/reward.py:cheer --max-new-tokens 12 --output-dir runs/replies
"""

import sys

from mezo.cli.main import main
from mezo.tasks import Prompt, Task, register

CHEERFUL = {"good", "fine", "great", "nice"}


def cheer(example, output):
    """Share of cheerful words, less the share of those that only repeat the message.

    Args:
        example: the task's own fields, as `load` gives them.
        output: what the model wrote, greedily, up to --stop or --max-new-tokens; it may be empty.

    Returns:
        A finite number, more being better, and always the same for the same arguments: a run resumes to the bit.
    """
    words, message = output.lower().split(), set(example["message"].lower().split())
    return sum((word in CHEERFUL) - (word in message) for word in words) / max(len(words), 1)


def load():
    """Prompts alone: a reward asks for no right answer. Beside one, rows may have options and answers as ever."""
    subjects, verdicts = ("film", "story", "plot", "acting"), ("poor", "awful", "bad")
    rows = [{"message": f"the {subject} was {verdict}"} for subject in subjects for verdict in verdicts]
    return {"train": rows[:8], "dev": rows[8:10], "test": rows[10:]}


REPLIES = Task("replies", load, prompt=Prompt("{message} but", text_field="message"), dev_size=0)
# A mixture keeps a second aim in sight, where rows have options: --objective cross_entropy:1,reward:0.5

if __name__ == "__main__":
    register(REPLIES)
    sys.exit(main())
