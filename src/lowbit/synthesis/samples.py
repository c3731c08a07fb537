"""The samples that a synthesis method made, as a data set, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowbit.errors import FileFormatError
from lowbit.files import read_tensors, write_tensors
from lowbit.inputs import Inputs
from lowbit.reading import check_readable
from lowbit.synthesis.statistics import Match

_KIND = "lowbit samples"
Sample = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class NormMatch:
    """How near samples, and others beside them, come to what one norm keeps from training.

    Attributes:
        norm: Its name; with ``#2`` and so on from its second call in a pass on.
        channels: How many it has.
        samples: The match of the samples.
        noise: That of as many samples of standard normal noise.
        data: That of real data, where some were given.
    """

    norm: str
    channels: int
    samples: Match
    noise: Match
    data: Match | None = None


@dataclass(frozen=True, eq=False)
class SynthesizedData(Dataset[Sample]):
    """Samples without labels, on the processor; what ``lowbit.synthesize`` returns.

    ``data[i]`` is a sample: a tensor, or a tuple or a dictionary of them where the network takes several. It goes wherever calibration data do.

    Attributes:
        inputs: All samples as inputs of one call.
        method: The method that made them.
        options: Its hyper-parameters.
        seed: The seed.
        losses: The loss at each iteration, before its step; the mean over samples.
        statistics: For each norm, in the order of their calls, how far its means and deviations were matched.
        notes: What users should know: norms that were left out.
        facts: What else the method knows, as JSON holds it.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> _ = model(torch.rand(32, 1, 6, 6))  # in training mode, so that the norm sees data
        >>> data = lowbit.synthesize(model, method="zeroq", shape=(1, 6, 6), count=8, iterations=20)
        >>> len(data), data[0].shape, data.losses[-1] < data.losses[0], data.statistics[0].norm
        (8, torch.Size([1, 6, 6]), True, '1')
        >>> quantized = lowbit.quantize(model, method="round_to_nearest", calibration=data)
    """

    inputs: Inputs
    method: str
    options: Mapping[str, object]
    seed: int
    losses: tuple[float, ...]
    statistics: tuple[NormMatch, ...]
    notes: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.inputs.batch_size

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        one = self.inputs.take(index % len(self), index % len(self) + 1)
        parts = one.map(lambda tensor: tensor if (dim := one.batch_dim_of(tensor)) is None else tensor.squeeze(dim))
        if not parts.kwargs:
            return parts.args[0] if len(parts.args) == 1 else parts.args
        return {**{str(place): tensor for place, tensor in enumerate(parts.args)}, **parts.kwargs}

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each input of one sample."""
        dims = [(tensor.shape, self.inputs.batch_dim_of(tensor)) for tensor in self.inputs.tensors]
        return [tuple(size for place, size in enumerate(shape) if place != dim) for shape, dim in dims]

    def collate(self, samples: Sequence[Sample]) -> Inputs:
        """Several of the samples as inputs of one call."""
        rows = [(row,) if isinstance(row, Tensor) else tuple(row.values()) if isinstance(row, dict) else row for row in samples]
        dims = [self.inputs.batch_dim_of(tensor) for tensor in self.inputs.tensors]
        columns = zip(dims, zip(*rows, strict=True), strict=True)
        values = iter([column[0] if dim is None else torch.stack(column, dim) for dim, column in columns])
        return self.inputs.map(lambda _: next(values))

    def __repr__(self) -> str:
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in self.shapes)
        return f"SynthesizedData({len(self)} samples of {shapes} by {self.method}, loss {self.losses[-1]:.4g} from {self.losses[0]:.4g})"

    def save(self, path: Path | str) -> None:
        """Write all to a safetensors file.

        Raises:
            OutputError: It cannot be written.
        """
        named = {f"args.{place}": tensor for place, tensor in enumerate(self.inputs.args)}
        named |= {f"kwargs.{name}": tensor for name, tensor in self.inputs.kwargs.items()}
        write_tensors(path, named, {"kind": _KIND, "order": list(named), "batch_dim": self.inputs.batch_dim, **self.to_dict()})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """What ``save`` wrote.

        Raises:
            FileFormatError: No such file, a damaged one, or one that holds something else.
        """
        tensors, facts = read_tensors(check_readable(path, error=FileFormatError))
        if not isinstance(facts, dict) or facts.get("kind") != _KIND:
            raise FileFormatError(f"{path}: holds no samples that lowbit made. Pass the samples.safetensors of 'lowbit synthesize'.")
        try:
            order = list(map(str, facts["order"]))  # safetensors sorts by size and name
            args = tuple(tensors[name] for name in order if name.startswith("args."))
            kwargs = {name.removeprefix("kwargs."): tensors[name] for name in order if name.startswith("kwargs.")}
            statistics = tuple(_norm_match(entry) for entry in facts["statistics"])
            return cls(
                Inputs(args, kwargs, int(facts["batch_dim"])),
                str(facts["method"]),
                dict(facts["options"]),
                int(facts["seed"]),
                tuple(map(float, facts["losses"])),
                statistics,
                tuple(map(str, facts["notes"])),
                dict(facts["facts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} is damaged: {error!r}. Make the samples again.") from error

    def to_dict(self) -> dict[str, Any]:
        """All but the samples, as JSON holds it."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "seed": self.seed,
            "count": len(self),
            "shapes": [list(shape) for shape in self.shapes],
            "losses": list(self.losses),
            "statistics": [asdict(entry) for entry in self.statistics],
            "notes": list(self.notes),
            "facts": dict(self.facts),
        }


def _norm_match(entry: Mapping[str, Any]) -> NormMatch:
    matches = {name: None if entry[name] is None else Match(**entry[name]) for name in ("samples", "noise", "data")}
    return NormMatch(str(entry["norm"]), int(entry["channels"]), **matches)  # type: ignore[arg-type]
