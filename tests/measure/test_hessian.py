from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowbit.errors import SpecError
from lowbit.measure.hessian import (
    Draw,
    Hessian,
    Trace,
    exact_spectrum,
    gaussian,
    hutchinson_traces,
    inner_product,
    product_with,
    rademacher,
    top_eigenvalues,
)
from lowbit.measure.loss_surface import LossSurface
from lowbit.network.taps import Tap

X = torch.randn(12, 2, 5, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2))
LAYERS = ("conv1", "conv2", "fc")
BLOCKS = {name: [f"{name}.weight"] for name in LAYERS}
Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, 2)
        self.act1, self.act2, self.fc = nn.ReLU(inplace=True), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act2(self.conv2(self.act1(self.norm(self.conv1(x))))).mean((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    nn.init.uniform_(net.norm.running_mean)  # type: ignore[arg-type]
    return net


def task_loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(output, batch[1])


def surface(batches: Batches | None = None, model: nn.Module | None = None) -> LossSurface:
    return LossSurface(model or network(), batches or [(X, LABELS)], task_loss)


def given(vectors: Iterable[Tensor]) -> Draw:
    """Draws these vectors, one after the other."""
    left = iter(vectors)
    return lambda like: next(left).to(like)


def seeded(name: str = "") -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def exact(name: str) -> Tensor:
    """The Hessian of one parameter in float64, column by column."""
    net = network().eval().double()
    weight = net.get_parameter(name).detach()

    def loss(values: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(net, {name: values}, X.double()), LABELS)

    return torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), weight.numel())


def quadratic(matrix: Tensor) -> Hessian:
    """The Hessian of ``w' matrix w / 2`` at some ``w``."""
    model = nn.Linear(len(matrix), 1, bias=False).to(matrix.dtype)
    flat = LossSurface(model, [torch.ones(1, len(matrix), dtype=matrix.dtype)], lambda output, batch: output.sum())
    flat.loss = lambda output, batch: 0.5 * flat.model.weight[0] @ matrix @ flat.model.weight[0]
    return Hessian(flat, {"all": ["weight"]})


# Products


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_of_the_exact_hessian(name: str) -> None:
    hessian, matrix = Hessian(surface(), {name: BLOCKS[name]}), exact(f"{name}.weight")
    vector = torch.randn(network().get_parameter(f"{name}.weight").shape, generator=seeded())
    (product,) = hessian.product([vector])
    torch.testing.assert_close(product.flatten().double(), matrix @ vector.flatten().double(), rtol=1e-4, atol=1e-6)


def test_products_are_linear_and_symmetric() -> None:
    hessian = Hessian(surface(), {"all": [f"{name}.weight" for name in LAYERS]})
    shapes = [network().get_parameter(f"{name}.weight").shape for name in LAYERS]
    u, v = ([torch.randn(shape, generator=seeded(key)) for shape in shapes] for key in "uv")
    assert inner_product(u, hessian.product(v)) == pytest.approx(inner_product(v, hessian.product(u)), rel=1e-4)
    both = hessian.product([2 * a - b for a, b in zip(u, v, strict=True)])
    for mixed, a, b in zip(both, hessian.product(u), hessian.product(v), strict=True):
        torch.testing.assert_close(mixed, 2 * a - b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(5, 4, 3), (1, 11), (12,)])
def test_uneven_batches_give_the_hessian_of_the_mean_over_all_samples(sizes: tuple[int, ...]) -> None:
    batches = list(zip(X.split(sizes), LABELS.split(sizes), strict=True))
    vector = [torch.randn(network().conv2.weight.shape, generator=seeded())]
    whole, parts = (Hessian(surface(given), {"conv2": BLOCKS["conv2"]}).product(vector)[0] for given in ([(X, LABELS)], batches))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


def test_the_network_is_measured_in_evaluation_mode_and_stays_as_it_was() -> None:
    model = network().train()
    model.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vector = [torch.ones_like(model.conv1.weight)]
    (product,) = Hessian(surface(model=model), {"conv1": BLOCKS["conv1"]}).product(vector)
    torch.testing.assert_close(product.flatten().double(), exact("conv1.weight").sum(1), rtol=1e-3, atol=1e-6)
    assert model.training and not model.conv1.weight.requires_grad and model.conv1.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_products_work_under_no_grad_and_inference_mode() -> None:
    vector = [torch.ones_like(network().fc.weight)]
    plain = Hessian(surface(), {"fc": BLOCKS["fc"]}).product(vector)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(Hessian(surface(), {"fc": BLOCKS["fc"]}).product(vector)[0], plain)


