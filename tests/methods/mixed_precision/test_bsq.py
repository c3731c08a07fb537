from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from tests.qat.recording import BATCHES, network
from tests.qat.training import RECIPE, assert_same, killed, train
from torch import nn

import lowbit
from lowbit.methods.mixed_precision.bsq import BitPlanesWithBias, Bsq, BsqActivation, held_by_planes
from lowbit.network import insert
from lowbit.network.bits import asked_bits
from lowbit.network.record import record_of
from lowbit.qat import Classification, OptimizerSpec, Phase, Recipe, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.quantizers.bit_planes import BitPlanes
from lowbit.testing import tiny

FIRST_STEPS = OptimizerSpec(learning_rate=0.05, weight_decay=0.01, schedule="constant")


def prepared(net: nn.Module | None = None, *, bits: int = 5, activations: int | None = None, **options: object) -> nn.Module:
    policy = lowbit.BitPolicy.uniform(bits, activations, first_last=None)
    return lowbit.prepare(net or network(), method="bsq", policy=policy, sample=BATCHES[0][0], **options).train()


def run_of(model: nn.Module, epochs: int = 4, spec: OptimizerSpec = FIRST_STEPS) -> TrainRun:
    return TrainRun(model, method_of(model), Classification(), Recipe(epochs, optimizer=spec), len(BATCHES))


def epoch(run: TrainRun) -> None:
    for batch in BATCHES:
        run.before_step()
        run.loss(batch).backward()
        run.after_backward()
        run.optimizer_step()
        run.after_step()


def trained(model: nn.Module, epochs: int = 4) -> nn.Module:
    run = run_of(model, epochs)
    for _ in run.each_epoch():
        epoch(run)
    return model.eval()


def quantizers(model: nn.Module) -> list[BitPlanes]:
    return [quantizer for quantizer, _ in held_by_planes(model)]


def total_bits(model: nn.Module) -> int:
    return sum(held.original.numel() * quantizer.found for quantizer, held in held_by_planes(model))


def rates(phases: list[Phase]) -> list[float]:
    return [p.optimizers["weights"].rate_at(p.scheduled((e + 0.5) / p.epochs)) for p in phases for e in range(p.epochs)]


def test_the_papers_phases_adjust_every_hundred_epochs_and_their_rates_go_on() -> None:
    phases = Bsq().phases(Bsq().default_recipe())
    assert [phase.name for phase in phases] == ["planes 1", "planes 2", "planes 3", "planes 4", "finetuning"]
    assert [phase.epochs for phase in phases] == [100, 100, 100, 50, 300]
    expected = [0.1] * 250 + [0.01] * 250 + [1e-3] * 100 + [1e-4] * 50  # finetuning: 0.01, a tenth at its epochs 150 and 250
    assert rates(phases) == pytest.approx(expected)


def test_short_runs_have_planes_first_and_options_say_how_long() -> None:
    def lengths(epochs: int, **options: float) -> list[tuple[str, int]]:
        return [(phase.name, phase.epochs) for phase in Bsq(**options).phases(Recipe(epochs))]  # type: ignore[arg-type]

    assert lengths(1) == [("planes 1", 1), ("finetuning", 0)]
    assert lengths(2) == [("planes 1", 1), ("finetuning", 1)]
    assert lengths(6, finetune_share=0.0, interval=4) == [("planes 1", 4), ("planes 2", 2), ("finetuning", 0)]


def test_weights_become_planes_when_training_begins_and_weights_again_for_finetuning() -> None:
    model = prepared()
    before = [held.original for _, held in held_by_planes(model)]
    assert [q.planes for q in quantizers(model)] == [None] * 3
    run = run_of(model)  # planes 1 and 2, an epoch each, and two of finetuning
    for index in run.each_epoch():
        roles = {role for role, _ in run.roles()}
        held = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
        if index < 2:
            assert all(q.planes is not None and {id(q.planes), id(q.scale)} <= held for q in quantizers(model))
            assert roles == {"weights.planes", "weights.scales", "resting", "others"}
            assert not any(parameter.requires_grad or id(parameter) in held for parameter in before)
        else:
            assert all(q.planes is None for q in quantizers(model)) and "weights" in roles and "resting" not in roles
            assert all(id(h.original) in held and h.original.requires_grad for _, h in held_by_planes(model))
        epoch(run)


