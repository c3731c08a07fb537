"""Measuring networks: agreement with the float network, noise by layer, size, bit operations, latency, diagnosis."""

from __future__ import annotations

from lowbit.measure.agreement import Agreement, AgreementMeter, measure_agreement, run_output
from lowbit.measure.cost import (
    LayerCompute,
    LayerSize,
    ModelSize,
    compute_cost,
    layer_bits,
    model_size,
    qtensor_bytes,
    tensor_bytes,
)
from lowbit.measure.latency import Latency, measure_latency
from lowbit.measure.layer_noise import LayerNoise, layer_noise, output_noise, weight_noise
from lowbit.measure.macs import count_macs
from lowbit.measure.noise import Noise, noise_between, sqnr_db
from lowbit.measure.outputs import output_tensor

__all__ = [
    "Agreement", "AgreementMeter", "LayerCompute", "LayerNoise", "LayerSize", "Latency", "ModelSize", "Noise", "compute_cost",
    "count_macs", "layer_bits", "layer_noise", "measure_agreement", "measure_latency", "model_size", "noise_between",
    "output_noise", "output_tensor", "qtensor_bytes", "run_output", "sqnr_db", "tensor_bytes", "weight_noise",
]  # fmt: skip