def test_a_loss_that_is_linear_or_does_not_depend_on_a_tensor_has_no_curvature() -> None:
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    gradients = torch.autograd.grad(a.sum() + (b**2).sum(), (a, b), create_graph=True)
    assert [t.tolist() for t in product_with(gradients, (a, b), [torch.ones(3), torch.ones(2)])] == [[0, 0, 0], [2, 2]]
    assert product_with([None], [a], [torch.ones(3)])[0].tolist() == [0, 0, 0]


# Eigenvalues


@pytest.mark.parametrize("name", LAYERS)
def test_the_top_eigenvalues_are_those_of_the_exact_hessian(name: str) -> None:
    wanted = sorted(torch.linalg.eigvalsh(exact(f"{name}.weight")).tolist(), key=abs, reverse=True)[:2]
    found = top_eigenvalues(Hessian(surface(), {name: BLOCKS[name]}), gaussian(seeded()), count=2, tolerance=1e-5, max_iterations=500)
    assert [pair.value for pair in found] == pytest.approx(wanted, rel=0.01)
    assert all(pair.is_converged for pair in found)


def test_the_whole_network_is_a_block_too() -> None:
    names = [name for name, _ in network().named_parameters()]
    (pair,) = top_eigenvalues(Hessian(surface(), {"all": names}), gaussian(seeded()), tolerance=1e-5)
    product = Hessian(surface(), {"all": names}).product(pair.vector)
    for part, vector in zip(product, pair.vector, strict=True):
        torch.testing.assert_close(part, pair.value * vector, rtol=0, atol=0.01 * abs(pair.value))
    assert pair.value >= max(float(torch.linalg.eigvalsh(exact(f"{name}.weight"))[-1]) for name in LAYERS)


def test_the_eigenvalue_of_largest_magnitude_keeps_its_sign() -> None:
    basis = torch.linalg.qr(torch.randn(4, 4, generator=seeded(), dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.tensor([-5.0, 3.0, 1.0, -0.5], dtype=torch.float64)) @ basis.T
    found = top_eigenvalues(quadratic(matrix), gaussian(seeded("v")), count=4, tolerance=1e-9, max_iterations=500)
    assert [pair.value for pair in found] == pytest.approx([-5, 3, 1, -0.5], rel=1e-6)
    for pair, index in zip(found, range(4), strict=True):
        assert abs(float(pair.vector[0][0] @ basis[:, index])) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("size", [1e-12, 1e9])
def test_eigenvalues_scale_with_the_loss(size: float) -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) * size
    (pair,) = top_eigenvalues(quadratic(matrix), gaussian(seeded()), tolerance=1e-6)
    assert pair.value == pytest.approx(3 * size, rel=1e-4)


def test_a_flat_loss_has_the_eigenvalue_0() -> None:
    (pair,) = top_eigenvalues(quadratic(torch.zeros(3, 3)), gaussian(seeded()))
    assert pair.value == 0 and pair.is_converged and len(pair.estimates) == 1
    assert inner_product(pair.vector, pair.vector) == pytest.approx(1)


def test_estimates_after_each_iteration_follow_the_formula() -> None:
    found = top_eigenvalues(
        quadratic(torch.diag(torch.tensor([2.0, 1.0]))), given([torch.tensor([[1.0, 1.0]])]), tolerance=0, max_iterations=3
    )
    # v ~ (2^k, 1): (2 4^k + 1) / (4^k + 1)
    assert found[0].estimates == pytest.approx([(2 * 4**k + 1) / (4**k + 1) for k in range(3)])
    assert not found[0].is_converged
    assert found[0].vector[0].tolist()[0] == pytest.approx([8 / math.sqrt(65), 1 / math.sqrt(65)])


def test_more_eigenvalues_than_weights_are_refused() -> None:
    with pytest.raises(SpecError, match="at most the number of weights, 2; got 3"):
        top_eigenvalues(quadratic(torch.eye(2)), gaussian(seeded()), count=3)


