"""The Trainer of Hugging Face's transformers with lowbit's callback; it needs `pip install "lowbit[huggingface,data]"`.

python examples/huggingface_trainer.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

import lowbit
from lowbit.data import load_data, loader
from lowbit.models import load_default
from lowbit.qat.loops.huggingface import LowbitCallback


class Digits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network  # what lowbit.prepare returned

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": cross_entropy(logits, labels) + lowbit.penalty(self.network), "logits": logits}


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight-bits", type=int, default=2)
    parser.add_argument("--activation-bits", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("huggingface_trainer.lowbit"))
    options = parser.parse_args(arguments)

    data, test = load_data("digits").dataset, loader(load_data("digits", split="test"), 256)
    sample = next(iter(loader(load_data("digits", split="calibration"), 256)))[0]
    model = lowbit.prepare(load_default(), weight_bits=options.weight_bits, activation_bits=options.activation_bits, sample=sample)

    samples = [{"pixel_values": image, "labels": label} for image, label in data]
    steps = options.epochs * -(-len(samples) // 64)
    optimizer = torch.optim.SGD(lowbit.parameter_groups(model, learning_rate=0.02), momentum=0.9)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=options.epochs, per_device_train_batch_size=64, logging_strategy="epoch", save_strategy="no",
            report_to=[], seed=0,
        )  # fmt: skip
        schedule = get_cosine_schedule_with_warmup(optimizer, 0, steps)
        Trainer(
            Digits(model.train()), settings, train_dataset=samples, optimizers=(optimizer, schedule), callbacks=[LowbitCallback()]
        ).train()

    model.cpu().eval()
    accuracy = lowbit.evaluate(model, test)["accuracy"]
    print(f"quantized accuracy {accuracy:.2%}")
    print(lowbit.export(model, options.out, sample=sample[:32]))
    return accuracy


if __name__ == "__main__":
    main()
