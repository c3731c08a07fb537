from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowbit.data import load_data
from lowbit.data.images import Preprocessing, read_input, read_picture
from lowbit.errors import DataError, SpecError

PLAIN = Preprocessing(size=4, crop_fraction=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def save(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def test_colours_are_planes_from_zero_to_one_minus_mean_over_std() -> None:
    picture = Image.new("RGB", (9, 5), (255, 51, 0))
    tensor = Preprocessing(size=3, mean=(0.5, 0.0, 0.25), std=(0.5, 0.1, 0.5))(picture)
    assert tensor.shape == (3, 3, 3)
    assert tensor.dtype == torch.float32
    for plane, value in zip(tensor, (1.0, 2.0, -0.5), strict=True):
        torch.testing.assert_close(plane, torch.full((3, 3), value))


def test_the_centre_of_the_longer_side_is_kept() -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    assert PLAIN(Image.fromarray(pixels)).min().item() == 1.0
    assert PLAIN(Image.fromarray(pixels.transpose(1, 0, 2))).min().item() == 1.0


def test_the_crop_fraction_leaves_out_the_border() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[2:6, 2:6] = 255
    half = Preprocessing(size=4, crop_fraction=0.5, mean=PLAIN.mean, std=PLAIN.std)
    assert half(Image.fromarray(pixels)).min().item() == 1.0  # resized to floor(4 / 0.5) = 8: unchanged, then the centre


def test_grey_has_one_channel() -> None:
    tensor = Preprocessing(size=2, mean=(0.0,), std=(1.0,), grey=True)(Image.new("RGB", (2, 2), (255, 0, 0)))
    torch.testing.assert_close(tensor, torch.full((1, 2, 2), 76 / 255))  # 0.299 of red


def test_one_number_for_mean_or_std_counts_for_all_channels() -> None:
    assert Preprocessing(mean=(0.5,), std=(0.25,)) == Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    assert Preprocessing(mean=(0.5,), std=(0.25,), grey=True).mean == (0.5,)
    with pytest.raises(SpecError, match="give one number, or 3"):
        Preprocessing(mean=(0.5, 0.5))


def test_interpolation_is_chosen() -> None:
    pixels = np.zeros((1, 2, 3), np.uint8)
    pixels[:, 1] = 255
    wide = Image.fromarray(pixels).resize((8, 4), Image.Resampling.NEAREST)
    nearest = Preprocessing(size=8, crop_fraction=1.0, mean=PLAIN.mean, std=PLAIN.std, interpolation="nearest")
    assert nearest(wide).unique().tolist() == [0.0, 1.0]
    smooth = Preprocessing(size=8, crop_fraction=1.0, mean=PLAIN.mean, std=PLAIN.std, interpolation="bilinear")
    assert len(smooth(wide).unique()) > 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size 0"),
        ({"crop_fraction": 0.0}, "crop_fraction 0.0"),
        ({"crop_fraction": 1.1}, "crop_fraction 1.1"),
        ({"interpolation": "lanczos"}, "'lanczos', expected one of bicubic, bilinear, nearest"),
        ({"grey": True}, "one for each channel"),
        ({"std": (1.0, 0.0, 1.0)}, "must be positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Preprocessing(**options)  # type: ignore[arg-type]


def test_a_png_comes_back_exactly(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (np.asarray(read_picture(save(tmp_path / "a.png", pixels))) == pixels).all()


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 256], [32768, 65535]], np.uint16))
    assert np.asarray(read_picture(path)).tolist() == [[0, 1], [128, 255]]


def test_a_turned_photograph_is_set_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (2, 4)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_a_truncated_picture_is_named(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}: "):
        read_picture(path)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: "):
        read_picture(tmp_path / "a.png")


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (2000, 1000)).save(path)
    with pytest.raises(DataError, match=r"2000 x 1000 pixels, at most 1,999,999 are decoded"):
        read_picture(path, max_pixels=1_999_999)
    assert read_picture(path, max_pixels=2_000_000).size == (2000, 1000)


def test_a_small_file_of_a_giant_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (20_000, 10_000)).save(path)  # 25 KB on disk
    with pytest.raises(DataError, match="too many pixels, at most 100,000,000"):
        read_picture(path)


def test_too_many_bytes_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="bytes, at most 10 are read"):
        read_picture(path, max_bytes=10)


def test_a_narrow_picture_is_refused_before_it_is_enlarged(tmp_path: Path) -> None:
    path = save(tmp_path / "thin.png", np.zeros((60_000, 1), np.uint8))
    with pytest.raises(DataError, match=r"thin\.png: a picture of 1 x 60000 pixels is too narrow.*256 x 15,360,000"):
        read_input(path, Preprocessing())


@pytest.mark.parametrize("name", ["a.png", "a.npz", "a.npy"])
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="a pipe or a device"):
        read_picture(tmp_path / name) if name.endswith("png") else load_data(str(tmp_path / name))


def test_a_path_that_no_file_system_takes_is_an_error_of_data() -> None:
    with pytest.raises(DataError, match="File name too long"):
        load_data("x" * 5000)


def test_a_preprocessing_says_itself_in_a_line() -> None:
    assert (
        str(Preprocessing(size=8, mean=(0.5,), std=(0.25,), grey=True)) == "8 x 8, grey, mean 0.5, std 0.25, crop fraction 0.875, bicubic"
    )
    assert str(Preprocessing()).startswith("224 x 224, colour, mean 0.485, 0.456, 0.406, std 0.229")
