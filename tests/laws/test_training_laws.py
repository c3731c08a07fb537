"""Laws that every registered training method keeps, on one tiny network."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.errors import LowbitError, SpecError
from lowbit.qat.prepare import prepare
from lowbit.registry import get_method, list_methods
from lowbit.surrogates import SURROGATES
from lowbit.testing import checks, laws, tiny, training
from lowbit.testing.odd import ODD, odd_network

METHODS = [info.name for info in list_methods(kind="training")]
PROCEDURES = [info.name for info in list_methods(kind="training") if info.is_procedure]
OF_DIFFERENT_KIND = ("lsq", "dorefa")  # a learned step, and weights that are squeezed into a range
every_method = pytest.mark.parametrize("name", METHODS)


def with_every_method(argument: str, others: Collection[str]) -> pytest.MarkDecorator:
    """Every method with each of ``others``. Each method with one of them, and each of them with two methods, are not slow."""

    def is_slow(place: int, name: str, index: int) -> bool:
        return name not in OF_DIFFERENT_KIND and place % len(others) != index

    pairs = [
        pytest.param(name, other, marks=pytest.mark.slow if is_slow(place, name, index) else ())
        for place, name in enumerate(METHODS)
        for index, other in enumerate(others)
    ]
    return pytest.mark.parametrize(("name", argument), pairs)


def gradients(model: Callable[[Tensor], Tensor], owner: nn.Module) -> dict[str, Tensor]:
    """Gradients of the parameters of ``owner`` for a loss of ``model``, which is that network or a wrapper of it."""
    images, labels = training.batch(3)
    owner.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad.clone() for name, p in owner.named_parameters() if p.grad is not None}


# 1. Codes say everything


@every_method
def test_decoded_codes_are_the_forward_pass_on_at_most_two_to_the_b_levels(name: str, tmp_path: Path) -> None:
    laws.codes_are_the_forward_pass(name, tmp_path)
    for bits in set(range(1, 9)).difference(get_method(name, "training").weight_bits):
        with pytest.raises(SpecError, match="weight bits"):
            training.prepared(name, bits)


@every_method
def test_layers_compute_with_what_their_quantizer_encodes(name: str) -> None:
    checks.check_baked(training.trained(name))


# 3. The result is an ordinary module


@every_method
def test_copies_pickles_and_state_dicts_compute_the_same(name: str, device: torch.device) -> None:
    checks.check_copies(training.trained(name), training.prepared(name), device)


@every_method
def test_copies_keep_the_order_of_parameters_and_learn_the_same(name: str) -> None:
    model = training.prepared(name).train()
    names = [parameter for parameter, _ in model.named_parameters()]
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # before a pass, which moves running ranges
    expected = gradients(model, model)
    for twin in twins:
        assert [parameter for parameter, _ in twin.named_parameters()] == names
        found = gradients(twin, twin)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@every_method
def test_preparing_leaves_the_given_network_alone(name: str, tmp_path: Path) -> None:
    laws.the_given_network_is_left_alone(name, tmp_path)


# 4. Odd layers and data


@every_method
@pytest.mark.parametrize("case", ODD)
def test_odd_layers_and_data_train_and_stay_finite(name: str, case: str) -> None:
    laws.odd_layer_trains(name, case)


# 5. Lower precision and compilation


@every_method
def test_autocast_to_bfloat16_stays_near_float32(name: str) -> None:
    bits = max(b for b in get_method(name, "training").weight_bits if b <= 8)
    model, images = training.prepared(name, bits), tiny.held_out()[:64]
    expected = tiny.outputs(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tiny.outputs(model, images)
    assert tiny.sqnr_db(expected, got.float()) > 20


@pytest.mark.slow
@every_method
def test_the_compiled_network_computes_the_same(name: str) -> None:
    torch.compiler.reset()
    model, images = training.trained(name), tiny.held_out()[:16]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tiny.outputs(compiled, images), tiny.outputs(model, images), rtol=1e-4, atol=1e-4)


@every_method
def test_a_step_under_autocast_learns_nearly_the_same(name: str) -> None:
    losses = []
    for enabled in (False, True):
        model = training.prepared(name).train()
        run = training.run_of(model)
        run.start_phase()
        run.start_epoch()
        run.before_step()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = run.loss(training.batch(0))
        loss.backward()
        run.after_backward()
        run.optimizer_step()
        run.after_step()
        losses.append(loss.item())
        assert all(p.dtype == torch.float32 and bool(torch.isfinite(p).all()) for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.08)  # processors round sums in bfloat16 differently


@pytest.mark.slow
@every_method
def test_the_compiled_network_learns_the_same(name: str) -> None:
    """Where a method's backward pass has effects the graph is broken there; the gradients are the same all the same."""
    torch.compiler.reset()
    model = training.prepared(name).train()
    twin = copy.deepcopy(model)
    expected = gradients(model, model)
    found = gradients(torch.compile(twin, backend="aot_eager"), twin)
    assert found.keys() == expected.keys()
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6 * size, key


