from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.runtime.binary_cases import any_activation, any_convolution, signs
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.runtime.layers import prepared
from lowbit.runtime.layers.binary import (
    binary_conv2d,
    binary_conv2d_reference,
    binary_linear,
    binary_linear_reference,
    compiled_loops,
    pack_conv_weight,
)

needs_kernels = pytest.mark.skipif(compiled_loops() is None, reason="there are no compiled kernels here")


@needs_kernels
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_kernel_gives_the_integers_of_the_reference_for_any_shape(data: st.DataObject) -> None:
    arguments = any_convolution(data)
    activation = any_activation(data, arguments[1].shape[0])
    got = binary_conv2d(*arguments, activation=activation)
    assert torch.equal(got, binary_conv2d_reference(*arguments, activation=activation))
    assert got.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_packed_signs_of_outputs_are_those_of_the_numbers_and_the_next_layer_takes_them(data: st.DataObject) -> None:
    arguments = any_convolution(data)
    out, generator = arguments[1].shape[0], torch.Generator().manual_seed(0)
    limits = {"out_threshold": 3 * torch.randn(out, generator=generator).round()}
    if data.draw(st.booleans()):
        limits["out_flip"] = torch.rand(out, generator=generator) > 0.5
    residual = torch.randn(binary_conv2d(*arguments).shape, generator=generator) if data.draw(st.booleans()) else None
    more = {"activation": any_activation(data, out), "residual": residual}
    found = binary_conv2d(*arguments, **more, **limits)
    assert torch.equal(found, binary_conv2d_reference(*arguments, **more, **limits))
    numbers = binary_conv2d(*arguments, **more)
    weight = signs((5, out, 3, 2), generator)
    rest = (*pack_conv_weight(weight), torch.ones(5), None, out, [3, 2], [2, 1], [2, 1], [1, 1], 1, data.draw(st.sampled_from([-1, 0, 1])))
    expected = binary_conv2d_reference(numbers, *rest, limits["out_threshold"], limits.get("out_flip"))
    assert torch.equal(binary_conv2d(found, *rest), expected)
    assert torch.equal(binary_conv2d_reference(found, *rest), expected)


@needs_kernels
def test_packed_signs_go_into_groups_of_whole_words() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, next_weight = torch.randn(2, 40, 6, 6), signs((64, 40, 3, 3), generator), signs((8, 32, 3, 3), generator)
    window = ([3, 3], [1, 1], [1, 1], [1, 1])
    first = (x, *pack_conv_weight(weight), torch.ones(64), None, 40, *window, 1)
    second = (*pack_conv_weight(next_weight, 2), torch.ones(8), None, 64, *window, 2)
    packed = binary_conv2d(*first, out_threshold=torch.zeros(64))
    assert torch.equal(binary_conv2d(packed, *second), binary_conv2d_reference(binary_conv2d(*first), *second))
    third = (*pack_conv_weight(signs((8, 16, 3, 3), generator), 4), torch.ones(8), None, 64, *window, 4)
    with pytest.raises(SpecError, match="whole words for each group"):
        binary_conv2d(packed, *third)
    with pytest.raises(SpecError, match="have no threshold"):
        binary_conv2d(packed, *second, threshold=torch.zeros(64))


