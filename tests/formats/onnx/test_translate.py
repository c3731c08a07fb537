from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnxruntime

from lowbit.formats.onnx.translate import DOMAIN, INT4_OPSET, OPSET, QUANTIZE, translate
from lowbit.formats.program.program import export_program
from lowbit.quantizers.ops import input_scale, mark_affine, mark_input_scale


class Of(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("zero", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(self, x)  # type: ignore[operator]
        return result


def answers(model: object, x: Tensor) -> Tensor:
    import onnx_ir as ir

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.as_tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((2, 4, 7, 6), ([3, 2], [2, 1], [1, 0], [1, 2], 1)),
        ((2, 4, 7, 6), ([3, 3], [1, 1], [1, 1], [1, 1], 2)),
        ((2, 6, 9), ([3], [2], [1], [1], 3)),
        ((2, 2, 4, 4, 4), ([2, 2, 2], [1, 1, 1], [0, 0, 0], [1, 1, 1], 1)),
    ],
)
def test_input_scaling_becomes_operators_of_onnx(
    shape: tuple[int, ...], window: tuple[list[int], list[int], list[int], list[int], int]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = translate(export_program(Of(lambda _, x: mark_input_scale(x, *window)), x))
    assert {node.op_type for node in model.graph} <= {"Abs", "ReduceMean", "Conv", "Constant"}
    torch.testing.assert_close(answers(model, x), input_scale(x, *window), rtol=1e-5, atol=1e-6)


def test_a_quantizer_is_one_node_whose_lower_end_is_that_of_code_0() -> None:
    program = export_program(Of(lambda m, x: mark_affine(x.relu(), m.scale, m.zero, 0, 7)), torch.randn(2, 3))
    (node,) = (node for node in translate(program).graph if node.domain == DOMAIN)
    assert (node.op_type, node.attributes["qmin"].as_int(), node.attributes["qmax"].as_int()) == (QUANTIZE, 0, 7)
    constants = [value.const_value.numpy().item() for value in node.inputs[1:]]
    assert constants == [-1.0, 0.5, 0.5, 2.0]


@pytest.mark.parametrize("opset", [OPSET, INT4_OPSET])
def test_the_open_size_is_called_batch_and_the_opset_is_the_one_asked_for(opset: int) -> None:
    model = translate(export_program(Of(lambda _, x: x.relu()), torch.randn(2, 3)), opset=opset)
    assert model.opset_imports[""] == opset
    assert str(model.graph.inputs[0].shape[0]) == "batch"
    x = torch.tensor([[1.0, -1.0, np.pi]]).expand(5, 3)
    assert torch.equal(answers(model, x.contiguous()), x.relu())
