from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.formats.networks import WEIGHT_QUANTIZERS, activation_quantizer, quantized
from tests.formats.packed.test_tensor import ALL, KINDS
from tests.formats.tampering import Manifest, read_parts, tampered, write_parts
from tests.networks import DictOutputNet, ReusedNet, TinyNet, Torture, TwoInputNet, settled
from torch import Tensor, nn

import lowbit
from lowbit.errors import FileFormatError, LowbitError, SpecError
from lowbit.formats.packed.file import read_package, write_package
from lowbit.network.insert import bake_weights, set_input_quantizer, set_weight_quantizer
from lowbit.network.record import record_of
from lowbit.spec import BitPolicy, Granularity
from lowbit.workflows.export import export
from lowbit.workflows.load import load

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module, *inputs: Tensor, **named: Tensor) -> Any:
    with torch.no_grad():
        return model(*inputs, **named)


def rounded(model: nn.Module, *, weight_bits: int = 4) -> nn.Module:
    """``model`` as the public function quantizes it: with a record."""
    return lowbit.quantize(settled(model, IMAGE), method="round_to_nearest", weight_bits=weight_bits, calibration=IMAGE)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return rounded(TinyNet(16), weight_bits=3)


@pytest.fixture(scope="module")
def tiny_file(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loaded") / "tiny.lowbit"
    export(tiny, path, sample=IMAGE)
    return path


# Round trips


@pytest.mark.parametrize("granularity", [Granularity.tensor(), Granularity.channel(0), Granularity.group(9)], ids=str)
def test_layers_of_every_kind_and_width_compute_the_same_again(tmp_path: Path, granularity: Granularity) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in ALL)).eval()
    for layer, (kind, bit_width) in zip(model, ALL, strict=True):
        assert isinstance(layer, nn.Conv2d)
        quantizer = KINDS[kind][1](bit_width, granularity)
        with torch.no_grad():
            layer.weight *= 3
        quantizer.initialize(layer.weight.detach())
        set_weight_quantizer(layer, quantizer)
        set_input_quantizer(layer, activation_quantizer())
    x = torch.randn(2, 6, 5, 5)
    export(model, tmp_path / "m.lowbit", sample=x)
    loaded = load(tmp_path / "m.lowbit")
    expected = outputs(model, x)
    assert expected.std() > 0.01
    assert torch.equal(outputs(loaded, x), expected)
    found = loaded.weight_codes()  # type: ignore[operator]
    assert [found[f"{index}.weight"].bit_width for index in range(len(ALL))] == [bit_width for _, bit_width in ALL]


@pytest.mark.parametrize("weights", WEIGHT_QUANTIZERS)
def test_a_network_computes_the_same_again_and_takes_any_batch(tmp_path: Path, weights: str) -> None:
    model = quantized(TinyNet(), IMAGE, weights=weights)
    export(model, tmp_path / "m.lowbit", sample=IMAGE[:2])
    loaded = load(tmp_path / "m.lowbit")
    assert not loaded.training
    for batch in (IMAGE, IMAGE[:1], torch.cat([IMAGE] * 3)):
        assert torch.equal(outputs(loaded, batch), outputs(model, batch))


def test_inputs_and_outputs_keep_their_names_and_nesting(tmp_path: Path) -> None:
    vector = torch.randn(4, 5)
    export(quantized(DictOutputNet(), IMAGE), tmp_path / "dict.lowbit", sample=IMAGE)
    assert list(outputs(load(tmp_path / "dict.lowbit"), IMAGE)) == ["logits", "side"]
    model = quantized(TwoInputNet(), IMAGE, vector)
    export(model, tmp_path / "two.lowbit", sample=(IMAGE, vector))
    loaded, expected = load(tmp_path / "two.lowbit"), outputs(model, IMAGE, vector)
    for got in (outputs(loaded, IMAGE, vector), outputs(loaded, IMAGE, vector=vector), outputs(loaded, vector=vector, image=IMAGE)):
        assert torch.equal(got, expected)


class Recurrent(nn.Module):
    """Operators that are checked before they are called, as real networks use them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.groups, self.instances, self.layers = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.LayerNorm(8)
        self.batches = nn.BatchNorm2d(8, track_running_stats=False)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.batches(self.instances(self.groups(self.conv(x))))
        y = nn.functional.interpolate(y, size=(4, 4), mode="bilinear", antialias=True)
        sequence = self.layers(y.flatten(2).transpose(1, 2))
        sequence = nn.functional.scaled_dot_product_attention(sequence, sequence, sequence)
        return self.head(self.lstm(sequence)[0])


def test_norms_recurrence_and_attention_pass_the_checks_of_operators(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantized(Recurrent(), IMAGE)
    export(model, tmp_path / "m.lowbit", sample=IMAGE)
    torch.testing.assert_close(outputs(load(tmp_path / "m.lowbit"), IMAGE), outputs(model, IMAGE), rtol=1e-5, atol=1e-5)


class AwkwardNames(nn.Module):
    """Modules that are called as a loaded network could call its own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.info, self.record, self.codes = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.codes(self.record(self.info(x)))