def test_after_an_adjustment_optimizers_are_new_and_keep_the_rate() -> None:
    spec = OptimizerSpec(learning_rate=0.1, schedule="linear")
    model = prepared()
    run = run_of(model, 4, spec)
    epochs = run.each_epoch()
    next(epochs)
    old = [q.planes for q in quantizers(model)]
    epoch(run)
    assert all(len(optimizer.state) for optimizer in run.optimizers)
    next(epochs)
    assert all(not optimizer.state for optimizer in run.optimizers)
    assert not any(q.planes is planes for q, planes in zip(quantizers(model), old, strict=True))
    assert run.learning_rate == pytest.approx(0.1 * (1 - 1 / 4))


def test_planes_and_scales_decay_as_weights_do_and_planes_alone_are_clipped() -> None:
    model = prepared(alpha=0.0)
    run = run_of(model)
    next(run.each_epoch())
    before = [(q.planes.detach().clone(), q.scale.item()) for q in quantizers(model)]  # type: ignore[union-attr]
    run.before_step()
    for q in quantizers(model):
        q.planes.grad, q.scale.grad = torch.full_like(q.planes, 4.0), torch.tensor(100.0)  # type: ignore[union-attr, arg-type]
    run.optimizer_step()
    run.after_step()
    for q, (planes, scale) in zip(quantizers(model), before, strict=True):
        torch.testing.assert_close(q.planes.detach(), (planes - 0.05 * (4 + 0.01 * planes)).clamp(0, 2))  # type: ignore[union-attr]
        assert q.scale.item() == pytest.approx(scale - 0.05 * (100 + 0.01 * scale), rel=1e-5)  # below 0


def test_the_loss_weighs_each_layer_by_what_it_takes() -> None:
    for reweigh in (True, False):
        model = prepared(alpha=0.5, reweigh=reweigh)
        run = run_of(model)
        next(run.each_epoch())
        expected, weights = 0.0, 6 * 16 + 16 * 12 + 12 * 3
        for q, held in held_by_planes(model):
            lasso = sum(((q.planes[..., b] ** 2).sum() + 1e-8).sqrt() for b in range(q.count))  # type: ignore[index]
            expected += 0.5 * float(lasso) * (held.original.numel() * q.count / weights if reweigh else 1)
        assert run.penalty().item() == pytest.approx(expected, rel=1e-5)
        assert run.loss(BATCHES[0]).item() == pytest.approx(run.task_loss(BATCHES[0]).item() + expected, rel=1e-5)


def test_a_large_alpha_takes_ever_more_bits_and_none_takes_none() -> None:
    model = prepared(alpha=8.0, interval=1, finetune_share=0.0)
    run, found = run_of(model, 6), []
    for _ in run.each_epoch():
        found.append(total_bits(model))
        epoch(run)
    found.append(total_bits(model))
    assert found == sorted(found, reverse=True) and found[-1] < found[0] / 2
    kept = trained(prepared(alpha=0.0))
    assert [q.found for q in quantizers(kept)] == [4, 4, 4]


def test_large_layers_lose_bits_first_and_without_reweighing_small_ones() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3))
    found = {}
    for reweigh, alpha in ((True, 10.0), (False, 3.0)):
        model = trained(prepared(copy.deepcopy(net), alpha=alpha, reweigh=reweigh, bits=6, interval=1), 8)
        found[reweigh] = [q.found for q in quantizers(model)]  # of layers with 18, 144, 2304 and 144 weights
    first, second, largest, last = found[True]
    assert largest < min(first, second, last)
    first, second, largest, last = found[False]
    assert largest > max(first, second, last) and first < min(second, last)


