"""Bit-Mixer of lowbit for reference cases."""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowbit.measure.selection import average_bits, bit_operations, greedy_path
from lowbit.methods.adaptive.bit_mixer import BitMixer, draw_widths, enable_weights, start_from_diagonal, transitional_norm
from lowbit.models.resnet import ResidualBlock
from lowbit.network import insert
from lowbit.network.bits import set_bits
from lowbit.network.slot import Slot
from lowbit.network.surgery.switchable_norm import SwitchableNorm
from lowbit.qat import Classification
from lowbit.qat.prepare import prepare
from lowbit.quantizers import Quantizer
from lowbit.quantizers.switchable import SwitchableQuantizer
from lowbit.spec import LayerBits

Values = dict[str, Any]
STATISTICS = ("running_mean", "running_var")
TABLES = ("weight", "bias", *STATISTICS)


def parts_of(quantizer: Quantizer, widths: list[int]) -> list[nn.Parameter]:
    """The steps of a quantizer, one for each width where it has several."""
    if isinstance(quantizer, SwitchableQuantizer):
        return [quantizer.at[str(bits)].get_parameter("scale") for bits in widths]
    return [quantizer.get_parameter("scale")]


def set_steps(quantizer: Quantizer, widths: list[int], steps: Tensor) -> None:
    for parameter, step in zip(parts_of(quantizer, widths), steps.reshape(-1), strict=True):
        parameter.data = step.clone()


def step_gradients(quantizer: Quantizer, widths: list[int], shape: torch.Size) -> Tensor:
    """The gradients of all steps, 0 where there is none."""
    gradients = [torch.zeros(()) if step.grad is None else step.grad for step in parts_of(quantizer, widths)]
    return torch.stack(gradients).reshape(shape)


def slot(widths: list[int], **place: Any) -> Slot:
    ordered = tuple(sorted(widths, reverse=True))
    return Slot("layer", nn.Identity(), ordered[0], widths=ordered, **place)


def weight_quantizer(params: Values, sharing: str) -> Quantizer:
    method = BitMixer(weight_sharing=sharing, rounding=params.get("rounding", "trunc"), step_start="lsq", step_gradient="highest")  # type: ignore[arg-type]
    return method.weight_quantizer(slot(params["bits_list"]))


def weight(params: Values, inputs: dict[str, Tensor]) -> Values:
    widths, w = params["bits_list"], inputs["w"].requires_grad_()
    quantizer = weight_quantizer(params, params["weight_sharing"])
    set_steps(quantizer, widths, inputs["step"])
    q_max = quantizer.encode(w).codes
    quantizer.set_bit_width(params["bits"])
    w_q = quantizer(w)
    found = {"q_max": q_max, "codes": quantizer.encode(w).codes, "w_q": w_q}
    if "grad_output" in inputs:
        w_q.backward(inputs["grad_output"])
        found |= {"grad_w": w.grad, "grad_step": step_gradients(quantizer, widths, inputs["step"].shape)}
    return found


def activation_quantizer(params: Values) -> Quantizer:
    return BitMixer().activation_quantizer(slot(params["bits_list"], is_signed=False, purpose="input"))


def activation(params: Values, inputs: dict[str, Tensor]) -> Values:
    widths, x = params["bits_list"], inputs["x"].requires_grad_()
    quantizer = activation_quantizer(params)
    set_steps(quantizer, widths, inputs["step"])
    quantizer.set_bit_width(params["bits"])
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    gradients = step_gradients(quantizer, widths, inputs["step"].shape)
    return {"codes": quantizer.encode(x).codes, "y": y, "grad_x": x.grad, "grad_step": gradients}


def initial_step(params: Values, inputs: dict[str, Tensor]) -> Values:
    bits = [params["bits"]]
    shared, latent = (weight_quantizer(params, sharing) for sharing in ("integers", "latent"))
    activations = activation_quantizer(params)
    for quantizer, values in ((shared, inputs["w"]), (latent, inputs["w"]), (activations, inputs["x"])):
        quantizer.initialize(values)
    steps = [parts_of(quantizer, bits)[0] for quantizer in (shared, latent, activations)]
    return dict(zip(("weight_step", "weight_step_latent", "activation_step"), steps, strict=True))


def pair_of(norm: SwitchableNorm) -> list[int]:
    """The widths of the pair that is selected, 0 for full precision."""
    return [0 if part == "float" else int(part) for part in norm.key.split(">")]


def in_order(norm: SwitchableNorm, widths: list[int]) -> list[nn.Module]:
    """The norms of all pairs by rows and columns, in the order of the widths."""
    places = {"float": 0, **{str(bits): place for place, bits in enumerate(widths)}}
    return [norm.norms[key] for key in sorted(norm.norms, key=lambda key: [places[part] for part in key.split(">")])]


