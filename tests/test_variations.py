"""Networks and data of the kinds that people bring, in other forms than the tests of each part have them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lowbit
from lowbit.errors import LowbitError
from lowbit.formats.onnx.sessions import PRECISE_PRODUCTS, saturates
from lowbit.network.insert import weight_sites

X = torch.randn(33, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(33) % 4
ONE_EPOCH = lowbit.Recipe(epochs=1, batch_size=16)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), *pooled
    ).eval()


def quantized(model: nn.Module, calibration: object = X, **options: object) -> nn.Module:
    return lowbit.quantize(model, method="round_to_nearest", calibration=calibration, **options)  # type: ignore[arg-type]


def sqnr(expected: Tensor, found: Tensor) -> float:
    a, b = expected.detach().double(), found.detach().double()
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum().clamp(min=1e-300)))


def loaded(model: nn.Module, sample: object, folder: Path, **options: object) -> nn.Module:
    """The network from its packed file; its ONNX file passes its check."""
    pytest.importorskip("onnx")
    lowbit.export(model, folder / "m.onnx", sample=sample, measure_speed=False, **options)  # type: ignore[arg-type]
    lowbit.export(model, folder / "m.lowbit", sample=sample, **{key: value for key, value in options.items() if key != "output_names"})  # type: ignore[arg-type]
    return lowbit.load(folder / "m.lowbit")


def onnx_outputs(path: Path, sample: Tensor, *, precise: bool = False) -> list[Tensor]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    if precise or saturates():
        options.add_session_config_entry(*PRECISE_PRODUCTS)
    session = ort.InferenceSession(path, options)
    return [torch.tensor(found) for found in session.run(None, {session.get_inputs()[0].name: sample.numpy()})]


REPARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "weight norm, old, second axis": lambda layer: weight_norm(layer, dim=1),
    "weight norm of the whole": lambda layer: parametrizations.weight_norm(layer, dim=None),  # type: ignore[arg-type]
    "spectral norm, old": spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "masks": lambda layer: (prune.l1_unstructured(layer, "weight", 0.5), prune.random_unstructured(layer, "bias", 0.5)),
}


@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_reparametrized_convolutions_keep_their_function(kind: str, tmp_path: Path) -> None:
    model = network()
    REPARAMETRIZED[kind](model[3])
    model.train()(X)
    expected, small = model.eval()(X), quantized(model)
    assert sqnr(expected, small(X)) > 25
    assert sqnr(small(X), loaded(small, X, tmp_path)(X)) > 60
    assert lowbit.train(model, (X, Y), method="lsq", recipe=ONE_EPOCH)(X).isfinite().all()


def test_a_recurrent_layer_with_weight_norm_keeps_its_function() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)
            weight_norm(self.rnn, "weight_hh_l0")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Last().eval(), torch.randn(32, 5, 6)
    assert sqnr(model(x), quantized(model, x)(x)) > 25


def test_a_decoder_layer_and_a_tied_head_used_by_function_are_quantized(tmp_path: Path) -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 16)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
            self.decoder, self.head = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.decoder(self.table(tokens), self.encoder(self.table(tokens))), self.head.weight)

    torch.manual_seed(0)
    model, tokens = Translator().eval(), torch.randint(0, 20, (32, 6))
    small = quantized(model, tokens)
    assert sqnr(model(tokens), small(tokens)) > 20
    assert not any("never" in row.reason for row in lowbit.summary(small).layers)
    assert sqnr(small(tokens), loaded(small, tokens, tmp_path)(tokens)) > 40
    for method in ("lsq", "pact", "dorefa", "qil"):
        output = lowbit.prepare(model, method=method, sample=tokens)(tokens)
        assert output.isfinite().all()


def test_attention_with_keys_and_values_of_other_widths_is_in_both_files(tmp_path: Path) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 2, kdim=12, vdim=10, batch_first=True), nn.Linear(16, 3)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.head(self.attention(q, k, v, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    inputs = torch.randn(16, 4, 16), torch.randn(16, 6, 12), torch.randn(16, 6, 10)
    model = Cross().eval()
    small = quantized(model, [inputs])
    assert sqnr(model(*inputs), small(*inputs)) > 25
    assert sqnr(small(*inputs), loaded(small, inputs, tmp_path)(*inputs)) > 50


def test_outputs_may_be_one_tensor_twice_an_input_or_nested(tmp_path: Path) -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.net(x)
            return {"a": y, "again": y, "x": x, "deep": (y * 2, [x[:, 0]])}

    small = quantized(Outputs().eval())
    found = loaded(small, X[:8], tmp_path, output_names=["p", "q", "r", "s", "t"])(X[:8])
    assert list(found) == ["a", "again", "x", "deep"] and torch.equal(found["x"], X[:8])
    assert len(onnx_outputs(tmp_path / "m.onnx", X[:8])) == 5


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_layers_used_twice_load_with_precise_products(bits: int, tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.inner(torch.relu(self.inner(torch.relu(self.stem(x)))))).mean((2, 3))
            return self.head(torch.relu(self.head(hidden)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    small = quantized(Twice().eval(), weight_bits=bits)
    loaded(small, X[:8], tmp_path)
    (found,) = onnx_outputs(tmp_path / "m.onnx", X[:8], precise=True)
    assert sqnr(small(X[:8]), found) > 35


def test_heights_and_widths_stay_open_through_a_skip_and_functions(tmp_path: Path) -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
            self.up, self.head = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            fine = F.silu(self.down(x))
            return self.head(torch.cat([fine, F.gelu(self.up(F.hardswish(self.inner(fine))))], 1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    small, other = quantized(Skip().eval()), torch.randn(2, 3, 20, 8)
    assert sqnr(small(other), loaded(small, X[:4], tmp_path, dynamic=["H", "W"])(other)) > 40
    assert sqnr(small(other), onnx_outputs(tmp_path / "m.onnx", other)[0]) > 35


def test_a_network_with_dropout_that_is_always_on_is_called_random_when_it_is_quantized() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.dropout(torch.relu(self.first(x)), 0.3, training=True))  # type: ignore[no-any-return]

    x = torch.randn(32, 8)
    for model in (quantized(Dropped(), x), lowbit.prepare(Dropped(), method="lsq", sample=x)):
        assert any("is random" in note for note in lowbit.summary(model).notes)
    assert not any("is random" in note for note in lowbit.summary(quantized(network())).notes)


def test_the_layer_behind_a_logarithm_of_negative_numbers_is_named() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.log(torch.tanh(self.first(x))))  # type: ignore[no-any-return]

    x, y = torch.randn(32, 8), torch.arange(32) % 3
    for run in (
        lambda: quantized(Logarithm(), x),
        lambda: lowbit.quantize(Logarithm(), method="adaround", calibration=x, iterations=5),
        lambda: lowbit.train(Logarithm(), (x, y), method="lsq", recipe=ONE_EPOCH),
    ):
        with pytest.raises(LowbitError, match="the first layer whose output is not finite is 'last"):
            run()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_everything_works_where_no_gradients_are_recorded(mode: Callable[[], object], tmp_path: Path) -> None:
    with mode():  # type: ignore[attr-defined]
        x = torch.randn(32, 3, 12, 12)
        small = lowbit.quantize(network(), method="brecq", calibration=x, iterations=4, activation_iterations=4)
        trained = lowbit.train(network(), (x, Y[:32]), method="lsq", recipe=ONE_EPOCH)
        delivery = lowbit.deliver(small, tmp_path, calibration=x, float_model=network(), onnx=False)
        assert delivery.report.parity_packed.passed and lowbit.diagnose(small, calibration=x).samples == 32
        assert 0 <= lowbit.evaluate(trained, (x, Y[:32]))["accuracy"] <= 1


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(1, 4), (2, 3), (3, 8)])
def test_a_file_that_passed_gives_the_answers_of_the_network(seed: int, weight_bits: int, activation_bits: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 12, 3, padding=1), nn.Hardswish(), nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.GELU(), nn.Conv2d(12, 12, 1))
    model = nn.Sequential(*layers, nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)).eval()
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            layer.bias.data = torch.round(layer.bias.data * 8) / 8  # near ties
    x, others = torch.randn(256, 3, 8, 8), torch.randn(512, 3, 8, 8)
    small = quantized(model, x, weight_bits=weight_bits, activation_bits=activation_bits)
    pytest.importorskip("onnx")
    parity = lowbit.export(small, tmp_path / "m.onnx", sample=x, measure_speed=False).parity
    assert parity.passed and parity.top1_agreement is not None and parity.top1_agreement >= 0.99
    same = onnx_outputs(tmp_path / "m.onnx", others)[0].argmax(1) == small(others).argmax(1)
    assert float(same.float().mean()) >= 0.985


@pytest.mark.parametrize("factor", [1e-20, 1e-30])
def test_values_that_are_tiny_within_the_network_lose_no_more(factor: float, tmp_path: Path) -> None:
    def scaled(by: float) -> nn.Module:
        model = network()
        model[1] = nn.Identity()
        with torch.no_grad():
            model[0].weight.mul_(by)
            for layer in (model[0], model[3], model[7]):
                layer.bias.mul_(by)
        return model

    plain, tiny = scaled(1), scaled(factor)
    small = quantized(tiny)
    expected = sqnr(plain(X), quantized(plain)(X))
    assert sqnr(tiny(X) / factor, small(X) / factor) == pytest.approx(expected, abs=0.5)
    assert sqnr(small(X) / factor, loaded(small, X, tmp_path)(X) / factor) > 60


class Samples(Dataset[object]):
    def __init__(self, sample: Callable[[int], object]) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> object:
        return self.sample(index)


def listed(samples: list[tuple[Tensor, ...]]) -> tuple[object, ...]:
    """A batch in which everything but the first member stays a list."""
    return torch.stack([sample[0] for sample in samples]), *map(list, list(zip(*samples, strict=True))[1:])


MEMBERS: dict[str, Callable[[int], object]] = {
    "names": lambda index: (X[index], f"n{index}"),
    "none": lambda index: (X[index], None),
    "numpy": lambda index: (X[index], np.int64(index % 4)),
    "boxes": lambda index: (X[index], {"boxes": torch.rand(index % 3, 4), "labels": torch.ones(index % 3)}),
    "three": lambda index: (X[index], int(Y[index]), f"n{index}"),
    "picture": lambda index: (X[index], X[index]),
    "mask": lambda index: (X[index], (X[index, 0] > 0).long()),
    "column": lambda index: (X[index], Y[index : index + 1]),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_whatever_stands_beside_inputs_is_dropped(kind: str, tmp_path: Path) -> None:
    batches = DataLoader(Samples(MEMBERS[kind]), batch_size=8, collate_fn=listed)
    small = quantized(network(), batches)
    assert torch.equal(small(X), quantized(network(), list(X.split(8)))(X))
    delivery = lowbit.deliver(small, tmp_path, calibration=batches, float_model=network(), onnx=False)
    assert delivery.report.sqnr_db is not None and delivery.report.sqnr_db > 25
    assert lowbit.diagnose(small, calibration=batches).samples == 32


LABELS = {
    "int8": Y.to(torch.int8), "uint8": Y.to(torch.uint8), "int32": Y.to(torch.int32), "column": Y[:, None].to(torch.int32),
    "one-hot": F.one_hot(Y, 4), "one-hot doubles": F.one_hot(Y, 4).double(), "ignored": torch.where(torch.arange(33) % 5 == 0, -100, Y),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_type_train_and_measure_the_same(kind: str) -> None:
    data = X, LABELS[kind]
    trained = lowbit.train(network(), data, method="lsq", recipe=ONE_EPOCH, test_data=data)
    if kind != "ignored":
        plain = lowbit.train(network(), (X, Y), method="lsq", recipe=ONE_EPOCH)
        torch.testing.assert_close(trained(X), plain(X), rtol=1e-4, atol=1e-5)
        assert lowbit.evaluate(trained, data)["accuracy"] == lowbit.evaluate(trained, (X, Y))["accuracy"]


def test_targets_that_no_tensor_holds_go_to_the_users_loss() -> None:
    def count_loss(output: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        return (output[:, 0] - torch.tensor([float(len(target["boxes"])) for target in targets])).square().mean()

    batches = DataLoader(Samples(MEMBERS["boxes"]), batch_size=8, collate_fn=listed)
    trained = lowbit.train(network(), batches, method="lsq", recipe=ONE_EPOCH, task=count_loss, test_data=batches)
    assert lowbit.evaluate(trained, batches, task=count_loss)["loss"] < 4


@pytest.mark.parametrize("method", ["lsq", "metaquant", "ewgs"])
def test_a_stream_without_length_whose_last_batch_is_one_sample(method: str) -> None:
    class Stream(IterableDataset[object]):
        def __iter__(self) -> object:  # type: ignore[override]
            yield from ((X[index], int(Y[index])) for index in range(33))

    stream = DataLoader(Stream(), batch_size=16)
    trained = lowbit.train(network(), stream, method=method, recipe=ONE_EPOCH, test_data=stream)
    before, after = network(), weight_sites(trained)
    assert trained(X).isfinite().all() and not torch.equal(after["0"].original, before[0].weight)
    adapted = lowbit.quantize(copy.deepcopy(before), method="adaround", iterations=4, calibration=stream)
    assert sqnr(before(X), adapted(X)) > 20


class TwoInputs(nn.Module):
    """Two inputs and an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = torch.relu(self.a(x) + self.b(z))
        return self.head(hidden if mask is None else hidden * mask)  # type: ignore[no-any-return]


def test_dicts_and_nested_inputs_give_one_network(tmp_path: Path) -> None:
    x, z, labels = torch.randn(32, 8), torch.randn(32, 4), Y[:32]
    named = {"x": x, "z": z, "labels": labels, "extra": torch.rand(32, 3)}
    found = []
    for data in (named, ((x, z), labels), (x, z, labels)):
        small = quantized(TwoInputs(), [data])
        found.append(small(x, z))
        assert lowbit.deliver(small, tmp_path, calibration=[data], float_model=TwoInputs(), onnx=False).report.parity_packed.passed
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    masked = quantized(TwoInputs(), [{**named, "mask": torch.zeros(32, 16)}])
    assert not torch.equal(masked(x, z), found[0])  # the mask is an input of the network
    trained = [lowbit.train(TwoInputs(), data, method="lsq", recipe=ONE_EPOCH)(x, z) for data in (named, ((x, z), labels))]
    torch.testing.assert_close(trained[0], trained[1])