def lossy() -> nn.Module:
    """A trained network one of whose layers lost all planes, another all but one, and a third none."""
    net = network()
    with torch.no_grad():
        net[0].weight.zero_()
    model = prepared(net, alpha=0.0)
    run, q = run_of(model), quantizers(model)[1]
    for index in run.each_epoch():
        if index == 0:
            with torch.no_grad():
                q.planes[..., :-1] = 0  # type: ignore[index]
        epoch(run)
    return model.eval()


def test_what_was_found_is_what_everything_says() -> None:
    model = lossy()
    expected = {"0": 2, "2": 2, "4": 5}
    assert {name: bits.weight for name, bits in lowbit.get_bits(model).items()} == expected
    assert {name: bits.weight for name, bits in asked_bits(model).items()} == expected
    assert {layer.name: layer.weight_bits for layer in lowbit.summary(model).layers} == expected
    record = record_of(model)
    assert record is not None
    assert {row.name: row.weight_bits for row in record.table} == expected
    assert record.measured["planes"] == {"0": 0, "2": 1, "4": 4}
    assert [row.name for row in record.table if "lost all of its planes" in row.reason] == ["0"]
    assert f"planes found: {(192 + 36 * 4) / 324:.2f} for each weight" in " ".join(record.table.notes)
    assert record.policy.default.weight == 5 and [rule.weight for rule in record.policy.rules] == [2, 2]
    assert lowbit.BitPolicy.from_dict(record.policy.to_dict()) == record.policy


def test_planes_are_gone_in_the_end_and_codes_are_the_weights(tmp_path: Path) -> None:
    model = lossy()
    for name, site in insert.quantized_weights(model).items():
        assert site.quantizer is not None
        encoded, layer = site.quantizer.encode(site.original), model.get_submodule(name)
        assert torch.equal(encoded.decode(), layer.weight) and encoded.bit_width == site.quantizer.bit_width
        assert encoded.codes.abs().max() < 2 ** (encoded.bit_width - 1)
    assert not [name for name, _ in model.named_parameters() if "planes" in name]
    assert not model[0].weight.any()
    sample = BATCHES[0][0]
    lowbit.export(model, tmp_path / "net.lowbit", sample=sample)
    loaded = lowbit.load(tmp_path / "net.lowbit")
    torch.testing.assert_close(loaded(sample), model(sample))
    assert {name: bits.weight for name, bits in lowbit.get_bits(loaded).items()} == {"0": 2, "2": 2, "4": 5}


def test_the_float_network_is_behind_the_quantizers_before_and_after() -> None:
    float_model, model = network(), prepared()
    x = BATCHES[0][0]
    lowbit.set_bits(model, None)
    assert torch.equal(model(x), float_model(x))
    model = trained(prepared())
    quantized = model(x)
    lowbit.set_bits(model, None)
    assert float((model(x) - quantized).norm() / quantized.norm()) < 0.2


def test_the_bits_asked_for_are_the_most_unless_more_planes_are_allowed() -> None:
    def grown(**options: object) -> list[int]:
        model = prepared(bits=3, alpha=0.0, **options)
        run = run_of(model)
        next(run.each_epoch())
        with torch.no_grad():
            for q in quantizers(model):
                q.planes[0].fill_(2)  # type: ignore[index]
                q.planes[1].fill_(0)  # type: ignore[index]
        run.phase_index = 1
        run.start_phase()
        return [q.count for q in quantizers(model)]

    assert grown() == [2, 2, 2] and grown(max_planes=8) == [2, 2, 2]  # 6 has planes of 4 and 2, and that of 1 is empty
    model = prepared(bits=3, alpha=0.0, max_planes=8)
    next(run_of(model).each_epoch())
    q = quantizers(model)[0]
    assert q.most == 8
    with torch.no_grad():
        q.planes.zero_()  # type: ignore[union-attr]
        q.planes[0, 0, 0] = torch.tensor([2.0, 1.0])  # type: ignore[index]
    q.adjust()
    assert (q.count, q.bit_width) == (3, 4)


