"""Quantizers in a network, without tracing it.

A weight quantizer is a parametrization of a layer's parameter (``weight``, or one of several such as ``weight_ih_l0``), so every use of
that weight, functional ones too, sees quantized values; the bias follows one that scales the layer's whole output. An activation quantizer is a submodule called
``input_quantizer`` or ``output_quantizer`` that a forward hook applies. An ``input_transform`` comes before the input quantizer; an
``output_transform`` changes a layer's output by what it knows of its input. The network stays an ordinary module: control flow,
reused layers, ``state_dict``, ``deepcopy``, ``pickle``, autocast and ``torch.compile`` behave as before. Quantizers belong to modules,
not to calls: a layer used twice shares them.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import LayerError
from lowbit.network.calls import Call, input_of, with_input
from lowbit.network.layers import (
    QUANTIZABLE,
    WEIGHT,
    layers_with_weights,
    output_channel_axis,
    quantizable_layers,
    weights_of,
)
from lowbit.network.record import FloatSize
from lowbit.quantizers import QTensor, Quantizer
from lowbit.quantizers.base import disabled

INPUT, OUTPUT, TRANSFORM = "input_quantizer", "output_quantizer", "output_transform"
INPUT_TRANSFORM = "input_transform"


@dataclass(frozen=True)
class WeightSite:
    """One weight of a network: a parameter of a layer.

    Attributes:
        layer: The layer.
        parameter: The name of its parameter.
        layer_name: The layer's name in the network.
    """

    layer: nn.Module
    parameter: str = WEIGHT
    layer_name: str = ""

    @property
    def name(self) -> str:
        """What policies and tables call it: the layer's name where the parameter is ``weight``, else the path of the parameter."""
        return self.layer_name if self.parameter == WEIGHT else self.path

    @property
    def path(self) -> str:
        """The name of the parameter in the network."""
        return f"{self.layer_name}.{self.parameter}" if self.layer_name else self.parameter

    @property
    def quantizer(self) -> Quantizer | None:
        """Its quantizer, if it has one."""
        return weight_quantizer(self.layer, self.parameter)

    @property
    def original(self) -> nn.Parameter:
        """The float weight behind the quantizer."""
        return float_weight(self.layer, self.parameter)

    @property
    def channel_axis(self) -> int:
        """The axis that counts output channels."""
        return output_channel_axis(self.layer)

    @property
    def is_weight_only(self) -> bool:
        """Whether what the layer computes stays in float, whatever its weight is."""
        return not isinstance(self.layer, QUANTIZABLE)


def site_name(path: str) -> str:
    """The name of the weight site whose parameter has the name ``path`` in the network.

    >>> site_name("head.weight"), site_name("lstm.weight_ih_l0")
    ('head', 'lstm.weight_ih_l0')
    """
    layer, _, parameter = path.rpartition(".")
    return layer if parameter == WEIGHT else path


def weight_sites(model: nn.Module) -> dict[str, WeightSite]:
    """Every weight that can be quantized by its site's name, in definition order.

    >>> list(weight_sites(nn.Sequential(nn.Embedding(9, 2), nn.GRU(2, 3), nn.Linear(3, 2))))
    ['0', '1.weight_ih_l0', '1.weight_hh_l0', '2']
    """
    sites = (WeightSite(layer, parameter, name) for name, layer in layers_with_weights(model).items() for parameter in weights_of(layer))
    return {site.name: site for site in sites if not site.is_weight_only or _holds(site)}


def _holds(site: WeightSite) -> bool:
    """Whether the weight is a parameter, and not computed by a hook of the user's."""
    own = site.layer._parameters.get(site.parameter) is not None
    return own or _weight_parametrization(site.layer, site.parameter) is not None


def quantized_weights(model: nn.Module) -> dict[str, WeightSite]:
    """The weights that have a quantizer, enabled or not, by the names of their sites."""
    return {name: site for name, site in weight_sites(model).items() if site.quantizer is not None}


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


@runtime_checkable
class HoldsNorm(Protocol):
    """A weight quantizer that folds the norm behind a layer into it, so that weight and bias follow the norm, quantized or not."""

    def folded_bias(self, bias: Tensor) -> Tensor:
        """The bias of the layer and its norm together."""


class BiasParametrization(nn.Module):
    """Passes a bias through ``scale_bias`` of the weight's quantizer, where that has one and is enabled, or through its ``folded_bias``."""

    def __init__(self, weights: WeightParametrization) -> None:
        super().__init__()
        self._weights = (weights,)  # in a tuple, because it is a submodule of the weight's parametrization already

    @property
    def quantizer(self) -> Quantizer:
        """That of the weight."""
        (weights,) = self._weights
        return weights.quantizer

    def forward(self, bias: Tensor) -> Tensor:
        folded = getattr(self.quantizer, "folded_bias", None)
        if folded is not None:
            return cast(Tensor, folded(bias))
        scale = getattr(self.quantizer, "scale_bias", None)
        return bias if scale is None or not self.quantizer.enabled else scale(bias)


