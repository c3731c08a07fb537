from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.runtime.binary_cases import any_activation, any_convolution, sign_layer, signs
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.runtime.arguments import Epilogue, Window
from lowbit.runtime.layers import prepared
from lowbit.runtime.layers.binary import (
    binary_conv2d,
    binary_conv2d_reference,
    binary_linear,
    binary_linear_reference,
    compiled_loops,
    pack_conv_weight,
)

PADDED = Window((3, 3), padding=(1, 1))
needs_kernels = pytest.mark.skipif(compiled_loops() is None, reason="there are no compiled kernels here")


@needs_kernels
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_kernel_gives_the_integers_of_the_reference_for_any_shape(data: st.DataObject) -> None:
    *arguments, epilogue = any_convolution(data)
    epilogue = replace(epilogue, activation=any_activation(data, len(epilogue.scale)))
    got = binary_conv2d(*arguments, epilogue)
    assert torch.equal(got, binary_conv2d_reference(*arguments, epilogue))
    assert got.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_packed_signs_of_outputs_are_those_of_the_numbers_and_the_next_layer_takes_them(data: st.DataObject) -> None:
    *arguments, epilogue = any_convolution(data)
    out, generator = len(epilogue.scale), torch.Generator().manual_seed(0)
    limit = 3 * torch.randn(out, generator=generator).round()
    flip = torch.rand(out, generator=generator) > 0.5 if data.draw(st.booleans()) else None
    residual = torch.randn(binary_conv2d(*arguments, epilogue).shape, generator=generator) if data.draw(st.booleans()) else None
    of_numbers = replace(epilogue, activation=any_activation(data, out), residual=residual)
    of_signs = replace(of_numbers, out_threshold=limit, out_flip=flip)
    found = binary_conv2d(*arguments, of_signs)
    assert torch.equal(found, binary_conv2d_reference(*arguments, of_signs))
    numbers = binary_conv2d(*arguments, of_numbers)
    layer = sign_layer(signs((5, out, 3, 2), generator))
    rest = Window((3, 2), (2, 1), (2, 1), pad_value=data.draw(st.sampled_from([-1, 0, 1]))), Epilogue(torch.ones(5))
    expected = binary_conv2d_reference(numbers, replace(layer, threshold=limit, flip=flip), *rest)
    assert torch.equal(binary_conv2d(found, layer, *rest), expected)
    assert torch.equal(binary_conv2d_reference(found, layer, *rest), expected)


@needs_kernels
def test_packed_signs_go_into_groups_of_whole_words() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, next_weight = torch.randn(2, 40, 6, 6), signs((64, 40, 3, 3), generator), signs((8, 32, 3, 3), generator)
    first = (x, sign_layer(weight), PADDED)
    second = (sign_layer(next_weight, 2), replace(PADDED, groups=2), Epilogue(torch.ones(8)))
    packed = binary_conv2d(*first, Epilogue(torch.ones(64), out_threshold=torch.zeros(64)))
    expected = binary_conv2d_reference(binary_conv2d(*first, Epilogue(torch.ones(64))), *second)
    assert torch.equal(binary_conv2d(packed, *second), expected)
    third = sign_layer(signs((8, 16, 3, 3), generator), 4)
    with pytest.raises(SpecError, match="whole words for each group"):
        binary_conv2d(packed, third, replace(PADDED, groups=4), Epilogue(torch.ones(8)))
    with pytest.raises(SpecError, match="have no threshold"):
        binary_conv2d(packed, replace(second[0], threshold=torch.zeros(64)), *second[1:])


@pytest.mark.parametrize("is_reference", [True, pytest.param(False, marks=needs_kernels)])
@pytest.mark.parametrize("pad_value", [-1, 0, 1])
def test_it_is_the_convolution_of_signs_with_scale_bias_residual_and_input_scale(is_reference: bool, pad_value: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 36, 7, 6, generator=generator), signs((10, 18, 3, 3), generator, has_zero=True)
    scale, bias, residual = (torch.randn(*shape, generator=generator) for shape in ((10,), (10,), (2, 10, 4, 3)))
    threshold, flip = torch.randn(36, generator=generator), torch.arange(36) % 3 == 0
    function = binary_conv2d_reference if is_reference else binary_conv2d
    window = Window((3, 3), (2, 2), (1, 1), groups=2, pad_value=pad_value)
    got = function(x, sign_layer(weight, 2, threshold, flip), window, Epilogue(scale, bias, residual, input_scaling=True))
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
    got = function(x, sign_layer(weight), Epilogue(scale, bias, residual))
    expected = functional.linear(torch.where(x >= 0, 1.0, -1.0), weight) * scale + bias + residual
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("is_last", [False, True])
def test_the_reference_is_right_for_one_channel_and_one_column(is_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 1, 6, 4, generator=generator), signs((1, 1, 2, 3), generator)
    if is_last:
        x = torch.empty(x.shape, memory_format=torch.channels_last).copy_(x)
    arguments = (x, sign_layer(weight), Window((2, 3), (1, 2)), Epilogue(torch.ones(1)))
    expected = functional.conv2d(torch.where(x >= 0, 1.0, -1.0).double().contiguous(), weight.double(), None, (1, 2))
    for function in (binary_conv2d_reference, binary_conv2d):
        assert function(*arguments).flatten().tolist() == expected.flatten().tolist()