# Traces


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("vectors", [rademacher, gaussian])
def test_the_trace_is_that_of_the_exact_hessian(name: str, vectors: Callable[[torch.Generator], Callable[[Tensor], Tensor]]) -> None:
    matrix = exact(f"{name}.weight")
    found = hutchinson_traces(Hessian(surface(), {name: BLOCKS[name]}), vectors(seeded()), min_probes=150, max_probes=150)[name]
    assert abs(found.mean - float(matrix.trace())) < 4 * found.error
    own = 0.0 if vectors is gaussian else float(matrix.diagonal().square().sum())
    assert found.error == pytest.approx(math.sqrt(2 * (float(matrix.square().sum()) - own) / 150), rel=0.4)
    assert found.elements == len(matrix) and found.average == pytest.approx(found.mean / len(matrix))


def test_all_sign_vectors_give_the_trace_of_a_network_within_one_percent() -> None:
    torch.manual_seed(3)
    model, x, labels = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Linear(2, 3)), X.flatten(1)[:, :3], LABELS
    first = Hessian(LossSurface(model, [(x, labels)], task_loss), {"first": ["0.weight"]})
    signs = [torch.tensor(row).reshape(2, 3) for row in itertools.product((-1.0, 1.0), repeat=6)]
    found = hutchinson_traces(first, given(signs), min_probes=64, max_probes=64)["first"].mean
    double = model.double()

    def loss(weight: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(double, {"0.weight": weight}, x.double()), labels)

    matrix = torch.autograd.functional.hessian(loss, double[0].weight.detach()).reshape(6, 6)
    assert found == pytest.approx(float(matrix.trace()), rel=1e-4)


def test_the_mean_over_all_sign_vectors_is_the_trace_exactly() -> None:
    matrix = torch.randn(5, 5, generator=seeded(), dtype=torch.float64)
    signs = [torch.tensor([row], dtype=torch.float64) for row in itertools.product((-1, 1), repeat=5)]
    found = hutchinson_traces(quadratic(matrix + matrix.T), given(signs), min_probes=32, max_probes=32)["all"]
    assert found.mean == pytest.approx(2 * float(matrix.trace()), rel=1e-12)


def test_a_diagonal_hessian_gives_its_trace_from_a_single_probe() -> None:
    model = nn.Linear(6, 1, bias=False).double()
    flat = LossSurface(model, [torch.ones(1, 6, dtype=torch.float64)], lambda output, batch: output.sum())
    coefficients = torch.arange(1.0, 7, dtype=torch.float64)
    flat.loss = lambda output, batch: (coefficients * flat.model.weight[0] ** 4).sum()
    found = hutchinson_traces(Hessian(flat, {"w": ["weight"]}), rademacher(seeded()), min_probes=1, max_probes=1)["w"]
    assert found.mean == pytest.approx(float((12 * coefficients * model.weight[0].detach() ** 2).sum()), rel=1e-12)
    assert found.error == math.inf


def test_a_first_probe_of_0_does_not_end_the_estimate() -> None:
    matrix = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    probes = [torch.tensor([[1.0, 1.0]])] + [torch.tensor([[1.0, -1.0]])] * 9
    found = hutchinson_traces(quadratic(matrix), given(probes), min_probes=10, max_probes=100, tolerance=0.2)["all"]
    assert found.values == (0.0, *[4.0] * 9)
    authors = hutchinson_traces(quadratic(matrix), given(probes), min_probes=1, floor=1e-6)["all"]
    assert authors.values == (0.0,)


def test_the_estimate_ends_when_the_running_mean_settles() -> None:
    values = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0]])] * 9
    found = hutchinson_traces(quadratic(torch.tensor([[3.0, 1.0], [1.0, 3.0]])), given(values), min_probes=1, tolerance=0.1)["all"]
    # means 8, 6, 6.67, 7, 6.4, 6.67: changes of 25, 11, 5 percent
    assert found.values == (8.0, 4.0, 8.0, 8.0)


def traces(of: LossSurface, *names: str, **settings: Any) -> dict[str, Trace]:
    """Those of some blocks from the same products."""
    return hutchinson_traces(Hessian(of, {name: BLOCKS[name] for name in names}), rademacher(seeded(names[0])), **settings)


def test_one_product_estimates_all_layers_at_once() -> None:
    settings = {"min_probes": 200, "max_probes": 200}
    found = traces(surface(), *LAYERS, **settings)
    for name in LAYERS:
        assert abs(found[name].mean - float(exact(f"{name}.weight").trace())) < 4 * found[name].error
        assert found[name].error > traces(surface(), name, **settings)[name].error  # cross blocks add variance