# 6. It learns


@every_method
def test_beats_rounding_to_nearest_by_the_points_it_states(name: str, tmp_path: Path) -> None:
    laws.learns_by_the_points_it_states(name, tmp_path)


@every_method
def test_every_parameter_that_is_trained_gets_a_finite_gradient(name: str) -> None:
    model = training.prepared(name).train()
    run = training.run_of(model)
    run.start_phase()
    run.start_epoch()
    training.one_step(run)  # a method may gather first
    run.before_step()
    run.loss(training.batch(1)).backward()
    run.after_backward()
    resting = {id(p) for quantizer in run.quantizers() if quantizer.is_resting for p in quantizer.parameters()}
    for role, parameter in run.roles():
        if run.phase.key(role, run.turn) == role and id(parameter) not in resting:
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), role


# 7. The file is as small as the arithmetic says


@every_method
def test_packed_bytes_match_the_arithmetic_and_decode_to_the_same_outputs(name: str, tmp_path: Path) -> None:
    laws.the_file_is_small_and_decodes_to_the_same(name, tmp_path)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("case", ["odd_channels", "transposed_grouped"])
def test_a_file_of_odd_layers_with_biases_decodes_to_the_same_outputs(name: str, case: str, tmp_path: Path) -> None:
    model, data = odd_network(case)
    qat = training.ready(name, model.eval(), data).eval()
    lowbit.export(qat, tmp_path / "odd.lowbit", sample=data)
    torch.testing.assert_close(tiny.outputs(lowbit.load(tmp_path / "odd.lowbit"), data), tiny.outputs(qat, data), rtol=1e-5, atol=1e-5)


# 8. The same seed, the same result


@every_method
def test_the_same_seed_gives_the_same_network(name: str, tmp_path: Path) -> None:
    laws.the_same_seed_gives_the_same_network(name, tmp_path)


# Procedures


@with_every_method("procedure", PROCEDURES)
def test_goes_through_any_procedure_or_says_why_not(name: str, procedure: str) -> None:
    weight_bits, activation_bits = training.few_bits(name)
    ask = {"method": name, "weight_bits": weight_bits, "activation_bits": activation_bits, "sample": tiny.calibration()[:16]}
    try:
        model = prepare(tiny.trained(), procedure=procedure, seed=3, **ask)  # type: ignore[arg-type]
    except LowbitError as error:
        assert procedure in str(error)
        return
    before = {key: value.clone() for key, value in tiny.trained().state_dict().items()}
    training.train(model, epochs=4)
    checks.check_untouched(tiny.trained(), before)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert lowbit.get_bits(model)["conv1"].weight == weight_bits
    checks.check_baked(model)


# Surrogates


@with_every_method("surrogate", SURROGATES)
def test_takes_any_surrogate_or_says_that_it_takes_none(name: str, surrogate: str) -> None:
    weight_bits, activation_bits = training.few_bits(name)
    ask = {"method": name, "weight_bits": weight_bits, "activation_bits": activation_bits, "sample": tiny.calibration()[:16]}
    try:
        model = prepare(tiny.trained(), surrogate=surrogate, **ask)  # type: ignore[arg-type]
    except SpecError as error:
        assert "surrogate" in str(error)
        return
    model.train()
    run = training.run_of(model)
    run.start_phase()
    run.start_epoch()
    assert torch.isfinite(training.one_step(run))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
