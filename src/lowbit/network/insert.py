"""Quantizers in a network, without tracing it.

A weight quantizer is a parametrization of the layer's ``weight``, so every use of that weight, functional ones too, sees
quantized values; the bias follows one that scales the layer's whole output. An activation quantizer is a submodule called
``input_quantizer`` or ``output_quantizer`` that a forward hook applies. An ``input_transform`` comes before the input quantizer; an
``output_transform`` changes a layer's output by what it knows of its input. The network stays an ordinary module: control flow,
reused layers, ``state_dict``, ``deepcopy``, ``pickle``, autocast and ``torch.compile`` behave as before. Quantizers belong to modules,
not to calls: a layer used twice shares them.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LayerError
from lowbit.network.layers import quantizable_layers
from lowbit.quantizers import QTensor, Quantizer
from lowbit.quantizers.base import disabled

INPUT, OUTPUT, TRANSFORM = "input_quantizer", "output_quantizer", "output_transform"
INPUT_TRANSFORM = "input_transform"


class WeightParametrization(nn.Module):
    """Passes a weight through its quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantizer(weight)


@runtime_checkable
class ScalesBias(Protocol):
    """A weight quantizer whose levels include a factor of the layer's whole output, so that its bias has to be scaled too."""

    def scale_bias(self, bias: Tensor) -> Tensor:
        """The bias of the scaled layer."""


class BiasParametrization(nn.Module):
    """Passes a bias through ``scale_bias`` of the weight's quantizer, where that has one and is enabled."""

    def __init__(self, weights: WeightParametrization) -> None:
        super().__init__()
        self._weights = (weights,)  # in a tuple, because it is a submodule of the weight's parametrization already

    def forward(self, bias: Tensor) -> Tensor:
        (weights,) = self._weights
        scale = getattr(weights.quantizer, "scale_bias", None)
        return bias if scale is None or not weights.quantizer.enabled else scale(bias)


def set_weight_quantizer(layer: nn.Module, quantizer: Quantizer) -> None:
    """Quantize ``layer.weight`` from now on, wherever it is used; replaces a quantizer that is already there.

    The bias of the layer follows one that ``ScalesBias``.
    """
    quantizer.train(layer.training)
    parametrization = _weight_parametrization(layer)
    if parametrization is not None:
        parametrization.quantizer = quantizer
        _follow_with_bias(layer, parametrization)
        return
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise LayerError(f"{type(layer).__name__} has no weight tensor to quantize")
    parametrization = WeightParametrization(quantizer)
    parametrize.register_parametrization(layer, "weight", parametrization, unsafe=True)
    _follow_with_bias(layer, parametrization)
    layer.train(layer.training)
    # parametrize refuses to pickle its generated class; rebuilding the parametrization on load is all that is needed
    type(layer).__reduce_ex__ = _reduce_quantized_layer  # type: ignore[method-assign, assignment]


def _follow_with_bias(layer: nn.Module, weights: WeightParametrization) -> None:
    if isinstance(weights.quantizer, ScalesBias) and isinstance(layer._parameters.get("bias"), Tensor):
        parametrize.register_parametrization(layer, "bias", BiasParametrization(weights))


def weight_quantizer(layer: nn.Module) -> Quantizer | None:
    """The quantizer of the layer's weight, if it has one."""
    parametrization = _weight_parametrization(layer)
    return None if parametrization is None else parametrization.quantizer


def float_weight(layer: nn.Module) -> nn.Parameter:
    """The float weight behind the quantizer (the parameter that training and rounding change)."""
    if _weight_parametrization(layer) is None:
        return layer.weight  # type: ignore[return-value]
    return layer.parametrizations.weight.original  # type: ignore[union-attr, return-value]


def float_bias(layer: nn.Module) -> nn.Parameter | None:
    """The parameter behind the layer's bias, if it has one."""
    if _has_scaled_bias(layer):
        return layer.parametrizations.bias.original  # type: ignore[union-attr, return-value]
    return getattr(layer, "bias", None)


