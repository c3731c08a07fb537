"""Statistics by hand, norms of every kind and place, and what cannot be matched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import LayerError, SpecError
from lowbit.inputs import Inputs
from lowbit.synthesis.statistics import KeptStatistics, Match, channel_statistics, kept_statistics, measure_match, watching


def test_statistics_are_those_of_each_sample_over_space_with_the_unbiased_variance() -> None:
    values = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]], [[[2.0, 2.0], [2.0, 2.0]]]])
    mean, std = channel_statistics(values)
    assert mean.tolist() == [[4.0], [2.0]]
    torch.testing.assert_close(std, torch.tensor([[(20 / 3 + 1e-6) ** 0.5], [1e-3]]))


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 2, 7), (5, 3)])
def test_gradients_are_those_of_torchs_variance(shape: tuple[int, ...]) -> None:
    values = (1000 + torch.randn(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(channel_statistics, values, eps=1e-4)
    rows = values.flatten(2) if len(shape) > 2 else values.T[None]
    variance, mean = torch.var_mean(rows, dim=2)
    expected = torch.autograd.grad((mean.square() + 3 * (variance + 1e-6).sqrt()).sum(), values)
    mean, std = channel_statistics(values)
    torch.testing.assert_close(torch.autograd.grad((mean.square() + 3 * std).sum(), values), expected)


def test_a_large_mean_does_not_drown_the_deviation() -> None:
    values = 1000 + torch.tensor([[[0.25, 0.5, 0.75, 1.0]]])
    torch.testing.assert_close(channel_statistics(values)[1], torch.tensor([[0.25 * (5 / 3) ** 0.5]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1)])
def test_without_space_statistics_are_those_of_the_batch(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    mean, std = channel_statistics(values)
    rows = values.reshape(6, 4)
    torch.testing.assert_close(mean, rows.mean(0, keepdim=True))
    torch.testing.assert_close(std, (rows.var(0, keepdim=True) + 1e-6).sqrt())
    with pytest.raises(SpecError, match="count=2 or more"):
        channel_statistics(values[:1])


@pytest.mark.parametrize("shape", [(3, 2, 50), (3, 2, 5, 4, 3)])
def test_space_of_any_dimensions_counts_and_half_precision_is_widened(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape).bfloat16()
    mean, std = channel_statistics(values)
    assert mean.dtype == torch.float32 and mean.shape == (3, 2)
    torch.testing.assert_close(std, (values.float().flatten(2).var(2) + 1e-6).sqrt())


class Structures(nn.Module):
    """A norm before its convolution, a norm of concatenated features, a norm that is called twice, and one in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.before = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.joined = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1)
        self.shared = nn.BatchNorm2d(8)
        self.unused = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.second(F.relu(self.before(x), inplace=True))
        y = self.joined(torch.cat([x, y], 1))
        return self.shared(self.last(self.shared(self.last(y)).relu_()))


def trained_structures() -> nn.Module:
    model = Structures().train()
    for _ in range(3):
        model(torch.randn(16, 2, 6, 6))
    return model.eval()


def test_norms_are_read_in_the_order_of_their_calls_wherever_they_stand() -> None:
    model = trained_structures()
    kept, notes = kept_statistics(model)
    assert list(kept) == ["before", "joined", "shared"]
    assert notes == ("left out: unused: mean 0 and variance 1, as of a norm that has never seen data",)
    x = torch.randn(5, 2, 6, 6)
    expected = model.conv(x)
    with watching(model, kept) as found:
        model(x)
        model(x)
    assert [one.name for one in found] == ["before", "joined", "shared", "shared#2"]
    torch.testing.assert_close(found[0].mean, expected.mean((2, 3)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_frozen_norms_of_other_packages_and_tracking_instance_norms_count() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.tensor([1.0, 2.0]))
            self.register_buffer("running_var", torch.tensor([4.0, 9.0]))

    tracking = nn.InstanceNorm2d(2, track_running_stats=True)
    tracking(torch.randn(4, 2, 5, 5))
    kept, _ = kept_statistics(nn.Sequential(Frozen(), tracking))
    assert list(kept) == ["0", "1"]
    torch.testing.assert_close(kept["0"].std, torch.tensor([2.0, 3.0]))


def test_a_network_without_statistics_is_told_what_to_do() -> None:
    for model, words in (
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)), "it has none. Pass calibration data instead"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), "track_running_stats=False"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "never seen data: 1. Load trained weights"),
    ):
        with pytest.raises(LayerError, match=words):
            kept_statistics(model)
    model = nn.Sequential(nn.BatchNorm2d(2))
    for name, value in (("running_mean", float("nan")), ("running_var", -1.0), ("running_var", float("inf"))):
        broken = nn.Sequential(nn.BatchNorm2d(2))
        getattr(broken[0], name)[0] = value
        with pytest.raises(LayerError, match=r"norm '0' .*running statistics hold"):
            kept_statistics(broken)
    with pytest.raises(LayerError):
        kept_statistics(model)


def test_the_match_is_measured_in_units_of_the_kept_deviations_over_all_batches() -> None:
    kept = KeptStatistics(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 4.0]))
    match = Match.of(torch.tensor([[5.0, 1.0], [-5.0, 1.0]]), torch.tensor([[3.0, 4.0], [3.0, 9.0]]), kept)
    assert match.mean_error == pytest.approx(1.0)  # sqrt(25 / 25)
    assert match.std_error == pytest.approx((12.5 / 25) ** 0.5)
    assert match.spread == pytest.approx((50 / 25) ** 0.5)
    assert Match.of(torch.ones(1, 2), torch.ones(1, 2), kept).spread is None

    model = trained_structures()
    kept_all, _ = kept_statistics(model)
    x = torch.randn(6, 2, 6, 6)
    whole = measure_match(model, kept_all, [Inputs((x,))])
    parts = measure_match(model, kept_all, [Inputs((x[:2],)), Inputs((x[2:],))])
    assert list(whole) == ["before", "joined", "shared", "shared#2"]
    for name, match in whole.items():
        assert parts[name].mean_error == pytest.approx(match.mean_error) and parts[name].spread == pytest.approx(match.spread)
    with pytest.raises(LayerError, match="norm 'before': what it reads holds NaN"):
        measure_match(model, kept_all, [Inputs((x * float("nan"),))])
