"""A plain PyTorch loop: the optimizer, the schedule and the loss are yours, lowbit adds four lines.

python examples/plain_loop.py --method lsq --weight-bits 2 --activation-bits 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import lowbit
from lowbit.data import load_data, loader
from lowbit.models import load_default


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lsq", help="any of: lowbit methods list --kind training")
    parser.add_argument("--weight-bits", type=int, default=2)
    parser.add_argument("--activation-bits", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("plain_loop.lowbit"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    batches, test = loader(load_data("digits"), 64, shuffle=True), loader(load_data("digits", split="test"), 256)
    sample = next(iter(loader(load_data("digits", split="calibration"), 256)))[0]

    # 1. a copy of the trained float network with trainable quantizers in it
    model = lowbit.prepare(
        load_default(), method=options.method, weight_bits=options.weight_bits, activation_bits=options.activation_bits, sample=sample
    )

    # 2. your optimizer, over parameter groups in which quantizers have the method's learning rate
    run = lowbit.training(model, steps_per_epoch=len(batches), epochs=options.epochs, task=cross_entropy, batches=batches)
    optimizer = torch.optim.SGD(run.parameter_groups(learning_rate=0.02, weight_decay=1e-4), momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.total_steps)

    # 3. your loop, with three calls for each step
    model.train()
    for epoch in range(options.epochs):
        for images, labels in batches:
            run.before_step(optimizer)  # also clears gradients
            loss = run.loss((images, labels))  # or, for most methods, your loss on model(images) + run.penalty()
            loss.backward()
            run.after_backward()
            optimizer.step()
            run.after_step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    # 4. an ordinary module in evaluation mode, and a file of exactly these bits
    model.eval()
    accuracy = lowbit.evaluate(model, test)["accuracy"]
    print(f"quantized accuracy {accuracy:.2%}")
    print(lowbit.export(model, options.out, sample=sample[:32]))
    return accuracy


if __name__ == "__main__":
    main()
