"""Pairs of pictures: where they come from, how they belong together, patches, and everything that can be wrong with a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import Subset

from lowbit.data import load_pairs, upscaling
from lowbit.data.upscaling import Patches, PictureInMemory, PicturePairs, sample_photographs
from lowbit.errors import DataError, SpecError, UnknownNameError
from lowbit.qat.engine.batches import evaluation_batches, make_source
from lowbit.qat.recipe import Recipe
from lowbit.resize import shrink


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)


def save(path: Path, picture: np.ndarray | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of different, odd sizes."""
    for index, (height, width) in enumerate([(21, 34), (25, 25), (40, 23)]):
        save(tmp_path / f"{index}.png", pixels(height, width, index))
    return tmp_path


def test_small_pictures_are_made_of_originals_cropped_to_a_multiple(folder: Path) -> None:
    data = load_pairs(str(folder), scale=3, split="test")
    small, original = data.dataset[0]
    expected = torch.from_numpy(pixels(21, 34)).permute(2, 0, 1)[:, :21, :33]
    assert torch.equal(original, expected.float())
    assert torch.equal(small, shrink(expected, 3).float())
    assert (data.pictures, data.given, data.has_targets) == (3, False, True)


def test_pictures_to_measure_on_come_whole_and_one_at_a_time(folder: Path) -> None:
    batches = list(evaluation_batches(load_pairs(str(folder), scale=2, split="test"), 8))
    assert [tuple(batch[1].shape) for batch in batches] == [(1, 3, 20, 34), (1, 3, 24, 24), (1, 3, 40, 22)]


def test_training_takes_patches_of_every_picture_and_the_same_with_the_same_seed(folder: Path) -> None:
    source = make_source(load_pairs(str(folder), scale=2, patch=8), Recipe(1, batch_size=6, seed=3))
    assert source.samples == 3 * 86  # the fewest that are 256 or more
    first, second = (list(source.epoch(0)) for _ in range(2))
    for (a, _), (b, _) in zip(first, second, strict=True):
        assert a[0].shape == (6, 3, 8, 8)
        assert a[1].shape == (6, 3, 16, 16)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    other = next(iter(source.epoch(1)))[0]
    assert not torch.equal(first[0][0][0], other[0])


def test_a_resumed_epoch_draws_the_same_patches(folder: Path) -> None:
    source = make_source(load_pairs(str(folder), scale=2, patch=8), Recipe(1, batch_size=6))
    whole, rest = list(source.epoch(0)), list(source.epoch(0, start=5))
    assert all(torch.equal(a[0][1], b[0][1]) for a, b in zip(whole[5:], rest, strict=True))


def test_patches_are_flipped_and_transposed_together_with_their_originals() -> None:
    original = torch.arange(3 * 64).view(3, 8, 8).to(torch.uint8)
    small = original[:, ::2, ::2]
    seen: set[tuple[float, ...]] = set()
    generator = Generator().manual_seed(0)
    for _ in range(200):
        a, b = Patches(4, 2)(([small], [original]), generator)
        assert a.dtype == torch.float32
        corners = [b[0, 0, y::2, x::2] for y in (0, 1) for x in (0, 1)]  # which pixel was kept depends on how the patch is turned
        assert any(torch.equal(a[0, 0], corner) for corner in corners)
        seen.add(tuple(a[0, 0].flatten().tolist()))
    assert len(seen) == 8


def test_patches_without_changes_are_not_turned() -> None:
    picture = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    big = picture.repeat_interleave(2, 1).repeat_interleave(2, 2)
    a, b = Patches(4, 2).plain(([picture], [big]))
    assert torch.equal(a[0], picture.float())
    assert torch.equal(b[0], big.float())


def test_calibration_takes_patches_at_fixed_places(folder: Path) -> None:
    data = load_pairs(str(folder), scale=2, split="calibration", patch=6)
    assert len(data) == 3 * 86
    again = load_pairs(str(folder), scale=2, split="calibration", patch=6)
    for index in (0, 1, 40):
        small, original = data.dataset[index]
        assert small.shape == (3, 6, 6)
        assert original.shape == (3, 12, 12)
        assert torch.equal(small, again.dataset[index][0])


def test_pictures_to_train_on_are_stacked_as_patches_at_fixed_places(folder: Path) -> None:
    train, fixed = load_pairs(str(folder), scale=2, patch=8), load_pairs(str(folder), scale=2, patch=8, split="calibration")
    for index in (0, 1, len(train) - 1):
        assert all(torch.equal(a, b) for a, b in zip(train.fixed[index], fixed.fixed[index], strict=True))
    few = replace(train, dataset=Subset(train.dataset, [1]))
    assert torch.equal(few.fixed[0][0], fixed.dataset[1][0])


def test_sub_folders_divide_pictures(tmp_path: Path) -> None:
    save(tmp_path / "train" / "a.png", pixels(20, 20))
    save(tmp_path / "val" / "b.png", pixels(30, 30))
    assert load_pairs(str(tmp_path), scale=2, split="test").dataset[0][1].shape == (3, 30, 30)
    assert load_pairs(str(tmp_path), scale=2, split="train", patch=8).dataset[0][1].shape == (3, 20, 20)


