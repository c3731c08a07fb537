"""Networks for super-resolution: counts of parameters from the literature, sizes, and identities that follow from their structure."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from lowbit.errors import SpecError
from lowbit.models import BUILT_IN, load_model
from lowbit.models.bsrn import LocalBlock
from lowbit.models.edsr import edsr_small
from lowbit.models.srresnet import srresnet
from lowbit.models.upsampling import MeanShift, upsampler
from lowbit.models.vdsr import vdsr
from lowbit.resize import imresize

NAMES = [name for name, (factory, _) in BUILT_IN.items() if "scale" in inspect.signature(factory).parameters]
COUNTS = {  # for scales 2, 3, 4
    "edsr_baseline": (1_369_859, 1_554_499, 1_517_571),
    "edsr": (40_729_603, 43_680_003, 43_089_923),
    "rdn_a": (5_541_795, 5_634_115, 5_578_787),
    "rdn_b": (22_123_395, 22_308_035, 22_271_107),
    "vdsr": (668_227, 668_227, 668_227),
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_networks_have_the_known_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        assert tuple(parameters(BUILT_IN[name][0](scale=scale)) for scale in (2, 3, 4)) == COUNTS[name]


def test_srresnet_has_the_known_number_of_parameters_and_a_slope_more_for_each_block_with_prelu() -> None:
    assert parameters(srresnet(4)) == 1_546_755
    assert parameters(srresnet(4, activation="prelu")) == 1_546_755 + 16


def test_bsrn_has_the_sum_of_its_convolutions() -> None:
    weights = sum(m.weight.numel() for m in load_model("bsrn", scale=4).modules() if isinstance(m, nn.Conv2d))
    assert weights == 27 * 48 + 40 * 11 * 48**2 + 2 * 9 * 4 * 48**2 + 27 * 48


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_come_out_scale_times_larger(name: str, scale: int) -> None:
    with torch.no_grad():
        out = load_model(name, scale=scale, width=8)(torch.rand(2, 3, 7, 10) * 255)
    assert out.shape == (2, 3, 7 * scale, 10 * scale)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_other_scales_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="enlarge by 2, 3, 4"):
        load_model(name, scale=5, width=8)


def test_edsr_without_its_body_is_tail_of_head() -> None:
    model = edsr_small().eval()
    for parameter in model.body.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(1, 3, 6, 5) * 255
    assert torch.equal(model(x), model.add_mean(model.tail(model.head(model.sub_mean(x)))))


def test_edsr_layers_have_the_names_of_the_authors_program() -> None:
    names = set(load_model("edsr_baseline", scale=4, width=8, blocks=2).state_dict())
    layers = ("head.0", "body.0.body.0", "body.0.body.2", "body.1.body.0", "body.1.body.2", "body.2", "tail.0.0", "tail.0.2", "tail.1")
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_the_mean_colour_cancels() -> None:
    x = torch.rand(1, 3, 2, 2) * 255
    torch.testing.assert_close(MeanShift(1)(MeanShift(-1)(x)), x)
    assert MeanShift(1)(torch.zeros(1, 3, 1, 1)).flatten().tolist() == pytest.approx([114.444, 111.4605, 103.02])


def test_channels_go_to_pixels_row_by_row() -> None:
    shuffle = upsampler(2, 1, 1)[1]
    assert shuffle(torch.arange(4.0).view(1, 4, 1, 1)).flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_vdsr_adds_to_the_bicubically_enlarged_picture(scale: int) -> None:
    model = vdsr(scale, width=4, depth=3).eval()
    nn.init.zeros_(model.tail.weight)
    nn.init.zeros_(model.tail.bias)
    x = torch.rand(2, 3, 5, 2, generator=torch.Generator().manual_seed(0)) * 255
    torch.testing.assert_close(model(x).double(), imresize(x, scale), rtol=0, atol=1e-4)


def test_a_local_block_accumulates_what_its_convolutions_give() -> None:
    block = LocalBlock(1)
    with torch.no_grad():
        block.spatial.weight.zero_()[0, 0, 1, 1] = 2.0
        block.pointwise1.weight.fill_(3.0)
        block.pointwise2.weight.fill_(5.0)
    assert block(torch.ones(1, 1, 1, 1)).item() == 2 + 6 + 5 * (2 + 6)
