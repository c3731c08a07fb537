from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.formats.networks import WEIGHT_QUANTIZERS, quantized
from tests.formats.tampering import Manifest, read_parts, tampered, write_parts
from tests.networks import SharedWeightNet, TinyNet
from torch import nn

from lowbit.data import Preprocessing
from lowbit.errors import DataError, FileFormatError, OutputError
from lowbit.formats.packed.file import LARGEST_MANIFEST, Package, file_parts, package, read_package, write_package
from lowbit.formats.packed.tensor import PackedTensor
from lowbit.formats.program.program import export_program
from lowbit.provenance import Provenance
from lowbit.spec import BitPolicy
from lowbit.workflows.quantize import quantize

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def packed(model: nn.Module, *inputs: torch.Tensor) -> Package:
    return package(export_program(model, inputs if len(inputs) > 1 else inputs[0]))


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "tiny.lowbit"
    torch.manual_seed(0)
    write_package(packed(quantized(TinyNet(), IMAGE, weights="affine"), IMAGE), path)
    return path


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    content = packed(quantized(TinyNet(), IMAGE, weights="affine"), IMAGE)
    write_package(content, tmp_path / "m.lowbit")
    again = read_package(tmp_path / "m.lowbit")
    assert again.graph == content.graph
    assert again.tensors.keys() == content.tensors.keys()
    for name, tensor in content.tensors.items():
        other = again.tensors[name]
        if isinstance(tensor, PackedTensor):
            assert isinstance(other, PackedTensor)
            assert (other.bit_width, other.offset, other.shape) == (tensor.bit_width, tensor.offset, tensor.shape)
            assert torch.equal(other.packed, tensor.packed)
            tensor, other = tensor.decode(), other.decode()
        assert torch.equal(other, tensor)
        assert other.dtype == tensor.dtype


def test_a_file_keeps_where_its_network_comes_from_and_one_of_before_does_not_say(tmp_path: Path) -> None:
    known = Provenance(model="net.py:build", data="photos", classes=("cat", "dog"), preprocessing=Preprocessing(size=8))
    program = export_program(quantized(TinyNet(), IMAGE, weights="affine"), IMAGE)
    for provenance in (known, Provenance(), None):
        write_package(package(program, provenance=provenance), tmp_path / "m.lowbit")
        assert read_package(tmp_path / "m.lowbit").provenance == provenance
    assert read_package(Path(__file__).parent / "files" / "lsq.lowbit").provenance is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "must hold some of model"),
        ({"model": "a\x1bb"}, "model must be printable text"),
        ({"trusted": True}, "must hold some of model"),
        ({"preprocessing": {"size": 0}}, "size 0"),
    ],
)
def test_a_provenance_that_cannot_be_is_refused(tiny_file: Path, value: object, reason: str) -> None:
    assert reason in refusal(tampered(tiny_file, lambda manifest: manifest.update(provenance=value)))


def test_equal_networks_give_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for index in range(6):
        torch.manual_seed(3)
        write_package(packed(quantized(TinyNet(), IMAGE), IMAGE), tmp_path / f"{index}.lowbit")
        contents.append((tmp_path / f"{index}.lowbit").read_bytes())
    assert set(contents) == {contents[0]}
    raw = contents[0]
    assert list(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]) == ["lowbit"]


@pytest.mark.parametrize("bit_width", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_file_takes_at_most_two_percent_more_than_codes_scales_and_biases(tmp_path: Path, bit_width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3)).eval()
    policy = BitPolicy.uniform(bit_width, 8, first_last=None)
    model = quantize(model, method="round_to_nearest", policy=policy, calibration=IMAGE)
    size = write_package(packed(model, IMAGE), tmp_path / "m.lowbit")
    weights = 3 * 64 * 9 + 64 * 256 * 9 + 256 * 256 * 9
    channels = 64 + 256 + 256
    arithmetic = weights * bit_width / 8 + channels * 4 + channels * 4
    assert arithmetic < size < 1.02 * arithmetic
    assert size == (tmp_path / "m.lowbit").stat().st_size


