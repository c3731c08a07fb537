from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.binary.bi_real_net import BiRealWeight
from lowbit.methods.binary.react_net import ChannelShift, ReactNetMethod, distribution_loss
from lowbit.models import load_model
from lowbit.models.reactnet import ReactBlock, reactnet_a
from lowbit.network import insert
from lowbit.network.surgery.shortcuts import ShiftedPReLU, ShortcutBlock
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.prepare import method_of


def images() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def prepared(**options: object) -> nn.Module:
    return lowbit.prepare(
        load_model("resnet8", num_classes=4), method="react_net", weight_bits=1, activation_bits=1, sample=images(), **options
    )


def test_the_loss_is_the_divergence_from_the_teacher_plus_its_entropy() -> None:
    output, target = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    chance = target.softmax(1)
    divergence = functional.kl_div(output.log_softmax(1), chance, reduction="batchmean")
    entropy = -(chance * chance.log()).sum(1).mean()
    loss = distribution_loss(output, target)
    torch.testing.assert_close(loss, divergence + entropy)
    torch.testing.assert_close(distribution_loss(target + 3, target), entropy)
    loss.backward()
    torch.testing.assert_close(output.grad, (output.detach().softmax(1) - chance) / 5)


def test_a_shift_moves_the_threshold_of_each_channel_and_is_learned() -> None:
    layer = nn.Conv2d(3, 4, 1)
    shift = ChannelShift(layer)
    shift.shift.data = torch.tensor([0.5, 0.0, -0.5]).view(3, 1, 1)
    quantizer = ReactNetMethod().activation_quantizer(None)  # type: ignore[arg-type]
    x = torch.tensor([-0.25, -0.25, 0.25]).view(1, 3, 1, 1)
    y = quantizer(shift(x))
    assert y.flatten().tolist() == [1.0, -1.0, -1.0]
    y.sum().backward()
    torch.testing.assert_close(shift.shift.grad.flatten(), torch.tensor([1.5, 1.5, 1.5]))


def test_a_residual_network_gets_shortcuts_prelus_and_shifts() -> None:
    model = prepared()
    assert sum(isinstance(module, ShortcutBlock) for module in model.modules()) == 3
    assert sum(isinstance(module, ShiftedPReLU) for module in model.modules()) == 6
    assert isinstance(insert.input_transform(model.get_submodule("layer1.0.conv2")), ChannelShift)


def test_weights_are_real_in_the_first_step_and_both_are_binary_in_the_second() -> None:
    model = prepared().train()
    recipe = Recipe(4, 4, OptimizerSpec(learning_rate=0.01, weight_decay=0.5))
    run = TrainRun(model, method_of(model), Classification(), recipe, 1)
    assert [(phase.name, phase.epochs) for phase in run.phases] == [("real weights", 2), ("binary", 2)]
    assert run.phases[0].optimizers["weights"].weight_decay == 1e-5
    assert run.phases[1].optimizers["weights"].weight_decay == 0.5
    layer = model.get_submodule("layer1.0.conv1")
    assert isinstance(insert.weight_quantizer(layer), BiRealWeight)
    levels = []
    for _ in run.each_epoch():
        levels.append(len(layer.weight.detach()[0].unique()) > 2)
    assert levels == [True, True, False, False]


def test_with_a_teacher_labels_do_not_count() -> None:
    model, teacher = prepared().train(), load_model("resnet8", num_classes=4).eval()
    run = TrainRun(model, method_of(model), Classification(), Recipe(2, 4, OptimizerSpec()), 1, given=GivenNetworks(teacher))
    losses = {float(run.loss((images(), labels)).detach()) for labels in (torch.zeros(4).long(), torch.arange(4))}
    assert len(losses) == 1
    alone = TrainRun(model, method_of(model), Classification(), Recipe(2, 4, OptimizerSpec()), 1)
    assert len({float(alone.loss((images(), labels)).detach()) for labels in (torch.zeros(4).long(), torch.arange(4))}) == 2


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_no_binary_step_is_refused(share: float) -> None:
    with pytest.raises(SpecError, match="react_net: real_weights must be from 0 to below 1"):
        ReactNetMethod(real_weights=share)


def test_a_block_that_doubles_the_width_puts_two_branches_side_by_side() -> None:
    block = ReactBlock(8, 16, 2).eval()
    for unit in (block.spatial, *block.pointwise):
        nn.init.zeros_(unit.norm.weight)
    for activation in (block.spatial.activation, block.activation):
        activation.prelu.weight.data.fill_(1.0)
    x = torch.randn(2, 8, 6, 6)
    pooled = functional.avg_pool2d(x, 2)
    assert torch.equal(block(x), torch.cat([pooled, pooled], 1))


def test_reactnet_a_has_the_paper_s_widths() -> None:
    model = reactnet_a(num_classes=7).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert model.blocks[-1](torch.randn(1, 1024, 2, 2)).shape == (1, 1024, 2, 2)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 1 + 13 + 8 + 2 * 5
