"""The Triton kernels against the reference: on a CUDA device, or in Triton's interpreter where ``TRITON_INTERPRET=1`` is set."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.runtime.binary_cases import any_convolution, sign_layer, signs
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.runtime.arguments import Epilogue, SignLayer, Window
from lowbit.runtime.cpu.bits import pack_signs
from lowbit.runtime.cuda.target import cuda_target
from lowbit.runtime.layers.binary import binary_conv2d, binary_conv2d_reference, binary_linear_reference, cuda_kernels, pack_conv_weight

has_triton = importlib.util.find_spec("triton") is not None
is_interpreted = has_triton and os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    not is_interpreted and not cuda_target()[0], reason=f"{cuda_target()[1]}; or set TRITON_INTERPRET=1 where triton is installed"
)
device = torch.device("cpu" if is_interpreted else "cuda")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from lowbit.runtime.cuda import kernels as cuda_kernels

    return cuda_kernels


def there(*arguments: Any) -> list[Any]:
    """The arguments and their parts with tensors on the device that is tested, strides kept."""
    return [_there(argument) for argument in arguments]


def _there(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.to(device)
    return replace(argument, **{name: _there(value) for name, value in vars(argument).items() if isinstance(value, Tensor)})


@needs_kernels
@settings(max_examples=60 if is_interpreted else 300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_kernel_gives_the_integers_of_the_reference_for_any_shape(kernels: ModuleType, data: st.DataObject) -> None:
    arguments = there(*any_convolution(data))
    got = kernels.conv2d(*arguments)
    assert torch.equal(got, binary_conv2d_reference(*arguments))
    assert got.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("pad_value", [-1, 0, 1])
@pytest.mark.parametrize("input_scaling", [False, True])
def test_scale_bias_residual_and_input_scale_round_as_in_the_reference(
    kernels: ModuleType, pad_value: int, has_zero: bool, input_scaling: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 36, 7, 6, generator=generator), signs((10, 18, 3, 3), generator, has_zero=has_zero)
    scale, bias, residual = (torch.randn(*shape, generator=generator) for shape in ((10,), (10,), (2, 10, 4, 3)))
    threshold, flip = torch.randn(36, generator=generator), torch.arange(36) % 3 == 0
    window = Window((3, 3), (2, 2), (1, 1), groups=2, pad_value=pad_value)
    epilogue = Epilogue(scale, bias, residual, input_scaling=input_scaling)
    arguments = there(x, sign_layer(weight, 2, threshold, flip), window, epilogue)
    assert torch.equal(kernels.conv2d(*arguments), binary_conv2d_reference(*arguments))


@needs_kernels
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("shape", [(5,), (1, 64), (3, 5), (2, 3, 100), (130, 33)])
def test_a_linear_layer_of_signs(kernels: ModuleType, shape: tuple[int, ...], has_zero: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(shape, generator=generator), signs((70, shape[-1]), generator, has_zero=has_zero)
    scale, bias, residual = (torch.randn(s, generator=generator) for s in ((70,), (70,), (*shape[:-1], 70)))
    threshold, flip = torch.randn(shape[-1], generator=generator), torch.arange(shape[-1]) % 3 == 0
    arguments = there(x, sign_layer(weight, 1, threshold, flip), Epilogue(scale, bias, residual))
    assert torch.equal(kernels.linear(*arguments), binary_linear_reference(*arguments))


@needs_kernels
def test_layers_of_one_channel_a_group_and_of_many_channels(kernels: ModuleType) -> None:
    generator = torch.Generator().manual_seed(2)
    for groups, inputs, outputs in ((9, 1, 1), (5, 1, 2), (1, 300, 70)):
        x, weight = torch.randn(2, groups * inputs, 6, 5, generator=generator), signs((groups * outputs, inputs, 3, 3), generator)
        window, epilogue = Window((3, 3), padding=(1, 1), groups=groups), Epilogue(torch.ones(groups * outputs))
        arguments = there(x, sign_layer(weight, groups), window, epilogue)
        assert torch.equal(kernels.conv2d(*arguments), binary_conv2d_reference(*arguments))


@needs_kernels
def test_inputs_and_residuals_of_any_strides(kernels: ModuleType) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = signs((8, 40, 3, 3), generator)
    wide, row = torch.randn(2, 50, 9, 14, generator=generator).to(device), torch.randn(8, 1, 1, generator=generator).to(device)
    x = wide[:, 3:43, :, ::2].transpose(2, 3)
    layer, window, epilogue = there(sign_layer(weight), Window((3, 3), padding=(1, 1)), Epilogue(torch.ones(8), residual=row))
    whole = replace(epilogue, residual=row.expand(2, 8, 7, 9))
    assert torch.equal(kernels.conv2d(x, layer, window, whole), binary_conv2d_reference(x, layer, window, epilogue))


@needs_kernels
def test_bits_are_packed_as_on_the_cpu_and_nan_counts_as_negative(kernels: ModuleType) -> None:
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1e-45]).repeat(7)[:40].reshape(1, 40, 1, 1).to(device)
    flip = torch.arange(40, device=device) % 2 == 0
    packed = kernels.pack(x, 1, None, None)
    assert torch.equal(packed[:, 0], pack_signs(x.flatten()))
    assert torch.equal(kernels.pack(x, 1, None, flip)[:, 0], pack_signs(((x.flatten() >= 0) ^ flip) * 2 - 1))


@needs_kernels
def test_weights_that_are_loaded_in_place_are_used(kernels: ModuleType) -> None:
    arguments = there(torch.randn(1, 40, 5, 5), sign_layer(torch.ones(8, 40, 3, 3)), Window((3, 3)), Epilogue(torch.ones(8)))
    first = kernels.conv2d(*arguments)
    arguments[1].words.copy_(pack_conv_weight(-torch.ones(8, 40, 3, 3))[0])
    assert torch.equal(kernels.conv2d(*arguments), -first)


@needs_kernels
def test_tensors_on_other_devices_are_refused(kernels: ModuleType) -> None:
    x, epilogue = there(torch.randn(1, 40, 5, 5), Epilogue(torch.ones(8)))
    elsewhere = SignLayer(torch.empty(8, 3, 3, 2, dtype=torch.int32, device="meta"), 40)
    with pytest.raises(SpecError, match="its words on meta"):
        kernels.conv2d(x, elsewhere, Window((3, 3)), epilogue)


@pytest.mark.skipif(not cuda_target()[0], reason=cuda_target()[1])
def test_the_operator_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.randn(1, 40, 5, 5), sign_layer(torch.ones(8, 40, 3, 3)), Window((3, 3)), Epilogue(torch.ones(8)))
    expected = binary_conv2d(*arguments)
    loaded = cuda_kernels()
    assert loaded is not None
    calls: list[int] = []
    conv2d = loaded.conv2d
    monkeypatch.setattr(loaded, "conv2d", lambda *given: calls.append(1) or conv2d(*given))
    assert torch.equal(binary_conv2d(*there(*arguments)).cpu(), expected)
    assert calls == [1]


_COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from lowbit.runtime.arguments import Epilogue, SignLayer, Window
from lowbit.runtime.cuda import kernels
from lowbit.runtime.layers.binary import pack_conv_weight

class Absent:
    get_current_target = lambda self: GPUTarget("cuda", 80, 32)
    get_current_device = get_current_stream = lambda self, *_: 0

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *arguments, **options: self.keep(self.kernel.run(*arguments, grid=grid, warmup=True, **options).asm["ptx"])
    def keep(self, ptx):
        self.ptx = ptx

driver.set_active(Absent())
kernels.pack_kernel, kernels.convolve_kernel = map(Compiled, (kernels.pack_kernel, kernels.convolve_kernel))

def counts(function, x, weight, *window, threshold=None, flip=None, **more):
    words, mask = pack_conv_weight(weight)
    epilogue = Epilogue(torch.ones(len(weight)), torch.ones(len(weight)), **more)
    function(x, SignLayer(words, x.shape[1], mask, threshold, flip), *window, epilogue)
    ptx = kernels.convolve_kernel.ptx
    print(ptx.count("popc.b32"), ptx.count("fma.rn.f32"))

counts(kernels.conv2d, torch.ones(2, 64, 9, 9), torch.ones(64, 64, 3, 3), Window((3, 3), padding=(1, 1)))
counts(kernels.conv2d, torch.ones(2, 64, 9, 9), torch.eye(64)[..., None, None].expand(64, 64, 3, 3),
       Window((3, 3), padding=(1, 1), pad_value=1), threshold=torch.ones(64), flip=torch.ones(64) > 0, residual=torch.ones(64, 1, 1),
       input_scaling=True)
counts(kernels.linear, torch.ones(1, 100), torch.ones(64, 100))
"""


@pytest.mark.skipif(not has_triton, reason="triton is not installed")
def test_every_launch_compiles_to_counts_of_bits_and_no_fused_sums_without_a_device() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "0", "8", "0", "2", "0"]  # 8 sums to a thread; 64 sums of a single row to a warp of 32 threads
