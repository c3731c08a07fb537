"""Enlarging pictures: tiles that do not show, grey and transparent pictures, and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lowbit.errors import DataError, SpecError
from lowbit.models import load_model, upscaling_weights
from lowbit.progress import Progress
from lowbit.resize import enlarge
from lowbit.workflows.enlarge import Tiling, enlarge_files, enlarge_picture, enlarge_tensor, result_paths


class Nearest(nn.Module):
    """Twice as large, each pixel four times."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, x.shape[2] * x.shape[3])
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 40), (50, 33)])
def test_tiles_cover_a_picture_of_any_size_once(size: tuple[int, int]) -> None:
    picture = torch.from_numpy(pixels(*size)).permute(2, 0, 1)
    network = Nearest()
    found = enlarge_tensor(network, picture, 2, Tiling(16, 4))
    assert torch.equal(found, picture.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert network.largest <= 24 * 24  # memory depends on the tile alone


def test_tiles_of_the_embedded_network_differ_from_the_whole_picture_by_one_level_at_most() -> None:
    network = load_model("edsr_small", upscaling_weights(), scale=2)
    picture = torch.from_numpy(pixels(70, 90)).permute(2, 0, 1)
    whole = enlarge_tensor(network, picture, 2, Tiling(256, 0)).int()
    assert (enlarge_tensor(network, picture, 2, Tiling(32, 16)).int() - whole).abs().max() <= 1
    assert (enlarge_tensor(network, picture, 2, Tiling(32, 0)).int() - whole).abs().max() > 1


def test_grey_stays_grey_and_transparency_is_enlarged() -> None:
    grey = Image.fromarray(pixels(5, 6)[..., 0])
    assert enlarge_picture(Nearest(), grey, 2, Tiling()).mode == "L"
    assert np.array_equal(np.asarray(enlarge_picture(Nearest(), grey, 2, Tiling()))[::2, ::2], np.asarray(grey))
    both = Image.merge("RGBA", [*Image.fromarray(pixels(5, 6)).split(), grey])
    found = enlarge_picture(Nearest(), both, 2, Tiling())
    assert found.mode == "RGBA"
    assert np.array_equal(np.asarray(found)[..., 3], enlarge(torch.from_numpy(np.array(grey)), 2).numpy().astype(np.uint8))
    assert enlarge_picture(Nearest(), both.convert("LA"), 2, Tiling()).mode == "LA"
    assert enlarge_picture(Nearest(), Image.fromarray(pixels(5, 6)).convert("CMYK"), 2, Tiling()).mode == "RGB"


def test_results_have_the_names_of_their_pictures_and_write_over_none(tmp_path: Path) -> None:
    photo = tmp_path / "in" / "sub" / "a.jpg"
    photo.parent.mkdir(parents=True)
    Image.fromarray(pixels(4, 4)).save(photo)
    assert result_paths(photo, [photo], tmp_path / "big.webp") == [tmp_path / "big.webp"]
    assert result_paths(tmp_path / "in", [photo], tmp_path / "out") == [tmp_path / "out" / "sub" / "a.png"]
    with pytest.raises(SpecError, match="cannot tell the format"):
        result_paths(photo, [photo], tmp_path / "big.txt")
    with pytest.raises(SpecError, match="would be written over"):
        result_paths(photo, [photo], photo)
    twin = photo.with_suffix(".bmp")
    with pytest.raises(SpecError, match="would be written over"):
        result_paths(tmp_path / "in", [photo, twin], tmp_path / "out")


def test_files_are_enlarged_to_files(tmp_path: Path) -> None:
    photo, large = tmp_path / "a.png", tmp_path / "new" / "b.png"
    Image.fromarray(pixels(7, 9)).save(photo)
    assert enlarge_files(Nearest(), 2, [photo], [large], Tiling(), Progress.silent()) == [(18, 14)]
    assert np.array_equal(np.asarray(Image.open(large))[::2, ::2], pixels(7, 9))
    Image.new("RGBA", (4, 4)).save(photo)
    with pytest.raises(DataError, match="holds no transparency"):
        enlarge_files(Nearest(), 2, [photo], [tmp_path / "c.jpg"], Tiling(), Progress.silent())
    assert not (tmp_path / "c.jpg").exists()
