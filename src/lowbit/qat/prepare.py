"""``lowbit.prepare``: a float network in, a copy with trainable quantizers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from lowbit.autograd import records_gradients
from lowbit.errors import NotFiniteError, SpecError
from lowbit.inputs import Inputs, check_values
from lowbit.network.bits import set_bits
from lowbit.network.job import check_method_bits
from lowbit.network.layers import evaluating
from lowbit.network.record import QuantizationRecord, attach_record, record_of
from lowbit.network.unwrap import plain_copy
from lowbit.options import choose_policy
from lowbit.qat.attach.job import QatJob
from lowbit.qat.engine.finite import first_output_not_finite
from lowbit.qat.method import TrainingMethod
from lowbit.qat.procedure import Procedure, training_method
from lowbit.quantizers import Quantizer
from lowbit.quantizers.switchable import parts_of
from lowbit.registry import find_method, list_methods
from lowbit.spec import BitPolicy, Bits, LayerBits, parse_bits, parse_switches, switch_name, widest
from lowbit.surrogates import make_surrogate

_ATTRIBUTE = "lowbit_method"
Widths = Sequence[int | str | LayerBits] | str | None


@records_gradients
def prepare(
    model: nn.Module,
    *,
    method: str | type[TrainingMethod] | TrainingMethod = "lsq",
    weight_bits: int | None = 4,
    activation_bits: int | None = 4,
    bits: Widths = None,
    sample: object,
    policy: BitPolicy | Literal["paper"] | None = None,
    surrogate: str | None = None,
    procedure: str | type[Procedure] | Procedure | None = None,
    procedure_options: Mapping[str, object] = MappingProxyType({}),
    merge_bits: Bits = None,
    seed: int = 0,
    **options: object,
) -> nn.Module:
    """A copy of ``model`` with the trainable quantizers of ``method``, ready for ``lowbit.train`` or a custom loop.

    Args:
        model: Any network; it is not changed.
        method: Name of a training method (``lowbit.list_methods(kind="training")``), ``"path/to/file.py:Class"``, or a class or an object
            derived from ``TrainingMethod``.
        weight_bits: 1 to 8, or ``None`` / 32 to leave weights in float.
        activation_bits: 1 to 8, or ``None`` / 32 to leave activations in float.
        bits: Widths that one network is to have, from the highest to the lowest, for methods that train several: ``[8, 4, 2]``, or weights and
            inputs apart, ``"32/32,4/4,1/1"``. ``lowbit.set_bits`` switches between them. Replaces ``weight_bits`` and ``activation_bits``.
        sample: One batch of inputs (labels are dropped); quantizers are initialized from it.
        policy: Bits for each layer; overrides ``weight_bits`` and ``activation_bits``. Default: those everywhere, at least 8
            in the first and last layer. ``"paper"``: those, with the first and the last layer as in the method's paper.
        surrogate: Gradient surrogate to use in place of the method's (a name of ``lowbit.surrogates.SURROGATES``).
        procedure: Procedure to train with in place of the method's own, such as ``"qkd"`` (``lowbit.list_methods(axis="procedure")``): its
            phases, companions and losses, with the quantizers of ``method``.
        procedure_options: Hyper-parameters of that procedure.
        merge_bits: Bits of what meets in residual sums and concatenations, of their results, and of what is pooled (8 costs next to
            nothing), or ``"float"``; overrides what ``policy`` says. Where neither says anything they stay in float, as in most papers,
            or get what the method's paper gives them.
            With them an exported residual network runs in integers from end to end, which is several times faster. Needs a network
            that can be exported.
        seed: Makes the result reproducible.
        **options: The method's hyper-parameters.

    Returns:
        The network in the training mode of ``model``; ``lowbit.summary`` shows what was done to each layer.

    Raises:
        UnknownNameError: No such method, option, surrogate or procedure.
        SpecError: Bits, policy or an option out of range, or a surrogate or a procedure that the method cannot use.
        CalibrationError: A sample that does not fit the network.
        NotFiniteError: What a quantizer reads of the sample is NaN or infinite; names where that begins.
        LayerError: Nothing to quantize, or a layer that cannot be.
        GraphError: ``merge_bits`` for a network that cannot be exported.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> policy = lowbit.BitPolicy.uniform(2, 4, first_last=None)
        >>> prepared = lowbit.prepare(model, method="lsq", policy=policy, sample=torch.rand(32, 8))
        >>> prepared[0].weight[0].unique().numel() <= 4
        True
    """
    chosen = training_method(method, options, procedure, procedure_options)
    info = find_method(chosen, "training")
    switches = training_switches(chosen, bits)
    if switches:
        weight_bits, activation_bits = widest(switches).weight, widest(switches).activation
    policy = training_policy(chosen, weight_bits, activation_bits, policy=policy, merge_bits=merge_bits)
    if switches:
        policy = replace(policy, default=replace(widest(switches), output=policy.default.output))
    elif chosen.switching is not None:
        switches = (policy.default,)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        job = QatJob(
            plain_copy(model),
            policy,
            check_values(Inputs.of(sample, model), "sample", infinite="allowed"),
            seed,
            edges=chosen.edge_quantizer,
            switches=switches,
        )
        check_method_bits(info, policy, job)
        try:
            chosen.attach(job)
            job.insert_outputs(chosen.output_quantizer, chosen.merge_quantizer)
        except NotFiniteError as error:
            with evaluating(model):
                place = first_output_not_finite(model, lambda: model(*job.sample.args, **job.sample.kwargs))
            raise error if place is None else NotFiniteError(f"{place} on the sample: {error}") from error
        if surrogate is not None:
            set_surrogate(job, surrogate, info.name)
        table = job.finish()
    used = chosen.hyper_parameter_values()
    if surrogate is not None:
        used["surrogate"] = surrogate
    attach_record(
        job.model, QuantizationRecord(info.name, used, job.policy, seed, table, switches, chosen.switching or "network", job.tied)
    )
    setattr(job.model, _ATTRIBUTE, chosen)
    if switches:
        set_bits(job.model, switches[0])
    return job.model


def training_switches(method: TrainingMethod, bits: Widths) -> tuple[LayerBits, ...]:
    """The widths that ``bits`` asks ``method`` to train one network for; empty where it asks for none.

    Raises:
        SpecError: The method trains one width, does not have one of these, or they are listed twice or in another order.
    """
    if bits is None:
        return ()
    info = find_method(method, "training")
    if method.switching is None:
        several = [other.name for other in list_methods(kind="training") if getattr(other.method, "switching", None) is not None]
        raise SpecError(
            f"{info.name!r} trains a network for one width: give weight_bits and activation_bits. Methods for several: "
            f"{', '.join(several) or 'none is installed'}."
        )
    switches = parse_switches(bits)
    for switch in switches:
        for operand, supported in (("weight", info.weight_bits), ("activation", info.activation_bits)):
            width = getattr(switch, operand)
            if width is not None and width not in (supported or ()):
                raise SpecError(
                    f"bits: {info.name} has {operand} bits {', '.join(map(str, supported or ())) or 'float'}, got {switch_name(switch)}. Choose others."
                )
    return switches


def training_policy(
    method: TrainingMethod,
    weight_bits: int | None,
    activation_bits: int | None,
    *,
    policy: BitPolicy | Literal["paper"] | None,
    merge_bits: Bits,
) -> BitPolicy:
    """The policy that these arguments of ``prepare`` describe for ``method``."""
    activations = activation_bits if method.info.activation_bits is not None else None
    asked = LayerBits(parse_bits(weight_bits, "weight_bits"), parse_bits(activations, "activation_bits"))
    return choose_policy(method, policy, asked).with_merges(merge_bits)


def method_of(model: nn.Module) -> TrainingMethod:
    """The method that ``model`` was prepared with; SpecError for any other network."""
    method = getattr(model, _ATTRIBUTE, None)
    if not isinstance(method, TrainingMethod):
        record = record_of(model)
        came = "it is not quantized" if record is None else f"it was quantized by {record.method}"
        raise SpecError(f"{type(model).__name__} was not made by lowbit.prepare: {came}. Prepare the float network first.")
    return method


def prepared_network(model: nn.Module) -> nn.Module:
    """The one network that ``lowbit.prepare`` made among ``model`` and its submodules, so that wrappers may lie around it.

    Raises:
        SpecError: There is none, or more than one.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(vars(module).get(_ATTRIBUTE), TrainingMethod)}
    if len(found) > 1:
        raise SpecError(f"{type(model).__name__} holds {len(found)} prepared networks: {', '.join(found)}. Pass the one to train.")
    if not found:
        method_of(model)  # raises with what is known of the network
    network: nn.Module = next(iter(found.values()))
    return network


def set_surrogate(job: QatJob, name: str, method: str) -> None:
    """Let every quantizer that has a surrogate use a new one called ``name``; SpecError when none of the method's own has."""
    everything = [module for module in job.model.modules() if isinstance(module, Quantizer)]
    inserted = [(layer, part) for layer, quantizer in job.inserted for part in parts_of(quantizer)]
    own = {id(q): layer for layer, q in inserted if not job.is_excepted(layer)} or {id(q): layer for layer, q in inserted}
    rigid = dict.fromkeys(own[id(q)] for q in everything if id(q) in own and not hasattr(q, "surrogate"))
    if not any(id(q) in own and hasattr(q, "surrogate") for q in everything):
        raise SpecError(f"the quantizers of {method!r} define their own gradient and take no surrogate. Leave surrogate out.")
    for quantizer in everything:
        if hasattr(quantizer, "surrogate"):
            del quantizer.surrogate
            quantizer.surrogate = make_surrogate(name)  # type: ignore[assignment]
    if rigid:
        job.table.note(f"{len(rigid)} layers have a quantizer that defines its own gradient and takes no surrogate: {', '.join(rigid)}")
