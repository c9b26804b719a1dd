"""MeZO in Lightning (pip install lightning): its own optimization is off, the optimizer is called with a closure.

python examples/lightning_module.py
"""

import lightning
import torch

from mezo import MeZO


class Classifier(lightning.LightningModule):
    """A layer that is trained with forward passes only."""

    def __init__(self):
        super().__init__()
        self.model, self.automatic_optimization = torch.nn.Linear(10, 2), False

    def training_step(self, batch, _):
        """A step of MeZO: two forward passes."""
        x, y = batch
        loss = self.optimizers().step(lambda: torch.nn.functional.cross_entropy(self.model(x), y))
        self.log("loss", loss)

    def configure_optimizers(self):
        """As for any optimizer."""
        return MeZO(self.model.named_parameters(), lr=0.05, eps=1e-3)


def main(epochs: int = 40, output_dir: str = "runs/lightning") -> float:
    """Train on two classes; return the accuracy."""
    lightning.seed_everything(0)
    x = torch.randn(512, 10)
    y = (x.sum(1) > 0).long()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=output_dir, logger=False)
    trainer.fit(module := Classifier(), data)
    return (module.model(x).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    print("accuracy", main())