def remove_weight_quantizer(layer: nn.Module) -> None:
    """Make weight and bias ordinary parameters again, holding their quantized and scaled values."""
    if _weight_parametrization(layer) is None:
        return
    bias = float_bias(layer) if _has_scaled_bias(layer) else None
    if bias is not None:
        bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=bias.requires_grad)  # type: ignore[operator]
    weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=float_weight(layer).requires_grad)  # type: ignore[operator]
    # parametrize.remove_parametrizations edits the generated class, which copies of this layer share
    layer.__class__ = _plain_class(layer)
    del layer._modules["parametrizations"]
    layer._parameters["weight"] = weight
    if bias is not None:
        layer._parameters["bias"] = bias


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    return type(layer).__mro__[1]


def set_input_quantizer(module: nn.Module, quantizer: Quantizer) -> None:
    """Quantize the module's first floating-point positional input."""
    if not hasattr(module, INPUT):
        module.register_forward_pre_hook(_quantize_input)
    setattr(module, INPUT, quantizer.train(module.training))


def set_output_quantizer(module: nn.Module, quantizer: Quantizer) -> None:
    """Quantize the module's output, which must be one tensor."""
    if not hasattr(module, OUTPUT):
        module.register_forward_hook(_quantize_output)
    setattr(module, OUTPUT, quantizer.train(module.training))


def input_quantizer(module: nn.Module) -> Quantizer | None:
    """The quantizer of the module's input, if it has one."""
    return getattr(module, INPUT, None)


def output_quantizer(module: nn.Module) -> Quantizer | None:
    """The quantizer of the module's output, if it has one."""
    return getattr(module, OUTPUT, None)


def set_output_transform(module: nn.Module, transform: nn.Module) -> None:
    """Replace the module's output, one tensor, by ``transform(output, x)``; replaces a transform that is already there.

    ``x`` is the module's first floating-point positional input before the input quantizer (behind an input transform). An
    output quantizer sees the transformed output. It belongs to the quantizer of the input: where that is not enabled the output stays
    as it is, and where ``transform.enabled`` is ``False``. A transform with a true attribute ``before_bias`` gets the output without
    the layer's bias, which is added to what it returns.
    """
    if not hasattr(module, TRANSFORM):
        module.register_forward_hook(_transform_output, prepend=True)
    setattr(module, TRANSFORM, transform.train(module.training))


def set_input_transform(module: nn.Module, transform: nn.Module) -> None:
    """Replace the module's first floating-point positional input by ``transform(x)``, before any input quantizer.

    It belongs to the network, as a norm does: it stays where quantizers are disabled. Replaces a transform that is already there.
    """
    if not hasattr(module, INPUT_TRANSFORM):
        module.register_forward_pre_hook(_transform_input, prepend=True)
    setattr(module, INPUT_TRANSFORM, transform.train(module.training))


def input_transform(module: nn.Module) -> nn.Module | None:
    """The transform of the module's input, if it has one."""
    return getattr(module, INPUT_TRANSFORM, None)


def output_transform(module: nn.Module) -> nn.Module | None:
    """The transform of the module's output, if it has one."""
    return getattr(module, TRANSFORM, None)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weight has a quantizer, enabled or not, by name."""
    return {name: layer for name, layer in quantizable_layers(model).items() if weight_quantizer(layer) is not None}


def activation_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Activation quantizers by site, as ``sites`` gives them; one shared by several sites appears once."""
    found: dict[Quantizer, str] = {}
    for site, quantizer in sites(model).items():
        found.setdefault(quantizer, site)
    return {site: quantizer for quantizer, site in found.items()}


def sites(model: nn.Module) -> dict[str, Quantizer]:
    """Every place of an activation quantizer, ``layer1.0.conv1.input`` or ``layer1.0.output``, and the quantizer that sits there."""
    return {
        f"{name}.{side}" if name else side: getattr(module, attribute)
        for name, module in model.named_modules()
        for attribute, side in ((INPUT, "input"), (OUTPUT, "output"))
        if isinstance(getattr(module, attribute, None), Quantizer)
    }


def quantization_enabled(model: nn.Module, *, weights: bool, activations: bool) -> AbstractContextManager[None]:
    """Within the context, ``False`` disables weight quantizers, or activation quantizers and output transforms.

    The others stay as they are: enabled, unless ``set_bit_width(None)`` or an outer context disabled them.
    """
    off: list[nn.Module] = []
    for module in model.modules():
        if not weights and isinstance(module, WeightParametrization):
            off.append(module.quantizer)
        if not activations:
            off += [getattr(module, attribute) for attribute in (INPUT, OUTPUT, TRANSFORM) if hasattr(module, attribute)]
    return disabled(off)