def test_modules_may_be_called_info_or_codes(tmp_path: Path) -> None:
    model = quantized(AwkwardNames(), IMAGE)
    export(model, tmp_path / "m.lowbit", sample=IMAGE)
    assert torch.equal(outputs(load(tmp_path / "m.lowbit"), IMAGE), outputs(model, IMAGE))


RUN_WITHOUT_THE_CLASS = """
import sys
import safetensors.torch, torch
import lowbit
with torch.no_grad():
    result = lowbit.load(sys.argv[1])(safetensors.torch.load_file(sys.argv[2])["x"])
safetensors.torch.save_file({"y": result}, sys.argv[3])
assert not [name for name in sys.modules if name.split(".")[0] == "tests"]
"""


def test_another_process_without_the_class_runs_it(tiny: nn.Module, tiny_file: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": IMAGE}, tmp_path / "x.safetensors")
    arguments = [str(tiny_file), str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    source = str(Path(lowbit.__file__).parents[1])
    subprocess.run([sys.executable, "-c", RUN_WITHOUT_THE_CLASS, *arguments], check=True, cwd=tmp_path, env={"PYTHONPATH": source})
    found = safetensors.torch.load_file(tmp_path / "y.safetensors")["y"]
    torch.testing.assert_close(found, outputs(tiny, IMAGE), rtol=1e-5, atol=1e-5)


def test_a_loaded_network_is_an_ordinary_module(tiny_file: Path) -> None:
    loaded = load(tiny_file)
    expected = outputs(loaded, IMAGE)
    assert torch.equal(outputs(copy.deepcopy(loaded), IMAGE), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(loaded)), IMAGE), expected)
    buffer = io.BytesIO()
    torch.save(loaded.state_dict(), buffer)
    assert buffer.tell() < 1.5 * sum(t.numel() * t.element_size() for t in loaded.state_dict().values()) + 10_000
    other = load(tiny_file)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(outputs(other, IMAGE), expected)


def test_the_state_has_the_names_of_the_network(tiny: nn.Module, tiny_file: Path) -> None:
    names = {name for name, _ in bake_weights(tiny)[0].named_parameters() if name.endswith("weight") and not name.startswith("bn")}
    loaded = dict(load(tiny_file).named_parameters())
    assert names <= set(loaded)
    assert not any(parameter.requires_grad for parameter in loaded.values())


# What is known about it


def test_the_summary_of_a_loaded_network_has_the_bits_of_its_layers(tiny: nn.Module, tiny_file: Path) -> None:
    before, after = lowbit.summary(tiny), lowbit.summary(load(tiny_file))
    assert after.method == "round_to_nearest"
    assert [(layer.name, layer.kind) for layer in after.layers] == [(layer.name, layer.kind) for layer in before.layers]
    assert [(layer.weight_bits, layer.activation_bits) for layer in after.layers] == [(8, 8), (3, 8), (3, 8), (8, 8)]
    for ours, theirs in zip(after.layers, before.layers, strict=True):
        assert (ours.shape, ours.quantizer, ours.granularity, ours.status) == (theirs.shape, theirs.quantizer, theirs.granularity, "done")
        assert (ours.stored_bytes, ours.float_bytes) == (theirs.stored_bytes, theirs.float_bytes)
    assert after.layers[1].stored_bytes == 16 * 16 * 9 * 3 / 8 + 16 * 4 + 16 * 4  # codes, scales, bias
    assert after.stored_bytes == pytest.approx(before.stored_bytes, abs=100)
    assert "conv1" in str(after)
    assert after.notes == before.notes


def test_layers_left_in_float_are_in_the_summary_with_the_reason(tmp_path: Path) -> None:
    policy = BitPolicy.uniform(4, 8).keep_float("conv2")
    model = lowbit.quantize(settled(TinyNet(), IMAGE), method="round_to_nearest", policy=policy, calibration=IMAGE)
    export(model, tmp_path / "m.lowbit", sample=IMAGE)
    before = {layer.name: layer for layer in lowbit.summary(model).layers}["conv2"]
    after = {layer.name: layer for layer in lowbit.summary(load(tmp_path / "m.lowbit")).layers}["conv2"]
    assert (after.status, after.weight_bits, after.reason) == ("skipped", None, before.reason)
    assert after.reason
    assert after.stored_bytes == before.stored_bytes == 8 * 8 * 9 * 4 + 8 * 4


