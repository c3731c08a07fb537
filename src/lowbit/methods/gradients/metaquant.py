"""MetaQuant: a small network learns which gradient a weight should get from the gradient at its quantized value.

Paper: Chen, Wang, Pan 2019, "MetaQuant: Learning to Quantize by Learning to Penetrate Non-differentiable Quantization", NeurIPS.
    Section 3.1 (Eq. 3-6, meta quantizers), section 3.2 (Eq. 7-10, training), section 4.1 (settings).
Symbols: M_phi -> meta network, g_Wb -> the gradient at the quantized weight, W~ -> preprocessed weight, pi -> refined_gradient,
    dA/dW -> calibration.
Differs from the paper:
    - The meta network starts as the factor 1, because a random start may give a negative factor, which reverses every update.
    - The look-ahead weight is the paper's; ``look_ahead="stored"`` is that of the authors' code, which looks ahead along the update that
      it applied before.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.network import insert
from lowbit.options import AtLeast
from lowbit.qat import Companion, GivenNetworks, OptimizerSpec, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.recipe import Role
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.qtensor import AffineDecoder, BinaryDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient

Base = Literal["dorefa", "bwn", "bwn_f"]
META = "meta"  # the meta network among the run's networks, and the role of its parameters
_TINY = 1e-30
_NOTHING = 1e-20  # weights below it count as zeros: dividing by their maximum would make their gradients infinite


class FcGrad(nn.Module):
    """``m = FC_2(FC_1(g))``: one learned factor for the gradient. Source: Eq. 5."""

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(1, hidden, bias=False), nn.Linear(hidden, 1, bias=False)
        _start_at_one([self.linear1, self.linear2])

    def forward(self, gradient: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The gradient for every weight, shaped like ``gradient``, and the next state (none)."""
        return gradient * _product([self.linear1, self.linear2]), None