@runtime_checkable
class Coded(Protocol):
    """A network whose parameters hold decoded weights already and that knows their codes: one that was loaded from a file."""

    def weight_codes(self) -> dict[str, QTensor]:
        """The codes of each quantized weight by parameter name."""


def bake_weights(model: nn.Module) -> tuple[nn.Module, dict[str, QTensor]]:
    """A copy of ``model`` with ordinary weights (and biases) that hold the decoded values, and the codes of each by parameter name.

    Activation quantizers stay. A weight whose quantizer is not enabled has no codes.
    """
    baked = copy.deepcopy(model)
    codes = model.weight_codes() if isinstance(model, Coded) else {}
    for name, layer in quantized_layers(baked).items():
        quantizer = weight_quantizer(layer)
        if quantizer is not None and quantizer.enabled:
            codes[f"{name}.weight" if name else "weight"] = quantizer.encode(float_weight(layer).detach())
        remove_weight_quantizer(layer)
    return baked, codes


class _QuantizedArguments(tuple[Any, ...]):
    """A call's arguments with the first tensor quantized; ``raw`` is that tensor as it came, for the hook that sees the output.

    Travelling with the arguments, it needs no state on the module, so copies, threads and reused layers cannot mix it up.
    """

    raw: Tensor


def _first_tensor(args: tuple[Any, ...]) -> int | None:
    return next((index for index, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()), None)


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    index = _first_tensor(args)
    if index is None:
        return None
    quantized = (*args[:index], getattr(module, INPUT)(args[index]), *args[index + 1 :])
    if not hasattr(module, TRANSFORM):
        return quantized
    arguments = _QuantizedArguments(quantized)
    arguments.raw = args[index]
    return arguments


def _transform_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    index = _first_tensor(args)
    return None if index is None else (*args[:index], getattr(module, INPUT_TRANSFORM)(args[index]), *args[index + 1 :])


def _transform_output(module: nn.Module, args: tuple[Any, ...], output: object) -> object:
    index = _first_tensor(args)
    transform, quantizer = getattr(module, TRANSFORM), getattr(module, INPUT, None)
    is_enabled = getattr(transform, "enabled", True) and (quantizer is None or quantizer.enabled)
    if index is None or not is_enabled or not isinstance(output, Tensor):
        return output
    x = args.raw if isinstance(args, _QuantizedArguments) else args[index]
    bias = getattr(module, "bias", None) if getattr(transform, "before_bias", False) else None
    if bias is None:
        return transform(output, x)
    bias = bias.reshape(-1, *(1 for _ in getattr(module, "kernel_size", ())))  # channels come before the dimensions of space
    return transform(output - bias, x) + bias


def _quantize_output(module: nn.Module, _args: tuple[Any, ...], output: object) -> object:
    return getattr(module, OUTPUT)(output) if isinstance(output, Tensor) else output


def _weight_parametrization(layer: nn.Module) -> WeightParametrization | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    found = [p for p in layer.parametrizations.weight if isinstance(p, WeightParametrization)]  # type: ignore[union-attr]
    return found[-1] if found else None


def _has_scaled_bias(layer: nn.Module) -> bool:
    if not parametrize.is_parametrized(layer, "bias"):
        return False
    return any(isinstance(p, BiasParametrization) for p in layer.parametrizations.bias)  # type: ignore[union-attr]


def _reduce_quantized_layer(layer: nn.Module, _protocol: int) -> tuple[Any, ...]:
    state = {key: value for key, value in vars(layer).items() if key != "_modules"}
    # its place is kept, and with it the order of parameters that optimizers count on
    modules = {key: value if key != "parametrizations" else None for key, value in layer._modules.items()}
    bias = float_bias(layer) if _has_scaled_bias(layer) else None
    return _rebuild_quantized_layer, (_plain_class(layer), state, modules, float_weight(layer), weight_quantizer(layer), bias)


def _rebuild_quantized_layer(
    cls: type[nn.Module],
    state: dict[str, Any],
    modules: dict[str, nn.Module | None],
    weight: nn.Parameter,
    quantizer: Quantizer,
    bias: nn.Parameter | None = None,
) -> nn.Module:
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    vars(layer).update(state)
    layer._modules.update(modules)
    layer._parameters["weight"] = weight
    if bias is not None:
        layer._parameters["bias"] = bias
    set_weight_quantizer(layer, quantizer)
    return layer