def test_small_pictures_are_found_by_name_beside_their_originals(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / "HR" / f"{name}.png", pixels(20, 24))
        save(tmp_path / "LR" / "X2" / f"{name}x2.png", pixels(10, 12, 7))
    data = load_pairs(str(tmp_path), scale=2, split="test")
    assert data.given
    assert torch.equal(data.dataset[1][0], torch.from_numpy(pixels(10, 12, 7)).permute(2, 0, 1).float())


def test_pictures_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    save(tmp_path / "high" / "a.png", pixels(20, 24))
    save(tmp_path / "low" / "b.png", pixels(10, 12))
    with pytest.raises(DataError, match=r"a\.png without a small picture, b without an original"):
        load_pairs(str(tmp_path), scale=2)
    save(tmp_path / "low" / "a.png", pixels(9, 12))
    (tmp_path / "low" / "b.png").unlink()
    with pytest.raises(DataError, match=r"a\.png has 12 x 9 pixels, .*a\.png 24 x 20: at scale 2 they do not belong together"):
        load_pairs(str(tmp_path), scale=2, split="test").dataset[0]
    (tmp_path / "high").rename(tmp_path / "other")
    with pytest.raises(DataError, match="no sub-folder hr or high"):
        load_pairs(str(tmp_path), scale=2)


def test_pictures_smaller_than_a_patch_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"smaller than a patch of 24 x 24 .*0\.png \(34 x 20\).*2\.png \(22 x 40\)"):
        load_pairs(str(folder), scale=2, patch=12)
    assert len(load_pairs(str(folder), scale=2, patch=12, split="test")) == 3


def test_a_picture_smaller_than_the_scale_is_named(tmp_path: Path) -> None:
    save(tmp_path / "dot.png", pixels(1, 9))
    with pytest.raises(DataError, match=r"dot\.png: a picture of 9 x 1 pixels is smaller than the scale 2"):
        load_pairs(str(tmp_path), scale=2, split="test").dataset[0]


def test_an_unreadable_picture_is_an_error_or_left_out_and_counted(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"broken\.png"):
        load_pairs(str(folder), scale=2, patch=8)
    data = load_pairs(str(folder), scale=2, patch=8, strict=False)
    assert data.pictures == 3
    assert [path.name for path in data.skipped] == ["broken.png"]
    for index in range(3):
        (folder / f"{index}.png").unlink()
    with pytest.raises(DataError, match="none of the 1 pictures can be decoded"):
        load_pairs(str(folder), scale=2, strict=False)


def colours(path: Path) -> Tensor:
    return load_pairs(str(path.parent), scale=1, split="test").dataset[0][1]


def test_pictures_of_other_kinds_become_rgb(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (4, 4), (10, 20, 30, 40))
    palette = Image.new("RGB", (4, 4), (200, 100, 50)).quantize(4)
    grey16 = Image.fromarray(np.full((4, 4), 257 * 77, np.uint16))
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    grey_alpha = Image.new("LA", (4, 4), (90, 3))
    expected = {
        "rgba.png": (rgba, (10, 20, 30)),
        "palette.png": (palette, (200, 100, 50)),
        "deep.png": (grey16, (77, 77, 77)),
        "cmyk.tif": (cmyk, (255, 0, 0)),
        "grey.png": (grey_alpha, (90, 90, 90)),
    }
    for name, (picture, colour) in expected.items():
        found = colours(save(tmp_path / name.replace(".", "_") / name, picture))
        assert found.shape == (3, 4, 4), name
        assert found[:, 2, 1].tolist() == list(colour), name


def test_animations_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"a\.gif: 2 frames or pages, expected one picture"):
        load_pairs(str(tmp_path), scale=2, split="test").dataset[0]


def test_names_and_numbers_that_are_not_allowed(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown data 'fotographs'. Did you mean 'photographs'\?"):
        load_pairs("fotographs", scale=2)
    with pytest.raises(SpecError, match="scale 0, patch 8"):
        load_pairs(str(tmp_path), scale=0, patch=8)
    with pytest.raises(DataError, match="no picture"):
        load_pairs(str(tmp_path), scale=2)
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(DataError, match="expected a folder of pictures"):
        load_pairs(str(tmp_path / "a.npz"), scale=2)


def test_decoded_pictures_are_kept_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [PictureInMemory(str(index), torch.zeros(3, 8, 8, dtype=torch.uint8)) for index in range(3)]
    monkeypatch.setattr(upscaling, "KEPT_BYTES", 500)  # a pair has 3 * (64 + 16) bytes
    pairs = PicturePairs(pictures, 2)
    for index in range(3):
        assert pairs[index][1].shape == (3, 8, 8)
    assert sorted(pairs._kept) == [0, 1]


def test_the_sample_photographs_are_halves_that_do_not_meet() -> None:
    pytest.importorskip("sklearn")
    train, test = sample_photographs("train"), sample_photographs("test")
    assert [picture.pixels.shape for picture in (*train, *test)] == [(3, 427, 320)] * 4
    whole = torch.cat([train[0].pixels, test[0].pixels], 2)
    from sklearn.datasets import load_sample_image

    assert torch.equal(whole, torch.from_numpy(load_sample_image("china.jpg")).permute(2, 0, 1))
