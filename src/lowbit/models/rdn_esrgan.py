"""The small RDN that the npm packages @upscalerjs/esrgan-slim and @upscalerjs/esrgan-medium hold trained weights for, x2, x3 and x4.

It is RDN with dense blocks of one layer, and another upsampler: three convolutions, nearest-neighbour enlarging, a convolution. Layers go by
the names in the packages' files, which are ``--weights FOLDER/package/models/x2/model.json`` after ``npm pack @upscalerjs/esrgan-slim``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.models.upsampling import check_scale
from lowbit.network.surgery.sums import Sum


class RdnEsrgan(nn.Module):
    """RGB pixels in 0 to 255, ``[N, 3, H, W]``, become ``scale`` times larger."""

    def __init__(self, scale: int, blocks: int, growth: int, width: int) -> None:
        super().__init__()
        check_scale(scale)
        self.scale, self.blocks = scale, range(1, blocks + 1)
        self.F_m1 = nn.Conv2d(3, width, 3, padding=1)
        self.F_0 = nn.Conv2d(width, width, 3, padding=1)
        for block in self.blocks:
            self.add_module(f"F_{block}_1", nn.Conv2d(width, growth, 3, padding=1))
            self.add_module(f"LFF_{block}", nn.Conv2d(width + growth, width, 1))
            self.add_module(f"LRL_{block}", Sum())
        self.GFF_1 = nn.Conv2d(blocks * width, width, 1)
        self.GFF_2 = nn.Conv2d(width, width, 3, padding=1)
        self.FDF = Sum()
        self.UPN1 = nn.Conv2d(width, 64, 5, padding=2)
        self.UPN2 = nn.Conv2d(64, 32, 3, padding=1)
        self.UPN3 = nn.Conv2d(32, 3 * scale**2, 3, padding=1)
        self.UPsample = nn.Upsample(scale_factor=scale, mode="nearest")
        self.SR = nn.Conv2d(3 * scale**2, 3, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        """What the upsampler gets: ``[N, width, H, W]``, after the skip."""
        shallow = self.F_m1(x)
        x = self.F_0(shallow)
        found = []
        for block in self.blocks:
            layer, fusion, add = (self.get_submodule(name) for name in (f"F_{block}_1", f"LFF_{block}", f"LRL_{block}"))
            x = add(fusion(torch.cat((x, layer(x).relu()), 1)), x)
            found.append(x)
        out: Tensor = self.FDF(self.GFF_2(self.GFF_1(torch.cat(found, 1))), shallow)
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.UPN2(self.UPN1(self.features(x)).relu()).relu()
        out: Tensor = self.SR(self.UPsample(self.UPN3(x)))
        return out


def esrgan_slim(scale: int = 2, width: int = 64, blocks: int = 2) -> RdnEsrgan:
    """Two dense blocks of 4 features; weights in the npm package @upscalerjs/esrgan-slim."""
    return RdnEsrgan(scale, blocks, 4, width)


def esrgan_medium(scale: int = 2, width: int = 64, blocks: int = 10) -> RdnEsrgan:
    """Ten dense blocks of 64 features; weights in the npm package @upscalerjs/esrgan-medium."""
    return RdnEsrgan(scale, blocks, 64, width)