def test_a_frozen_layer_keeps_its_weights_and_its_bits() -> None:
    net = network()
    net[2].weight.requires_grad_(False)
    model = trained(prepared(net, alpha=50.0))
    assert torch.equal(insert.float_weight(model[2]), net[2].weight)  # type: ignore[arg-type]
    q = insert.weight_quantizer(model[2])  # type: ignore[arg-type]
    assert isinstance(q, BitPlanes) and q.scale.item() == float(net[2].weight.detach().abs().max())
    assert q.bit_width == 5 and quantizers(model)[0].bit_width < 5


def test_layers_that_share_a_weight_share_its_planes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net[2].weight = net[0].weight
    model = prepared(net, alpha=1.0)
    assert insert.weight_quantizer(model[0]) is insert.weight_quantizer(model[2])  # type: ignore[arg-type]
    model = trained(model)
    assert insert.float_weight(model[0]) is insert.float_weight(model[2])  # type: ignore[arg-type]
    assert torch.equal(model[0].weight, model[2].weight)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(BATCHES[0][0]), model(BATCHES[0][0]))


def test_biases_go_through_planes_where_that_is_asked_for(tmp_path: Path) -> None:
    model = prepared(alpha=0.5, quantize_biases=True)
    assert all(isinstance(insert.weight_quantizer(model[i]), BitPlanesWithBias) for i in (0, 2, 4))  # type: ignore[arg-type]
    run = run_of(model)
    for _ in run.each_epoch():
        epoch(run)
    model.eval()
    for index in (0, 2, 4):
        q, bias = insert.weight_quantizer(model[index]), insert.float_bias(model[index])  # type: ignore[arg-type]
        assert isinstance(q, BitPlanesWithBias) and q.bias.planes is None and bias is not None
        assert torch.equal(q.bias.encode(bias).decode(), model[index].bias)
        assert not torch.equal(bias, network()[index].bias)
    x = BATCHES[0][0]
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    lowbit.export(model, tmp_path / "net.lowbit", sample=x)
    torch.testing.assert_close(lowbit.load(tmp_path / "net.lowbit")(x), model(x))