@pytest.mark.parametrize("is_reference", [True, pytest.param(False, marks=needs_kernels)])
@pytest.mark.parametrize("pad_value", [-1, 0, 1])
def test_it_is_the_convolution_of_signs_with_scale_bias_residual_and_input_scale(is_reference: bool, pad_value: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 36, 7, 6, generator=generator), signs((10, 18, 3, 3), generator, has_zero=True)
    scale, bias, residual = (torch.randn(*shape, generator=generator) for shape in ((10,), (10,), (2, 10, 4, 3)))
    threshold, flip = torch.randn(36, generator=generator), torch.arange(36) % 3 == 0
    function = binary_conv2d_reference if is_reference else binary_conv2d
    got = function(
        x, *pack_conv_weight(weight, 2), scale, bias, 36, [3, 3], [2, 2], [1, 1], [1, 1], 2, pad_value, threshold, flip, residual, True
    )
    binary = torch.where(x >= threshold[:, None, None], 1.0, -1.0) * torch.where(flip, -1.0, 1.0)[:, None, None]
    dot = functional.conv2d(functional.pad(binary, (1, 1, 1, 1), value=pad_value), weight, None, 2, groups=2)
    means = functional.conv2d(x.abs().unflatten(1, (2, 18)).mean(2), torch.full((2, 1, 3, 3), 1 / 9), None, 2, 1, groups=2)
    expected = dot * means.repeat_interleave(5, 1) * scale[:, None, None] + bias[:, None, None] + residual
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_reference", [True, pytest.param(False, marks=needs_kernels)])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 100), (0, 40)])
def test_a_linear_layer_of_signs(shape: tuple[int, ...], is_reference: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(shape, generator=generator), signs((7, shape[-1]), generator)
    scale, bias, residual = (torch.randn(s, generator=generator) for s in ((7,), (7,), (*shape[:-1], 7)))
    function = binary_linear_reference if is_reference else binary_linear
    got = function(x, *pack_conv_weight(weight), scale, bias, shape[-1], None, None, residual)
    expected = functional.linear(torch.where(x >= 0, 1.0, -1.0), weight) * scale + bias + residual
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("is_last", [False, True])
def test_the_reference_is_right_for_one_channel_and_one_column(is_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 1, 6, 4, generator=generator), signs((1, 1, 2, 3), generator)
    if is_last:
        x = torch.empty(x.shape, memory_format=torch.channels_last).copy_(x)
    arguments = (x, *pack_conv_weight(weight), torch.ones(1), None, 1, [2, 3], [1, 2], [0, 0], [1, 1], 1)
    expected = functional.conv2d(torch.where(x >= 0, 1.0, -1.0).double().contiguous(), weight.double(), None, (1, 2))
    for function in (binary_conv2d_reference, binary_conv2d):
        assert function(*arguments).flatten().tolist() == expected.flatten().tolist()


def test_an_empty_batch_gives_an_empty_output() -> None:
    words, mask = pack_conv_weight(torch.ones(4, 3, 3, 3))
    assert binary_conv2d(torch.empty(0, 3, 8, 8), words, mask, torch.ones(4), None, 3, [3, 3], [1, 1], [1, 1], [1, 1], 1).shape == (
        0,
        4,
        8,
        8,
    )


@needs_kernels
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(3, 40, 9, 9, generator=generator), signs((24, 40, 3, 3), generator)
    arguments = (x, *pack_conv_weight(weight), torch.ones(24), None, 40, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = binary_conv2d(*arguments)
        monkeypatch.setattr(prepared, "THREAD_WORK", 1)
        torch.set_num_threads(3)
        assert torch.equal(binary_conv2d(*arguments), alone)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_weights_that_are_loaded_in_place_are_used() -> None:
    x, words = torch.randn(1, 40, 5, 5), pack_conv_weight(torch.ones(8, 40, 3, 3))[0]
    rest = (None, torch.ones(8), None, 40, [3, 3], [1, 1], [0, 0], [1, 1], 1)
    first = binary_conv2d(x, words, *rest)
    words.copy_(pack_conv_weight(-torch.ones(8, 40, 3, 3))[0])
    assert torch.equal(binary_conv2d(x, words, *rest), -first)
    with torch.inference_mode():
        assert torch.equal(binary_conv2d(x, words.clone(), *rest), -first)


@needs_kernels
def test_the_same_signs_with_another_mask_or_other_groups_are_another_weight() -> None:
    x, weight = torch.randn(1, 40, 5, 5), torch.ones(4, 40, 3, 3)
    weight[:, ::2] = 0
    words, mask = pack_conv_weight(weight)
    assert mask is not None
    other = mask.clone()
    other[1:] = 0
    rest = (torch.ones(4), None, 40, [3, 3], [1, 1], [0, 0], [1, 1], 1)
    for present in (mask, other, None, mask):
        assert torch.equal(binary_conv2d(x, words, present, *rest), binary_conv2d_reference(x, words, present, *rest))
    mask.zero_()
    assert not binary_conv2d(x, words, mask, *rest).any()
    words, mask = pack_conv_weight(signs((4, 20, 3, 3), torch.Generator().manual_seed(0)))
    for groups in (1, 2, 4):
        arguments = (torch.randn(1, 20 * groups, 5, 5), words, mask, torch.ones(4), None, 20 * groups, *rest[3:-1], groups)
        assert torch.equal(binary_conv2d(*arguments), binary_conv2d_reference(*arguments))


def test_the_operators_can_be_exported_and_compiled() -> None:
    words, mask = pack_conv_weight(torch.randint(0, 3, (8, 5, 3, 3)).float() - 1)
    opcheck(
        torch.ops.lowbit.binary_conv2d.default,
        (torch.randn(2, 5, 9, 9), words, mask, torch.rand(8), None, 5, [3, 3], [2, 1], [1, 1], [1, 1], 1),
    )
    layer = (words, mask, torch.rand(8), None, 5, [3, 3], [2, 1], [1, 1], [1, 1], 1)
    more = {"activation": torch.rand(5, 8), "out_threshold": torch.rand(8)}
    opcheck(torch.ops.lowbit.binary_conv2d.default, (torch.randn(2, 5, 9, 9), *layer), more)
    opcheck(torch.ops.lowbit.binary_conv2d.default, (torch.zeros(2, 9, 9, 1, dtype=torch.int32), *layer))
    opcheck(torch.ops.lowbit.binary_linear.default, (torch.randn(4, 40), *pack_conv_weight(torch.ones(7, 40)), torch.rand(7), None, 40))

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return binary_conv2d(x, words, mask, torch.ones(8), None, 5, [3, 3], [1, 1], [1, 1], [1, 1], 1)

    x = torch.randn(2, 5, 9, 9)
    exported = torch.export.export(Layer(), (x,)).module()
    assert torch.equal(exported(x), Layer()(x))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": torch.randn(1, 6, 8, 8)}, "got an input of shape"),
        ({"x": torch.randn(1, 5, 8, 8).double()}, "takes float32 inputs, got torch.float64"),
        ({"x": torch.randn(1, 5, 1, 8)}, "smaller than the kernel's reach"),
        ({"scale": torch.ones(4)}, r"scale must be float32 \(8,\)"),
        ({"bias": torch.ones(4)}, r"bias must be float32 \(8,\)"),
        ({"pad_value": 2}, "pad_value must be -1, 0 or 1"),
        ({"threshold": torch.ones(4)}, r"threshold must be float32 \(5,\)"),
        ({"residual": torch.ones(1, 8, 3, 3)}, "residual must fit the output's shape"),
        ({"activation": torch.ones(8)}, r"activation must be float32 \(5, 8\)"),
        ({"out_threshold": torch.ones(5)}, r"out_threshold must be float32 \(8,\)"),
        ({"out_flip": torch.ones(8) > 0}, "out_flip needs out_threshold"),
        ({"x": torch.zeros(1, 8, 8, 2, dtype=torch.int32)}, "packed signs of 5 channels"),
        ({"groups": 2}, "5 input and 8 output channels cannot be divided into 2 groups"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], told: str) -> None:
    words, mask = pack_conv_weight(torch.ones(8, 5, 3, 3))
    arguments: dict[str, object] = {
        "x": torch.randn(1, 5, 8, 8), "words": words, "mask": mask, "scale": torch.ones(8), "bias": None, "in_channels": 5,
        "kernel_size": [3, 3], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1,
    }  # fmt: skip
    with pytest.raises(SpecError, match=told):
        binary_conv2d(**{**arguments, **change})


@pytest.mark.parametrize(("weight", "told"), [(torch.full((4, 3), 0.5), "holds -1, 0 and"), (torch.ones(4, 3, 3), "needs a shape")])
def test_weights_that_are_no_signs_are_not_packed(weight: Tensor, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        pack_conv_weight(weight)