def test_batches_change_a_trace_by_rounding_alone() -> None:
    batches = list(zip(X.split([5, 4, 3]), LABELS.split([5, 4, 3]), strict=True))
    whole, parts = (traces(surface(given), *LAYERS, max_probes=10) for given in ([(X, LABELS)], batches))
    for name in LAYERS:
        assert parts[name].values == pytest.approx(whole[name].values, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("bounds", [(0, 5), (6, 5)])
def test_the_number_of_probes_is_checked(bounds: tuple[int, int]) -> None:
    with pytest.raises(SpecError, match="probes"):
        hutchinson_traces(quadratic(torch.eye(2)), rademacher(seeded()), min_probes=bounds[0], max_probes=bounds[1])


def test_the_whole_hessian_is_the_exact_one_and_knows_its_sums() -> None:
    matrix, found = exact("conv2.weight"), exact_spectrum(Hessian(surface(), {"conv2": BLOCKS["conv2"]}))
    torch.testing.assert_close(found.matrix, matrix, rtol=1e-3, atol=1e-6)
    values = sorted(torch.linalg.eigvalsh(matrix).tolist(), key=abs, reverse=True)
    assert found.eigenvalues[:3] == pytest.approx(values[:3], rel=1e-3)
    assert found.trace == pytest.approx(float(matrix.trace()), rel=1e-3) and found.average == pytest.approx(found.trace / len(matrix))
    squares = matrix.square()
    assert found.frobenius == pytest.approx(math.sqrt(float(squares.sum())), rel=1e-3)
    assert found.off_diagonal == pytest.approx(math.sqrt(float(squares.sum() - squares.diagonal().sum())), rel=1e-3)


# Activations


def exact_activation_traces(tap: Tap) -> Tensor:
    """The trace of the Hessian by the activations of each sample, in float64."""
    net, traces = network().eval().double(), []
    place = {"act1": net.act1, "conv2": net.conv2}[tap.module]
    for x, label in zip(X.double(), LABELS, strict=True):
        size = [0]

        def loss(shift: Tensor, x: Tensor = x, label: Tensor = label) -> Tensor:
            if tap.side == "output":
                handle = place.register_forward_hook(lambda _m, _a, output: output + shift)
            else:
                handle = place.register_forward_pre_hook(lambda _m, args: (args[0] + shift,))
            try:
                return cross_entropy(net(x[None]), label[None])
            finally:
                handle.remove()

        probe = place.register_forward_hook(
            lambda _m, args, output, size=size: size.append((output if tap.side == "output" else args[0]).shape)
        )
        net(x[None])
        probe.remove()
        shape = size[-1]
        matrix = torch.autograd.functional.hessian(loss, torch.zeros(shape, dtype=torch.float64))  # type: ignore[call-overload]
        traces.append(matrix.reshape(math.prod(shape), -1).trace())  # type: ignore[arg-type]
    return torch.stack(traces)


@pytest.mark.parametrize("tap", [Tap("act1"), Tap("conv2"), Tap("conv2", "input")])
def test_the_trace_of_activations_is_the_mean_over_samples(tap: Tap) -> None:
    found = hutchinson_traces(Hessian(surface(), {"a": [tap]}), rademacher(seeded("a")), min_probes=200, max_probes=200)["a"]
    wanted = float(exact_activation_traces(tap).mean())
    assert abs(found.mean - wanted) < 4 * found.error and found.error < 0.2 * abs(wanted)
    assert found.elements == {"act1": 75, "conv2": 16 if tap.side == "output" else 75}[tap.module]


def test_batches_of_activations_are_weighted_by_their_samples() -> None:
    batches = list(zip(X.split([7, 5]), LABELS.split([7, 5]), strict=True))
    found = hutchinson_traces(Hessian(surface(batches), {"a": [Tap("conv2")]}), rademacher(seeded("a")), min_probes=200, max_probes=200)[
        "a"
    ]
    assert abs(found.mean - float(exact_activation_traces(Tap("conv2")).mean())) < 4 * found.error
    with pytest.raises(SpecError, match="activations of 2 batches are different tensors"):
        Hessian(surface(batches), {"a": [Tap("conv2")]}).product([torch.zeros(7, 4, 2, 2)])


def test_the_mean_of_a_trace_adds_up_in_float64() -> None:
    assert Trace((1e16, 1.0, -1e16, 1.0), 4).mean == 0.5