def test_a_file_without_a_record_still_says_the_bits_of_its_weights(tmp_path: Path) -> None:
    export(quantized(TinyNet(), IMAGE, weights="affine"), tmp_path / "m.lowbit", sample=IMAGE)
    loaded = load(tmp_path / "m.lowbit")
    assert record_of(loaded) is None
    found = {layer.name: layer for layer in lowbit.summary(loaded).layers}
    assert {name: layer.weight_bits for name, layer in found.items()} == {"stem": 3, "conv1": 3, "conv2": 3, "head": 3}
    assert {layer.quantizer for layer in found.values()} == {"uniform affine"}
    assert {layer.reason for layer in found.values()} == {"the file does not record the activation bits"}


def test_the_record_is_that_of_the_quantization(tiny: nn.Module, tiny_file: Path) -> None:
    before, after = record_of(tiny), record_of(load(tiny_file))
    assert before is not None
    assert after is not None
    assert (after.method, after.seed, after.policy) == (before.method, before.seed, before.policy)
    assert list(after.table) == list(before.table)
    assert after.table.notes == before.table.notes
    assert set(after.options) == set(before.options)


def test_a_loaded_network_is_exported_again_without_loss(tiny_file: Path, tmp_path: Path) -> None:
    first = load(tiny_file)
    export(first, tmp_path / "again.lowbit", sample=IMAGE)
    again = load(tmp_path / "again.lowbit")
    assert torch.equal(outputs(again, IMAGE), outputs(first, IMAGE))
    assert lowbit.summary(again).layers == lowbit.summary(first).layers
    export(again, tmp_path / "third.lowbit", sample=IMAGE)
    assert (tmp_path / "third.lowbit").read_bytes() == (tmp_path / "again.lowbit").read_bytes()


