"""ONNX graphs made by hand, and what ONNX Runtime computes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from lowbit.formats.onnx.surgery import constant_of
from lowbit.formats.onnx.translate import DOMAIN, QUANTIZE, WEIGHT

Array = npt.NDArray[np.generic]


def floats(*values: object) -> Array:
    """A float32 array: ``floats(1, 2)``, or ``floats([[1, 2]])`` for more dimensions."""
    return np.asarray(values[0] if len(values) == 1 and isinstance(values[0], list) else values, np.float32)


class Builder:
    """A graph that grows node by node; the first input is ``x``."""

    def __init__(self, shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        self.x = ir.val("x", dtype=dtype, shape=list(shape))
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 18, DOMAIN: 1}, name="graph")

    def constant(self, name: str, content: Array) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(np.asarray(content), name=name), shape=ir.Shape(np.shape(content)))
        value.dtype = ir.DataType.from_numpy(np.asarray(content).dtype)
        self.graph.register_initializer(value)
        return value

    def add(
        self, operator: str, inputs: Sequence[ir.Value | None], name: str, shape: Sequence[int], domain: str = "", /, **attributes: object
    ) -> ir.Value:
        """The output ``name`` of a new node."""
        node = ir.node(operator, inputs, attributes, domain=domain)  # type: ignore[arg-type]
        value = node.outputs[0]
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(self.x.dtype or ir.DataType.FLOAT)
        self.graph.append(node)
        return value

    def quantizer(self, x: ir.Value, name: str, *, lower: float, step: float, scale: float, zero: float, qmin: int, qmax: int) -> ir.Value:
        """A quantizer as ``translate`` leaves it."""
        parts = (("lower", lower), ("step", step), ("scale", scale), ("zero", zero))
        constants = [self.constant(f"{name}.in.{part}", np.asarray(number, np.float32)) for part, number in parts]
        return self.add(QUANTIZE, [x, *constants], name, list(x.shape or ()), DOMAIN, qmin=qmin, qmax=qmax)

    def weight(self, name: str, content: Array) -> ir.Value:
        """A weight as ``translate`` leaves it."""
        return self.add(WEIGHT, [self.constant(name, content)], f"{name}.quantized", content.shape, DOMAIN, name=name)

    def model(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        return ir.Model(self.graph, ir_version=10)


def operators(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


def node_of(graph: ir.Graph, operator: str) -> ir.Node:
    (found,) = (node for node in graph if node.op_type == operator)
    return found


def constants_of(graph: ir.Graph) -> Mapping[str, object]:
    """The initializers as plain numbers, without those that went into a quantizer node."""
    found = {name: constant_of(value) for name, value in graph.initializers.items()}
    return {name: content.tolist() for name, content in found.items() if content is not None and ".in." not in name}


def computed(model: ir.Model, x: Array) -> list[Array]:
    """The outputs of ONNX Runtime, which leaves the graph as it is; weight nodes pass their decoded values."""
    plain = model.clone()
    for node in list(plain.graph):
        if node.op_type == WEIGHT:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
            plain.graph.remove(node, safe=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(plain).SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, {"x": x})
    return results