def load_table(norm: SwitchableNorm, widths: list[int], tables: dict[str, Tensor]) -> None:
    """Rows and columns of tables into the norms of all pairs."""
    for name, table in tables.items():
        for own, values in zip(in_order(norm, widths), table.flatten(0, 1), strict=True):
            getattr(own, name).data.copy_(values)


def table_of(norm: SwitchableNorm, widths: list[int], name: str, shape: torch.Size) -> Tensor:
    return torch.stack([getattr(own, name) for own in in_order(norm, widths)]).reshape(shape)


def transitional_bn(params: Values, inputs: dict[str, Tensor]) -> Values:
    x, sequence = inputs["x"], params["sequence"]
    places = ("previous", "producer", "consumer")
    layers = ("producer", "consumer") if params["pair"] == "producer_consumer" else ("previous", "producer")
    mixed = {name: params["bits_list"] for name, bits in zip(places, sequence[0], strict=True) if bits != "fp"}
    norm = transitional_norm(nn.BatchNorm2d(x.shape[2], params["eps"], params["momentum"]), mixed, layers)
    assert norm is not None
    load_table(norm, params["bits_list"], {"weight": inputs["weight"], "bias": inputs["bias"]})

    def select(bits: list[Any]) -> None:
        chosen = {name: LayerBits(None, None) if own == "fp" else LayerBits(own, own) for name, own in zip(places, bits, strict=True)}
        norm.select(norm.choose(chosen, None))

    outputs, pairs = [], []
    for values, bits in zip(x, sequence, strict=True):
        select(bits)
        pairs.append(pair_of(norm))
        outputs.append(norm(values))
    norm.eval()
    select(params["eval_bits"])
    statistics = {name: table_of(norm, params["bits_list"], name, inputs["weight"].shape) for name in STATISTICS}
    return {"pairs": pairs, "y": torch.stack(outputs), "y_eval_last_x": norm(x[-1]), **statistics}


class Chain(nn.Sequential):
    """A float stem, quantized convolutions, and a classifier."""

    def __init__(self, channels: list[int], classes: int) -> None:
        super().__init__()
        self.add_module("stem", nn.Conv2d(3, channels[0], 3, padding=1, bias=False))
        self.add_module("bn0", nn.BatchNorm2d(channels[0]))
        self.add_module("relu0", nn.ReLU())
        for index, (before, behind) in enumerate(itertools.pairwise(channels), 1):
            self.add_module(f"conv{index}", nn.Conv2d(before, behind, 3, padding=1, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(behind))
            self.add_module(f"relu{index}", nn.ReLU())
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flatten", nn.Flatten())
        self.add_module("fc", nn.Linear(channels[-1], classes))


def residual(channels: int, wide: int, classes: int) -> nn.Module:
    """A float stem, two residual blocks, the second with a convolution in its shortcut, and a classifier."""
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, channels, 3, padding=1, bias=False))
    model.add_module("bn0", nn.BatchNorm2d(channels))
    model.add_module("relu0", nn.ReLU())
    model.add_module("block1", ResidualBlock(channels, channels, 1))
    model.add_module("block2", ResidualBlock(channels, wide, 2))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(wide, classes))
    return model


def ours(name: str) -> str:
    """The name of a module of the case in ``residual``."""
    parts = {"bn1": "norm1", "bn2": "norm2", "shortcut": "downsample.0", "shortcut_bn": "downsample.1"}
    return ".".join(parts.get(part, part) for part in name.split(".")) if "block" in name else name


def mixed(network: nn.Module, params: Values, sample: Tensor) -> nn.Module:
    options: Values = {name: params[name] for name in ("pair", "rounding", "weight_sharing") if name in params}
    widths = sorted(params["bits_list"], reverse=True)
    return prepare(network, method="bit_mixer", bits=widths, policy="paper", step_gradient="highest", sample=sample, **options)


def norms_of(model: nn.Module) -> list[SwitchableNorm]:
    return [module for module in model.modules() if isinstance(module, SwitchableNorm)]


def pair_selection(params: Values, inputs: dict[str, Tensor]) -> Values:
    layers = [f"conv{index}" for index, _ in enumerate(inputs["bits"][0], 1)]
    model = mixed(Chain([4, *(4 for _ in layers)], 3), params, torch.rand(2, 3, 6, 6))
    pairs = []
    for configuration in inputs["bits"].tolist():
        set_bits(model, dict(zip(layers, configuration, strict=True)))
        pairs.append([pair_of(norm) for norm in norms_of(model)])
    return {"pairs": pairs, "entries": [len(norm.norms) for norm in norms_of(model)]}


