"""Two loops that the examples share: float training, and training of a prepared network, both in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

import lowbit


def train_float(network: nn.Module, batches: Iterable[object], task: lowbit.Task, epochs: int, learning_rate: float = 0.01) -> nn.Module:
    """The usual loop; a task says how the network is called and what the loss is."""
    optimizer = torch.optim.Adam(network.train().parameters(), learning_rate)
    for _ in range(epochs):
        for batch in batches:
            loss = task.loss(task.predict(network, batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def train_low_bit(prepared: nn.Module, batches: list[object], task: lowbit.Task, epochs: int, learning_rate: float = 0.002) -> nn.Module:
    """The same with three calls of lowbit for each step, for what ``lowbit.prepare`` returned."""
    run = lowbit.training(prepared.train(), steps_per_epoch=len(batches), epochs=epochs, task=task)
    optimizer = torch.optim.Adam(run.parameter_groups(learning_rate, weight_decay=0.0))
    for _ in range(epochs):
        for batch in batches:
            run.before_step(optimizer)
            run.loss(batch).backward()
            run.after_backward()
            optimizer.step()
            run.after_step()
    return prepared.eval()
