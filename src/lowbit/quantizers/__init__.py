"""Quantizers: tensors in, values on a grid out. They know nothing of layers or networks."""

from lowbit.quantizers.affine import affine_parameters, dequantize, fake_quantize, qrange, quantize
from lowbit.quantizers.base import Quantizer
from lowbit.quantizers.binary import BinaryQuantizer, ScaledSignQuantizer, SignQuantizer
from lowbit.quantizers.codebook import CodebookQuantizer
from lowbit.quantizers.grid import Grid, GridQuantizer, fake_quantize_grid
from lowbit.quantizers.learned_scale import LearnedScaleQuantizer
from lowbit.quantizers.power_of_two import PowerOfTwoQuantizer
from lowbit.quantizers.qtensor import (
    AffineDecoder,
    BinaryDecoder,
    CodebookDecoder,
    Decoder,
    PowerOfTwoDecoder,
    QTensor,
    SumDecoder,
    decoder_from,
)
from lowbit.quantizers.sum import SumQuantizer
from lowbit.quantizers.uniform import UniformQuantizer

__all__ = [
    "AffineDecoder", "BinaryDecoder", "BinaryQuantizer", "CodebookDecoder", "CodebookQuantizer", "Decoder", "Grid", "GridQuantizer",
    "LearnedScaleQuantizer", "PowerOfTwoDecoder", "PowerOfTwoQuantizer", "QTensor", "Quantizer", "ScaledSignQuantizer", "SignQuantizer",
    "SumDecoder", "SumQuantizer", "UniformQuantizer", "affine_parameters", "decoder_from", "dequantize", "fake_quantize",
    "fake_quantize_grid", "qrange", "quantize",
]  # fmt: skip
