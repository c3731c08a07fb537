from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.networks import LoopNet, SharedWeightNet
from tests.qat.adaptive import chain
from torch import Tensor, nn

import lowbit
from lowbit.measure import compute_cost, count_macs, model_size, qtensor_bytes
from lowbit.measure.cost import float_size
from lowbit.network.insert import set_input_quantizer, set_weight_quantizer
from lowbit.quantizers import SumQuantizer, UniformQuantizer
from lowbit.spec import Granularity

CHANNEL = Granularity.channel(0)


def uniform(bit_width: int, granularity: Granularity = CHANNEL, *, symmetric: bool = True) -> UniformQuantizer:
    return UniformQuantizer(bit_width, signed=symmetric, symmetric=symmetric, granularity=granularity)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3), (4, 10), 6 * 8 * 4 * 3),
        (nn.Conv2d(4, 8, 3, groups=2, padding=1, stride=2), (4, 7, 9), 8 * 4 * 5 * 2 * 9),
        (nn.Conv2d(4, 4, (1, 3), groups=4, dilation=2), (4, 5, 9), 4 * 5 * 5 * 1 * 3),
        (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 3 * 27 * 2 * 8),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 5), 4 * 5 * 6 * 3),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 3, 3), 4 * 9 * 3 * 4),
        (nn.Linear(5, 7), (5,), 35),
        (nn.Linear(5, 7), (11, 5), 11 * 35),
    ],
    ids=["conv1d", "grouped", "depthwise", "conv3d", "transposed1d", "transposed grouped", "linear", "tokens"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_those_counted_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int, batch: int) -> None:
    assert count_macs(nn.Sequential(layer), torch.zeros(batch, *shape)) == {"0": macs}


def test_every_call_of_a_layer_counts() -> None:
    assert count_macs(LoopNet(repeats=3), torch.zeros(2, 6)) == {"layers.0": 36, "layers.1": 36, "layers.2": 4 * 36}


def test_bit_operations_take_float_operands_as_32_bits() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    set_weight_quantizer(model[0], uniform(4))
    model[0].parametrizations.weight[0].quantizer.initialize(model[0].parametrizations.weight.original)
    activation = uniform(6, Granularity.tensor(), symmetric=False)
    activation.set_parameters(torch.tensor(0.1), torch.tensor(3.0))
    set_input_quantizer(model[0], activation)
    cost = compute_cost(model, torch.zeros(1, 5))
    assert cost["0"].bops == 35 * 4 * 6
    assert cost["2"].bops == 14 * 32 * 32


def test_stored_bytes_are_codes_times_bits_and_tables() -> None:
    weight = torch.randn(6, 35)  # 210 codes
    for bit_width, code_bytes in ((1, 27), (3, 79), (5, 132), (8, 210)):
        quantizer = uniform(bit_width, symmetric=False)
        quantizer.initialize(weight)
        assert qtensor_bytes(quantizer.encode(weight)) == (code_bytes, 6 * 4 + 6)  # zero points take a byte each
    symmetric = uniform(3)
    symmetric.initialize(weight)
    assert qtensor_bytes(symmetric.encode(weight)) == (79, 24)  # zero points that are all zero take nothing


def test_all_parts_of_a_sum_are_stored() -> None:
    weight = torch.randn(6, 35)
    quantizer = SumQuantizer([uniform(3), uniform(3)])
    quantizer.initialize(weight)
    assert qtensor_bytes(quantizer.encode(weight)) == (158, 48)  # 2 x 210 x 3 bits, densely packed


def test_a_network_adds_up_its_layers_and_the_rest() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    floats = model_size(model)
    assert floats.float_bytes == floats.total_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())

    quantizer = uniform(4)
    quantizer.initialize(model[0].weight.detach())
    set_weight_quantizer(model[0], quantizer)
    activation = uniform(8, Granularity.tensor(), symmetric=False)
    activation.set_parameters(torch.tensor(0.1), torch.tensor(3.0))
    set_input_quantizer(model[0], activation)
    size = model_size(model)
    conv = size.layers["0"]
    assert (conv.weight_bytes, conv.table_bytes, conv.bias_bytes, conv.float_bytes) == (108, 32, 32, 216 * 4 + 32)
    assert size.layers["4"].total_bytes == size.layers["4"].float_bytes == 45 * 4
    assert size.float_bytes == floats.float_bytes
    assert size.other_bytes == 4 * 8 * 4 + 8 + 8  # the norm with its int64 counter; scale and zero point of the activation
    assert size.total_bytes == 172 + 180 + 144


