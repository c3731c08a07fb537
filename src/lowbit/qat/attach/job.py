"""Putting trained quantizers into a network: at weights, at inputs and outputs of layers, at sums, initialized from one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit.errors import CalibrationError, LayerError, LowbitError, NotFiniteError
from lowbit.network.bits import policy_bits, raised_bits
from lowbit.network.calls import input_of
from lowbit.network.graph.dataflow import Dataflow, capture
from lowbit.network.insert import activation_quantizers
from lowbit.network.job import NetworkJob, made_for
from lowbit.network.layers import WEIGHT, frozen_norms
from lowbit.network.placement import Placement, Site, place_at_layers, place_at_tensors
from lowbit.network.slot import MergeFactory, QuantizerFactory, Slot
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.spec import Granularity, LayerBits

InitializeLayer = Callable[..., None]  # (layer, input) or (layer, None, parameter)


def learned_scale(slot: Slot) -> Quantizer:
    """A grid whose step size is learned: with weights one for each output channel (or row of an embedding), elsewhere one with a learned zero point as well.

    The inputs of layers that are never negative need no zero point.
    """
    if slot.purpose == "weight":
        return LearnedScaleQuantizer(slot.bit_width, signed=True, granularity=Granularity.channel(slot.channel_axis))
    learn_offset = slot.is_signed or slot.purpose != "input"
    return LearnedScaleQuantizer(slot.bit_width, signed=False, learn_offset=learn_offset, is_batched=True)


@dataclass
class QatJob(NetworkJob):
    """A network that is made ready for training.

    Attributes:
        edges: Makes the quantizers of layers to which the policy's exception for the first and last one applies.
        switches: The widths between which the network is to switch, from the highest on, which the policy's default is; with one it has this alone.
        tied: Layers whose bits are to follow those of another one, where each layer switches, and which that is.
        inserted: The quantizers that ``insert`` put in at weights and inputs, each with the name of its layer.

    Raises:
        GraphError: The policy asks for bits of sums and concatenations, and the network cannot be exported.

    Example:
        >>> import torch, lowbit
        >>> from lowbit.inputs import Inputs
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> job = lowbit.QatJob(model, lowbit.BitPolicy.uniform(2, 4), Inputs.of(torch.rand(8, 4), model))
        >>> list(job.layers), job.positions
        (['0', '2'], {'0': 'first', '2': 'last'})
    """

    allows_float_weights = True
    edges: QuantizerFactory = learned_scale
    switches: tuple[LayerBits, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    inserted: list[tuple[str, Quantizer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._dataflow: Dataflow | None = None
        self._between: list[Quantizer] = []  # those of ``insert`` that do not sit at the input of a layer
        if self.merge_bits is not None:
            self.dataflow()

    def dataflow(self) -> Dataflow:
        """The dataflow of the network without quantizers; to be asked for before they are inserted.

        Raises:
            GraphError: The network cannot be exported.
        """
        if self._dataflow is None:
            self._dataflow = capture(self.model, self.sample)
        return self._dataflow

    def insert(self, weights: QuantizerFactory, activations: QuantizerFactory, placements: Sequence[Placement] | None = None) -> None:
        """Give every layer the quantizers of these factories at its weight and input; they are not initialized yet.

        ``placements`` say where those of activations sit, if not at the inputs of layers; ``insert_outputs`` then leaves these places alone.
        """
        if placements is None:
            placements = place_at_layers(self.activation_bits)
        at_layers = {Site(name, "input") for name in self.activation_bits}
        signs = self.signs(placements)
        for name, site in self.weights.items():
            quantizer = self._build(self.weight_slot(name), weights)
            self.set_weight(site, quantizer)
            self.inserted.append((name, quantizer))
        for placement in placements:
            slot = self.slot(placement, is_signed=signs[placement.name])
            quantizer = self._build(slot, activations)
            self.place(placement, quantizer)
            if placement.purpose == "input":
                self.inserted.append((slot.name, quantizer))
            if not at_layers.issuperset(placement.sites):
                self._between.append(quantizer)

    def initialize(self, initialize_layer: InitializeLayer) -> None:
        """Run the sample in training mode and let ``initialize_layer(layer, input)`` set each layer up just before its first call.

        Layers are set up in execution order, so each sees what the quantized layers before it give; those that run in evaluation mode
        alone in a second pass. Where a weight is used before its layer was called, or without calling it, ``initialize_layer(layer,
        None)`` sets it up from the weight alone; so are layers that never run, and each of several weights of a layer, by
        ``initialize_layer(layer, None, parameter)``. Quantizers that do not sit at the input of a layer are initialized from what they see
        first. Running statistics are restored afterwards.
        """
        between = dict.fromkeys(self._between)
        pending: dict[str, nn.Module] = dict(self.layers)
        for name in self.activation_bits:
            pending.setdefault(name, self.model.get_submodule(name))
        by_module = {id(layer): name for name, layer in pending.items()}
        unset = {name: site for name, site in self.weights.items() if site.quantizer is not None}

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name = by_module[id(layer)]
            if pending.pop(name, None) is not None:
                unset.pop(name, None)
                with _naming(_described(name, layer)):
                    x = input_of(args, kwargs)
                    if x is None:
                        raise LayerError("it is called without a floating-point input")
                    if name in self.activation_bits:
                        _check_finite(x)
                    initialize_layer(layer, x)

        def from_weight(name: str) -> None:
            site = unset.pop(name, None)
            if site is not None:
                with _naming(_described(name, site.layer)):
                    initialize_layer(site.layer, None, *(() if site.parameter == WEIGHT else (site.parameter,)))

        def first_seen(quantizer: Quantizer, args: tuple[Any, ...]) -> None:
            if quantizer in between:
                del between[quantizer]
                self._initialize(quantizer, args[0])

        called = set(self._called)
        for name in [name for name in unset if name not in called]:
            from_weight(name)

        def hooks() -> list[RemovableHandle]:
            handles = [layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True) for layer in pending.values()]
            handles += [quantizer.register_forward_pre_hook(first_seen) for quantizer in between]
            for name, site in unset.items():
                quantizer = site.quantizer
                assert quantizer is not None
                handles.append(quantizer.register_forward_pre_hook(lambda *_, name=name: from_weight(name)))
            return handles

        self._run(hooks())
        if between or not called.isdisjoint(pending):
            self._run(hooks(), training=False)
        for name in list(unset):
            from_weight(name)

    def _initialize(self, quantizer: Quantizer, x: Tensor) -> None:
        """Initialize a quantizer of activations from what it reads; its errors name the place."""
        place = next(name for name, known in activation_quantizers(self.model).items() if known is quantizer)
        with _naming(f"activation {place!r}"):
            _check_finite(x)
            quantizer.initialize(x.detach())

    def insert_outputs(self, outputs: QuantizerFactory, merges: MergeFactory) -> None:
        """Quantize the outputs of layers and what takes part in merges, as far as the policy asks for it, and initialize them.

        A runtime computes a layer in integers only where its result is quantized; with quantizers at the inputs of layers alone, those
        that end in a residual sum are computed in float. Initialized from the sample, each seeing what those before it give; one
        that ``merges`` gives for several places from the first of them.

        Args:
            outputs: Makes the quantizer of a layer's output.
            merges: Makes the quantizer of a tensor between layers, or ``None`` for a tensor that stays float.
        """
        if self.merge_bits is None:
            planned = place_at_layers({}, self.output_bits)
        else:
            planned = place_at_tensors(self.dataflow(), {}, self.output_bits, merge_bits=self.merge_bits)
        planned = [replace(p, sites=self.free_sites(p.sites)) for p in planned]
        planned = [p for p in planned if p.sites]
        if not planned:
            return
        signs = self.signs(planned)
        placed: dict[Placement, Quantizer] = {}
        for placement in planned:
            slot = self.slot(placement, is_signed=signs[placement.name])
            quantizer = self._build(slot, outputs) if placement.purpose == "output" else made_for(slot, merges)
            if quantizer is not None:
                self.place(placement, quantizer)
                placed[placement] = quantizer
        pending = set(placed.values())

        def before(quantizer: Quantizer, args: tuple[Any, ...]) -> None:
            if quantizer in pending:
                pending.discard(quantizer)
                self._initialize(quantizer, args[0])

        self._run([quantizer.register_forward_pre_hook(before) for quantizer in pending])
        if pending:
            self._run([quantizer.register_forward_pre_hook(before) for quantizer in pending], training=False)
        merged = sum(placement.purpose != "output" for placement in placed)
        if self.merge_bits is not None:
            self.table.note(f"sums, concatenations and what is pooled: {self.merge_bits} bits at {merged} places")

    def leave_merges_float(self, note: str) -> None:
        """Let ``insert_outputs`` quantize no sums and concatenations, for what the policy asks for has been done as ``note`` says."""
        self.policy = replace(self.policy, merges="float")
        self.table.note(note)

    def _run(self, handles: Sequence[RemovableHandle], *, training: bool = True) -> None:
        """Run the sample once with hooks, which are removed; training flags and the statistics of norms are as before."""
        saved = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        was_training = {module: module.training for module in self.model.modules()}
        try:
            frozen = frozen_norms(self.model)
            self.model.train(training)
            for norm in frozen:
                norm.eval()
            with torch.no_grad():
                self.model(*self.sample.args, **self.sample.kwargs)
        except ValueError as error:  # it has run in evaluation mode already
            if isinstance(error, LowbitError):
                raise
            shapes = ", ".join(str(tuple(t.shape)) for t in self.sample.tensors)
            raise CalibrationError(
                f"{type(self.model).__name__} fails in training mode on the sample of shape {shapes}: {error}. "
                "Norms over a batch need a sample of several inputs."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for module, flag in was_training.items():
                module.training = flag
        norms = {name for name, module in self.model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)}
        for name, buffer in self.model.named_buffers():
            if name.rpartition(".")[0] in norms:
                buffer.copy_(saved[name])

    @contextmanager
    def raised(self, stage: LayerBits) -> Iterator[None]:
        """Within the context layers ask for at least the bits of ``stage``, so that what is inserted and initialized starts there.

        Afterwards their quantizers have the bits of the policy, on grids derived from the first ones.
        """
        asked, widths = self._bits, {id(q) for _, q in self.inserted}
        self._bits = {name: raised_bits(bits, stage) for name, bits in asked.items()}
        try:
            yield
        finally:
            self._bits = {name: _as_changed(bits, self._bits[name]) for name, bits in asked.items()}
        for name, quantizer in self.inserted:
            if id(quantizer) not in widths:
                is_weight = name in self.weights and self.weights[name].quantizer is quantizer
                quantizer.set_bit_width(asked[name].weight if is_weight else asked[name].activation)
        own = {name: bits.activation for name, bits in asked.items()}
        self.placements = [
            replace(p, bit_width=own[p.layer] or p.bit_width) if p.purpose == "input" and p.layer in own else p for p in self.placements
        ]

    def weight_slot(self, name: str) -> Slot:
        slot = super().weight_slot(name)
        return replace(slot, widths=self.widths(name, slot.layer, "weight"))

    def slot(self, placement: Placement, *, is_signed: bool = True) -> Slot:
        slot = super().slot(placement, is_signed=is_signed)
        return replace(slot, widths=self.widths(slot.name, slot.layer, "activation")) if placement.purpose == "input" else slot

    def widths(self, name: str, layer: nn.Module, operand: Literal["weight", "activation"]) -> tuple[int, ...]:
        """The widths of a layer's weight or input over all switches, each once."""
        position = self.positions.get(name, "inner")
        policies = [replace(self.policy, default=switch) for switch in self.switches]
        found = [getattr(policy_bits(policy, name, layer, position), operand) for policy in policies]
        return tuple(dict.fromkeys(bits for bits in found if bits is not None))

    def is_excepted(self, name: str) -> bool:
        """Whether the policy's exception for the first and the last layer applies to it."""
        return self.policy.first_last is not None and name in self.positions

    def _build(self, slot: Slot, factory: QuantizerFactory) -> Quantizer:
        return made_for(slot, self.edges if self.is_excepted(slot.name) else factory)

    def free_sites(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """Those of ``sites`` whose module is there (surgery may have removed it) and that are quantized neither as inputs of layers nor by ``insert``."""
        modules = {name for name, _ in self.model.named_modules()}
        taken = {site for placement in self.placements for site in placement.sites}
        return tuple(
            s for s in sites if s.module in modules and s not in taken and not (s.side == "input" and s.module in self.activation_bits)
        )


def _as_changed(asked: LayerBits, since: LayerBits) -> LayerBits:
    """The bits that were asked for, but for what was left in float since, and for outputs."""
    weight = None if since.weight is None else asked.weight
    return LayerBits(weight, None if since.activation is None else asked.activation, since.output)


def _check_finite(x: Tensor) -> None:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise NotFiniteError(f"{bad} of {x.numel()} values to quantize are NaN or infinite on the sample")


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Within the context an error names the place, as a LayerError; values that are not finite stay a NotFiniteError."""
    try:
        yield
    except LowbitError as error:
        raise (NotFiniteError if isinstance(error, NotFiniteError) else LayerError)(f"{place}: {error}") from error


def _described(name: str, layer: nn.Module) -> str:
    return f"layer {name!r} ({type(layer).__name__.removeprefix('Parametrized')})"