def test_activations_of_four_bits_are_clipped_at_six_and_reach_to_the_largest_of_the_batch() -> None:
    quantizer = BsqActivation(4, learns_clip=False).train()
    x = torch.tensor([-1.0, 0.0, 0.9, 3.0, 1.26], requires_grad=True)  # steps of 3 / 15
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.8, 3.0, 1.2]), rtol=1e-6, atol=1e-6)  # 4.5 steps, a tie, and 6.3
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert quantizer(torch.tensor([7.0, 6.0, 0.1])).tolist() == pytest.approx([6.0, 6.0, 0.0])
    assert quantizer(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert list(quantizer.parameters()) == []


def test_activations_of_fewer_bits_learn_their_clip() -> None:
    quantizer = BsqActivation(2, learns_clip=True).train()
    assert isinstance(quantizer.clip, nn.Parameter) and quantizer.clip.item() == 10.0
    quantizer.clip.data.fill_(3.0)
    x = torch.tensor([-1.0, 1.2, 3.0, 5.0], requires_grad=True)
    y = quantizer(x)
    y.backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert y.tolist() == [0.0, 1.0, 3.0, 3.0]
    assert x.grad is not None and x.grad.tolist() == [0.0, 2.0, 4.0, 0.0]
    assert quantizer.clip.grad is not None and quantizer.clip.grad.item() == 12.0
    assert not quantizer(torch.tensor([1.0, 2.0])).requires_grad or quantizer.largest.item() == 2.0
    model = prepared(activations=3)
    assert {q.learns_clip for q in model.modules() if isinstance(q, BsqActivation)} == {True}
    model = prepared(activations=4)
    assert {q.learns_clip for q in model.modules() if isinstance(q, BsqActivation)} == {False}


def test_evaluation_has_a_mean_of_the_ranges_or_that_of_its_batch() -> None:
    quantizer = BsqActivation(4, learns_clip=False).train()
    quantizer.initialize(torch.tensor([2.0]))
    quantizer(torch.tensor([4.0]))
    assert quantizer.running.item() == pytest.approx(0.9 * 2 + 0.1 * 4)
    quantizer.eval()
    assert quantizer(torch.tensor([5.0, 0.11])).tolist() == pytest.approx([2.2, 2.2 / 15])
    batch = BsqActivation(4, learns_clip=False, is_dynamic=True).eval()
    assert batch(torch.tensor([5.0, 0.2])).tolist() == pytest.approx([5.0, 5.0 / 15])
    model = prepared(activations=4, inference_range="batch")
    assert {q.is_dynamic for q in model.modules() if isinstance(q, BsqActivation)} == {True}


@pytest.mark.parametrize(("step", "average"), [(3, None), (7, None), (12, 0.7), (18, None)])
def test_a_kill_in_any_phase_changes_no_bit(step: int, average: float | None, tmp_path: Path) -> None:
    recipe = lowbit.Recipe(4, 16, RECIPE.optimizer, average_weights=average)  # of five steps: planes 1 and 2, then finetuning
    settings = {"method": "bsq", "recipe": recipe, "weight_bits": 6, "activation_bits": 4, "alpha": 3.0}
    whole = train(**settings)
    killed(step, tmp_path, save_every="2", **settings)
    again = train(out=tmp_path, save_every="2", **settings)
    assert_same(again, whole)
    assert lowbit.get_bits(again) == lowbit.get_bits(whole) and any(q.bit_width < 6 for q in quantizers(whole))
    first, second = record_of(again), record_of(whole)
    assert first is not None and second is not None
    assert (first.policy, first.measured, list(first.table)) == (second.policy, second.measured, list(second.table))


def test_averages_of_weights_start_anew_where_planes_ended() -> None:
    recipe = lowbit.Recipe(2, 16, OptimizerSpec(learning_rate=0.0), average_weights=0.9)
    settings = {"method": "bsq", "weight_bits": 6, "activation_bits": None, "policy": lowbit.BitPolicy.uniform(6, None, first_last=None)}
    averaged, plain = train(recipe=recipe, **settings), train(recipe=lowbit.Recipe(2, 16, recipe.optimizer), **settings)
    for one, other in zip(insert.quantized_weights(averaged).values(), insert.quantized_weights(plain).values(), strict=True):
        torch.testing.assert_close(one.original, other.original)


def test_a_user_of_several_widths_or_procedures_hears_why_not() -> None:
    with pytest.raises(lowbit.errors.SpecError, match="need its own phases and cannot go through 'qkd'"):
        lowbit.prepare(tiny.trained(), method="bsq", procedure="qkd", sample=tiny.calibration()[:8])


def test_another_method_trains_with_the_policy_that_was_found(tmp_path: Path) -> None:
    common = {"packed": False, "onnx": False, "device": "cpu", "tensorboard": False, "activation_bits": 4}
    request = lowbit.TrainRequest(method="bsq", weight_bits=8, out=tmp_path / "found", options={"alpha": 20.0}, **common)
    found = lowbit.train_and_deliver(request.changed({"epochs": 3}))
    assert found is not None
    content = json.loads((tmp_path / "found" / "report.json").read_text())
    bits = {layer["name"]: layer["weight_bits"] for layer in content["layers"]}
    assert len(set(bits.values())) > 2
    planes = content["training"]["measured"]["planes"]
    assert all(bits[name] == max(count, 1) + 1 for name, count in planes.items())
    request = lowbit.TrainRequest(
        method="lsq", policy=tmp_path / "found" / "policy.yaml", out=tmp_path / "lsq", **{**common, "activation_bits": None}
    )
    lowbit.train_and_deliver(request.changed({"epochs": 1}))
    content = json.loads((tmp_path / "lsq" / "report.json").read_text())
    assert {layer["name"]: layer["weight_bits"] for layer in content["layers"]} == bits
