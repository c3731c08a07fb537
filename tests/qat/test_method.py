from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.qat.recording import BATCHES, network, prepared
from torch import nn

from lowbit.inputs import Inputs
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.spec import BitPolicy
from lowbit.surrogates import SoftTanh


@dataclass
class Plain(TrainingMethod):
    """Nothing but quantizers: everything else is the default."""

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return LearnedScaleQuantizer(slot.bit_width, signed=True)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return LearnedScaleQuantizer(slot.bit_width, signed=slot.is_signed, surrogate=SoftTanh())


def attached(method: TrainingMethod, model: nn.Module | None = None) -> nn.Module:
    job = QatJob(model or network(), BitPolicy.uniform(2, 3), Inputs.of(BATCHES[0][0]))
    method.attach(job)
    return job.model


def role_of(model: nn.Module, name: str) -> str:
    return Plain().role(name, model.get_parameter(name), model.get_submodule(name.rpartition(".")[0]))


def test_attaching_puts_in_initialized_quantizers() -> None:
    model = attached(Plain())
    quantizers = [m for m in model.modules() if isinstance(m, LearnedScaleQuantizer)]
    assert len(quantizers) == 6 and all(q.is_initialized for q in quantizers)
    weights = insert.weight_quantizer(model[2])  # type: ignore[index]
    assert isinstance(weights, LearnedScaleQuantizer) and weights.bit_width == 2
    fresh = LearnedScaleQuantizer(2, signed=True)
    fresh.initialize(network()[2].weight)
    assert torch.equal(weights.scale, fresh.scale)


def test_a_layer_in_float_has_nothing_to_initialize() -> None:
    Plain().initialize_layer(nn.Linear(3, 2), torch.randn(2, 3))


def test_roles_follow_where_a_parameter_lies() -> None:
    model = attached(Plain())
    roles = {name: role_of(model, name) for name, _ in model.named_parameters()}
    assert roles["2.parametrizations.weight.original"] == "weights"
    assert roles["2.parametrizations.weight.0.quantizer.scale"] == "quantizers"
    assert roles["2.input_quantizer.scale"] == "quantizers"
    assert roles["2.input_quantizer.surrogate.alpha"] == "quantizers"
    assert roles["2.bias"] == "others"
    assert set(roles.values()) == {"weights", "quantizers", "others"}


def test_layers_of_the_network_that_are_called_quantizer_are_none_of_ours() -> None:
    model = attached(Plain())
    model.quantizer = nn.Embedding(3, 2)
    model.my_input_quantizer = nn.Module()
    model.my_input_quantizer.table = nn.Parameter(torch.zeros(2))
    assert role_of(model, "quantizer.weight") == role_of(model, "my_input_quantizer.table") == "others"


def test_biases_that_are_scaled_with_their_weight_are_others() -> None:
    torch.manual_seed(0)
    model = attached(Plain(), network())

    class Doubling(LearnedScaleQuantizer):
        def scale_bias(self, bias: torch.Tensor) -> torch.Tensor:
            return 2 * bias

    quantizer = Doubling(2, signed=True)
    quantizer.initialize(insert.float_weight(model[2]).detach())  # type: ignore[index]
    insert.set_weight_quantizer(model[2], quantizer)  # type: ignore[index]
    assert role_of(model, "2.parametrizations.bias.original") == "others"


def test_weights_and_others_get_the_recipes_optimizer_and_quantizers_their_share_of_its_rate() -> None:
    spec = OptimizerSpec("adamw", 0.5, weight_decay=0.1, schedule="linear", warmup=0.1)
    found = Plain(quantizer_learning_rate=0.1, quantizer_weight_decay=0.01).optimizers(Recipe(optimizer=spec))
    assert found["weights"] is found["others"] is spec
    assert found["quantizers"] == OptimizerSpec("adamw", 0.05, weight_decay=0.01, schedule="linear", warmup=0.1)
    plain = Plain().optimizers(Recipe())["quantizers"]
    assert plain.learning_rate == Recipe().optimizer.learning_rate and plain.weight_decay == 0


def test_there_is_one_phase_over_all_epochs() -> None:
    (phase,) = Plain().phases(Recipe(epochs=7, clip_norm=2.0))
    assert (phase.name, phase.epochs, phase.clip_norm, phase.renew_each_epoch) == ("train", 7, 2.0, False)
    assert set(phase.optimizers) == {"weights", "quantizers", "others"}


def test_the_loss_adds_the_tasks_and_the_penalties() -> None:
    model, method = attached(Plain()), Plain()
    run = TrainRun(model, method, Classification(), Recipe(), 4)
    assert torch.equal(method.loss(run, BATCHES[0]), run.task_loss(BATCHES[0]))


@pytest.mark.parametrize("hook", ["start_phase", "start_epoch", "before_step", "after_backward", "after_step"])
def test_hooks_change_nothing_unless_a_method_says_so(hook: str) -> None:
    model = prepared()
    run = TrainRun(model, Plain(), Classification(), Recipe(), 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    getattr(Plain(), hook)(run)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (run.step, run.epoch, run.optimizers) == (0, 0, [])