BITS_OF_A_WEIGHT = {"uniform": 4, "affine": 3, "binary": 1, "codebook": 2, "power_of_two": 4, "sum": 2}  # sum: two parts of one bit


@pytest.mark.parametrize("weights", WEIGHT_QUANTIZERS)
def test_every_kind_of_codes_takes_exactly_its_bits(tmp_path: Path, weights: str) -> None:
    write_package(packed(quantized(TinyNet(), IMAGE, weights=weights), IMAGE), tmp_path / "m.lowbit")
    _, manifest, vectors = read_parts(tmp_path / "m.lowbit")
    code_bytes = sum(manifest["tensors"][name][1][0] for name in manifest["packed"])
    assert code_bytes == (8 * 27 + 2 * 8 * 72 + 4 * 8) * BITS_OF_A_WEIGHT[weights] / 8
    zero_points = 3 * 8 + 4 if weights == "affine" else 0
    assert vectors["uint8"].numel() == code_bytes + zero_points


def test_tensors_of_equal_content_are_stored_once(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    content = packed(quantized(SharedWeightNet(), x), x)
    assert [name for name in content.tensors if name.endswith("weight")] == ["encode.weight"]


@pytest.mark.parametrize(
    "make", [lambda: quantized(TinyNet(), IMAGE, weights="affine"), lambda: quantized(SharedWeightNet(), torch.randn(2, 6))]
)
def test_the_parts_of_a_file_add_up_to_its_size(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    content = packed(model, IMAGE if isinstance(model, TinyNet) else torch.randn(2, 6))
    size = write_package(content, tmp_path / "model.lowbit")
    parts = file_parts(tmp_path / "model.lowbit")
    assert sum(part.total_bytes for part in parts) == size == (tmp_path / "model.lowbit").stat().st_size
    sizes = [part.total_bytes for part in parts]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) > 0
    held = [tensor for tensor in content.tensors.values() if isinstance(tensor, PackedTensor)]
    assert sum(part.code_bytes for part in parts) == sum(tensor.code_bytes for tensor in held)
    assert sum(part.table_bytes for part in parts) == sum(tensor.table_bytes for tensor in held)


def test_channels_last_weights_keep_their_layout(tmp_path: Path) -> None:
    model = quantized(TinyNet(), IMAGE).to(memory_format=torch.channels_last)
    write_package(packed(model, IMAGE), tmp_path / "m.lowbit")
    assert set(read_package(tmp_path / "m.lowbit").layouts.values()) == {"channels_last"}


# Damage


def refusal(path: Path) -> str:
    """Why the file is refused; the message names it."""
    with pytest.raises(FileFormatError) as caught:
        read_package(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.count(str(path)) == 1
    return text.removeprefix(f"{path}: ")


def test_a_truncated_file_is_refused_wherever_it_ends(tiny_file: Path, tmp_path: Path) -> None:
    raw, cut = tiny_file.read_bytes(), tmp_path / "cut.lowbit"
    for size in [0, 1, 7, 8, 9, *range(16, len(raw) - 1, len(raw) // 25), len(raw) - 1]:
        cut.write_bytes(raw[:size])
        assert "truncated" in refusal(cut), size


def test_a_flipped_bit_is_found_wherever_it_is(tiny_file: Path, tmp_path: Path) -> None:
    raw, flipped = tiny_file.read_bytes(), tmp_path / "flipped.lowbit"
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(raw), (250,), generator=generator).tolist()
    for place in [*range(8), *places, len(raw) - 1]:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << (place % 8)
        flipped.write_bytes(damaged)
        assert refusal(flipped), place


def test_a_flipped_bit_in_a_tensor_is_found_by_that_tensors_checksum(tiny_file: Path, tmp_path: Path) -> None:
    _, manifest, vectors = read_parts(tiny_file)
    vectors["float32"][-1] += 1
    last = max(name for name, entry in manifest["tensors"].items() if entry[0] == "float32")
    path = write_parts(tmp_path / "flipped.lowbit", manifest, vectors)
    assert refusal(path) == f"tensor {last!r}: its checksum does not match, the file is damaged"


def test_other_bytes_behind_the_tensors_are_refused(tiny_file: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer.lowbit"
    longer.write_bytes(tiny_file.read_bytes() + b"\0" * 16)
    assert "truncated" in refusal(longer)


@pytest.mark.parametrize("version", ["2", "0.1", ""])
def test_another_version_is_refused_before_anything_else_is_read(tiny_file: Path, tmp_path: Path, version: str) -> None:
    _, _, vectors = read_parts(tiny_file)
    path = write_parts(tmp_path / "other.lowbit", b"of the future", vectors, version=version)
    assert refusal(path) == f"format version {version!r}, this lowbit reads version '1'. Install a matching lowbit."


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "was run"),)

    (tmp_path / "a.lowbit").write_bytes(pickle.dumps(Payload()))
    torch.save({"payload": Payload()}, tmp_path / "b.lowbit")
    for name in ("a.lowbit", "b.lowbit"):
        assert refusal(tmp_path / name).startswith("not a safetensors file, or a truncated one")
    assert not (tmp_path / "was run").exists()
    pickle.loads((tmp_path / "a.lowbit").read_bytes())
    assert (tmp_path / "was run").exists()  # the payload works where pickles are loaded


def test_files_of_other_programs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.lowbit").write_text("not a network " * 10)
    assert refusal(tmp_path / "text.lowbit").startswith("not a safetensors file")
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "other.lowbit")
    assert refusal(tmp_path / "other.lowbit") == "a safetensors file, but not one that lowbit wrote"


def test_a_file_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.lowbit", tmp_path):
        with pytest.raises(DataError, match=rf"{path}: (there is no such file|a folder, expected a file)"):
            read_package(path)


# Hostile files


def test_a_manifest_that_inflates_without_end_is_refused(tiny_file: Path, tmp_path: Path) -> None:
    path = write_parts(tmp_path / "bomb.lowbit", b" " * (LARGEST_MANIFEST + 1), {})
    assert path.stat().st_size < 50_000
    assert refusal(path) == f"its manifest is truncated or larger than {LARGEST_MANIFEST} bytes"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[1, 2]", "its manifest must be a JSON object, got list"),
        (b"{", "its manifest is not valid JSON"),
        (b'{"graph": NaN}', "its manifest is not valid JSON (NaN is not allowed)"),
        (b"\xff\xfe", "its manifest is not valid JSON"),
        (b"[" * 100_000, "its manifest is not valid JSON"),
        (b"{}", "its manifest must hold the sections info, graph, tensors, packed, layouts, numbers"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    assert refusal(write_parts(tmp_path / "m.lowbit", text, {})).startswith(reason)


def test_a_manifest_whose_own_checksum_differs_is_refused(tiny_file: Path, tmp_path: Path) -> None:
    _, manifest, vectors = read_parts(tiny_file)
    path = write_parts(tmp_path / "m.lowbit", manifest, vectors, checksum="0" * 16)
    assert refusal(path) == "the checksum of its manifest does not match: the file is damaged"


@pytest.mark.parametrize("shape", [[2**39, 2**39], [2**31], [10**30], [-1], [True], ["8"], [1] * 17, "8", None, [1.5]], ids=str)
def test_absurd_shapes_are_refused_before_any_memory_is_taken(tiny_file: Path, shape: object) -> None:
    def in_tensors(manifest: Manifest) -> None:
        manifest["tensors"]["head.bias"][1] = shape

    assert refusal(tampered(tiny_file, in_tensors)).startswith("tensor 'head.bias': ")

    def in_packed(manifest: Manifest) -> None:
        manifest["packed"]["conv1.weight"]["shape"] = shape

    assert refusal(tampered(tiny_file, in_packed)).startswith("tensor 'conv1.weight': ")


def test_a_shape_without_elements_hides_no_values(tiny_file: Path) -> None:
    def change(manifest: Manifest) -> None:
        manifest["tensors"] = {"head.bias": [*manifest["tensors"]["head.bias"][:1], [0, 2**39, 2**39, 2**39], "0" * 16]}

    assert refusal(tampered(tiny_file, change)) == "tensor 'head.bias': its checksum does not match, the file is damaged"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["tensors"].pop("stem.weight.zero_point"), r"8 values of 'uint8' belong to no tensor"),
        (lambda m: m["tensors"].pop("bn1.bias"), "tensor 'bn1.running_mean': its checksum does not match"),
        (lambda m: m["tensors"].__setitem__("head.bias", [1, 2]), r"'head.bias': it must be described by \[dtype, shape, checksum\]"),
        (lambda m: m["tensors"]["head.bias"].__setitem__(0, "complex128"), "tensor 'head.bias': the file contains fewer values"),
        (lambda m: m["packed"].__setitem__("absent", {}), "tensor 'absent': its codes are missing"),
        (lambda m: m["numbers"].__setitem__("conv1.weight", [1.0, 0]), "tensor 'conv1.weight': it appears twice"),
        (lambda m: m["numbers"].__setitem__("head.bias", [1.0, 0]), "tensor 'head.bias': it appears twice"),
        (lambda m: m["numbers"].__setitem__("x", [1.0, 2.0]), r"number 'x': expected \[value, dimensions\]"),
        (lambda m: m["numbers"].__setitem__("x", ["1", 0]), r"number 'x': expected \[value, dimensions\]"),
        (lambda m: m["numbers"].__setitem__("a" + ".a" * 100_000, [1.0, 0]), "its name has more than 64 parts"),
        (lambda m: m["layouts"].__setitem__("head.bias", "channels_last"), "channels_last needs 4 dimensions, the tensor has 1"),
        (lambda m: m["layouts"].__setitem__("absent", "channels_last"), "layout of 'absent': unknown tensor"),
        (lambda m: m["layouts"].__setitem__("conv1.weight", "strided"), "unknown tensor or memory format 'strided'"),
        (lambda m: m["info"].__setitem__("method", "x"), "cannot understand how the network was quantized"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tiny_file: Path, change: Callable[[Manifest], object], reason: str) -> None:
    assert re.search(reason, refusal(tampered(tiny_file, change)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", [["a", "conv2d", 4, 8, "done"]]),
        ("layers", [["a", "conv2d", 4, 8, "melted", ""]]),
        ("layers", [["a", "conv2d", 99, 8, "done", ""]]),
        ("layers", [["a", "conv2d", "\u00b2", 8, "done", ""]]),
        ("layers", 3),
        ("notes", [3]),
        ("seed", "x"),
        ("options", []),
        ("policy", {"default": {"weight": 99}}),
        ("policy", {"unknown": 1}),
        ("policy", None),
        ("policy", {"rules": [{"match": "a", "weight": "9" * 5000}]}),
    ],
)
def test_a_record_that_cannot_be_is_refused(tiny_file: Path, key: str, value: object) -> None:
    record = {"method": "m", "options": {}, "seed": 0, "policy": {}, "layers": [["a", "conv2d", 4, None, "done", ""]], "notes": []}
    good = tampered(tiny_file, lambda m: m.__setitem__("info", record))
    assert read_package(good).record is not None
    refusal(tampered(tiny_file, lambda m: m.__setitem__("info", {**record, key: value})))


@pytest.mark.parametrize("place", ["graph", "packed", "tensors", "numbers", "layouts", "info"])
def test_nesting_without_end_is_refused(tiny_file: Path, place: str) -> None:
    def change(manifest: Manifest) -> None:
        value: object = 1
        for _ in range(900):
            value = [value]
        manifest[place] = {**manifest[place], "nodes": value, "x": value, "policy": value, "structure": {"x": value}}

    assert refusal(tampered(tiny_file, change))


# Writing


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.lowbit"
    path.write_text("the file before")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_package(packed(quantized(TinyNet(), IMAGE), IMAGE), path)
    assert path.read_text() == "the file before"
    assert list(tmp_path.iterdir()) == [path]
