"""A loop on Hugging Face's accelerate: several devices, mixed precision, accumulated gradients.

pip install "lowbit[huggingface,data]", then one of:
    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

import lowbit
from lowbit.data import load_data, loader
from lowbit.models import load_default


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight-bits", type=int, default=2)
    parser.add_argument("--activation-bits", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2, help="batches whose gradients make one step")
    parser.add_argument("--out", type=Path, default=Path("accelerate_loop.lowbit"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
    test = loader(load_data("digits", split="test"), 256)
    sample = next(iter(loader(load_data("digits", split="calibration"), 256)))[0]
    network = lowbit.prepare(load_default(), weight_bits=options.weight_bits, activation_bits=options.activation_bits, sample=sample)

    optimizer = torch.optim.SGD(lowbit.parameter_groups(network, learning_rate=0.02), momentum=0.9)
    model, optimizer, batches = accelerator.prepare(network.train(), optimizer, loader(load_data("digits"), 32, shuffle=True))
    steps = -(-len(batches) // options.accumulate)
    run = lowbit.training(model, steps_per_epoch=steps, epochs=options.epochs)  # finds the network inside accelerate's wrapper

    for epoch in range(options.epochs):
        for images, labels in batches:
            with accelerator.accumulate(model):
                if run.next_hook == "before_step":  # the first batch of a step
                    run.before_step(optimizer)  # also clears gradients
                loss = cross_entropy(model(images), labels) + run.penalty()
                accelerator.backward(loss)
                if accelerator.sync_gradients:  # the last batch of a step
                    run.after_backward()
                    optimizer.step()
                    run.after_step()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    network = accelerator.unwrap_model(model).cpu().eval()
    accuracy = lowbit.evaluate(network, test)["accuracy"]
    if accelerator.is_main_process:
        print(f"quantized accuracy {accuracy:.2%}")
        print(lowbit.export(network, options.out, sample=sample[:32]))
    return accuracy


if __name__ == "__main__":
    main()
