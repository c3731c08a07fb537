"""The auxiliary module by hand: where it reads, which gradients it adds, and that nothing of it is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.qat.training import RECIPE, assert_same, data, killed, network as conv_network, train
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit.errors import GraphError, LoopError, SpecError
from lowbit.files import read_tensors
from lowbit.methods.quantizer_design.pact import PactActivation
from lowbit.methods.training.fp_auxiliary import (
    AUXILIARY,
    Auxiliary,
    AuxiliaryBlock,
    FpAuxiliary,
    Place,
    Range6Activation,
    pointwise,
)
from lowbit.models.loading import load_model
from lowbit.network import insert
from lowbit.network.taps import Tap, tapped
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainRun

CLASSES, PIXELS = 4, 12


class Bottleneck(nn.Module):
    """As in torchvision: one activation in place for all three, and a sum in place."""

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride > 1 or in_channels != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        found: Tensor = self.relu(out)
        return found


def bottlenecks() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks = [Bottleneck(8, 2, 1), Bottleneck(8, 3, 2), Bottleneck(12, 3, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))


class PlainNet(nn.Module):
    """Three convolutions, two of them with a norm, pooled in functions, and no padding at the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.bn1, self.bn2, self.fc = nn.BatchNorm2d(6), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 2)
        x = functional.relu(self.bn2(self.conv2(x)))
        x = functional.relu(self.conv3(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


NETWORKS = {
    "resnet": lambda: load_model("resnet8", num_classes=CLASSES, width=4),
    "bottleneck": bottlenecks,
    "mobilenet": lambda: load_model("mobilenet_v2_small", num_classes=CLASSES, width=4),
    "plain": PlainNet,
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def images(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, PIXELS, PIXELS, generator=generator), torch.arange(count) % CLASSES


def run_of(model: nn.Module | str, *, epochs: int = 2, bits: int | None = 2, **options: Any) -> TrainRun:
    """A run in its last phase, without a float one unless asked for."""
    network = made(model) if isinstance(model, str) else model
    options = {"pretrain_share": 0.0, **options}
    asked = {"weight_bits": bits, "activation_bits": bits, "policy": "paper", "sample": images()[0], **options}
    qat = lowbit.prepare(network, method="fp_auxiliary", **asked).train()
    recipe = Recipe(epochs, optimizer=OptimizerSpec(learning_rate=0.05))
    run = TrainRun(qat, qat.lowbit_method, Classification(), recipe, 1, given=GivenNetworks(float_network=network))  # type: ignore[arg-type]
    run.phase_index = len(run.phases) - 1
    run.start_phase()
    return run


def gradients(run: TrainRun, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each quantized weight."""
    sites = insert.quantized_weights(run.model)
    found = torch.autograd.grad(loss, [site.original for site in sites.values()], allow_unused=True, retain_graph=True)
    return {name: torch.zeros(()) if value is None else value for name, value in zip(sites, found, strict=True)}


def both_losses(run: TrainRun) -> tuple[Tensor, Tensor]:
    """The losses of the network's classifier and of the auxiliary one, from one pass."""
    auxiliary = run.networks[AUXILIARY]
    assert isinstance(auxiliary, Auxiliary)
    batch = images()
    with tapped(run.model, auxiliary.taps, copies=True) as features:
        logits = run.predict(batch)
    return functional.cross_entropy(logits, batch[1]), functional.cross_entropy(auxiliary(features), batch[1])


@pytest.mark.parametrize(("name", "expected"), [
    ("resnet", [(4, 12, 12), (4, 12, 12), (8, 6, 6), (16, 3, 3)]),
    ("bottleneck", [(8, 6, 6), (8, 6, 6), (12, 3, 3), (12, 3, 3)]),
    ("mobilenet", [
        (4, 12, 12), (4, 12, 12), (16, 12, 12), (16, 6, 6), (6, 6, 6), (24, 6, 6), (24, 3, 3), (8, 3, 3), (32, 3, 3), (32, 3, 3), (16, 3, 3),
        (48, 3, 3),
    ]),
    ("plain", [(6, 6, 6), (8, 6, 6), (8, 4, 4)]),
])  # fmt: skip
def test_it_reads_the_stem_behind_its_pooling_and_the_end_of_each_block(name: str, expected: list[tuple[int, ...]]) -> None:
    method = run_of(name).method
    assert isinstance(method, FpAuxiliary)
    assert [place.shape for place in method.places] == expected and method.outputs == CLASSES


def test_what_it_reads_is_what_the_activation_functions_read_also_where_they_work_in_place() -> None:
    run = run_of("bottleneck", bits=8)
    auxiliary = run.networks[AUXILIARY]
    assert isinstance(auxiliary, Auxiliary)
    with tapped(run.model, auxiliary.taps, copies=True) as features, tapped(run.model, ["3", "4", "5", "6"], copies=True) as behind:
        run.predict(images())
    read = [place.read(features) for place in auxiliary.places]
    assert all(bool((x < 0).any()) for x in read)
    for x, activated in zip(read, behind.values(), strict=True):
        assert torch.equal(x.relu(), activated)


@every_network
def test_the_gradient_of_each_quantized_layer_is_the_sum_of_both_losses(name: str) -> None:
    run = run_of(name, auxiliary_weight=0.5)
    (loss,) = run.losses(images())
    total = gradients(run, loss)
    own, auxiliary = (gradients(run, part) for part in both_losses(run))
    assert len(total) >= 2
    for layer, gradient in total.items():
        rounding = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(gradient, own[layer] + 0.5 * auxiliary[layer], rtol=0, atol=rounding, msg=layer)
        assert float(auxiliary[layer].abs().max()) > 1e-3, layer


@every_network
def test_without_adaptors_the_gradient_is_that_of_the_network_alone(name: str) -> None:
    run = run_of(name)
    auxiliary = run.networks[AUXILIARY]
    assert isinstance(auxiliary, Auxiliary)
    with torch.no_grad():
        for adaptor in (auxiliary.stem, *(block.get_submodule("adaptor") for block in auxiliary.blocks)):
            for parameter in adaptor.parameters():
                parameter.zero_()
    (loss,) = run.losses(images())
    total, own = gradients(run, loss), gradients(run, both_losses(run)[0])
    assert all(torch.equal(total[layer], own[layer]) for layer in own)


@every_network
def test_the_branch_changes_neither_outputs_nor_statistics_of_the_network(name: str) -> None:
    run, alone = run_of(name), run_of(name)
    run.loss(images()).backward()
    output = alone.predict(images())
    functional.cross_entropy(output, images()[1]).backward()
    for key, value in alone.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[key], value), key
    assert torch.equal(run.model.eval()(images()[0]), alone.model.eval()(images()[0]))
    assert not any(module._forward_hooks for module in run.model.modules() if isinstance(module, nn.ReLU | nn.BatchNorm2d))


def test_files_hold_nothing_of_it(tmp_path: Path) -> None:
    run = run_of("resnet")
    for _ in run.each_epoch():
        run.before_step()
        run.loss(images()).backward()
        run.optimizer_step()
        run.after_step()
    plain = lowbit.prepare(made("resnet"), method="dorefa", policy="paper", weight_bits=2, activation_bits=2, sample=images()[0])
    plain.load_state_dict(run.model.state_dict())  # strict: the same parameters and buffers
    for name, model in (("auxiliary", run.model), ("plain", plain)):
        lowbit.export(model.eval(), tmp_path / f"{name}.lowbit", sample=images()[0])
    one, other = (load_file(tmp_path / f"{name}.lowbit") for name in ("auxiliary", "plain"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    loaded = lowbit.load(tmp_path / "auxiliary.lowbit")
    with torch.no_grad():
        assert torch.equal(loaded(images()[0]), plain(images()[0]))
    assert b"adaptor" not in (tmp_path / "auxiliary.lowbit").read_bytes()


def test_in_the_float_phase_the_network_computes_what_the_float_one_does() -> None:
    run = run_of("bottleneck", epochs=5, pretrain_share=0.4)
    run.phase_index = 0
    run.start_phase()
    assert torch.equal(run.model.eval()(images()[0]), made("bottleneck").eval()(images()[0]))
    run.phase_index = 1
    run.start_phase()
    levels = {layer: site.layer.weight.unique().numel() for layer, site in insert.quantized_weights(run.model).items()}  # type: ignore[operator]
    assert max(levels[layer] for layer in levels if "conv" in layer) <= 4


def test_both_phases_train_both_and_each_has_a_schedule_of_its_own() -> None:
    recipe = Recipe(10, optimizer=OptimizerSpec(learning_rate=0.1))
    phases = FpAuxiliary().phases(recipe)
    assert [(phase.name, phase.epochs, phase.span) for phase in phases] == [("float", 4, (0.0, 1.0)), ("quantized", 6, (0.0, 1.0))]
    assert all(phase.optimizers[AUXILIARY] == recipe.optimizer and "weights" in phase.optimizers for phase in phases)
    assert [phase.name for phase in FpAuxiliary().phases(Recipe(1))] == ["quantized"]
    assert [phase.name for phase in FpAuxiliary(pretrain_share=0).phases(recipe)] == ["quantized"]
    paper = FpAuxiliary().default_recipe()
    assert [phase.epochs for phase in FpAuxiliary().phases(paper)] == [20, 30]


def test_a_block_adds_what_the_adaptor_gives_to_its_stream() -> None:
    block = AuxiliaryBlock((2, 4), (2, 4)).eval()
    with torch.no_grad():
        block.adaptor[0].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, -1.0]])[..., None])
    stream, feature = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 3]]]), torch.tensor([[[1.0, -2, 0, 0], [1, 1, 1, 1]]])
    assert isinstance(block.resample, nn.Identity)
    scale = 1 / torch.tensor(1 + 1e-5).sqrt()  # of a norm that has seen nothing
    adapted = torch.tensor([[[2.0, -1, 1, 1], [-1, -1, -1, -1]]]) * scale
    torch.testing.assert_close(block(stream, feature), (stream + adapted).relu())