class MultiFc(nn.Module):
    """``m = g FC_n(... FC_1(W~))``, optionally with an activation function between. Source: Eq. 3."""

    def __init__(self, hidden: int = 100, layers: int = 2, activation: Literal["none", "relu", "tanh"] = "none") -> None:
        super().__init__()
        widths = [1, *[hidden] * (layers - 1), 1]
        linears = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
        self.network = nn.Sequential(OrderedDict((f"Linear{index}", linear) for index, linear in enumerate(linears)))
        self.activation = {"none": None, "relu": nn.ReLU(), "tanh": nn.Tanh()}[activation]
        _start_at_one(linears)

    def forward(self, gradient: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The gradient for every weight, shaped like ``gradient``, and the next state (none)."""
        if self.activation is None:
            return gradient * (weight * _product(self.network)), None
        x = weight.reshape(-1, 1)
        for index, linear in enumerate(self.network):
            x = linear(x if index == 0 else self.activation(x))
        return gradient * x.view_as(gradient), None


class LstmFc(nn.Module):
    """``m = g FC(LSTM(W~))`` with a hidden state for every weight. Source: Eq. 4."""

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.lstm1, self.fc1 = nn.LSTM(1, hidden), nn.Linear(hidden, 1)
        nn.init.ones_(self.fc1.bias)

    def forward(self, gradient: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The gradient for every weight, and the next state ``[2, weights, hidden]``: hidden and cell."""
        before = None if state is None else (state[:1].contiguous(), state[1:].contiguous())
        out, (hidden, cell) = self.lstm1(weight.reshape(1, -1, 1), before)
        return gradient * self.fc1(out).view_as(gradient), torch.cat([hidden, cell]).detach()


def _product(linears: Iterable[nn.Module]) -> Tensor:
    """The factor that consecutive linear layers amount to, shape ``()``.

    Multiplying the layers first saves ``hidden`` numbers for every weight of the network.
    """
    product: Tensor | None = None
    for linear in linears:
        weight: Tensor = linear.get_parameter("weight")
        product = weight if product is None else weight @ product
    assert product is not None
    return product.reshape(())


@torch.no_grad()
def _start_at_one(linears: list[nn.Linear]) -> None:
    """Make weights positive with a product of 1 over the layers, keeping their spread."""
    for linear in linears:
        linear.weight.copy_((linear.weight / linear.weight.abs().mean().clamp(min=_TINY)).abs().clamp(min=0.1))
    linears[-1].weight.div_(_product(linears))


@dataclass(frozen=True)
class LookAhead:
    """Where the next passes run.

    Attributes:
        meta_gradient: Returns ``m``, differentiable in the meta network; called in every pass, so that each has its own graph.
        update: Update that is subtracted from the weight, times the learning rate; a constant.
        learning_rate: Learning rate of the weights.
        value: ``m`` without its graph.
        state: The next state of the meta network, if it has one.
        bias: The layer's bias as it was before it was moved ahead.
    """

    meta_gradient: Callable[[], Tensor]
    update: Tensor
    learning_rate: float
    value: Tensor
    state: Tensor | None = None
    bias: Tensor | None = None


class MetaQuantizer(TableQuantizer):
    """A weight quantizer whose training pass runs at the look-ahead weight ``W - lr (C m + (u - C m))``, the bracket constant.

    Forward: ``dorefa``: ``2 round((2**k - 1) W~) / (2**k - 1) - 1`` with ``W~ = tanh(W) / (2 max|tanh(W)|) + 1/2``; ``bwn``: ``mean|W|`` times
    the sign, of the whole tensor or (``bwn_f``) of each output channel. Backward: the rounding passes the gradient, the sign where
    ``|W| <= 1``; nothing through the maximum and the mean; ``-lr C`` to the meta gradient ``m``. Source: Eq. 7-9.

    Args:
        bit_width: 1 to 8; 1 for ``bwn`` and ``bwn_f``.
        base: Base quantizer.
        granularity: Granularity of the scales of ``bwn_f``.

    All bit-widths share the memory of the meta network.
    """

    tables = ("last_gradient", "last_weight", "last_update", "last_bias_update", "state")

    def __init__(self, bit_width: int, base: Base, granularity: Granularity | None = None) -> None:
        super().__init__(bit_width, granularity if base == "bwn_f" and granularity is not None else Granularity.tensor())
        self.base: Base = base
        self.resize()
        for name in self.tables:
            self.get_buffer(name).zero_()
        self.register_buffer("has_history", torch.zeros((), dtype=torch.bool))
        self.has_history: Tensor
        self.last_gradient: Tensor  # at the quantized weight, in the last step
        self.last_weight: Tensor  # preprocessed, in the last step
        self.last_update: Tensor  # the refined gradient that was applied last
        self.last_bias_update: Tensor
        self.state: Tensor  # of the meta network
        self.pending: LookAhead | None = None
        self._captured: Tensor | None = None
        self._preprocessed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": None, "_captured": None, "_preprocessed": None}  # they belong to one step

    @property
    def bit_widths(self) -> Sequence[int]:
        return range(1, 9) if self.base == "dorefa" else (1,)

    def resize(self) -> None:
        self.steps = 2**self.bit_width - 1

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def calibration(self, x: Tensor) -> Tensor:
        """``C``: contribution of the preprocessing to the gradient, without the factors that cancel; a constant."""
        if self.base != "dorefa":
            return torch.ones_like(x)
        t = torch.tanh(x.detach())
        return (1 - t * t) / _largest(t)

    def preprocess(self, x: Tensor) -> Tensor:
        """``W~``."""
        if self.base != "dorefa":
            return x
        t = torch.tanh(x)
        return 0.5 * t / _largest(t) + 0.5

    def scale(self, x: Tensor) -> Tensor:
        """``mean|W|``, shaped to broadcast; a constant."""
        return self.granularity.flatten(x.detach().abs()).mean(1).reshape(self.granularity.scale_shape(x))

    def quantize(self, preprocessed: Tensor, scale: Tensor) -> Tensor:
        """The quantized weight; ``scale`` for the binary ones."""
        if self.base == "dorefa":
            steps: Tensor = preprocessed * self.steps
            rounded: Tensor = pass_gradient(steps, steps.round())
            levels: Tensor = 2 * (rounded / self.steps) - 1
            return levels
        sign = torch.where(preprocessed >= 0, 1.0, -1.0)
        passed: Tensor = pass_gradient(preprocessed * (preprocessed.detach().abs() <= 1), sign)
        return passed * scale

    def look_ahead(self, x: Tensor) -> Tensor:
        """The weight at which the pass runs: ``x`` itself where nothing is pending."""
        if self.pending is None:
            return x
        step = self.calibration(x) * self.pending.meta_gradient()
        ahead: Tensor = x - self.pending.learning_rate * pass_gradient(step, self.pending.update)
        return ahead

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.encode(x).decode().to(x.dtype)
        weight = self.look_ahead(x.float())
        preprocessed = self.preprocess(weight)
        y = self.quantize(preprocessed, self.scale(x.float() if self.base == "bwn_f" else weight))
        self._preprocessed = preprocessed.detach()
        if y.requires_grad:
            y.register_hook(self._capture)
        return y.to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        values = x.detach().float()
        if self.base == "dorefa":
            codes = (self.preprocess(values) * self.steps).round().to(torch.uint8)
            decoder = AffineDecoder(values.new_tensor(2 / self.steps), values.new_tensor(self.steps / 2), self.granularity)
            return QTensor(codes, decoder, self.bit_width)
        return QTensor((values >= 0).to(torch.uint8), BinaryDecoder(self.scale(values), self.granularity), 1)

    @property
    def captured(self) -> Tensor | None:
        """The gradient at the quantized weight, summed over the passes of this step; ``None`` where there was none."""
        return self._captured

    def remember(self, weight: Tensor, gradient_scale: float = 1.0, reduce_mean: Callable[[Tensor], None] = lambda _: None) -> bool:
        """Keep the inputs of the meta network for the next step; ``False`` if they are not finite, in which case nothing is kept.

        Args:
            weight: The float weight.
            gradient_scale: Loss scale contained in the gradients, which may have made them infinite.
            reduce_mean: Averages over processes; one whose layer did not run takes part without a gradient.
        """
        captured, preprocessed = self.captured, self._preprocessed
        if captured is None or preprocessed is None:
            captured, preprocessed = torch.zeros_like(weight, dtype=torch.float32), self.preprocess(self.look_ahead(weight.float()))
        pending = self.pending
        self.forget()
        reduce_mean(captured)
        if gradient_scale != 1 and not bool(torch.isfinite(captured).all()):
            return False
        self._set_table("last_gradient", captured / gradient_scale)
        self._set_table("last_weight", preprocessed)
        if pending is not None and pending.state is not None:
            self._set_table("state", pending.state)
        self.has_history.fill_(True)
        return True

    def forget(self) -> None:
        """Drop what belongs to one step."""
        self.pending = self._captured = self._preprocessed = None

    def _capture(self, gradient: Tensor) -> None:
        gradient = gradient.detach().float()
        self._captured = gradient.clone() if self._captured is None else self._captured + gradient


def _largest(t: Tensor) -> Tensor:
    largest = t.detach().abs().max()
    return torch.where(largest > _NOTHING, largest, torch.ones_like(largest))


def refined_gradient(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """The direction in which ``optimizer`` would move ``parameter`` for ``gradient``, without changing its state.

    SGD: the gradient with weight decay, with momentum added to its buffer (Nesterov too). Adam: the bias-corrected ratio of moments.
    """
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    state = optimizer.state.get(parameter, {})
    decay = 0.0 if isinstance(optimizer, torch.optim.AdamW) else group["weight_decay"]
    gradient = gradient + decay * parameter.detach()
    moved: Tensor
    if isinstance(optimizer, torch.optim.Adam):
        beta1, beta2 = group["betas"]
        count = float(state["step"]) + 1 if state else 1
        first = beta1 * state["exp_avg"] + (1 - beta1) * gradient if state else (1 - beta1) * gradient
        second = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient.square() if state else (1 - beta2) * gradient.square()
        moved = (first / (1 - beta1**count)) / ((second / (1 - beta2**count)).sqrt() + group["eps"])
        return moved
    momentum = group.get("momentum", 0.0)
    if not momentum:
        return gradient
    buffer = state.get("momentum_buffer")
    moved = gradient if buffer is None else momentum * buffer + (1 - group["dampening"]) * gradient
    return gradient + momentum * moved if group["nesterov"] else moved


@register(
    MethodInfo(
        name="metaquant",
        title="MetaQuant: Learning to Quantize by Learning to Penetrate Non-differentiable Quantization",
        paper="Chen, Wang, Pan, NeurIPS 2019",
        url="https://papers.nips.cc/paper_files/paper/2019/hash/f8e59f4b2fe7c5705bf878bbd494ccdf-Abstract.html",
        section="gradients",
        axes=("surrogate",),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=None,
        needs=("labels", "pretrained"),
        fidelity="exact",
        summary="a small network, trained along, turns gradients at quantized weights into gradients for the float ones",
        evidence="checked against the authors' code",
        margin_points=50,
    )
)
@dataclass
class MetaQuant(TrainingMethod):
    """Learned gradients of weights.

    Attributes:
        base: The forward quantizer: ``dorefa``, ``bwn`` (one scale) or ``bwn_f`` (a scale for each channel), the last two at 1 bit.
        meta: The meta network: ``fc_grad``, ``multi_fc`` or ``lstm_fc``.
        hidden: Width of the meta network.
        layers: Number of fully connected layers in ``multi_fc``.
        activation: Activation between the layers of ``multi_fc``: ``none``, ``relu`` or ``tanh``.
        meta_learning_rate: Adam learning rate of the meta network.
        look_ahead: ``refined``: the pass runs where the coming update will lead (the paper); ``stored``: where the last update would lead
            if repeated, biases too (the authors' code).
    """

    ends = "same"

    base: Base = "dorefa"
    meta: Literal["fc_grad", "multi_fc", "lstm_fc"] = "fc_grad"
    hidden: Annotated[int, AtLeast(1)] = 100
    layers: Annotated[int, AtLeast(1)] = 2
    activation: Literal["none", "relu", "tanh"] = "none"
    meta_learning_rate: Annotated[float, AtLeast(0)] = 1e-3
    look_ahead: Literal["refined", "stored"] = "refined"

    def default_recipe(self) -> Recipe:
        """CIFAR-10, with Adam."""
        return Recipe(100, 128, OptimizerSpec("adam", 1e-3, weight_decay=5e-4, schedule="step", milestones=(0.3, 0.6, 0.9)))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        if self.base != "dorefa" and slot.bit_width != 1:
            raise SpecError(f"metaquant: base {self.base!r} has 1 bit, got {slot.bit_width} weight bits. Use base 'dorefa', or 1 bit.")
        # linear layers have one scale, as in the authors' code
        base: Base = "bwn" if self.base == "bwn_f" and isinstance(slot.layer, nn.Linear) else self.base
        return MetaQuantizer(slot.bit_width, base, Granularity.channel(slot.channel_axis))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return LearnedScaleQuantizer(slot.bit_width, signed=False, learn_offset=slot.is_signed, is_batched=True)

    def meta_network(self) -> nn.Module:
        """A new meta network."""
        if self.meta == "fc_grad":
            return FcGrad(self.hidden)
        return MultiFc(self.hidden, self.layers, self.activation) if self.meta == "multi_fc" else LstmFc(self.hidden)

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        return {**super().companions(model, given), META: Companion(self.meta_network())}

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        meta = OptimizerSpec("adam", self.meta_learning_rate, weight_decay=0.0, schedule=recipe.optimizer.schedule)
        return {**super().optimizers(recipe), META: meta}

    @torch.no_grad()
    def before_step(self, run: TrainRun) -> None:
        network = run.networks[META]
        for site, quantizer in meta_weights(run.model):
            quantizer.forget()
            if not bool(quantizer.has_history):
                continue
            seen = quantizer.last_gradient, quantizer.last_weight, quantizer.state if quantizer.state.dim() else None
            value, state = network(*seen)
            if self.look_ahead == "refined":
                weight = site.original
                update = self._refined(run, weight, quantizer.calibration(weight) * value)
            else:
                update = quantizer.last_update
            bias = _bias(site.layer) if self.look_ahead == "stored" and quantizer.last_bias_update.dim() else None
            quantizer.pending = LookAhead(
                functools.partial(_meta_gradient, network, *seen),
                update,
                run.learning_rate,
                value,
                state,
                None if bias is None else bias.detach().clone(),
            )
            if bias is not None:
                move_bias(bias, quantizer.last_bias_update, run.learning_rate)

    @torch.no_grad()
    def after_backward(self, run: TrainRun) -> None:
        weights = list(meta_weights(run.model))
        has_gradients = any(site.original.grad is not None for site, _ in weights)  # none has where the user froze all of them
        is_first = has_gradients and not any(bool(quantizer.has_history) for _, quantizer in weights)
        for site, quantizer in weights:
            weight, bias, pending = site.original, _bias(site.layer), quantizer.pending
            if pending is not None and pending.bias is not None and bias is not None:
                bias.copy_(pending.bias)
            if weight.grad is None:  # the layer did not run, in any process
                quantizer.forget()
                continue
            if not quantizer.remember(weight.detach(), run.gradient_scale, run.reduce_mean):
                continue
            update, bias_update = weight.grad, None if bias is None else bias.grad
            if pending is None:  # the first step only gathers the inputs of the meta network
                weight.grad = None
                if bias is not None:
                    bias.grad = None
            else:
                weight.grad = (quantizer.calibration(weight) * pending.value).to(weight.dtype)
                if self.look_ahead == "stored":
                    update = self._refined(run, weight, weight.grad)
                    bias_update = None if bias is None or bias_update is None else self._refined(run, bias, bias_update)
            if self.look_ahead == "stored":
                quantizer._set_table("last_update", update)
                if bias_update is not None:
                    quantizer._set_table("last_bias_update", bias_update)
        if is_first:
            for role, parameter in run.roles():
                if role != META:
                    parameter.grad = None

    @staticmethod
    def _refined(run: TrainRun, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        for optimizer in run.optimizers:
            if any(p is parameter for group in optimizer.param_groups for p in group["params"]):
                return refined_gradient(optimizer, parameter, gradient)
        return gradient


def meta_weights(model: nn.Module) -> Iterator[tuple[insert.WeightSite, MetaQuantizer]]:
    """The weights that have a meta quantizer."""
    for site in insert.quantized_weights(model).values():
        quantizer = site.quantizer
        if isinstance(quantizer, MetaQuantizer):
            yield site, quantizer


def move_bias(bias: nn.Parameter, update: Tensor, learning_rate: float) -> None:
    """Move a bias, in place, to where ``update`` leads."""
    bias.data.sub_(learning_rate * update)


def _meta_gradient(network: nn.Module, gradient: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    m: Tensor = network(gradient, weight, state)[0]
    return m


def _bias(layer: nn.Module) -> nn.Parameter | None:
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, nn.Parameter) else None
