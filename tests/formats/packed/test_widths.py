"""Several widths of one network in one packed file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.formats.tampering import Manifest, read_parts, tampered
from tests.methods.adaptive.several import X, network, outputs
from torch import nn

import lowbit
from lowbit.errors import FileFormatError, GraphError
from lowbit.formats.packed.file import file_parts, package_widths, read_package, write_package
from lowbit.formats.packed.tensor import PackedTensor
from lowbit.formats.packed.widths import Choice, Nesting, cut_codes, cut_from
from lowbit.formats.program.program import export_program, export_switches
from lowbit.network.bits import set_bits, switches_of
from lowbit.network.record import record_of
from lowbit.network.surgery.switchable_norm import SwitchableNorm
from lowbit.quantizers.qtensor import AffineDecoder, QTensor
from lowbit.spec import Granularity


def prepared(method: str, bits: str, **options: object) -> nn.Module:
    """A network of several widths whose norms and clips all differ."""
    model = lowbit.prepare(network(), method=method, bits=bits, sample=X, **options).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def written(model: nn.Module, path: Path) -> Path:
    record = record_of(model)
    assert record is not None
    write_package(package_widths(model, export_switches(model, X), record), path)
    return path


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    return prepared("bit_mixer", "4,2")


@pytest.fixture(scope="module")
def file(mixed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(mixed, tmp_path_factory.mktemp("widths") / "mixed.lowbit")


@pytest.fixture(scope="module")
def joint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(prepared("adabits", "8,4,2"), tmp_path_factory.mktemp("widths") / "joint.lowbit")


def test_a_choice_counts_its_last_slot_fastest() -> None:
    choice = Choice(("a", "b"), tuple("0123"))
    assert [choice.at({"a": a, "b": b, "c": 1}, 2) for a in (0, 1) for b in (0, 1)] == list("0123")
    assert Choice((), ("x",)).at({}, 3) == "x"


def test_codes_are_cut_by_flooring_or_towards_zero() -> None:
    decoder = AffineDecoder(torch.ones(()), torch.zeros(()), Granularity.tensor())
    source = PackedTensor.of(QTensor(torch.tensor([-8, -5, -1, 0, 3, 4, 7], dtype=torch.int8), decoder, 4))
    assert cut_codes(source, 2, "floor").tolist() == [-2, -2, -1, 0, 0, 1, 1]
    assert cut_codes(source, 2, "trunc").tolist() == [-2, -1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("method", "bits", "cut", "stored"),
    # of the inner two layers at each lower width; DoReFa's codes nest at one bit alone, where they are signs
    [("adabits", "8,4,2", 4, 0), ("sp_nets", "32/32,4/4,1/1", 2, 0), ("sp_nets", "4,2", 0, 2), ("bit_mixer", "4,2", 2, 0)],
)
def test_every_width_computes_what_the_network_does_and_the_way_back_changes_no_bit(
    method: str, bits: str, cut: int, stored: int, tmp_path: Path
) -> None:
    model = prepared(method, bits)
    path = written(model, tmp_path / "all.lowbit")
    loaded, switches = lowbit.load(path), switches_of(model)
    assert switches_of(loaded) == switches
    seen = []
    for switch in (*switches, *switches[::-1]):
        set_bits(model, switch)
        set_bits(loaded, switch)
        assert lowbit.get_bits(loaded) == lowbit.get_bits(model)
        assert torch.equal(outputs(loaded), outputs(model))
        seen.append(outputs(loaded))
    assert all(torch.equal(a, b) for a, b in zip(seen, seen[::-1], strict=True))
    assert not torch.equal(seen[0], seen[1])
    widths = read_package(path).widths
    assert widths is not None
    assert (len(cut_from(widths)), (nesting := Nesting.of(widths)).cut, nesting.stored) == (cut, cut, stored)
    assert nesting.stored_bytes == stored * 6 * 6 * 9 * 2 // 8


def test_any_mixture_of_layers_widths_is_read_from_one_graph(mixed: nn.Module, file: Path) -> None:
    loaded = lowbit.load(file)
    seen = []
    for second, third in ((4, 4), (4, 2), (2, 4), (2, 2)):
        set_bits(mixed, {"conv2": second, "conv3": third})
        set_bits(loaded, {"conv2": second, "conv3": third})
        assert lowbit.get_bits(loaded) == lowbit.get_bits(mixed)
        assert torch.equal(outputs(loaded), outputs(mixed))
        seen.append(outputs(loaded))
    assert len({tuple(values.flatten().tolist()) for values in seen}) == 4
    assert torch.equal(outputs(lowbit.load(file, bits={"conv3": 2})), seen[1])
    set_bits(mixed, 4)


def test_what_widths_share_is_stored_once_and_codes_are_stored_at_the_most_bits(joint_file: Path) -> None:
    _, manifest, _ = read_parts(joint_file)
    inner = {name: entry for name, entry in manifest["packed"].items() if name.startswith("conv2")}
    assert sorted(inner) == ["conv2.weight", "conv2.weight@2/2", "conv2.weight@4/4"]
    assert inner["conv2.weight@2/2"]["cut"] == ["conv2.weight", "floor"] and "cut" not in inner["conv2.weight"]
    assert manifest["tensors"]["conv2.weight"][1] == [6 * 6 * 9] and "conv2.weight@2/2" not in manifest["tensors"]
    assert [name for name in manifest["tensors"] if name.startswith("fc.")] == [
        "fc.bias",
        "fc.weight",
        "fc.weight.scale",
        "fc.weight.zero_point",
    ]
    assert len([name for name in manifest["tensors"] if name.startswith("norm2.running_mean")]) == 3
    assert len([name for name in manifest["tensors"] if "norm" in name and ".weight" in name]) == 1  # all are still 1
    parts = file_parts(joint_file)
    assert sum(part.total_bytes for part in parts) == joint_file.stat().st_size
    assert {"widths", "graph"} <= {part.name for part in parts}
    assert next(part for part in parts if part.name == "conv2").code_bytes == 6 * 6 * 9


def test_equal_networks_give_equal_files_and_reading_one_gives_it_back(joint_file: Path, tmp_path: Path) -> None:
    assert written(prepared("adabits", "8,4,2"), tmp_path / "again.lowbit").read_bytes() == joint_file.read_bytes()
    write_package(read_package(joint_file), tmp_path / "copy.lowbit")
    assert (tmp_path / "copy.lowbit").read_bytes() == joint_file.read_bytes()


def test_a_file_starts_with_the_widths_that_the_network_had(mixed: nn.Module, tmp_path: Path) -> None:
    set_bits(mixed, {"conv2": 2, "conv3": 4})
    loaded = lowbit.load(written(mixed, tmp_path / "mixed.lowbit"))
    assert [bits.weight for bits in lowbit.get_bits(loaded).values()] == [8, 2, 4, 8]
    assert torch.equal(outputs(loaded), outputs(mixed))
    set_bits(mixed, 4)


def test_a_norm_that_is_folded_away_at_some_widths_cannot_be_held_for_pairs() -> None:
    model = prepared("bit_mixer", "4,2")
    programs = export_switches(model, X)
    for module in model.modules():
        if isinstance(module, SwitchableNorm):
            for norm in module.norms.values():
                norm.running_mean += 1  # type: ignore[operator]
    record = record_of(model)
    assert record is not None
    with pytest.raises(GraphError, match=r"'norm2.running_mean' is computed from the norms of 'norm2' .* Write a file for one width"):
        package_widths(model, programs, record)


def test_what_differs_without_belonging_to_a_layer_is_refused(mixed: nn.Module) -> None:
    record = record_of(mixed)
    assert record is not None
    first, second = export_switches(mixed, X)
    pooled = export_program(nn.Sequential(mixed, nn.ReLU()), X)
    with pytest.raises(GraphError, match="belongs to no layer whose width is chosen"):
        package_widths(mixed, [first, pooled], record)
    assert second.weights.keys() == first.weights.keys()


# Damage


def refusal(path: Path) -> str:
    with pytest.raises(FileFormatError) as caught:
        read_package(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_a_flipped_bit_is_found_wherever_it_is(file: Path, tmp_path: Path) -> None:
    raw, flipped = file.read_bytes(), tmp_path / "flipped.lowbit"
    for place in torch.randint(0, len(raw), (60,), generator=torch.Generator().manual_seed(0)).tolist():
        damaged = bytearray(raw)
        damaged[place] ^= 1 << (place % 8)
        flipped.write_bytes(damaged)
        assert refusal(flipped), place


def nested(manifest: Manifest) -> None:
    inner = {"choice": [["conv2"], [1, 2]]}
    manifest["graph"]["nodes"][0][2][1] = {"choice": [["conv2"], [inner, inner]]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(switches=[]), "its switches must be an object, got list"),
        (lambda m: m["switches"].update(widths=[[4, 4]]), "its switches must be 2 to 64 widths"),
        (lambda m: m["switches"].update(widths=[[4, 4]] * 2), "its switches list a width twice: 4/4, 4/4"),
        (lambda m: m["switches"].update(widths=[[4, 4], [9, 2]]), "its switches: bit_width must be a whole number from 1 to 8, got 9"),
        (lambda m: m["switches"].update(widths=[[4, 4], [2]]), "a width must be a list of 2 numbers of bits"),
        (lambda m: m["switches"].update(each="pair"), "widths of the network or each layer"),
        (lambda m: m["switches"].update(names=None), "must have objects for layers, tied and names"),
        (lambda m: m["switches"]["layers"].update(conv2=[[4, 4, None]]), "layer 'conv2': its bits must be listed for 2 switches"),
        (lambda m: m["switches"]["tied"].update(conv2="conv2"), "'conv2' is tied to 'conv2', which must be another layer"),
        (lambda m: m["switches"].update(places={"conv2": 0}), "must say where it starts for 'conv2', 'conv3'"),
        (lambda m: m["switches"].update(places={"conv2": 0, "conv3": 2}), "must say where it starts"),
        (lambda m: m["switches"].update(places={"conv2": 0, "conv3": True}), "must say where it starts"),
        (lambda m: m["switches"]["names"].update(x=[["conv2"], [None]]), "a choice of 1 slots with 2 widths has 2 values, got 1"),
        (lambda m: m["switches"]["names"].update(x=[["conv2", "conv2"], [None] * 4]), "a choice must be between widths of up to 2"),
        (lambda m: m["switches"]["names"].update(x=[["conv9"], [None, None]]), "of up to 2 of its slots, got ['conv9']"),
        (lambda m: m["switches"]["names"].update(x=[[], ["absent"]]), "tensor 'x': it means 'absent', which the file does not contain"),
        (lambda m: m["switches"]["names"].update(x=[[], [3]]), "tensor 'x': it means '3', which the file does not contain"),
        (lambda m: m["switches"]["names"].update({"conv2.weight": [["conv2"], [None, "conv2.weight"]]}), "it reads the tensor 'conv2.weight'"),
        (lambda m: m["switches"]["names"].update({"a" + ".a" * 100: [[], ["fc.bias"]]}), "its name has more than 64 parts"),
        (lambda m: m["packed"]["conv2.weight@2/2"].update(cut=["absent", "floor"]), "must be cut from those of a stored tensor"),
        (lambda m: m["packed"]["conv2.weight@2/2"].update(cut=["conv2.weight", "up"]), "must be cut from those of a stored tensor"),
        (lambda m: m["packed"]["conv2.weight@2/2"].update(cut=["conv3.weight@2/2", "trunc"]), "must be cut from those of a stored tensor"),
        (lambda m: m["packed"]["conv2.weight@2/2"].update(bit_width=4), "is no width and offset of codes cut from those of 4 bits"),
        (lambda m: m["packed"]["conv2.weight@2/2"].update(offset=-300), "is no width and offset of codes"),
        (lambda m: m["packed"]["conv2.weight@2/2"].update(shape=[6, 6, 3, 4]), "432 codes of 2 bits need 108 bytes"),
        (lambda m: m["packed"]["conv2.weight"].update(cut=["conv3.weight", "trunc"]), "tensor 'conv2.weight': it appears twice"),
        (lambda m: m["packed"]["conv2.weight@2/2"].pop("cut"), "tensor 'conv2.weight@2/2': its codes are missing"),
        (lambda m: m["graph"]["nodes"][0][2].__setitem__(1, {"choice": [["conv2"], [0]]}), "graph: a choice of 1 slots with 2 widths"),
        (lambda m: m["graph"]["nodes"][0][2].__setitem__(1, {"choice": 3}), "graph: a choice must be [slots, values]"),
        (nested, "cannot understand the argument {'choice'"),
        (lambda m: m.update(info={}), "it holds several widths and does not say how the network was quantized"),
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_refused(file: Path, change: Callable[[Manifest], object], reason: str) -> None:
    assert reason in refusal(tampered(file, change))


def test_a_name_that_no_network_can_have_is_refused_when_it_is_switched_to_and_changes_nothing(file: Path) -> None:
    def change(manifest: Manifest) -> None:
        text = json.dumps(manifest["graph"])
        manifest["graph"] = json.loads(
            text.replace('{"tensor": "fc.bias"}', '{"choice": [["conv2"], [{"tensor": "fc.bias"}, {"tensor": "parameters"}]]}')
        )
        manifest["switches"]["names"]["parameters"] = [[], ["fc.bias"]]

    loaded = lowbit.load(tampered(file, change))
    before = outputs(loaded)
    with pytest.raises(FileFormatError, match="a name that no network can have"):
        set_bits(loaded, 2)
    assert torch.equal(outputs(loaded), before)
