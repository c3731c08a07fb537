"""PAMS: numbers worked out by hand, and what its card says to check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.super_resolution.pams import Pams, PamsActivation, PamsWeight, attention_map, find_feature, transfer_loss
from lowbit.models.edsr import Edsr
from lowbit.network import insert
from lowbit.qat import CriterionTask, GivenNetworks, OptimizerSpec, Recipe, TrainRun
from lowbit.quantizers import Quantizer
from lowbit.spec import BitPolicy, LayerBits


def picture(samples: int = 2, side: int = 6) -> Tensor:
    return 255 * torch.rand(samples, 3, side, side, generator=torch.Generator().manual_seed(3))


def network(blocks: int = 2) -> Edsr:
    torch.manual_seed(0)
    return Edsr(2, blocks, 4)


def policy(bits: int, merges: int | None = None) -> BitPolicy:
    return BitPolicy(LayerBits(bits, bits), None).with_merges(merges)


def test_weights_take_even_steps_up_to_their_largest_magnitude() -> None:
    w = torch.tensor([-1.2, -0.5, 0.0, 0.1, 0.55], requires_grad=True)
    y = PamsWeight(3)(w)  # q = 3: steps of 0.4
    torch.testing.assert_close(y, torch.tensor([-1.2, -0.4, 0.0, 0.0, 0.4]))
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert torch.equal(w.grad, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_idempotent_and_follow_their_scale(bits: int) -> None:
    w = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    y = PamsWeight(bits)(w)
    torch.testing.assert_close(PamsWeight(bits)(y), y)
    torch.testing.assert_close(PamsWeight(bits)(3 * w), 3 * y)
    assert y.unique().numel() <= 2**bits - 1


def learned(clip: float, bits: int = 3) -> PamsActivation:
    quantizer = PamsActivation(bits, statistic_epochs=0)
    quantizer.clip.data.fill_(clip)
    return quantizer


def test_clipped_values_give_their_gradient_to_the_clip_with_their_sign() -> None:
    quantizer = learned(1.5)  # steps of 0.5
    x = torch.tensor([-4.0, 0.6, 2.0, 3.0], requires_grad=True)
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([-1.5, 0.5, 1.5, 1.5]))
    y.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert x.grad.tolist() == [0.0, 10.0, 0.0, 0.0]  # type: ignore[union-attr]
    # -1 + 100 + 1000, and inside 10 (y - x) / clip
    assert quantizer.clip.grad.item() == pytest.approx(1099 + 10 * (0.5 - 0.6) / 1.5)  # type: ignore[union-attr]


def test_values_on_the_grid_give_the_clip_no_gradient() -> None:
    quantizer = learned(1.5)
    quantizer(torch.tensor([-0.5, 0.0, 1.0])).sum().backward()
    assert quantizer.clip.grad.abs().item() < 1e-6  # type: ignore[union-attr]


def test_levels_are_symmetric_and_one_less_than_a_power_of_two() -> None:
    levels = learned(2.0, 2).eval()(torch.linspace(-9, 9, 1001)).unique()
    assert levels.tolist() == [-2.0, 0.0, 2.0]


def test_one_bit_is_refused() -> None:
    with pytest.raises(SpecError, match="2 bits or more"):
        PamsWeight(1)
    with pytest.raises(SpecError, match="2 bits or more"):
        PamsActivation(1)


def test_in_the_first_epoch_the_clip_is_that_of_the_last_batch_and_nothing_is_clipped() -> None:
    quantizer = PamsActivation(3)
    quantizer(torch.tensor([[8.0, 1.0], [4.0, -4.0]]))
    y = quantizer(torch.tensor([[2.0, -1.0], [0.5, 1.0]]))  # mean of 2 and 1
    assert quantizer.clip.item() == 1.5
    assert y.tolist() == [[2.0, -1.0], [0.5, 1.0]]
    quantizer.epoch = 2
    assert quantizer(torch.tensor([[2.0]])).item() == 1.5
    assert quantizer.clip.item() == 1.5


def test_later_epochs_of_statistics_average() -> None:
    quantizer = PamsActivation(3, statistic_epochs=2, decay=0.75)
    quantizer(torch.tensor([[4.0]]))
    quantizer.epoch = 2
    quantizer(torch.tensor([[8.0]]))
    assert quantizer.clip.item() == 5.0


def test_attention_is_blind_to_the_scale_and_the_order_of_channels() -> None:
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    assert transfer_loss(features, 7 * features).item() < 1e-12
    assert torch.equal(attention_map(features[:, [2, 0, 1]]).round(decimals=5), attention_map(features).round(decimals=5))
    torch.testing.assert_close(attention_map(features).norm(dim=1), torch.ones(2))


def test_features_at_other_positions_are_an_error() -> None:
    with pytest.raises(SpecError, match="same positions"):
        transfer_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4))


def test_compared_is_what_the_upsampler_reads_or_the_last_convolution() -> None:
    from lowbit.inputs import Inputs

    model = network()
    assert find_feature(model, Inputs.of(picture(), model)) == "tail.0.0"
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    assert find_feature(plain, Inputs.of(picture(), plain)) == "2"


def sites(**options: object) -> set[str]:
    model = lowbit.prepare(network(1), method="pams", policy=policy(4, 4), sample=picture(), blocks_only=True, **options)
    return set(insert.sites(model))


def test_a_block_and_its_shortcut_read_one_quantized_tensor_or_as_the_authors_have_it() -> None:
    assert sites() == {"head.0.output", "body.0.body.1.output", "body.0.body.2.output"}
    assert sites(block_input="float") == {"body.0.sum.left.output", "body.0.body.2.input", "body.0.sum.right.output"}


def test_outside_of_blocks_everything_stays_float_on_request() -> None:
    model = lowbit.prepare(network(), method="pams", policy=policy(4), sample=picture(), blocks_only=True)
    assert list(insert.quantized_weights(model)) == ["body.0.body.0", "body.0.body.2", "body.1.body.0", "body.1.body.2"]
    with pytest.raises(SpecError, match="no residual blocks"):
        lowbit.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), method="pams", sample=picture(), blocks_only=True)


def test_shortcuts_alone_need_bits_for_sums_and_sums_that_are_modules() -> None:
    with pytest.raises(SpecError, match="merge_bits"):
        lowbit.prepare(network(), method="pams", policy=policy(4), sample=picture(), block_input="float")
    with pytest.raises(SpecError, match="class Sum"):
        lowbit.prepare(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), method="pams", policy=policy(4, 4), sample=picture(), block_input="float"
        )


def test_clips_have_a_hundred_times_the_learning_rate_and_adam() -> None:
    adam = Pams().optimizers(Recipe(optimizer=OptimizerSpec("adam", 1e-4)))
    assert adam["quantizers"].learning_rate == pytest.approx(1e-2)
    sgd = Pams().optimizers(Recipe(optimizer=OptimizerSpec("sgd", 0.02)))
    assert (sgd["quantizers"].kind, sgd["quantizers"].learning_rate) == ("adam", 0.02)


def run_of(model: nn.Module, teacher: nn.Module | None = None) -> TrainRun:
    recipe = Recipe(2, optimizer=OptimizerSpec("adam", 1e-4, weight_decay=0.0))
    task = CriterionTask(nn.functional.l1_loss)
    return TrainRun(model, model.lowbit_method, task, recipe, 1, given=GivenNetworks(teacher, network()))  # type: ignore[arg-type]


def test_the_loss_is_the_tasks_and_the_distance_of_attention() -> None:
    model = lowbit.prepare(network(), method="pams", policy=policy(2), sample=picture()).train()
    run, batch = run_of(model), (picture(), picture(side=12))
    run.start_phase()
    run.start_epoch()
    with_transfer = run.loss(batch).item()
    model.lowbit_method.tap = None
    assert with_transfer > run.loss(batch).item()


def test_a_teacher_without_the_feature_is_refused() -> None:
    model = lowbit.prepare(network(), method="pams", policy=policy(4), sample=picture())
    with pytest.raises(SpecError, match="no such module"):
        run_of(model, nn.Conv2d(3, 3, 3))


def test_the_epoch_reaches_every_clip() -> None:
    model = lowbit.prepare(network(), method="pams", policy=policy(4), sample=picture()).train()
    run = run_of(model)
    seen = []
    for _ in run.each_epoch():
        seen.append({quantizer.epoch for quantizer in run.quantizers() if isinstance(quantizer, PamsActivation)})
    assert seen == [{1}, {2}]


def test_layers_outside_of_super_resolution_networks_are_trained_too() -> None:
    model = lowbit.prepare(nn.Linear(4, 2), method="pams", policy=policy(4), sample=torch.randn(8, 4))
    assert isinstance(insert.input_quantizer(model), Quantizer)
    assert model.lowbit_method.tap is None


def test_learned_steps_at_the_ends_do_not_have_the_learning_rate_of_clips() -> None:
    method = Pams()
    prepared = lowbit.prepare(network(), method=method, policy=BitPolicy.uniform(4, 4), sample=picture())
    found = {role: [] for role in ("quantizers", "quantizers.steps")}  # type: ignore[var-annotated]
    for path, module in prepared.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.get(method.role(f"{path}.{name}", parameter, module), []).append(name)
    assert set(found["quantizers"]) == {"clip"} and found["quantizers.steps"] and "clip" not in found["quantizers.steps"]
    assert method.optimizers(Recipe(optimizer=OptimizerSpec("adam", 1e-4)))["quantizers.steps"].learning_rate == 1e-4
