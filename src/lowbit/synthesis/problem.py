"""What a synthesis method is, and the problem that it gets: a trained network and the shape of its inputs."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError, LayerError, LowbitError, SpecError
from lowbit.inputs import Inputs, check_memory
from lowbit.measure.outputs import device_of
from lowbit.network.layers import EMBEDDINGS
from lowbit.network.unwrap import plain_copy
from lowbit.options import Method
from lowbit.post_training.reconstruction.resume import RunState, fingerprint
from lowbit.progress import Progress
from lowbit.qat.engine.finite import names_not_finite
from lowbit.synthesis.statistics import ChannelStatistics, KeptStatistics, channel_statistics, kept_statistics, watching

Draw = Callable[[Sequence[int], torch.Generator], Tensor]  # random numbers of a shape


@dataclass(frozen=True)
class Synthesized:
    """What a synthesis method made.

    Attributes:
        inputs: All samples, on the processor.
        losses: The loss at each iteration, before its step; the mean over samples.
        facts: What else the method knows, as JSON holds it.
    """

    inputs: Inputs
    losses: tuple[float, ...]
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class SynthesisProblem:
    """A trained network for which samples are to be made.

    Attributes:
        model: A copy of it in evaluation mode whose parameters ask for no gradients.
        template: Inputs of one call on all samples: shapes, types, and whatever is no floating-point tensor with samples.
        kept: What its norms keep, by name.
        norms: The norms in the order of their calls, a norm that is called twice also as ``name#2``.
        notes: What users should know: norms that are left out.
        seed: Seed of everything random.
        progress: Progress display.
        work_dir: Folder for what a killed synthesis needs to go on, or ``None``.

    Example:
        >>> from lowbit.synthesis.problem import make_problem
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> model(torch.randn(8, 1, 6, 6)).shape  # in training mode, so that the norm sees data
        torch.Size([8, 4, 4, 4])
        >>> problem = make_problem(model, Inputs((torch.zeros(1, 1, 6, 6),)), count=3)
        >>> problem.norms, [tuple(one.mean.shape) for one in problem.statistics(problem.draw(normal))]
        (('1',), [(3, 4)])
    """

    model: nn.Module
    template: Inputs
    kept: Mapping[str, KeptStatistics]
    norms: tuple[str, ...]
    notes: tuple[str, ...] = ()
    seed: int = 0
    progress: Progress = field(default_factory=Progress.silent)
    work_dir: Path | None = None

    @property
    def count(self) -> int:
        """How many samples are to be made."""
        return self.template.batch_size

    def generator(self, purpose: str = "") -> torch.Generator:
        """Random numbers that depend on the seed and on ``purpose`` alone; on the processor, so that devices start alike."""
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def draw(self, draw: Draw, purpose: str = "start") -> Inputs:
        """Random inputs of the template's shapes, at least in float32."""
        generator = self.generator(purpose)

        def drawn(tensor: Tensor) -> Tensor:
            if not _is_free(self.template, tensor):
                return tensor
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            return draw(tensor.shape, generator).to(tensor.device, wide)

        return self.template.map(drawn)

    def is_free(self, inputs: Inputs) -> list[bool]:
        """For each tensor of ``inputs`` whether it is to be made: a floating-point one that has samples."""
        return [_is_free(inputs, tensor) for tensor in inputs.tensors]

    def batches(self, inputs: Inputs, most: int) -> Iterator[tuple[range, Inputs]]:
        """``inputs`` in parts of nearly the same size, none above ``most``, with the places of their samples."""
        parts = -(-inputs.batch_size // most)
        ends = [inputs.batch_size * part // parts for part in range(parts + 1)]
        for start, stop in itertools.pairwise(ends):
            yield range(start, stop), inputs.take(start, stop)

    def with_count(self, count: int) -> SynthesisProblem:
        """The same problem for another number of samples."""
        return replace(self, template=_times(self.template, count))

    def cast(self, inputs: Inputs) -> Inputs:
        """``inputs`` in the types that the network takes."""
        types = [tensor.dtype for tensor in self.template.tensors]
        values = iter([tensor.to(dtype) for tensor, dtype in zip(inputs.tensors, types, strict=True)])
        return inputs.map(lambda _: next(values))

    def statistics(self, inputs: Inputs) -> list[ChannelStatistics]:
        """What each norm reads, call by call, with its graph; ``inputs`` as ``draw`` gives them."""
        taken = self.cast(inputs)
        with watching(self.model, self.kept) as found:
            self.model(*taken.args, **taken.kwargs)
        return found

    def input_statistics(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """Mean and deviation of each channel of the inputs that are made, as ``channel_statistics`` gives them."""
        free = [tensor for tensor, is_free in zip(inputs.tensors, self.is_free(inputs), strict=True) if is_free]
        return [channel_statistics(tensor.movedim(inputs.batch_dim_of(tensor) or 0, 0)) for tensor in free if tensor.dim() > 1]

    def state(self, facts: Mapping[str, object]) -> RunState:
        """What is kept on disk of the run with these ``facts``; runs of other networks, methods or seeds have theirs beside it."""
        named = [*self.model.state_dict().items(), *((f"input {i}", tensor) for i, tensor in enumerate(self.template.tensors))]
        run = fingerprint(named, {**facts, "seed": self.seed, "device": device_of(self.model).type})
        return RunState(None if self.work_dir is None else self.work_dir / "synthesis" / run, run)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal noise."""
    return torch.randn(tuple(shape), generator=generator)


class SynthesisMethod(Method, ABC):
    """Makes samples for a network from what it has learned; the fields of a subclass are the paper's hyper-parameters.

    Example:
        >>> import torch, lowbit
        >>> from lowbit.synthesis.problem import Synthesized, normal
        >>> info = lowbit.MethodInfo(
        ...     name="noise", title="Standard normal noise", paper="none", section="other", axes=("data",), kind="synthesis",
        ...     weight_bits=range(1, 9), activation_bits=None, needs=("batch_norm",), fidelity="unverified", summary="noise",
        ... )
        >>> @lowbit.register(info)
        ... @dataclass
        ... class Noise(lowbit.SynthesisMethod):
        ...     def synthesize(self, problem):
        ...         return Synthesized(problem.draw(normal), losses=(0.0,))
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
        >>> _ = model(torch.rand(8, 1, 6, 6))
        >>> lowbit.synthesize(model, method=Noise, shape=(1, 6, 6), count=2)[0].shape
        torch.Size([1, 6, 6])
    """

    trial: ClassVar[Mapping[str, object]] = MappingProxyType({})  # hyper-parameters for a first try, where the paper's take long

    def default_count(self, norms: int) -> int:
        """How many samples are made where nobody says it, for a network whose norms are called that many times."""
        return 64

    @abstractmethod
    def synthesize(self, problem: SynthesisProblem) -> Synthesized:
        """Make ``problem.count`` samples."""


def make_problem(
    model: nn.Module,
    sample: Inputs,
    *,
    count: int | Callable[[int], int] = 64,
    seed: int = 0,
    progress: Progress | None = None,
    work_dir: Path | None = None,
) -> SynthesisProblem:
    """The problem for ``model``, which is copied and checked.

    Args:
        model: The trained network.
        sample: Inputs of one call: their shapes count, and the values of what is no floating-point tensor.
        count: Samples to make, or what says it from the number of calls of norms.
        seed, progress, work_dir: See ``SynthesisProblem``.

    Raises:
        LayerError: No norm has statistics from training, something in the network is not finite, or no norm depends on the inputs.
        CalibrationError: The network cannot take such inputs, or takes integers alone.
        SpecError: A count below 1.
    """
    network = plain_copy(model).eval().requires_grad_(False)
    kept, notes = kept_statistics(network)
    _check_values(network)
    sample = sample.to(device_of(network))
    if not any(_is_free(sample, tensor) for tensor in sample.tensors):
        raise CalibrationError(f"{type(model).__name__}: {_ONLY_INTEGERS}")
    called = _called(network, kept, _times(sample, 2))
    silent = [name for name in kept if name not in called]
    number = count(len(called)) if callable(count) else count
    if number < 1:
        raise SpecError(f"count={number}: at least one sample has to be made.")
    check_memory(number * sum(tensor.nbytes for tensor in sample.tensors) // sample.batch_size, f"count={number}: the samples take")
    notes += (f"left out: {', '.join(silent)}: not called with such inputs",) if silent else ()
    kept = {name: value for name, value in kept.items() if name not in silent}
    return SynthesisProblem(network, _times(sample, number), kept, called, notes, seed, progress or Progress.silent(), work_dir)


_ONLY_INTEGERS = (
    "its inputs are integers, such as token ids, on which there is no descent. Pass calibration data instead, "
    "or a network that starts behind its embedding, with sample= its inputs."
)


def _is_free(inputs: Inputs, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and inputs.batch_dim_of(tensor) is not None


def _times(sample: Inputs, count: int) -> Inputs:
    """``count`` samples: those of ``sample`` over and over."""
    return sample.repeat(-(-count // sample.batch_size)).take(0, count)


def _check_values(network: nn.Module) -> None:
    """LayerError where a parameter is not finite; of buffers, masks may be infinite."""
    parameters = dict(network.named_parameters())
    broken = [name for name in names_not_finite(network) if name in parameters]
    if broken:
        raise LayerError(f"{type(network).__name__}: {broken[0]!r} holds NaN or infinity. Load sound weights.")


def _called(network: nn.Module, kept: Mapping[str, KeptStatistics], sample: Inputs) -> tuple[str, ...]:
    """The norms that run on ``sample``, in the order of their calls."""
    shapes = ", ".join(" x ".join(map(str, tensor.shape[1:])) for tensor in sample.tensors)
    leaves = iter([t.detach().clone().requires_grad_(_is_free(sample, t)) for t in sample.tensors])
    tried = sample.map(lambda _: next(leaves))
    try:
        with torch.enable_grad(), watching(network, kept) as found:
            network(*tried.args, **tried.kwargs)
    except LowbitError:
        raise
    except Exception as error:  # whatever the network raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = f" If {_ONLY_INTEGERS}" if any(isinstance(module, EMBEDDINGS) for module in network.modules()) else ""
        raise CalibrationError(
            f"{type(network).__name__} cannot take inputs of shape {shapes} for a sample ({reason}). "
            f"Pass shape= (one sample, without the batch) or sample= (inputs of one call) that fit.{hint}"
        ) from error
    if not any(one.mean.requires_grad for one in found):
        raise LayerError(
            f"{type(network).__name__}: what its norms read does not depend on the inputs in a differentiable way, so that no sample can be made. "
            "Pass calibration data instead."
        )
    for one in found:
        if not bool(torch.isfinite(one.mean).all()):
            raise LayerError(f"norm {one.name!r}: what it reads holds NaN or infinity.")
    return tuple(one.name for one in found)