# Wrong inputs


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((), {}, r"expects x: float32 \[batch, 3, 8, 8\]; got 0 inputs: none"),
        ((IMAGE, IMAGE), {}, "got 2 inputs: a tensor, a tensor"),
        ((), {"y": IMAGE}, "got 1 inputs: y"),
        ((IMAGE[:, :2],), {}, r"input 'x' must be float32 \[batch, 3, 8, 8\], got float32 \[4, 2, 8, 8\]"),
        ((IMAGE[0],), {}, r"got float32 \[3, 8, 8\]"),
        ((IMAGE[..., :7],), {}, r"got float32 \[4, 3, 8, 7\]"),
        ((IMAGE[..., None],), {}, r"got float32 \[4, 3, 8, 8, 1\]"),
        ((IMAGE.double(),), {}, r"got float64 \[4, 3, 8, 8\]"),
        ((IMAGE.byte(),), {}, r"got uint8 \[4, 3, 8, 8\]"),
        ((IMAGE[:0],), {}, "the batch size must be 1 to any, got 0"),
        ((IMAGE.numpy(),), {}, r"input 'x' must be a tensor: float32 \[batch, 3, 8, 8\]; got ndarray"),
        (("image.png",), {}, "got str"),
        ((IMAGE.to("meta"),), {}, r"input 'x' is on meta, the network on cpu\. Move one of them"),
    ],
)
def test_inputs_that_do_not_fit_are_named(tiny_file: Path, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        load(tiny_file)(*args, **kwargs)


def test_inputs_of_different_batch_sizes_are_named(tmp_path: Path) -> None:
    vector = torch.randn(4, 5)
    export(quantized(TwoInputNet(), IMAGE, vector), tmp_path / "m.lowbit", sample=(IMAGE, vector))
    with pytest.raises(SpecError, match="the inputs differ in their batch size: image 4, vector 3"):
        load(tmp_path / "m.lowbit")(IMAGE, vector[:3])


# Hostile files


def refused_or_computed(path: Path, *inputs: Tensor) -> bool:
    """Whether the file loads and runs; any error that is not lowbit's own is a failure."""
    try:
        outputs(load(path), *inputs)
    except LowbitError as error:
        assert str(error)
        return False
    return True


@pytest.mark.parametrize(
    "name",
    [
        "forward",
        "training",
        "packed_graph",
        "packed_source",
        "lowbit_record",
        "_modules",
        "__class__",
        "",
        ".",
        "a..b",
        "eval.weight",
        "stem",
        "stem.bias.x",
    ],
)
def test_tensors_cannot_take_the_place_of_the_networks_own_parts(tiny_file: Path, name: str) -> None:
    path = tampered(tiny_file, lambda manifest: manifest["numbers"].__setitem__(name, [1.0, 0]))
    with pytest.raises(FileFormatError, match=rf"{path}: a tensor has a name that no network can have"):
        load(path)


def replaced(path: Path, name: str, value: Tensor) -> Path:
    """A copy of the file with one float tensor replaced."""
    content = read_package(path)
    write_package(dataclasses.replace(content, tensors={**content.tensors, name: value}), path.with_name("replaced.lowbit"))
    return path.with_name("replaced.lowbit")


def test_a_batch_norm_with_short_statistics_is_refused_when_it_runs(tmp_path: Path) -> None:
    export(quantized(TinyNet(), IMAGE), tmp_path / "m.lowbit", sample=IMAGE)
    loaded = load(replaced(tmp_path / "m.lowbit", "bn1.running_mean", torch.zeros(2)))
    with pytest.raises(FileFormatError, match=r"graph node .*batch_norm.* cannot be computed: .*one element for each channel"):
        loaded(IMAGE)


def test_a_bias_of_another_size_is_a_clear_error_when_it_runs(tiny_file: Path) -> None:
    with pytest.raises(FileFormatError, match=r"graph node 'conv2d.*' \(aten\.conv2d\.default\) cannot be computed: "):
        load(replaced(tiny_file, "conv1.bias", torch.zeros(3)))(IMAGE)


def mutations(value: Any, generator: random.Random) -> Any:
    """``value`` with one random place in it changed."""
    odd = [None, True, -1, 0, 2**40, 1e300, "", "x", "aten.relu.default", [], {}, [[]], {"node": "x"}, {"tensor": "head.bias"}, 3, 9**99]
    if isinstance(value, (dict, list)) and value and generator.random() < 0.93:
        key = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
        roll = generator.random()
        if roll < 0.05:
            del value[key]
        elif roll < 0.1 and isinstance(value, list):
            value.insert(key, copy.deepcopy(generator.choice(value)))
        else:
            value[key] = mutations(value[key], generator)
        return value
    return copy.deepcopy(generator.choice(odd))


def test_random_changes_of_the_manifest_end_in_errors_that_are_lowbits_own(tiny_file: Path, tmp_path: Path) -> None:
    _, original, vectors = read_parts(tiny_file)
    results = []
    for seed in range(600):
        manifest: Manifest = mutations(copy.deepcopy(original), random.Random(seed))
        results.append(refused_or_computed(write_parts(tmp_path / "m.lowbit", manifest, vectors), IMAGE[:1]))
    assert results.count(False) > 400


def test_awkward_networks_run_from_their_files(tmp_path: Path) -> None:
    vector = torch.randn(4, 5)
    model = quantized(Torture(), IMAGE, vector)
    export(model, tmp_path / "torture.lowbit", sample=(IMAGE, vector))
    got, expected = outputs(load(tmp_path / "torture.lowbit"), IMAGE, vector), outputs(model, IMAGE, vector)
    assert all(torch.equal(got[key], expected[key]) for key in ("logits", "side"))
    reused = quantized(ReusedNet(), IMAGE)
    export(reused, tmp_path / "reused.lowbit", sample=IMAGE)
    assert torch.equal(outputs(load(tmp_path / "reused.lowbit"), IMAGE), outputs(reused, IMAGE))


class NamesOfLowbit(nn.Module):
    """A network whose parts are called as attributes of a loaded network are."""

    def __init__(self) -> None:
        super().__init__()
        self.provenance, self.report, self.compute = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)
        self.source, self.float_size = nn.Linear(8, 4), nn.Parameter(torch.full((8,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.report(torch.relu(self.provenance(x)))).mean((2, 3)) * self.float_size
        return self.source(torch.relu(self.compute(hidden)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kernels", [False, True])
def test_parts_may_be_called_as_lowbits_own_attributes(kernels: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, known = torch.randn(16, 3, 8, 8), lowbit.Provenance(classes=("a", "b", "c", "d"))
    small = lowbit.quantize(NamesOfLowbit().eval(), method="round_to_nearest", calibration=images)
    export(small, tmp_path / "m.lowbit", sample=images, kernels=kernels, provenance=known)
    loaded = load(tmp_path / "m.lowbit", check_finite=True)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(loaded)))
    export(loaded, tmp_path / "again.lowbit", sample=images)
    for network in (loaded, copied, load(tmp_path / "again.lowbit")):
        assert network.provenance == known
        assert {"provenance", "report", "compute", "source", "float_size"} == {name.partition(".")[0] for name in network.state_dict()}
        torch.testing.assert_close(network(images), small(images), rtol=1e-5, atol=1e-5)


def test_a_network_that_refuses_nan_is_exported_again(tiny_file: Path, tmp_path: Path) -> None:
    loaded = load(tiny_file, check_finite=True)
    images = torch.randn(4, *loaded.packed_graph.inputs[0].shape[1:])
    export(loaded, tmp_path / "again.lowbit", sample=images)
    assert torch.equal(load(tmp_path / "again.lowbit")(images), loaded(images))