@pytest.mark.parametrize(("before", "shape", "stride", "picked"), [
    ((1, 8), (2, 4), 2, [0, 2, 4, 6]),
    ((1, 7), (1, 4), 2, [0, 2, 4, 6]),
    ((1, 6), (1, 4), 1, [0, 1, 3, 4]),  # nearest: floor(index * 6 / 4)
    ((1, 2), (1, 4), 1, [0, 0, 1, 1]),
])  # fmt: skip
def test_the_stream_takes_the_positions_of_the_feature(before: Any, shape: Any, stride: int, picked: list[int]) -> None:
    block = AuxiliaryBlock(before, shape).eval()
    with torch.no_grad():
        block.adaptor[0].weight.zero_()
        block.resample[0].weight.fill_(1.0)
    assert block.resample[0].stride == (stride,)
    stream = torch.arange(before[1], dtype=torch.float32)[None, None]
    expected = torch.tensor(picked, dtype=torch.float32).expand(1, *shape) / torch.tensor(1 + 1e-5).sqrt()
    torch.testing.assert_close(block(stream, torch.zeros(1, *shape)), expected)


def test_a_stream_of_other_dimensions_is_averaged() -> None:
    block = AuxiliaryBlock((1, 2, 2), (3,)).eval()
    with torch.no_grad():
        block.adaptor[0].weight.zero_()
        block.resample[0].weight.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
    found = block(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]), torch.zeros(1, 3))
    torch.testing.assert_close(found, torch.tensor([[3.0, 6.0, 0.0]]) / torch.tensor(1 + 1e-5).sqrt())


