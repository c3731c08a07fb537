"""Networks around one layer that is out of the ordinary, and data for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SEQUENCE = "sequence"


class Odd(nn.Module):
    """Stem, the odd layer, ReLU, mean over space, linear: the odd layer is neither first nor last."""

    def __init__(self, stem: nn.Module, odd: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem, self.odd, self.head = stem, odd, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.odd(self.stem(x).relu()).relu()
        logits: Tensor = self.head(y.flatten(2).mean(2))
        return logits


class Sequence(nn.Module):
    """Embedding, a parameter of its own, attention, LSTM, linear, mean over time: weights of layers that compute in float."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.position = nn.Parameter(torch.randn(5, 8) / 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x, _ = self.lstm(x)
        logits: Tensor = self.head(self.inner(x).relu().mean(1))
        return logits


def odd_network(case: str) -> tuple[nn.Module, Tensor]:
    """A network around one odd layer, and samples for it."""
    if case == SEQUENCE:
        return Sequence(), torch.randint(11, (16, 5))
    images = torch.randn(16, 3, 6, 6)
    stem = nn.Conv2d(3, 6, 3, padding=1)
    if case == "one_dimension":
        return Odd(nn.Conv1d(3, 6, 3), nn.Conv1d(6, 5, 3, dilation=2), 5), torch.randn(16, 3, 12)
    if case == "transposed_one_dimension":
        return Odd(nn.Conv1d(3, 6, 3), nn.ConvTranspose1d(6, 4, 3, stride=2), 4), torch.randn(16, 3, 8)
    if case == "three_dimensions":
        return Odd(nn.Conv3d(3, 6, 1), nn.Conv3d(6, 4, 2), 4), torch.randn(16, 3, 3, 3, 3)
    odd: nn.Module = {
        "depthwise": nn.Conv2d(6, 6, 3, groups=6),
        "grouped": nn.Conv2d(6, 9, 3, groups=3, bias=False),
        "dilated": nn.Conv2d(6, 6, 3, dilation=2),
        "transposed": nn.ConvTranspose2d(6, 5, 3, stride=2),
        "transposed_grouped": nn.ConvTranspose2d(6, 4, 2, groups=2),
        "odd_channels": nn.Conv2d(6, 7, (1, 3), stride=(2, 1)),
    }.get(case, nn.Conv2d(6, 6, 3))
    model = Odd(stem, odd, tiny_channels(odd))
    weight = odd.get_parameter("weight")
    with torch.no_grad():
        if case == "zero_channel":
            weight[2] = 0
            weight[4] = 1e-30
        if case == "zero_layer":
            weight.zero_()
        if case == "constant_weights":
            weight.fill_(0.25)
    return model, images[:1] if case == "one_sample" else images


def tiny_channels(layer: nn.Module) -> int:
    """Output channels of a convolution."""
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    return layer.out_channels


ODD = [
    "depthwise", "grouped", "dilated", "transposed", "transposed_grouped", "one_dimension", "transposed_one_dimension", "three_dimensions",
    "odd_channels", "zero_channel", "zero_layer", "constant_weights", "one_sample", SEQUENCE,
]  # fmt: skip
