"""Training a prepared network with ``lightning.pytorch``.

The module owns the optimizer and the loss, the callback calls the hooks of the method::

    class Net(lightning.pytorch.LightningModule):
        def __init__(self, network):                      # what lowbit.prepare returned
            super().__init__()
            self.network = network

        def training_step(self, batch, _):
            x, y = batch
            return cross_entropy(self.network(x), y) + lowbit.penalty(self.network)

        def configure_optimizers(self):
            return torch.optim.SGD(lowbit.parameter_groups(self.network, learning_rate=0.02), momentum=0.9)

    Trainer(max_epochs=10, callbacks=[LowbitCallback()]).fit(Net(network), loader)
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lowbit.errors import missing_extra
from lowbit.qat.loops.plan import Planned

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise missing_extra("lightning", "lightning", "training with lightning.pytorch") from error


class LowbitCallback(Planned, Callback):  # type: ignore[misc]
    """Calls the hooks of the method that the module's network was prepared with.

    The module may hold other networks as well, but one prepared one. Optimization may be automatic, or manual with one optimizer
    step in a batch. Gradients are clipped after the method has seen them. Where the run stands is saved in Lightning's checkpoints.
    Methods with a loss of their own need ``callback.run.loss(batch)`` in the training step.

    Arguments: those of ``Planned``.
    """

    _saved: dict[str, object] | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the run, for as many steps as the trainer plans."""
        steps, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
        if epochs is None or epochs < 0:  # only max_steps was given
            epochs = math.ceil(steps / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
        run = self.start(pl_module, steps, epochs)
        if self._saved is not None:
            run.load_state_dict(self._saved)
            self._saved = None

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: object, batch_idx: int) -> None:
        """Start a step, unless gradients are being accumulated."""
        if self.run.next_hook == "before_step":
            self.run.before_step(*trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: object) -> None:
        """All gradients are there and not yet clipped."""
        if self.run.next_hook == "after_backward":
            self.run.after_backward()

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: object, batch: object, batch_idx: int) -> None:
        """End the step, if the optimizer made one in this batch."""
        if self.run.next_hook == "after_step":
            self.run.after_step()

    def state_dict(self) -> dict[str, object]:
        """Where the run stands."""
        return {} if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Remember where to resume once training starts."""
        self._saved = state_dict or None