def test_a_shared_weight_is_stored_once() -> None:
    model = SharedWeightNet()
    assert model_size(model).total_bytes == (36 + 6 + 6) * 4


@pytest.mark.parametrize(("second_bits", "stored"), [(4, 18 + 24), (2, 18 + 24 + 9 + 24)], ids=["same codes", "other codes"])
def test_a_shared_weight_is_stored_once_for_each_form_of_its_codes(second_bits: int, stored: int) -> None:
    model = SharedWeightNet()
    for layer, bit_width in ((model.encode, 4), (model.decode, second_bits)):
        quantizer = uniform(bit_width)
        quantizer.initialize(layer.weight.detach())
        set_weight_quantizer(layer, quantizer)
    size = model_size(model)
    assert size.total_bytes == stored + (6 + 6) * 4
    assert size.float_bytes == (36 + 6 + 6) * 4


class LayerOfTwoNames(nn.Module):
    """A layer and a norm that the network holds, and calls, under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.again, self.norm_again = self.first, self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm_again(self.again(torch.relu(self.norm(self.first(x))))))  # type: ignore[no-any-return]


class TiedEnds(nn.Module):
    """An embedding whose weight is the last layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.table(tokens))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [4, 8])  # at 4 bits the ends have forms of their own, as they keep 8
@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (SharedWeightNet(), torch.randn(16, 6)),
        (TiedEnds(), torch.randint(20, (16, 5))),
        (LayerOfTwoNames(), torch.randn(16, 16)),
        (LoopNet(repeats=3), torch.randn(16, 6)),
    ],
    ids=["two layers", "embedding and head", "two names", "loop"],
)
def test_a_loaded_network_knows_the_size_of_the_float_one(model: nn.Module, sample: Tensor, bits: int, tmp_path: Path) -> None:
    distinct = {id(t): t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values()}
    policy = lowbit.BitPolicy.uniform(4, 8).with_rule(match=list(model_size(model).layers)[-1], weight=bits)
    small = lowbit.quantize(model.eval(), method="round_to_nearest", policy=policy, calibration=sample)
    lowbit.export(small, tmp_path / "m.lowbit", sample=sample)
    lowbit.export(lowbit.load(tmp_path / "m.lowbit"), tmp_path / "again.lowbit", sample=sample)
    for network in (small, lowbit.load(tmp_path / "m.lowbit"), lowbit.load(tmp_path / "again.lowbit")):
        assert lowbit.summary(network).float_bytes == sum(distinct.values())
    before, after = (lowbit.summary(network) for network in (small, lowbit.load(tmp_path / "m.lowbit")))
    assert [(row.name, row.float_bytes, row.weight_bits) for row in after.layers] == [
        (row.name, row.float_bytes, row.weight_bits) for row in before.layers
    ]


def test_a_layer_of_two_names_is_in_few_bits_in_both_files(tmp_path: Path) -> None:
    sample = torch.randn(16, 16)
    small = lowbit.quantize(LayerOfTwoNames().eval(), method="round_to_nearest", weight_bits=4, calibration=sample)
    lowbit.export(small, tmp_path / "m.lowbit", sample=sample)
    assert set(lowbit.load(tmp_path / "m.lowbit").weight_codes()) == {"first.weight", "last.weight"}
    pytest.importorskip("onnx")
    report = lowbit.export(small, tmp_path / "m.onnx", sample=sample, measure_speed=False)
    assert report.integer is not None and report.integer.linear_integer == report.integer.linear_total


@pytest.mark.parametrize("method", ["adabits", "sp_nets"])
def test_a_network_of_several_widths_takes_at_each_what_one_of_that_width_takes(method: str) -> None:
    images = torch.rand(4, 2, 6, 6)
    several = lowbit.prepare(chain(), method=method, bits=[8, 4, 2], sample=images)
    for bits in (8, 2):
        lowbit.set_bits(several, bits)
        alone = lowbit.prepare(chain(), method=method, weight_bits=bits, activation_bits=bits, sample=images)
        assert model_size(several) == model_size(alone)
    assert float_size(several).total_bytes == float_size(chain()).total_bytes
