"""Training a prepared network with the ``Trainer`` of Hugging Face's transformers.

The callback calls the hooks of the method; the optimizer is made from the network's parameter groups and the loss adds the penalty::

    class Net(torch.nn.Module):
        def __init__(self, network):                      # what lowbit.prepare returned
            super().__init__()
            self.network = network

        def forward(self, pixel_values, labels=None):
            logits = self.network(pixel_values)
            loss = cross_entropy(logits, labels) + lowbit.penalty(self.network)
            return {"loss": loss, "logits": logits}

    optimizer = torch.optim.SGD(lowbit.parameter_groups(network, learning_rate=0.02), momentum=0.9)
    Trainer(Net(network), arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[LowbitCallback()]).train()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowbit.errors import missing_extra
from lowbit.files import read_tensors, write_tensors
from lowbit.qat.loops.plan import Planned

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise missing_extra("transformers", "huggingface", "training with the Trainer of transformers") from error


class LowbitCallback(Planned, TrainerCallback):  # type: ignore[misc]
    """Calls the hooks of the method that the trainer's model was prepared with, or the one prepared network inside it.

    transformers clips gradients before it calls the method's hook for them. Each checkpoint gets a file with the run's state beside the
    trainer's, so that ``resume_from_checkpoint`` gives the same result. From a checkpoint outside of ``output_dir`` only the network is
    restored, and the method's own state (random numbers, for one) starts over. Methods with a loss of their own need
    ``callback.run.loss((inputs, labels))`` for the model's loss.

    Arguments: those of ``Planned``.
    """

    def on_train_begin(self, args: Any, state: Any, control: object, *, model: nn.Module, **kwargs: object) -> None:
        """Make the run, for as many steps as the trainer plans."""
        run = self.start(model, state.max_steps, state.num_train_epochs)
        path = _state_path(args, state)
        if state.global_step > 0 and path.is_file():
            tensors, facts = read_tensors(path)
            run.load_state_dict({**cast(dict[str, object], facts), "tensors": tensors})
        else:
            run.resume(state.global_step)

    def on_step_begin(self, args: object, state: object, control: object, *, optimizer: torch.optim.Optimizer, **kwargs: object) -> None:
        """Before the first forward pass of a step."""
        self.run.before_step(optimizer)

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """All gradients are there."""
        self.run.after_backward()

    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """The optimizer has made its step."""
        self.run.after_step()

    def on_save(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        """Write where the run stands into the checkpoint that the trainer has just written."""
        if state.is_world_process_zero:
            facts = self.run.state_dict()
            write_tensors(_state_path(args, state), cast(dict[str, Tensor], facts.pop("tensors")), facts)


def _state_path(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / "lowbit.safetensors"
