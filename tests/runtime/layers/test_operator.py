from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.runtime.binary_cases import sign_layer

from lowbit.runtime.arguments import Epilogue, SignLayer, Window
from lowbit.runtime.layers.binary import binary_conv2d
from lowbit.runtime.layers.operator import LayerCall
from lowbit.runtime.layers.packed import packed_linear

LAYER, WINDOW, EPILOGUE = sign_layer(torch.ones(4, 3, 1, 1)), Window((1, 1)), Epilogue(torch.ones(4))


def test_parts_are_flattened_to_the_parameters_of_the_schema_with_defaults_last() -> None:
    names = list(binary_conv2d.signature.parameters)
    assert names[:8] == ["x", "words", "in_channels", "kernel_size", "stride", "padding", "dilation", "scale"]
    assert names[8:13] == ["mask", "threshold", "flip", "groups", "pad_value"]
    assert names[13:] == ["bias", "residual", "input_scaling", "activation", "out_threshold", "out_flip"]
    schema = torch.ops.lowbit.binary_conv2d.default._schema
    assert [argument.name for argument in schema.arguments] == names


def test_flat_arguments_leave_out_defaults_and_are_rebuilt_to_equal_parts() -> None:
    x = torch.zeros(1, 3, 2, 2)
    flat = binary_conv2d.flatten(x, LAYER, WINDOW, EPILOGUE)
    assert set(flat) == {"x", "words", "in_channels", "kernel_size", "stride", "padding", "dilation", "scale"}
    again = binary_conv2d.rebuild(**flat)
    assert again[0] is x
    assert again[2] == WINDOW
    assert vars(again[1]) == vars(LAYER)
    assert binary_conv2d.flatten(x, LAYER, Window((1, 1), pad_value=1), EPILOGUE)["pad_value"] == 1


def test_tensors_may_be_references_of_a_graph() -> None:
    flat = binary_conv2d.flatten("image", SignLayer("words", 3, flip="turned"), WINDOW, Epilogue("factor"))
    assert (flat["x"], flat["words"], flat["flip"], flat["scale"]) == ("image", "words", "turned", "factor")


def test_positional_flat_arguments_are_those_of_the_schema_in_order() -> None:
    words, table = torch.zeros(1, 1, 64, dtype=torch.uint8), torch.tensor([[-1.0, 2.0]])
    _, weight, bias = packed_linear.rebuild(torch.ones(1, 5), words, table, 1, 4, 5, None)
    assert (weight.bit_width, weight.out_features, weight.in_features, bias) == (1, 4, 5, None)
    assert packed_linear.flat(torch.ones(1, 5), words, table, 1, 4, 5, None).tolist() == [[-5.0] * 4]


def test_a_layer_call_follows_tensors_that_are_replaced_or_written_to() -> None:
    x, call = torch.ones(1, 3, 1, 1), LayerCall(binary_conv2d)
    flat = binary_conv2d.flatten(x, LAYER, WINDOW, EPILOGUE)
    del flat["x"]
    assert call(x, **flat).flatten().tolist() == [3.0] * 4
    flat["scale"] = torch.arange(4.0)
    assert call(x, **flat).flatten().tolist() == [0.0, 3.0, 6.0, 9.0]
    flat["scale"].add_(1)  # type: ignore[attr-defined]
    assert call(x, **flat).flatten().tolist() == [3.0, 6.0, 9.0, 12.0]
    assert call(-x, residual=torch.full((1, 4, 1, 1), 10.0), **flat).flatten().tolist() == [7.0, 4.0, 1.0, -2.0]
    assert call(x, **flat).flatten().tolist() == [3.0, 6.0, 9.0, 12.0]  # nothing is left of what was added


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda call: pickle.loads(pickle.dumps(call))])
def test_copies_of_a_layer_call_hold_no_tensors(copied: object) -> None:
    call, x = LayerCall(binary_conv2d), torch.ones(1, 3, 1, 1)
    flat = binary_conv2d.flatten(x, LAYER, WINDOW, EPILOGUE)
    call(**flat)  # type: ignore[arg-type]
    again = copied(call)  # type: ignore[operator]
    assert again._known == ((), [])
    assert torch.equal(again(**flat), call(**flat))  # type: ignore[arg-type]