def set_weight_quantizer(layer: nn.Module, quantizer: Quantizer, parameter: str = WEIGHT) -> None:
    """Quantize a weight of ``layer`` from now on, wherever it is used; replaces a quantizer that is already there.

    The bias of the layer follows one that ``ScalesBias`` or ``HoldsNorm``.
    """
    quantizer.train(layer.training)
    parametrization = _weight_parametrization(layer, parameter)
    if parametrization is not None:
        parametrization.quantizer = quantizer
        _follow_with_bias(layer, parameter, parametrization)
        return
    if not isinstance(getattr(layer, parameter, None), Tensor):
        raise LayerError(f"{type(layer).__name__} has no {parameter} tensor to quantize")
    is_new = not parametrize.is_parametrized(layer)
    parametrization = WeightParametrization(quantizer)
    parametrize.register_parametrization(layer, parameter, parametrization, unsafe=True)
    _follow_with_bias(layer, parameter, parametrization)
    layer.train(layer.training)
    if is_new:
        _adapt_class(layer)


def _adapt_class(layer: nn.Module) -> None:
    """Let the class that parametrize made for ``layer`` be pickled, and read each of several weights once in a call."""
    made: Any = type(layer)
    plain = _plain_class(layer)
    # parametrize refuses to pickle its generated class; rebuilding the parametrization on load is all that is needed
    made.__reduce_ex__ = _reduce_quantized_layer
    if weights_of(layer) == (WEIGHT,):
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with parametrize.cached():
            return plain.forward(self, *args, **kwargs)

    made.forward = forward
    if isinstance(layer, nn.RNNBase):  # its kernels take a list of the weights as they were when it was made
        made._flat_weights = property(lambda self: [getattr(self, name) for name in self._flat_weights_names], lambda self, values: None)
        made._init_flat_weights = _forget_flat_weights
        made.flatten_parameters = lambda self: None
        vars(layer).pop("_flat_weights", None)
        _forget_flat_weights(layer)


def _forget_flat_weights(layer: nn.Module) -> None:
    layer._flat_weight_refs = [None] * len(layer._flat_weights_names)  # type: ignore[assignment, arg-type]


def _follow_with_bias(layer: nn.Module, parameter: str, weights: WeightParametrization) -> None:
    if parameter == WEIGHT and isinstance(weights.quantizer, (ScalesBias, HoldsNorm)) and isinstance(layer._parameters.get("bias"), Tensor):
        parametrize.register_parametrization(layer, "bias", BiasParametrization(weights))


def weight_quantizer(layer: nn.Module, parameter: str = WEIGHT) -> Quantizer | None:
    """The quantizer of the layer's weight, if it has one."""
    parametrization = _weight_parametrization(layer, parameter)
    return None if parametrization is None else parametrization.quantizer


def float_weight(layer: nn.Module, parameter: str = WEIGHT) -> nn.Parameter:
    """The float weight behind the quantizer (the parameter that training and rounding change)."""
    held: nn.Module = layer
    if _weight_parametrization(layer, parameter) is not None:
        held, parameter = layer.parametrizations[parameter], "original"  # type: ignore[index, assignment]
    weight: nn.Parameter = getattr(held, parameter)
    return weight


def float_bias(layer: nn.Module) -> nn.Parameter | None:
    """The parameter behind the layer's bias, if it has one."""
    if _has_scaled_bias(layer):
        return layer.parametrizations.bias.original  # type: ignore[union-attr, return-value]
    return getattr(layer, "bias", None)


def remove_weight_quantizers(layer: nn.Module) -> None:
    """Make weights and bias ordinary parameters again, holding their quantized and scaled values."""
    originals = {name: float_weight(layer, name) for name in _quantized_parameters(layer)}
    if not originals:
        return
    bias = float_bias(layer) if _has_scaled_bias(layer) else None
    if bias is not None:
        originals["bias"] = bias
    values = {name: nn.Parameter(getattr(layer, name).detach().clone(), p.requires_grad) for name, p in originals.items()}
    # parametrize.remove_parametrizations edits the generated class, which copies of this layer share
    layer.__class__ = _plain_class(layer)
    del layer._modules["parametrizations"]
    layer._parameters.update(values)
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()


def _quantized_parameters(layer: nn.Module) -> list[str]:
    return [name for name in weights_of(layer) if _weight_parametrization(layer, name) is not None]


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    return type(layer).__mro__[1]


