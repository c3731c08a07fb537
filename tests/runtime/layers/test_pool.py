from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import lowbit
from lowbit.errors import SpecError
from lowbit.runtime.arguments import Window
from lowbit.runtime.layers.pool import max_pool2d


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_largest_values_are_those_of_torch(data: st.DataObject) -> None:
    draw = data.draw
    kernel, stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(3))
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [number + draw(st.integers(0, 6)) for number in least]
    x = torch.randn(draw(st.integers(1, 2)), draw(st.sampled_from([1, 64, 70, 128])), *size)
    for value, share in ((torch.nan, 0.02), (torch.inf, 0.05), (-torch.inf, 0.2)):
        x[torch.rand(x.shape) < share] = value if draw(st.booleans()) else 0.0
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    y = max_pool2d.function(x, Window(kernel, stride, padding, dilation))
    torch.testing.assert_close(y, nn.functional.max_pool2d(x, kernel, stride, padding, dilation), rtol=0, atol=0, equal_nan=True)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_an_image_smaller_than_the_kernel_is_refused() -> None:
    with pytest.raises(SpecError, match="smaller than the kernel"):
        max_pool2d.function(torch.ones(1, 64, 2, 2), Window((3, 3)))


def test_gradients_flow_through_it() -> None:
    x = torch.randn(1, 64, 4, 4, requires_grad=True)
    max_pool2d.function(x, Window((2, 2), (2, 2))).sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == 64 * 4


@pytest.mark.parametrize(
    ("pool", "is_replaced"),
    [
        (nn.MaxPool2d(3, 2, 1), True),
        (nn.MaxPool2d((2, 3)), True),
        (nn.MaxPool2d(2, 1, dilation=2), True),
        (nn.MaxPool2d(2, ceil_mode=True), False),
    ],
)
def test_compiled_networks_pool_with_it(pool: nn.Module, is_replaced: bool) -> None:
    images = torch.randn(4, 3, 11, 11)
    quantized = lowbit.quantize(nn.Sequential(nn.Conv2d(3, 64, 3), pool, nn.Conv2d(64, 2, 1)), calibration=images)
    compiled = lowbit.compile_runtime(quantized, sample=images)
    assert (max_pool2d.name in {node.operator for node in compiled.packed_graph.nodes}) == is_replaced
    torch.testing.assert_close(compiled(images), quantized(images), rtol=1e-4, atol=1e-4)
    assert torch.equal(compiled(images[:1]), compiled(images)[:1])