def test_convolutions_start_normal_by_their_fan_out() -> None:
    torch.manual_seed(0)
    weight = pointwise(200, 100, [1, 1])[0].weight.detach()
    assert float(weight.std()) == pytest.approx((2 / 100) ** 0.5, rel=0.02) and abs(float(weight.mean())) < 2e-3


def test_a_network_of_linear_layers_or_of_float64_trains() -> None:
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS**2, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    run = run_of(mlp)
    assert [place.shape for place in run.method.places] == [(8,), (6,)]  # type: ignore[attr-defined]
    run.loss(images()).backward()
    assert insert.float_weight(run.model[3]).grad.abs().sum() > 0  # type: ignore[index, union-attr]
    wide = run_of(made("plain"))
    assert {p.dtype for p in Auxiliary(wide.method.places, 2).double().parameters()} == {torch.float64}  # type: ignore[attr-defined]


def test_other_quantizers_go_through_it() -> None:
    model = lowbit.prepare(made("resnet"), method="pact", procedure="fp_auxiliary", weight_bits=2, activation_bits=2, sample=images()[0])
    run = lowbit.training(model.train(), steps_per_epoch=1, epochs=5)
    assert [phase.name for phase in run.phases] == ["float", "quantized"]
    assert any(isinstance(module, PactActivation) for module in model.modules())
    run = TrainRun(model, model.lowbit_method, Classification(), Recipe(1), 1)  # type: ignore[arg-type]
    run.start_phase()
    (loss,) = run.losses(images())
    penalty = run.penalty()  # PACT's own, beside both losses
    assert bool(penalty > 0)
    own, auxiliary = both_losses(run)
    torch.testing.assert_close(loss, own + auxiliary + penalty)


def test_the_released_range_has_more_levels_than_bits_and_the_papers_has_not() -> None:
    x = torch.linspace(-1, 7, 2001)
    levels = Range6Activation(2)(x).unique()
    torch.testing.assert_close(levels, torch.arange(19) / 3)
    assert Range6Activation(2)(torch.tensor([0.5, 5.9, 6.0, -1.0])).tolist() == pytest.approx([2 / 3, 6.0, 6.0, 0.0])  # 0.5 is 1.5 steps
    assert [type(q) for q in kinds("range6_code")].count(Range6Activation) > 0
    assert not any(isinstance(q, Range6Activation) for q in kinds("paper"))
    noted = [run_of("plain", activation_range=kind).model for kind in ("range6_code", "paper")]
    assert ["more than the k bits" in str(lowbit.summary(model)) for model in noted] == [True, False]
    with pytest.raises(SpecError, match="has 1 to 5 bits, got 6"):
        Range6Activation(6)


