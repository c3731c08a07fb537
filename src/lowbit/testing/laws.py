"""Each law as a function of a method and a folder to write in; AssertionError where it is broken.

A method is given by its name, as ``path/to/file.py:Class``, or as a class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from pathlib import Path

import torch

from lowbit.network.insert import activation_quantizers, bake_weights
from lowbit.network.layers import NORMS
from lowbit.options import Method
from lowbit.registry import MethodInfo
from lowbit.testing import checks, hooks, post_training, tiny, training
from lowbit.testing.checks import MethodRef
from lowbit.testing.odd import ODD, SEQUENCE, odd_network
from lowbit.workflows.quantize import quantize

Law = Callable[[MethodRef, Path], None]
_held: set[Hashable] = set()  # quantizers that were found to keep their laws in this process


def quantizers_keep_their_laws(method: Method) -> None:
    """Every quantizer that the hooks of ``method`` make, at every bit-width and for every kind of layer, keeps the laws of a quantizer alone."""
    for example in hooks.new_examples(method, _held):
        slot = example.slot
        where = f"{slot} at {slot.bit_width} bits, {slot.purpose}"
        checks.check_alone(where, example.ready(), example.values, is_weight=slot.purpose == "weight")


def two_widths(supported: range) -> list[int]:
    """The lowest width and 4, or what is nearest to it: those at which whole networks are held to the laws."""
    return sorted({supported[0], min(supported, key=lambda bits: abs(bits - 4))})


def default_of(info: MethodInfo) -> Method:
    """The method at its defaults."""
    assert info.method is not None
    method = info.method()
    assert isinstance(method, Method)
    return method


def codes_are_the_forward_pass(method: MethodRef, folder: Path) -> None:
    """Decoded codes equal the forward pass, on at most ``2**b`` levels: each quantizer at all bits, networks at two widths and after training."""
    info = training.facts(method)
    quantizers_keep_their_laws(default_of(info))
    for bits in two_widths(info.weight_bits):
        activation_bits = bits if info.activation_bits is not None and bits in info.activation_bits else None
        checks.check_codes(training.prepared(method, bits, activation_bits), bits)
    checks.check_codes(training.trained(method), training.few_bits(method)[0])


def layers_compute_with_their_codes(method: MethodRef, folder: Path) -> None:
    """A trained network computes the same with its decoded codes as plain weights."""
    checks.check_baked(training.trained(method))


def copies_compute_the_same(method: MethodRef, folder: Path) -> None:
    """Copies, pickles and state dicts of a trained network compute the same."""
    checks.check_copies(training.trained(method), training.prepared(method), torch.device("cpu"))


def the_given_network_is_left_alone(method: MethodRef, folder: Path) -> None:
    """Preparing changes a copy."""
    before = {key: value.clone() for key, value in tiny.trained().state_dict().items()}
    training.prepared(method)
    checks.check_untouched(tiny.trained(), before)


def odd_layer_trains(method: MethodRef, case: str) -> None:
    """Two steps on the odd network ``case`` stay finite, and codes equal the forward pass."""
    model, data = odd_network(case)
    qat = training.ready(method, model, data).train()
    run = training.run_of(qat, epochs=1, float_network=model)
    run.start_phase()
    run.start_epoch()
    for _ in range(2):
        run.before_step()
        loss = run.loss((data, torch.zeros(len(data), dtype=torch.int64)))
        assert torch.isfinite(loss)
        loss.backward()
        run.after_backward()
        run.optimizer_step()
        run.after_step()
    assert all(bool(torch.isfinite(p).all()) for p in qat.parameters())
    assert torch.isfinite(tiny.outputs(qat.eval(), data)).all()
    for where, quantizer, values in checks.grids(qat):
        with torch.no_grad():
            assert torch.equal(quantizer.encode(values).decode(), quantizer(values)), where
    baked, _ = bake_weights(qat)
    rounding = 1e-6 if case == SEQUENCE else 0.0  # kernels of LSTMs and attention round by where their operands lie in memory
    torch.testing.assert_close(tiny.outputs(baked, data), tiny.outputs(qat, data), rtol=0.0, atol=rounding)


def odd_layers_train(method: MethodRef, folder: Path) -> None:
    """Depthwise, grouped, dilated, transposed, one- and three-dimensional layers, zeros, embeddings, attention, LSTMs and the like."""
    for case in ODD:
        odd_layer_trains(method, case)


def the_file_is_small_and_decodes_to_the_same(method: MethodRef, folder: Path) -> None:
    """The packed file holds codes and tables and hardly more, and computes what the trained network does."""
    model = training.trained(method)
    state = sum(t.numel() * 4 for key, t in model.state_dict().items() if "weight" not in key or "bn" in key)
    tables = sum(4 * (2**q.bit_width * 2 + 8) for q in activation_quantizers(model).values())
    checks.check_packed(model, folder / "tiny.lowbit", rest=state + tables)


def the_same_seed_gives_the_same_network(method: MethodRef, folder: Path) -> None:
    """Two runs of the same seed end with the same bits."""
    first, second = (training.train(training.prepared(method), epochs=1).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def learns_by_the_points_it_states(method: MethodRef, folder: Path) -> None:
    """After a short run it classifies by ``margin_points`` better than rounding the float weights to the same bits."""
    weight_bits, activation_bits = training.few_bits(method)
    plain = quantize(
        tiny.trained(),
        method="round_to_nearest",
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        calibration=tiny.calibration(),
    )
    gain = training.accuracy(training.trained(method)) - training.accuracy(plain)
    stated = training.facts(method).margin_points
    assert gain >= stated > 0, f"{method} gains {gain:.1f} points over rounding to nearest; margin_points is {stated}"


def rounded_codes_are_the_forward_pass(method: MethodRef, folder: Path) -> None:
    """Decoded codes equal the forward pass, on at most ``2**b`` levels: each quantizer at all bits, networks at two widths."""
    info = post_training.facts(method)
    quantizers_keep_their_laws(default_of(info))
    for bits in two_widths(info.weight_bits):
        checks.check_codes(post_training.quantized(method, bits), bits)


def rounded_layers_compute_with_their_codes(method: MethodRef, folder: Path) -> None:
    """A quantized network computes the same with its decoded codes as plain weights."""
    checks.check_baked(post_training.quantized(method))


def rounded_copies_compute_the_same(method: MethodRef, folder: Path, device: str | torch.device = "cpu") -> None:
    """Copies, pickles, state dicts and moves of a quantized network compute the same."""
    model = post_training.quantized(method)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.7)
    checks.check_copies(model, other, torch.device(device))


def rounding_leaves_the_given_network_alone(method: MethodRef, folder: Path) -> None:
    """Quantizing changes a copy."""
    before = {key: value.clone() for key, value in tiny.trained().state_dict().items()}
    post_training.quantized(method)
    checks.check_untouched(tiny.trained(), before)


def odd_layer_is_right(method: MethodRef, case: str) -> None:
    """At 8 bits the odd network ``case`` computes nearly what the float one does."""
    model, data = odd_network(case)
    result = post_training.quantize(method, model.eval(), data, weight_bits=8, iterations=5)
    expected, got = tiny.outputs(model, data), tiny.outputs(result, data)
    assert torch.isfinite(got).all()
    error = float((expected - got).norm() / (expected.norm()))
    assert error < 0.08, f"{case}: relative error {error:.3f} at 8 bits"


def odd_layers_are_right(method: MethodRef, folder: Path) -> None:
    """Depthwise, grouped, dilated, transposed, one- and three-dimensional layers, zeros, embeddings, attention, LSTMs and the like."""
    for case in ODD:
        odd_layer_is_right(method, case)


def rounded_file_is_small(method: MethodRef, bits: int, folder: Path) -> None:
    """At ``bits`` the packed file holds codes and tables and hardly more, and computes what the quantized network does."""
    model = post_training.quantized(method, bits)
    norms = [norm for norm in model.modules() if isinstance(norm, NORMS)]  # those that the method does not fold
    plain = [
        *(p for key, p in model.named_parameters() if key.endswith("bias")),
        *(t for norm in norms for t in norm.state_dict().values()),
    ]
    tables = [t for q in activation_quantizers(model).values() for t in q.state_dict().values()]
    checks.check_packed(model, folder / "tiny.lowbit", rest=sum(4 * t.numel() for t in (*plain, *tables)))


def rounded_files_are_small_and_decode_to_the_same(method: MethodRef, folder: Path) -> None:
    """The packed file holds codes and tables and hardly more, at two widths."""
    for bits in two_widths(post_training.facts(method).weight_bits):
        rounded_file_is_small(method, bits, folder)


def the_same_seed_gives_the_same_codes(method: MethodRef, folder: Path) -> None:
    """The same seed gives the same bits, whatever the global random state, which is left alone."""
    data = tiny.calibration()
    torch.manual_seed(11)
    first = post_training.quantize(method, tiny.trained(), data, weight_bits=4)
    after_first = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), after_first)
    torch.manual_seed(12)
    second = post_training.quantize(method, tiny.trained(), data, weight_bits=4)
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def beats_rounding_by_the_margin_it_states(method: MethodRef, folder: Path) -> None:
    """At 3 bits of weights the logits are by ``margin_db`` nearer to the float ones than with rounding to nearest."""
    info = post_training.facts(method)
    model, data, images = tiny.trained(), tiny.calibration(), tiny.held_out()
    expected = tiny.outputs(model, images)
    plain = quantize(
        model,
        method="round_to_nearest",
        weight_bits=3,
        activation_bits=8,
        calibration=data,
        weight_granularity=getattr(info.method, "weight_granularity", "per_channel"),
    )
    result = post_training.quantize(method, model, data, weight_bits=3, iterations=600, seed=0)
    gain = tiny.sqnr_db(expected, tiny.outputs(result, images)) - tiny.sqnr_db(expected, tiny.outputs(plain, images))
    assert gain >= info.margin_db, f"{method} gains {gain:.2f} dB over rounding to nearest; margin_db is {info.margin_db}"


TRAINING_LAWS: tuple[Law, ...] = (
    codes_are_the_forward_pass,
    layers_compute_with_their_codes,
    copies_compute_the_same,
    the_given_network_is_left_alone,
    odd_layers_train,
    the_file_is_small_and_decodes_to_the_same,
    the_same_seed_gives_the_same_network,
    learns_by_the_points_it_states,
)
POST_TRAINING_LAWS: tuple[Law, ...] = (
    rounded_codes_are_the_forward_pass,
    rounded_layers_compute_with_their_codes,
    rounded_copies_compute_the_same,
    rounding_leaves_the_given_network_alone,
    odd_layers_are_right,
    rounded_files_are_small_and_decode_to_the_same,
    the_same_seed_gives_the_same_codes,
    beats_rounding_by_the_margin_it_states,
)