def initialize_pairs(params: Values, inputs: dict[str, Tensor]) -> Values:
    shape = inputs["weight"].shape
    widths = {"producer": params["bits_list"], "consumer": params["bits_list"]}
    norm = transitional_norm(nn.BatchNorm1d(shape[-1]), widths, ("producer", "consumer"))
    assert norm is not None
    load_table(norm, params["bits_list"], {name: inputs[name] for name in TABLES})
    start_from_diagonal(norm, producer=0)
    return {name: table_of(norm, params["bits_list"], name, shape) for name in TABLES}


class Network:
    """The network of a case under the names of the case."""

    def __init__(self, params: Values, inputs: dict[str, Tensor]) -> None:
        self.params, self.classes = params, inputs["init.fc/weight"].shape[0]
        self.is_residual = params["kind"] == "residual"
        weights = {name: inputs[f"init.{name}/weight"] for name in params["layers"]}
        stem = inputs["init.stem/weight"].shape[0]
        if self.is_residual:
            network: nn.Module = residual(stem, weights["block2.conv1"].shape[0], self.classes)
        else:
            network = Chain([stem, *(own.shape[0] for own in weights.values())], self.classes)
        self.model = mixed(network, params, inputs["x"][0])
        for name in params["norms"]:
            load_table(self.norm_at(name), params["bits_list"], {table: inputs[f"init.{name}/{table}"] for table in TABLES})
        for name, tensor in self.tensors().items():
            if f"init.{name}" in inputs:
                for own, value in zip(
                    tensor, inputs[f"init.{name}"].unbind() if len(tensor) > 1 else [inputs[f"init.{name}"]], strict=True
                ):
                    own.data.copy_(value)

    def norm_at(self, name: str) -> SwitchableNorm:
        return cast(SwitchableNorm, self.model.get_submodule(ours(name)))

    def tensors(self) -> dict[str, list[nn.Parameter]]:
        """Weights and steps by the names of the case."""
        found = {f"{name}/weight": [self.model.get_submodule(name).get_parameter("weight")] for name in ("stem", "fc")}
        found["fc/bias"] = [self.model.get_submodule("fc").get_parameter("bias")]
        for name in self.params["layers"]:
            layer = self.model.get_submodule(ours(name))
            weights, activations = insert.weight_quantizer(layer), insert.input_quantizer(layer)
            assert weights is not None and activations is not None
            found[f"{name}/weight"] = [insert.float_weight(layer)]
            found[f"{name}/weight_step"] = parts_of(weights, self.params["bits_list"])
            found[f"{name}/activation_step"] = parts_of(activations, self.params["bits_list"])
        return found

    def __call__(self, x: Tensor, bits: list[int]) -> Tensor:
        set_bits(self.model, {ours(name): own for name, own in zip(self.params["layers"], bits, strict=True)})
        enable_weights(self.model, is_enabled=self.params["weight_quantization"])
        return cast(Tensor, self.model(x))


def network(params: Values, inputs: dict[str, Tensor]) -> Values:
    made = Network(params, inputs)
    optimizer, logits, losses, pairs = torch.optim.SGD(made.model.parameters(), params["lr"]), [], [], []
    for x, target, bits in zip(inputs["x"], inputs["target"], params["bits"], strict=True):
        made.model.train()
        optimizer.zero_grad()
        logits.append(made(x, bits))
        losses.append(Classification().loss(logits[-1], (x, target)))
        pairs.append([pair_of(made.norm_at(name)) for name in params["norms"]])
        losses[-1].backward()
        optimizer.step()
    made.model.eval()
    found = {f"final.{name}": torch.stack(list(own)) if len(own) > 1 else own[0] for name, own in made.tensors().items()}
    for name, table in itertools.product(params["norms"], TABLES):
        found[f"final.{name}/{table}"] = table_of(made.norm_at(name), params["bits_list"], table, inputs[f"init.{name}/{table}"].shape)
    evaluated = made(inputs["x"][-1], params["eval_bits"])
    return {"logits": torch.stack(logits), "loss": torch.stack(losses), "pairs": pairs, "logits_eval": evaluated, **found}


def layerwise_draw(params: Values, inputs: dict[str, Tensor]) -> Values:
    numbers = [inputs[name] for name in ("progress", "u_base", "u_redraw", "u_choice")]
    return {"p": inputs["progress"], "bits": draw_widths(params["bits_list"], *numbers)}


def greedy_selection(params: Values, inputs: dict[str, Tensor]) -> Values:
    accuracy, widths = inputs["accuracy"], params["bits_list"]

    def measure(bits: tuple[int, ...]) -> float:
        return float(accuracy[tuple(widths.index(own) for own in bits)])

    def cost(bits: tuple[int, ...]) -> float:
        return average_bits(bits) if params["budget_kind"] == "average_bits" else bit_operations(bits, bits, inputs["macs"].tolist())

    path = greedy_path(widths, accuracy.dim(), measure, cost, params["budget"])
    return {"trace": path.trace, "bits": path.bits, "cost": path.costs[-1], "selected_accuracy": path.accuracies[-1]}