def set_input_quantizer(module: nn.Module, quantizer: Quantizer) -> None:
    """Quantize the module's first floating-point input, and other inputs that are the same tensor, as in ``attention(x, x, x)``."""
    if not hasattr(module, INPUT):
        module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
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

    ``x`` is the module's first floating-point input before the input quantizer (behind an input transform). An
    output quantizer sees the transformed output. It belongs to the quantizer of the input: where that is not enabled the output stays
    as it is, and where ``transform.enabled`` is ``False``. A transform with a true attribute ``before_bias`` gets the output without
    the layer's bias, which is added to what it returns.
    """
    if not hasattr(module, TRANSFORM):
        module.register_forward_hook(_transform_output, prepend=True, with_kwargs=True)
    setattr(module, TRANSFORM, transform.train(module.training))


def set_input_transform(module: nn.Module, transform: nn.Module) -> None:
    """Replace the module's first floating-point input by ``transform(x)``, before any input quantizer.

    It belongs to the network, as a norm does: it stays where quantizers are disabled. Replaces a transform that is already there.
    """
    if not hasattr(module, INPUT_TRANSFORM):
        module.register_forward_pre_hook(_transform_input, prepend=True, with_kwargs=True)
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

    @property
    def float_size(self) -> FloatSize | None:
        """The size of the float network that the file was made from; ``None`` where the file does not say."""

    def weight_codes(self) -> dict[str, QTensor]:
        """The codes of each quantized weight by parameter name."""


def bake_weights(model: nn.Module) -> tuple[nn.Module, dict[str, QTensor]]:
    """A copy of ``model`` with ordinary weights (and biases) that hold the decoded values, and the codes of each by parameter name.

    Activation quantizers stay. A weight whose quantizer is not enabled has no codes.
    """
    baked = copy.deepcopy(model)
    codes = model.weight_codes() if isinstance(model, Coded) else {}
    found = quantized_weights(baked).values()
    for site in found:
        if site.quantizer is not None and site.quantizer.enabled:
            codes[site.path] = site.quantizer.encode(site.original.detach())
    for layer in dict.fromkeys(site.layer for site in found):
        remove_weight_quantizers(layer)
    return baked, codes


class _QuantizedArguments(tuple[Any, ...]):
    """A call's arguments with the first tensor quantized; ``raw`` is that tensor as it came, for the hook that sees the output.

    Travelling with the arguments, it needs no state on the module, so copies, threads and reused layers cannot mix it up.
    """

    raw: Tensor


def _quantize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    raw = input_of(args, kwargs)
    if raw is None:
        return None
    x = getattr(module, INPUT)(raw)
    quantized = tuple(x if value is raw else value for value in args)
    named = {name: x if value is raw else value for name, value in kwargs.items()}
    if not hasattr(module, TRANSFORM):
        return quantized, named
    arguments = _QuantizedArguments(quantized)
    arguments.raw = raw
    return arguments, named


def _transform_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    x = input_of(args, kwargs)
    return None if x is None else with_input(args, kwargs, getattr(module, INPUT_TRANSFORM)(x))


def _transform_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
    x = args.raw if isinstance(args, _QuantizedArguments) else input_of(args, kwargs)
    transform, quantizer = getattr(module, TRANSFORM), getattr(module, INPUT, None)
    is_enabled = getattr(transform, "enabled", True) and (quantizer is None or quantizer.enabled)
    if x is None or not is_enabled or not isinstance(output, Tensor):
        return output
    bias = getattr(module, "bias", None) if getattr(transform, "before_bias", False) else None
    if bias is None:
        return transform(output, x)
    bias = bias.reshape(-1, *(1 for _ in getattr(module, "kernel_size", ())))  # channels come before the dimensions of space
    return transform(output - bias, x) + bias


def _quantize_output(module: nn.Module, _args: tuple[Any, ...], output: object) -> object:
    return getattr(module, OUTPUT)(output) if isinstance(output, Tensor) else output


def _weight_parametrization(layer: nn.Module, parameter: str) -> WeightParametrization | None:
    if not parametrize.is_parametrized(layer, parameter):
        return None
    found = [p for p in layer.parametrizations[parameter] if isinstance(p, WeightParametrization)]  # type: ignore[index]
    return found[-1] if found else None


def _has_scaled_bias(layer: nn.Module) -> bool:
    if not parametrize.is_parametrized(layer, "bias"):
        return False
    return any(isinstance(p, BiasParametrization) for p in layer.parametrizations.bias)  # type: ignore[union-attr]


def _reduce_quantized_layer(layer: nn.Module, _protocol: int) -> tuple[Any, ...]:
    state = {key: value for key, value in vars(layer).items() if key not in ("_modules", "_flat_weight_refs")}
    # its place is kept, and with it the order of parameters that optimizers count on
    modules = {key: value if key != "parametrizations" else None for key, value in layer._modules.items()}
    bias = float_bias(layer) if _has_scaled_bias(layer) else None
    weights = {name: (float_weight(layer, name), weight_quantizer(layer, name)) for name in _quantized_parameters(layer)}
    return _rebuild_quantized_layer, (_plain_class(layer), state, modules, weights, bias)


def _rebuild_quantized_layer(
    cls: type[nn.Module],
    state: dict[str, Any],
    modules: dict[str, nn.Module | None],
    weights: dict[str, tuple[nn.Parameter, Quantizer]],
    bias: nn.Parameter | None = None,
) -> nn.Module:
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    vars(layer).update(state)
    layer._modules.update(modules)
    layer._parameters.update({name: weight for name, (weight, _) in weights.items()})
    if bias is not None:
        layer._parameters["bias"] = bias
    for name, (_, quantizer) in weights.items():
        set_weight_quantizer(layer, quantizer, name)
    return layer
