from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fuzzing import run_file, write_file

from lowbit.errors import FileFormatError
from lowbit.formats.program.arguments import check_tensors
from lowbit.formats.program.operators import check_arguments, find_operator, find_overload

ATEN = torch.ops.aten
X = torch.ones(2, 4, 8, 8)
W = torch.ones(4, 4, 3, 3)


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("aten.conv2d.default", (X, W, None, [1, 0]), "stride must be at least 1, got 0"),
        ("aten.conv2d.default", (X, W, None, [1, 1], [0, -1]), "padding must be at least 0, got -1"),
        ("aten.conv2d.default", (X, W, None, [1, 1], [0, 0], [0, 1]), "dilation must be at least 1, got 0"),
        ("aten.convolution.default", (X, W, None, [1], [0], [1], False, [0], 0), "groups must be at least 1, got 0"),
        ("aten.max_pool2d.default", (X, [2**33, 2]), "kernel_size must be at most 2147483648 in size"),
        ("aten.avg_pool2d.default", (X, [2, 2], [0]), "stride must be at least 1, got 0"),
        ("aten.pixel_unshuffle.default", (X, 0), "downscale_factor must be at least 1, got 0"),
        ("aten.channel_shuffle.default", (X, 0), "groups must be at least 1, got 0"),
        ("aten.repeat.default", (X, [-1, 1, 1, 1]), "repeats must be at least 0, got -1"),
        ("aten.grid_sampler.default", (X, X, 7, 0, False), r"interpolation_mode must be one of \(0, 1, 2\), got 7"),
        ("aten.scaled_dot_product_attention.default", (X, X, X, None, 0.5), "dropout_p must be 0"),
        ("aten.instance_norm.default", (X, None, None, W[0, 0, 0], W[0, 0, 0], True, 1.0, 1e-5, False), "running statistics"),
        ("aten.view.dtype", (X, torch.bool), "bytes cannot be used as booleans"),
    ],
)
def test_settings_out_of_range_are_refused_when_a_file_is_read(name: str, args: tuple[object, ...], reason: str) -> None:
    with pytest.raises(FileFormatError, match=reason):
        check_arguments(name, args, {})


def test_the_ends_of_slices_and_scalars_may_be_any_number() -> None:
    check_arguments("aten.slice.Tensor", (X, 1, 0, 2**63 - 1), {})
    check_arguments("aten.add.Scalar", (X, 2**40), {})
    check_arguments("aten.instance_norm.default", (X, None, None, None, None, True, 1.0, 1e-5, False), {})


Q, K = torch.ones(1, 4, 5, 8), torch.ones(1, 4, 3, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((Q, K, torch.ones(1, 4, 200, 8)), {}, "as many keys as values"),
        ((Q, K[..., :4], K), {}, "as wide as queries"),
        ((Q, K, K.double()), {}, "same dtype"),
        ((Q, K, K, torch.ones(5, 4)), {}, r"a mask of shape \(5, 4\) does not fit scores"),
        ((Q, K, K, torch.ones(5, 3), 0.0, True), {}, "cannot be combined with is_causal"),
        ((Q, K, K), {"scale": float("nan")}, "scale must be a finite number"),
        ((Q, K[:, :3], K[:, :3]), {"enable_gqa": True}, "a divisor of the query's"),
    ],
)
def test_attention_takes_only_what_fits(args: tuple[object, ...], kwargs: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_tensors(ATEN.scaled_dot_product_attention.default, args, kwargs)


def test_a_transposed_convolution_without_settings_has_strides_of_one() -> None:
    overload = find_overload("aten.conv_transpose2d.input")
    check_tensors(overload, (X, W), {})
    with pytest.raises(ValueError, match="output_padding must be smaller than stride or dilation, got 1"):
        check_tensors(overload, (X, W, None, [1, 1], [0, 0], [1, 1]), {})


@pytest.mark.parametrize("mask", [None, torch.ones(5, 3), torch.ones(1, 1, 5, 3, dtype=torch.bool), torch.ones(1, 3)], ids=str)
def test_attention_with_masks_that_fit_passes(mask: torch.Tensor | None) -> None:
    check_tensors(ATEN.scaled_dot_product_attention.default, (Q, K, K, mask), {})


@pytest.mark.parametrize("name", ["aten.floor_divide.default", "aten.remainder.Tensor", "aten.fmod.Tensor"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_the_smallest_number_is_not_divided_by_minus_one(name: str, dtype: torch.dtype) -> None:
    smallest, minus_one = torch.tensor([torch.iinfo(dtype).min], dtype=dtype), torch.tensor([-1], dtype=dtype)
    with pytest.raises(ValueError, match="cannot be divided by -1"):
        find_operator(name)(smallest, minus_one)
    found, expected = (f(smallest + 1, minus_one) for f in (find_operator(name), find_overload(name)))
    assert torch.equal(found, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-300, float("inf"), float("nan"), 7.0])
def test_scales_that_do_not_fit_the_sizes_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="does not resize 8 to 16"):
        check_tensors(ATEN.upsample_nearest2d.default, (X, [16, 16], scale, 2.0), {})
    check_tensors(ATEN.upsample_nearest2d.default, (X, [16, 16], 2.0, 2.0), {})


def test_settings_are_checked_before_kernels_too(tmp_path: Path) -> None:
    quantize = ["q", "lowbit.fake_quantize_affine.default", [{"node": "x"}, {"tensor": "s"}, {"tensor": "z"}, 0, 255], {}]
    tensors = {"s": np.full((), 0.1, np.float32), "z": np.zeros((), np.float32), "w": np.arange(256 * 9, dtype=np.int64).astype(np.uint8)}
    tensors["w.scale"] = np.full((16, 1, 1, 1), 0.1, np.float32)
    packed: dict[str, Any] = {"shape": [16, 16, 3, 3], "bit_width": 8, "offset": -128, "decoder": "affine", "parts": [], "axis": 0}
    packed["granularity"] = "per_channel"
    for settings, is_right in (([[1, 1], [1, 1]], True), ([[1, 0], [1, 1]], False), ([[1, 1], [1, 1], [1, 1], 0], False)):
        layer = ["y", "aten.conv2d.default", [{"node": "q"}, {"tensor": "w"}, None, *settings], {}]
        path = write_file(
            tmp_path / "m.lowbit", [quantize, layer], tensors, [["x", [None, 16, 8, 8], "float32"]], packed={"w": packed}, kernels=True
        )
        if is_right:
            run_file(path)
        else:
            with pytest.raises(FileFormatError, match="must be at least 1, got 0"):
                run_file(path)
