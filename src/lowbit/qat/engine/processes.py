"""What the processes of one training do together."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)
V = TypeVar("V")


def process_count() -> int:
    """How many processes train together; 1 where ``torch.distributed`` does not run."""
    is_running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_running else 1


def own_part(draw: Callable[[int], T], count: int) -> T:
    """``count`` of the rows of ``draw(n)``, which is the same in every process: this one's share of ``n = count`` times the processes.

    >>> own_part(lambda n: torch.arange(n), 3)
    tensor([0, 1, 2])
    """
    everything = draw(count * process_count())
    start = count * torch.distributed.get_rank() if process_count() > 1 else 0
    return everything[start : start + count]  # type: ignore[return-value]


def close_at_exit() -> None:
    """Let the group of processes end before the interpreter does.

    Threads of gloo hold tensors of the last messages. Where they let go of them while the interpreter ends, the process aborts
    ("terminate called without an active exception").
    """
    atexit.unregister(_close)
    atexit.register(_close)


def _close() -> None:
    if process_count() > 1:
        torch.distributed.destroy_process_group()


def mean_over_processes(value: Tensor) -> None:
    """Average a tensor over all processes in place; does nothing in a single one."""
    count = process_count()
    if count > 1:
        torch.distributed.all_reduce(value)
        value /= count


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of all processes, in one message for each type.

    A parameter without a gradient counts as one of zero; it stays without where no process has one.
    """
    if process_count() == 1:
        return
    for group in _by_kind([p for p in parameters if p.requires_grad]):
        has_gradient = torch.tensor([float(p.grad is not None) for p in group], device=group[0].device, dtype=group[0].dtype)
        parts = [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in group]
        flat = torch.cat([has_gradient, *parts])
        mean_over_processes(flat)
        flags, means = flat[: len(group)].tolist(), flat[len(group) :].split([p.numel() for p in group])
        for parameter, flag, mean in zip(group, flags, means, strict=True):
            if flag:
                parameter.grad = mean.reshape(parameter.shape).clone()


def average_buffers(model: nn.Module) -> None:
    """Average every floating-point buffer over all processes: statistics of norms, moving averages and ranges of quantizers.

    Each process sees other samples, so that their running statistics drift apart. Means over samples come out as one process
    with all samples would have them; extremes and variances only nearly.
    """
    if process_count() == 1:
        return
    with torch.no_grad():
        for group in _by_kind([buffer for buffer in model.buffers() if buffer.is_floating_point()]):
            flat = torch.cat([buffer.reshape(-1) for buffer in group])
            mean_over_processes(flat)
            for buffer, mean in zip(group, flat.split([buffer.numel() for buffer in group]), strict=True):
                buffer.copy_(mean.reshape(buffer.shape))


def any_process(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """For each flag whether it is true in some process."""
    if process_count() == 1:
        return list(flags)
    found = torch.tensor([float(flag) for flag in flags], device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def gathered_objects(value: V) -> list[V]:
    """The values of all processes, in the order of their ranks."""
    if process_count() == 1:
        return [value]
    found: list[Any] = [None] * process_count()
    torch.distributed.all_gather_object(found, value)
    return found


def gathered(value: Tensor, device: torch.device) -> list[Tensor]:
    """The tensors of all processes, in the order of their ranks; all have one shape."""
    if process_count() == 1:
        return [value]
    own = value.to(device)
    found = [torch.empty_like(own) for _ in range(process_count())]
    torch.distributed.all_gather(found, own)
    return [tensor.cpu() for tensor in found]


def _by_kind(tensors: Sequence[T]) -> list[list[T]]:
    groups: dict[tuple[torch.dtype, torch.device], list[T]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())
