"""Weights of layers that compute in float: embeddings, attention's input projections, recurrent layers."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lowbit
from lowbit.errors import GraphError, SpecError
from lowbit.network import insert
from lowbit.network.bits import get_bits, set_bits
from lowbit.network.record import record_of
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.spec import Granularity, LayerBits
from lowbit.testing import post_training

TOKENS = torch.randint(1, 20, (32, 5), generator=torch.Generator().manual_seed(0))
LSTM = [f"lstm.weight_{part}_l{layer}" for layer in (0, 1) for part in ("ih", "hh")]


class Tagger(nn.Module):
    """Embedding, a parameter of its own, norm, attention, LSTM, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position, self.norm = (
            nn.Embedding(20, 16, padding_idx=0),
            nn.Parameter(torch.randn(5, 16) / 4),
            nn.LayerNorm(16),
        )
        self.attention, self.lstm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LSTM(16, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens) + self.position)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.lstm(x)[0].mean(1))  # type: ignore[no-any-return]


class Around(nn.Module):
    """One layer, what makes a tensor of its result, a linear layer."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.RNNCellBase):
            state = None
            for step in range(x.shape[1]):
                state = self.layer(x[:, step], state)
            y = state[0] if isinstance(state, tuple) else state
        elif isinstance(self.layer, nn.MultiheadAttention):
            y = self.layer(x, x[..., :3], x[..., 1:3])[0].mean(1)
        elif isinstance(self.layer, nn.RNNBase):
            y = self.layer(x)[0][:, -1]
        else:
            y = self.layer(x)
        return self.head(y)  # type: ignore[no-any-return]


SEQUENCES = torch.randn(32, 5, 4, generator=torch.Generator().manual_seed(1))
AROUND = {
    "lstm": (lambda: Around(nn.LSTM(4, 8, batch_first=True, bidirectional=True), 16), SEQUENCES),
    "no bias": (lambda: Around(nn.LSTM(4, 8, batch_first=True, bias=False), 8), SEQUENCES),
    "gru": (lambda: Around(nn.GRU(4, 8, num_layers=2, batch_first=True), 8), SEQUENCES),
    "rnn": (lambda: Around(nn.RNN(4, 8, nonlinearity="relu", batch_first=True), 8), SEQUENCES),
    "lstm cell": (lambda: Around(nn.LSTMCell(4, 8), 8), SEQUENCES),
    "gru cell": (lambda: Around(nn.GRUCell(4, 8), 8), SEQUENCES),
    "rnn cell": (lambda: Around(nn.RNNCell(4, 8), 8), SEQUENCES),
    "keys of another width": (lambda: Around(nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True), 4), SEQUENCES),
    "mean": (lambda: Around(nn.EmbeddingBag(20, 8, mode="mean"), 8), TOKENS),
    "sum": (lambda: Around(nn.EmbeddingBag(20, 8, mode="sum", sparse=True), 8), TOKENS),
    "max": (lambda: Around(nn.EmbeddingBag(20, 8, mode="max"), 8), TOKENS),
}


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger().eval()


def prepared(model: nn.Module | None = None, sample: Tensor = TOKENS, **options: object) -> nn.Module:
    return lowbit.prepare(model or tagger(), method="lsq", sample=sample, **options)  # type: ignore[arg-type]


def quantized(bits: int = 8, model: nn.Module | None = None, sample: Tensor = TOKENS, **options: object) -> nn.Module:
    model = model or tagger()
    return lowbit.quantize(model, method="round_to_nearest", weight_bits=bits, calibration=sample, **options)  # type: ignore[arg-type]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def test_each_weight_has_the_bits_of_the_policy_and_the_table_says_what_stays_in_float() -> None:
    for model in (quantized(4), prepared(weight_bits=4)):
        found = {row.name: (row.kind, row.weight_bits, row.activation_bits) for row in lowbit.summary(model).layers}
        assert found == {
            "embedding": ("embedding", 8, None), "attention.in_proj_weight": ("attention", 4, None),
            **dict.fromkeys(LSTM, ("lstm", 4, None)), "head": ("linear", 8, found["head"][2]), "attention.out_proj": ("linear", 4, None),
        }  # fmt: skip
        reasons = {row.name: row.reason for row in lowbit.summary(model).layers}
        assert reasons["lstm.weight_ih_l1"] == reasons["embedding"] == "what is computed with it stays in float" and reasons["head"] == ""
        others = {row.name: row.reason for row in lowbit.summary(model).others}
        assert others == {"position": "lowbit does not know what Tagger computes with it", "norm": "norms stay in float"}
        assert all(name in str(lowbit.summary(model)) for name in (*found, *others))


def test_at_eight_bits_the_network_computes_nearly_the_same() -> None:
    model = tagger()
    assert relative(quantized(8, model)(TOKENS), model(TOKENS)) < 0.01


def test_a_rule_names_a_weight_or_its_layer() -> None:
    policy = lowbit.BitPolicy.uniform(4, 8).with_rule(match="lstm", weight=3).with_rule(match="lstm.weight_hh_*", weight=2)
    policy = policy.with_rule(type="MultiheadAttention", weight=5).keep_float("embedding")
    for model in (lowbit.quantize(tagger(), method="round_to_nearest", policy=policy, calibration=TOKENS), prepared(policy=policy)):
        bits = {name: found.weight for name, found in get_bits(model).items()}
        assert bits == {
            "embedding": None, "attention.in_proj_weight": 5, "lstm.weight_ih_l0": 3, "lstm.weight_hh_l0": 2, "lstm.weight_ih_l1": 3,
            "lstm.weight_hh_l1": 2, "head": 8, "attention.out_proj": 4,
        }  # fmt: skip
        set_bits(model, {"lstm": 6, "lstm.weight_ih_l1": 2})
        assert [get_bits(model)[name].weight for name in LSTM] == [6, 6, 2, 6]
        assert lowbit.summary(model).layers[2].weight_bits == 6
        with pytest.raises(SpecError, match=r"'lstm.weight_ih_l0': its input is in float"):
            set_bits(model, {"lstm": LayerBits(4, 4)})
    with pytest.raises(SpecError, match=r"lstm\.weight_ih_l9.*matches no layer.*lstm\.weight_ih_l0"):
        quantized(policy=policy.with_rule(match="lstm.weight_ih_l9", weight=3))


@pytest.mark.parametrize(("part", "match"), [("activation", "lstm"), ("output", "embedding"), ("activation", "lstm.weight_hh_*")])
def test_a_rule_for_what_such_layers_read_or_give_is_refused_by_name(part: str, match: str) -> None:
    asked = lowbit.BitPolicy.uniform(4, 8).with_rule(match=match, weight=4, **{part: 8})  # type: ignore[arg-type]
    with pytest.raises(
        SpecError, match=rf"rule with match '{re.escape(match)}'.*'{re.escape(match.partition('*')[0])}.*Let the rule say weight bits alone"
    ):
        quantized(policy=asked)
    with pytest.raises(SpecError, match="weight bits alone"):
        prepared(policy=asked)
    model = quantized(4)
    with pytest.raises(SpecError, match="weight bits alone"):
        set_bits(model, asked)
    taken_back = asked.with_rule(match=match, **{part: "float"})  # type: ignore[arg-type]
    assert get_bits(quantized(policy=taken_back))["head"].weight == 8


def test_a_rule_that_other_layers_honour_is_listed_where_it_is_not() -> None:
    policy = lowbit.BitPolicy.uniform(4, 8).with_rule(match="*", weight=4, activation=6)
    reasons = {row.name: row.reason for row in lowbit.summary(quantized(policy=policy)).layers}
    assert "activation bits of the rule with match '*' are not honoured" in reasons["lstm.weight_ih_l0"]
    assert "not honoured" not in reasons["head"]
    assert not any("not honoured" in row.reason for row in lowbit.summary(quantized(4)).layers)  # the default asks no layer by name


def test_an_embedding_that_runs_first_is_the_first_layer_and_one_within_is_not() -> None:
    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table, self.last = nn.Linear(4, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.table.weight[1])  # type: ignore[no-any-return]

    record = record_of(quantized(4))
    assert record is not None and record.table.positions == {"embedding": "first", "head": "last"}
    bits = get_bits(quantized(4, Within(), torch.randn(8, 4)))
    assert {name: found.weight for name, found in bits.items()} == {"first": 8, "table": 4, "last": 8}


def test_quantized_weights_are_computed_with_and_learn() -> None:
    model = prepared(weight_bits=2).train()
    before = model(TOKENS)
    for site in insert.quantized_weights(model).values():
        with torch.no_grad():
            kept = site.original.clone()
            site.original.mul_(-1)
            assert not torch.equal(model(TOKENS), before), site.name
            site.original.copy_(kept)
    assert torch.equal(model(TOKENS), before)
    model(TOKENS).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()] == []


@pytest.mark.parametrize("layer", [nn.LSTM(4, 3), nn.MultiheadAttention(4, 2), nn.GRUCell(4, 3)])
def test_each_weight_is_quantized_once_in_a_call(layer: nn.Module) -> None:
    calls: list[str] = []
    for name in insert.weights_of(layer):
        quantizer = LearnedScaleQuantizer(4, signed=True, granularity=Granularity.channel(0))
        quantizer.initialize(getattr(layer, name).detach())
        quantizer.register_forward_hook(lambda *_, name=name: calls.append(name))
        insert.set_weight_quantizer(layer, quantizer, name)
    x = torch.randn(2, 4)
    for training in (True, False):
        layer.train(training)
        calls.clear()
        layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x)
        assert sorted(calls) == sorted(insert.weights_of(layer))


@pytest.mark.parametrize("case", ["tagger", "gru", "rnn", "lstm cell", "keys of another width"])
def test_copies_pickles_moves_and_plain_weights_compute_the_same(case: str) -> None:
    model, x = (prepared(), TOKENS) if case == "tagger" else (prepared(AROUND[case][0](), AROUND[case][1]), AROUND[case][1])
    model.eval()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        assert torch.equal(twin(x), expected)
        assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.5)
        assert not torch.equal(twin(x), expected) and torch.equal(model(x), expected)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), expected)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    assert torch.equal(model.double().float()(x), expected)
    baked, codes = insert.bake_weights(model)
    assert all(torch.equal(baked.get_parameter(path), code.decode()) for path, code in codes.items())
    torch.testing.assert_close(baked(x), expected, rtol=0, atol=1e-6)
    assert not any("parametrizations" in name for name, _ in baked.named_parameters())


def test_packed_sequences_go_through_quantized_weights() -> None:
    layer = nn.LSTM(4, 3, batch_first=True)
    x = torch.randn(2, 5, 4)
    model = prepared(layer, x)
    packed = pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
    torch.testing.assert_close(model(packed)[1][0][:, 1], model(x[1:, :3])[1][0][:, 0])
    assert not torch.allclose(model(packed)[1][0], layer(packed)[1][0], atol=1e-4)


def test_rows_of_an_embedding_have_scales_of_their_own_and_the_padding_row_stays_zero() -> None:
    model = tagger()
    with torch.no_grad():
        model.embedding.weight.mul_(torch.logspace(-2, 2, 20)[:, None])
    by_row = quantized(8, model)
    assert insert.weight_quantizer(by_row.embedding).scale.shape == (20, 1)  # type: ignore[union-attr, arg-type]
    error = (by_row.embedding.weight - model.embedding.weight).norm(dim=1) / model.embedding.weight.norm(dim=1)  # type: ignore[union-attr, operator]
    assert error[1:].max() < 0.01 and not by_row.embedding.weight[0].any()  # type: ignore[union-attr, index]


def test_gradients_of_a_sparse_embedding_are_dense_and_max_norm_stays_in_float() -> None:
    sparse = prepared(Around(nn.EmbeddingBag(20, 8, mode="sum", sparse=True), 8))
    sparse.train()(TOKENS).sum().backward()
    assert insert.float_weight(sparse.layer).grad.layout == torch.strided  # type: ignore[arg-type, union-attr]
    assert "its gradient is dense" in lowbit.summary(sparse).layers[0].reason
    limited = quantized(8, Around(nn.EmbeddingBag(20, 8, mode="sum", max_norm=1.0), 8))
    row = lowbit.summary(limited).layers[0]
    assert (row.status, row.weight_bits, row.reason) == ("skipped", None, "max_norm changes its weight in every call")


@pytest.mark.parametrize("method", ["dfq", "lbq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adaround", "brecq"))])
def test_the_table_says_what_a_procedure_does_not_do_to_these_weights(method: str) -> None:
    options = {"epochs": 1} if method == "lbq" else post_training.budget(method, 3)
    model = lowbit.quantize(tagger(), method=method, weight_bits=8, calibration=TOKENS, **options)  # type: ignore[arg-type]
    reasons = {row.name: row.reason for row in lowbit.summary(model).layers}
    expected = "no bias is corrected" if method == "dfq" else "rounded to nearest"
    assert all(reasons[name].startswith(expected) for name in (*LSTM, "embedding", "attention.in_proj_weight"))
    assert not reasons["head"]


@pytest.mark.parametrize("case", [case if case in ("lstm", "mean") else pytest.param(case, marks=pytest.mark.slow) for case in AROUND])
def test_both_files_compute_the_same_and_hold_codes(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x = AROUND[case]
    policy = lowbit.BitPolicy.uniform(4, 8, first_last=None)
    model = lowbit.quantize(make(), method="round_to_nearest", policy=policy, calibration=x)
    report = lowbit.export(model, tmp_path / "m.lowbit", sample=x)
    loaded = lowbit.load(report.path)
    assert report.parity.passed and torch.equal(loaded(x), model(x))
    names = list(insert.quantized_weights(model))
    assert all(code.bit_width == 4 for code in loaded.weight_codes().values()) and len(loaded.weight_codes()) == len(names)
    assert [(row.name, row.weight_bits, row.stored_bytes) for row in lowbit.summary(loaded).layers] == [
        (row.name, row.weight_bits, row.stored_bytes) for row in lowbit.summary(model).layers
    ]
    report = lowbit.export(model, tmp_path / "m.onnx", sample=x, measure_speed=False)
    held = {tensor.name: tensor for tensor in onnx.load(report.path).graph.initializer}
    weights = {site.path: site for site in insert.quantized_weights(model).values()}
    assert report.parity.passed and all(any(name.startswith(f"{path}.") for name in held) for path in weights)
    floats = {tuple(tensor.dims) for tensor in held.values() if tensor.data_type == onnx.TensorProto.FLOAT}
    assert floats.isdisjoint(shape for site in weights.values() for shape in (site.original.shape, site.original.shape[::-1]))


def test_rows_are_looked_up_as_codes(tmp_path: Path) -> None:
    report = lowbit.export(quantized(4), tmp_path / "m.onnx", sample=TOKENS, measure_speed=False)
    lookups = [list(node.input) for node in onnx.load(report.path).graph.node if node.op_type == "Gather" and "x" not in node.output]
    assert ["embedding.weight.codes", "tokens"] in lookups


def test_an_lstm_with_projections_goes_to_a_packed_file_and_is_refused_by_name_in_onnx(tmp_path: Path) -> None:
    model = prepared(Around(nn.LSTM(4, 8, proj_size=3, batch_first=True), 3), SEQUENCES).eval()
    assert [name for name in get_bits(model) if "hr" in name] == ["layer.weight_hr_l0"]
    report = lowbit.export(model, tmp_path / "m.lowbit", sample=SEQUENCES)
    assert report.parity.passed and torch.equal(lowbit.load(report.path)(SEQUENCES), model(SEQUENCES))
    with pytest.raises(GraphError, match=r"layer 'layer' \(LSTM\): ONNX has no LSTM with projections \(proj_size=3\)"):
        lowbit.export(model, tmp_path / "m.onnx", sample=SEQUENCES)


def test_a_scale_that_became_negative_means_the_same_in_both_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    model = prepared(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), x).eval()
    for quantizer in (insert.weight_quantizer(model[0]), insert.weight_quantizer(model[2])):  # type: ignore[index]
        with torch.no_grad():
            quantizer.scale[::2] *= -1  # type: ignore[union-attr, operator]
    for name in ("m.lowbit", "m.onnx"):
        report = lowbit.export(model, tmp_path / name, sample=x, measure_speed=False)
        assert report.parity.passed and report.parity.top1_agreement == 1.0


@pytest.mark.slow
def test_compiled_networks_compute_the_same() -> None:
    model = prepared(Around(nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True), 4), SEQUENCES)
    torch.testing.assert_close(torch.compile(model)(SEQUENCES), model(SEQUENCES), rtol=1e-4, atol=1e-5)