def kinds(activation_range: str) -> list[nn.Module]:
    return list(insert.activation_quantizers(run_of("plain", activation_range=activation_range).model).values())


@pytest.mark.parametrize("step", [3, 8, 13])
def test_a_kill_in_either_phase_changes_no_bit_of_network_or_auxiliary_module(step: int, tmp_path: Path) -> None:
    asked = {"method": "fp_auxiliary", "recipe": RECIPE, "save_every": "1", "pretrain_share": 1 / 3}
    whole = train(out=tmp_path / "whole", **asked)
    killed(step, tmp_path / "killed", **asked)
    assert_same(train(out=tmp_path / "killed", **asked), whole)
    one, other = (read_tensors(tmp_path / name / ".work" / "last.safetensors")[0] for name in ("whole", "killed"))
    saved = [name for name in one if name.startswith(f"networks.{AUXILIARY}.")]
    assert any(name.endswith("head.weight") for name in saved)
    assert all(torch.equal(one[name], other[name]) for name in saved)


def test_a_loop_of_ones_own_gives_the_weights_of_the_trainer() -> None:
    x, y = data().tensors
    recipe = Recipe(epochs=4, batch_size=80, optimizer=OptimizerSpec(learning_rate=0.05, momentum=0.9, schedule="constant"))
    whole = train(data=(x, y), method="fp_auxiliary", recipe=recipe, augment="none", sample=x[:16])
    model = lowbit.prepare(conv_network(), method="fp_auxiliary", weight_bits=3, activation_bits=3, sample=x[:16]).train()
    run = lowbit.training(model, steps_per_epoch=1, epochs=4, recipe=recipe)
    optimizer = torch.optim.SGD(run.parameter_groups(), momentum=0.9)
    for _ in range(4):
        run.before_step(optimizer)
        run.loss((x, y)).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name, rtol=1e-4, atol=1e-5)


def wrapped(forward: Any) -> nn.Module:
    """The plain network with another last step."""

    class Wrapped(PlainNet):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return forward(self, super().forward(x))

    return Wrapped()


@pytest.mark.parametrize(("network", "error", "message"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS**2, 8), nn.ReLU(), nn.Linear(8, 4)), SpecError, "has 1 places .* 2 or more are needed"),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(256, 4)), SpecError, "has 0 places"),
    (wrapped(lambda _net, y: (y, y + 1)), SpecError, r"one tensor of shape \[N, outputs\]; for 8 samples it gives \[8, 4\], \[8, 4\]"),
    (wrapped(lambda _net, y: y[:, :, None, None].expand(-1, -1, 2, 2)), SpecError, r"gives \[8, 4, 2, 2\]"),
    (wrapped(lambda _net, y: y if bool(y.sum() > 0) else -y), GraphError, "fp_auxiliary looks for the blocks .* in its dataflow"),
])  # fmt: skip
def test_networks_that_cannot_have_it_are_told_why(network: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lowbit.prepare(network, method="fp_auxiliary", weight_bits=2, activation_bits=2, sample=images()[0])


def test_a_block_that_is_left_out_in_a_step_is_named() -> None:
    class Skipping(PlainNet):
        skips = False

        def forward(self, x: Tensor) -> Tensor:
            x = functional.relu(self.bn1(self.conv1(x)))
            x = x[:, :2].repeat(1, 4, 1, 1) if self.skips else functional.relu(self.bn2(self.conv2(x)))
            logits: Tensor = self.fc(functional.relu(self.conv3(x)).mean((2, 3)))
            return logits

    run = run_of(Skipping())
    run.model.skips = True  # type: ignore[assignment]
    with pytest.raises(LoopError, match="has not run 'bn2' in this step"):
        run.loss(images())


def test_checkpoints_that_keep_no_graph_are_an_error() -> None:
    class Checkpointed(PlainNet):
        reentrant = False

        def forward(self, x: Tensor) -> Tensor:
            run = super().forward
            found: Tensor = checkpoint(run, x.requires_grad_(self.training), use_reentrant=self.reentrant) if self.training else run(x)
            return found

    run = run_of(Checkpointed())
    expected = gradients(run, run.loss(images()))
    assert all(float(gradient.abs().max()) > 0 for gradient in expected.values())
    run.model.reentrant = True  # type: ignore[assignment]
    with pytest.raises(LoopError, match="use_reentrant=False"):
        run.loss(images())


def test_a_place_is_the_sum_of_its_taps_with_channels_in_front_and_pooled() -> None:
    a, b = torch.arange(16.0).reshape(1, 4, 4, 1), torch.ones(1, 4, 4, 1)
    place = Place((Tap("a"), Tap("b")), 3, (1, 2, 2), ("max_pool2d", ([2, 2],)))
    assert place.read({Tap("a"): a, Tap("b"): b}).tolist() == [[[[6.0, 8.0], [14.0, 16.0]]]]
