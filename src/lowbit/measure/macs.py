"""Multiply-accumulates of each weight, counted where its products are computed, whichever code computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from lowbit.inputs import Inputs, tensors_of
from lowbit.measure.outputs import device_of
from lowbit.network.insert import WeightSite, weight_sites
from lowbit.network.layers import evaluating

aten = torch.ops.aten


def count_macs(model: nn.Module, sample: object) -> dict[str, float]:
    """Multiply-accumulates of each weight for one sample, from the shapes of a real call.

    Convolution: output elements x (input channels / groups) x kernel elements. Transposed: input elements x (output
    channels / groups) x kernel elements. Linear: output elements x input features, so every token counts. Recurrent layers: tokens x
    elements of the weight. A lookup (an embedding) multiplies nothing. Calls add up, those of functions that are given a layer's weight
    (attention, ``F.linear(x, layer.weight)``) included; the batch is divided out.

    >>> layer = nn.Linear(8, 4)
    >>> count_macs(layer, torch.zeros(2, 8)), count_macs(nn.Sequential(nn.LSTM(8, 4)), torch.zeros(3, 1, 8))
    ({'': 32.0}, {'0.weight_ih_l0': 128.0, '0.weight_hh_l0': 64.0})
    """
    inputs = Inputs.of(sample, model).to(device_of(model))
    with evaluating(model), _without_fused_attention(), _Products(weight_sites(model)) as products:
        model(*inputs.args, **inputs.kwargs)
    return {name: count / inputs.batch_size for name, count in products.macs.items()}


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Within the context, attention computes its products one by one."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_enabled)


class _Products(TorchDispatchMode):
    """Within the context, counts the products of every tensor that is a weight, a view of one, or made of one element by element."""

    def __init__(self, sites: Mapping[str, WeightSite]) -> None:
        super().__init__()
        self.macs = dict.fromkeys(sites, 0)
        self._sites = sites
        self._running: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._names: dict[int, list[str]] = {}  # by the memory of the tensor
        self._kept: list[Tensor] = []  # so that nothing else gets that memory

    def __enter__(self) -> _Products:
        for name, site in self._sites.items():
            layer, parameter = site.layer, site.parameter
            if isinstance(layer, nn.RNNBase):  # its kernels hide the products
                self._handles.append(layer.register_forward_hook(self._recurrent(name, site), with_kwargs=True))
            elif parametrize.is_parametrized(layer, parameter):
                parts: nn.Module = layer.parametrizations[parameter]  # type: ignore[index, assignment]
                self._handles.append(parts.register_forward_hook(lambda _module, _args, value, name=name: self._note(name, value)))
            else:
                self._note(name, site.original)
        for layer in dict.fromkeys(site.layer for site in self._sites.values()):
            self._handles.append(layer.register_forward_pre_hook(lambda module, _args: self._running.append(module)))
            self._handles.append(layer.register_forward_hook(lambda *_: self._left()))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._names.clear()
        self._kept.clear()

    def __torch_dispatch__(self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = [(tensor, names) for tensor in tensors_of((args, kwargs or {})) if (names := self._names_of(tensor))]
        if not known:
            return result
        count = _PRODUCTS.get(function.overloadpacket)
        for tensor, names in known:
            if count is not None:
                self.macs[self._owner(names)] += count(*args, **(kwargs or {}))
                break
            if isinstance(result, Tensor) and result.shape == tensor.shape and not self._names_of(result):
                for name in names:
                    self._note(name, result)
        return result

    def _note(self, name: str, value: Tensor) -> None:
        if value.numel():
            self._names.setdefault(_memory(value), []).append(name)
            self._kept.append(value)

    def _names_of(self, tensor: Tensor) -> list[str]:
        return self._names.get(_memory(tensor), []) if tensor.layout == torch.strided else []

    def _owner(self, names: list[str]) -> str:
        """The one of several weights in one place that is multiplied with: that of the layer that runs."""
        return next((name for name in names if self._sites[name].layer in self._running), names[0])

    def _left(self) -> None:
        self._running.pop()

    def _recurrent(self, name: str, site: WeightSite) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], object], None]:
        def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: object) -> None:
            x = args[0] if args else kwargs["input"]
            x = x.data if isinstance(x, PackedSequence) else x
            self.macs[name] += x.numel() // x.shape[-1] * site.original.numel()

        return count


def _memory(tensor: Tensor) -> int:
    """A number for the memory of a tensor and its views, also on the device ``meta``, which has none."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or int(storage._cdata)


def _matrices(a: Tensor, b: Tensor, **_: object) -> int:
    return a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _added(_added_to: Tensor, a: Tensor, b: Tensor, **_: object) -> int:
    return _matrices(a, b)


def _linear(x: Tensor, weight: Tensor, *_: object) -> int:
    return x.numel() * weight.shape[0]


def _convolution(x: Tensor, weight: Tensor, _bias: object, stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
                 output_padding: list[int], _groups: int) -> int:  # fmt: skip
    if transposed:
        return x.numel() * weight[0].numel()
    sizes = zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    places = math.prod((size + 2 * pad - dil * (kernel - 1) - 1) // step + 1 for size, pad, dil, kernel, step in sizes)
    return int(x.shape[0] * places * weight.numel())


_PRODUCTS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.dot), _matrices),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addmv), _added),
    aten.linear: _linear,
    aten.convolution: _convolution,
}
