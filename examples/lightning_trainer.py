"""The Trainer of Lightning with lowbit's callback; it needs `pip install "lowbit[lightning,data]"`.

python examples/lightning_trainer.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowbit
from lowbit.data import load_data, loader
from lowbit.models import load_default
from lowbit.qat.loops.lightning import LowbitCallback


class Digits(pl.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network  # what lowbit.prepare returned

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.network(images), labels) + lowbit.penalty(self.network)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(lowbit.parameter_groups(self.network, learning_rate=0.02), momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)}


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight-bits", type=int, default=2)
    parser.add_argument("--activation-bits", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("lightning_trainer.lowbit"))
    options = parser.parse_args(arguments)

    pl.seed_everything(0)
    batches, test = loader(load_data("digits"), 64, shuffle=True), loader(load_data("digits", split="test"), 256)
    sample = next(iter(loader(load_data("digits", split="calibration"), 256)))[0]
    model = lowbit.prepare(load_default(), weight_bits=options.weight_bits, activation_bits=options.activation_bits, sample=sample)

    trainer = pl.Trainer(max_epochs=options.epochs, callbacks=[LowbitCallback()], logger=False, enable_checkpointing=False)
    trainer.fit(Digits(model.train()), batches)

    model.cpu().eval()
    accuracy = lowbit.evaluate(model, test)["accuracy"]
    print(f"quantized accuracy {accuracy:.2%}")
    print(lowbit.export(model, options.out, sample=sample[:32]))
    return accuracy


if __name__ == "__main__":
    main()