def test_an_empty_batch_gives_an_empty_output() -> None:
    layer = sign_layer(torch.ones(4, 3, 3, 3))
    assert binary_conv2d(torch.empty(0, 3, 8, 8), layer, PADDED, Epilogue(torch.ones(4))).shape == (0, 4, 8, 8)


@needs_kernels
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(3, 40, 9, 9, generator=generator), signs((24, 40, 3, 3), generator)
    arguments = (x, sign_layer(weight), PADDED, Epilogue(torch.ones(24)))
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
    x, layer = torch.randn(1, 40, 5, 5), sign_layer(torch.ones(8, 40, 3, 3))
    rest = Window((3, 3)), Epilogue(torch.ones(8))
    first = binary_conv2d(x, layer, *rest)
    layer.words.copy_(pack_conv_weight(-torch.ones(8, 40, 3, 3))[0])
    assert torch.equal(binary_conv2d(x, layer, *rest), -first)
    with torch.inference_mode():
        assert torch.equal(binary_conv2d(x, replace(layer, words=layer.words.clone()), *rest), -first)


@needs_kernels
def test_the_same_signs_with_another_mask_or_other_groups_are_another_weight() -> None:
    x, weight = torch.randn(1, 40, 5, 5), torch.ones(4, 40, 3, 3)
    weight[:, ::2] = 0
    layer, rest = sign_layer(weight), (Window((3, 3)), Epilogue(torch.ones(4)))
    assert layer.mask is not None
    other = layer.mask.clone()
    other[1:] = 0
    for present in (layer.mask, other, None, layer.mask):
        masked = replace(layer, mask=present)
        assert torch.equal(binary_conv2d(x, masked, *rest), binary_conv2d_reference(x, masked, *rest))
    layer.mask.zero_()
    assert not binary_conv2d(x, layer, *rest).any()
    layer = sign_layer(signs((4, 20, 3, 3), torch.Generator().manual_seed(0)))
    for groups in (1, 2, 4):
        grouped = replace(layer, in_channels=20 * groups), replace(rest[0], groups=groups), rest[1]
        x = torch.randn(1, 20 * groups, 5, 5)
        assert torch.equal(binary_conv2d(x, *grouped), binary_conv2d_reference(x, *grouped))


def test_the_operators_can_be_exported_and_compiled() -> None:
    layer, window = sign_layer(torch.randint(0, 3, (8, 5, 3, 3)).float() - 1), Window((3, 3), (2, 1), (1, 1))
    for x, epilogue in (
        (torch.randn(2, 5, 9, 9), Epilogue(torch.rand(8))),
        (torch.randn(2, 5, 9, 9), Epilogue(torch.rand(8), activation=torch.rand(5, 8), out_threshold=torch.rand(8))),
        (torch.zeros(2, 9, 9, 1, dtype=torch.int32), Epilogue(torch.rand(8))),
    ):
        opcheck(torch.ops.lowbit.binary_conv2d.default, (), binary_conv2d.flatten(x, layer, window, epilogue))
    linear = binary_linear.flatten(torch.randn(4, 40), sign_layer(torch.ones(7, 40)), Epilogue(torch.rand(7)))
    opcheck(torch.ops.lowbit.binary_linear.default, (), linear)

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return binary_conv2d(x, layer, PADDED, Epilogue(torch.ones(8)))

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
        binary_conv2d.flat(**{**arguments, **change})


@pytest.mark.parametrize(("weight", "told"), [(torch.full((4, 3), 0.5), "holds -1, 0 and"), (torch.ones(4, 3, 3), "needs a shape")])
def test_weights_that_are_no_signs_are_not_packed(weight: Tensor, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        pack_conv_weight(weight)
