"""MeZO in TRL's SFTTrainer: the mixin in front of the class. Needs trl: pip install 'mezo-kernels[trainer]'.

python examples/sft.py PATH_OR_HUB_ID
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from mezo import MeZOMixin

ROWS = [{"prompt": f"the {thing} was", "completion": " great"} for thing in ("film", "story", "plot", "acting")]


class MeZOSFTTrainer(MeZOMixin, SFTTrainer):
    """`SFTTrainer` with forward passes only."""


def main(path: str, steps: int = 200, output_dir: str = "runs/sft") -> MeZOSFTTrainer:
    """Train every weight on a few completions."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    args = SFTConfig(output_dir, max_steps=steps, learning_rate=1e-5, logging_steps=10, report_to="none", bf16=False)
    data = Dataset.from_list(ROWS)
    trainer = MeZOSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, mezo_options={"eps": 1e-3})
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
