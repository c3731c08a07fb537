import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowbit.errors import FileFormatError
from lowbit.models import load_model
from lowbit.models.weights import read_state_dict
from lowbit.resize import round_pixels

PACKAGE = Path(os.environ.get("LOWBIT_ESRGAN_SLIM", "node_modules/@upscalerjs/esrgan-slim"))


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).unsqueeze(0).float()


def written(folder: Path, values: np.ndarray, **entry: object) -> Path:
    manifest = [{"paths": ["a.bin", "b.bin"], "weights": [{"name": "c/kernel", "shape": [1, 2, 2, 3], "dtype": "float32", **entry}]}]
    raw = values.astype("<f4").tobytes()
    (folder / "a.bin").write_bytes(raw[:10])
    (folder / "b.bin").write_bytes(raw[10:])
    (folder / "model.json").write_text(json.dumps({"weightsManifest": manifest}))
    return folder / "model.json"


@pytest.mark.parametrize(
    ("name", "scale", "count"),
    [("esrgan_slim", 2, 222_075), ("esrgan_slim", 3, 226_815), ("esrgan_slim", 4, 233_451), ("esrgan_medium", 2, 693_235)],
)
def test_networks_have_the_parameters_of_the_packages(name: str, scale: int, count: int) -> None:
    assert sum(parameter.numel() for parameter in load_model(name, scale=scale).parameters()) == count


@pytest.mark.skipif(not PACKAGE.is_dir(), reason=f"no {PACKAGE}: npm pack @upscalerjs/esrgan-slim, unpack, LOWBIT_ESRGAN_SLIM=package")
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_sample_picture_of_the_package_comes_out_within_one_grey_level(scale: int) -> None:
    model = load_model("esrgan_slim", PACKAGE / "models" / f"x{scale}" / "model.json", scale=scale)
    with torch.inference_mode():
        found = round_pixels(model(pixels(PACKAGE / "assets" / "fixture.png")))
    difference = (found - pixels(PACKAGE / "assets" / "samples" / f"{scale}x" / "result.png")).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_kernels_of_tensorflow_js_are_transposed_across_the_files_that_hold_them(tmp_path: Path) -> None:
    found = read_state_dict(written(tmp_path, np.arange(12)))
    assert list(found) == ["c.weight"]
    assert found["c.weight"].shape == (3, 2, 1, 2)  # [out, in, height, width]
    assert found["c.weight"][1, 0, 0].tolist() == [1, 7]  # kernel [0, x, 0, 1] is number 6 x + 1


@pytest.mark.parametrize(
    ("values", "entry"), [(np.arange(11), {}), (np.arange(12), {"dtype": "int32"}), (np.arange(12), {"quantization": {}})]
)
def test_files_of_tensorflow_js_that_are_short_or_quantized_are_refused(
    tmp_path: Path, values: np.ndarray, entry: dict[str, object]
) -> None:
    with pytest.raises(FileFormatError, match="layers model of TensorFlow"):
        read_state_dict(written(tmp_path, values, **entry))
