"""A low-bit network that learns from the float one: the teacher's soft targets are half of the loss.

python examples/distill.py --weight-bits 1 --activation-bits 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import lowbit
from lowbit.data import load_data, loader
from lowbit.models import load_default


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight-bits", type=int, default=2)
    parser.add_argument("--activation-bits", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("distill.lowbit"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    batches, test = loader(load_data("digits"), 64, shuffle=True), loader(load_data("digits", split="test"), 256)
    sample = next(iter(loader(load_data("digits", split="calibration"), 256)))[0]
    teacher = load_default()
    model = lowbit.prepare(teacher, weight_bits=options.weight_bits, activation_bits=options.activation_bits, sample=sample)

    task = lowbit.Classification(temperature=4.0)  # how soft they are
    recipe = lowbit.Recipe(distillation=0.5)  # weight of the soft targets in the loss
    run = lowbit.training(model, steps_per_epoch=len(batches), epochs=options.epochs, teacher=teacher, task=task, recipe=recipe)
    optimizer = torch.optim.Adam(run.parameter_groups(learning_rate=1e-3, weight_decay=0.0))

    model.train()
    for epoch in range(options.epochs):
        for batch in batches:
            run.before_step(optimizer)  # also clears gradients
            loss = run.loss(batch)  # (1 - 0.5) * cross-entropy + 0.5 * distillation + penalties
            loss.backward()
            run.after_backward()
            optimizer.step()
            run.after_step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    model.eval()
    accuracy = lowbit.evaluate(model, test)["accuracy"]
    print(f"quantized accuracy {accuracy:.2%}, teacher {lowbit.evaluate(teacher, test)['accuracy']:.2%}")
    print(lowbit.export(model, options.out, sample=sample[:32]))
    return accuracy


if __name__ == "__main__":
    main()
