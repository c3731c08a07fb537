"""TWN of lowbit for reference cases."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit.formats.packed import packing
from lowbit.methods.quantization_aware.twn import TernaryQuantizer, Twn
from lowbit.network import insert
from lowbit.qat import Slot
from lowbit.quantizers import QTensor

BYTES_IN_WORD = 4  # of 32 bits, the first weight in the lowest two
AUTHORS_BITS = torch.tensor([1, 3, 0])  # for the codes 0, 1 and, the last one by its index, -1
CODES = torch.tensor([-1, 0, 0, 1], dtype=torch.int8)  # for two bits; 2 does not occur


def weight(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = TernaryQuantizer(delta_factor=params["delta_factor"])
    threshold, scale = quantizer.threshold_and_scale(inputs["weight"])
    return {"ternary_weight": quantizer(inputs["weight"]), "delta": threshold, "alpha": scale}


def pack(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    encoded = TernaryQuantizer().encode(inputs["ternary_weight"])
    stored = packing.pack(AUTHORS_BITS[encoded.codes.long()], 2)
    words = [int.from_bytes(bytes(word.tolist()), "little") for word in stored.split(BYTES_IN_WORD)]
    codes = CODES[packing.unpack(stored, 2, encoded.codes.numel()).long()].reshape(params["shape"])
    decoder = replace(encoded.decoder, scale=inputs["alpha"].reshape(()))
    return {"codes": torch.tensor(words), "unpacked": QTensor(codes, decoder, encoded.bit_width).decode()}


def conv(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    out_channels, in_channels, *kernel = inputs["weight"].shape
    layer = nn.Conv2d(in_channels, out_channels, tuple(kernel), params["stride"], params["padding"], bias=False)
    layer.load_state_dict({"weight": inputs["weight"]})
    method = Twn(delta_factor=params["delta_factor"])
    insert.set_weight_quantizer(layer, method.weight_quantizer(Slot("layer", layer, 2, True, "inner")))
    x = inputs["x"].requires_grad_()
    y = layer(x)
    y.backward(inputs["grad_output"])
    return {"ternary_weight": layer.weight, "y": y, "grad_x": x.grad, "grad_weight": insert.float_weight(layer).grad}
