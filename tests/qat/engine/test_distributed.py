"""Two processes give the weights of one process with twice the batch, and a kill of both loses nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import forked
from tests.qat.companions import Mutual, method_in_place
from tests.qat.training import RECIPE, Killed, Killing, data, network, state, train
from torch import Tensor, nn

from lowbit.qat.engine.processes import any_process, average_buffers, average_gradients, gathered

ROOT = Path(__file__).parents[3]
METHODS: dict[str, dict[str, object]] = {
    "inq": {"method": "inq", "activation_bits": None},
    **{name: {"method": name, "bits": [4, 2]} for name in ("adabits", "sp_nets", "bit_mixer")},
}
ASKED = {"plain": {}, "companion": {}, **METHODS}


def frozen_norm() -> nn.Module:
    """A network with a batch norm whose statistics do not follow the batch."""
    model = network()
    model[1].eval().requires_grad_(False)
    return model


def work(out: Path, kill: int, method: str) -> None:
    """What each of two processes does: the training, then every message between processes."""
    torch.set_num_threads(1)
    arguments: dict[str, object] = {
        "recipe": replace(RECIPE, batch_size=8), "test_data": data(50, 5), "out": out, "save_every": "1", "devices": 2
    }  # fmt: skip
    arguments |= ASKED.get(method, {"procedure": method, "teacher": network(norm=False)})
    if kill:
        arguments["progress"] = Killing(kill)
    try:
        with method_in_place(Mutual) if method == "companion" else nullcontext():
            trained = train(frozen_norm() if method in METHODS else network(norm=False), **arguments)
    except Killed:
        os._exit(9)
    rank = torch.distributed.get_rank()
    save_file({name: value.detach().clone() for name, value in state(trained).items()} | messages(rank), out / f"rank{rank}.safetensors")
    torch.distributed.barrier()


def messages(rank: int) -> dict[str, Tensor]:
    """What comes of averages, flags and gathered tensors that differ between the two."""
    layers = nn.ModuleList([nn.BatchNorm1d(2), nn.Linear(1, 1), nn.Linear(1, 1)])
    norm, one, other = layers
    norm.running_mean.fill_(rank + 1.0)
    norm.num_batches_tracked.fill_(rank)
    average_buffers(layers)
    if rank == 0:
        one.weight.grad = torch.full((1, 1), 3.0)  # the other process has none
    norm.weight.grad = torch.full((2,), 2.0 * rank)
    average_gradients(layers.parameters())
    flags = any_process([rank == 1, False], torch.device("cpu"))
    return {
        "check.mean": norm.running_mean, "check.count": norm.num_batches_tracked, "check.gradient": norm.weight.grad,
        "check.one": one.weight.grad, "check.none": torch.tensor(other.weight.grad is None), "check.flags": torch.tensor(flags),
        "check.gathered": torch.stack(gathered(torch.tensor([rank]), torch.device("cpu"))),
    }  # fmt: skip


def started_alone(out: Path, kill: int = 0, method: str = "plain") -> int:
    """A command that starts the second process itself, as a user's does."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    script = out.parent / "script.py"
    script.write_text(
        f"from pathlib import Path\nfrom tests.qat.engine.test_distributed import work\n\nwork(Path({str(out)!r}), {kill}, {method!r})\n"
    )
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 or kill, done.stderr
    return done.returncode


def _ranked(rank: int, port: int, *arguments: Any) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(*arguments)
    torch.distributed.destroy_process_group()


def two_processes(out: Path, kill: int = 0, method: str = "plain") -> int:
    """The same in processes that someone else has started, with the imports done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes = [forked.end(process) for process in [forked.start(_ranked, rank, port, out, kill, method) for rank in (0, 1)]]
    assert codes == [0, 0] or kill, codes
    return max(map(abs, codes))


def test_two_processes_give_the_weights_of_one_with_twice_the_batch_even_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert started_alone(out, kill=7) != 0
    assert not (out / "rank0.safetensors").exists()
    assert started_alone(out) == 0

    first, second = (load_file(out / f"rank{rank}.safetensors") for rank in (0, 1))
    single = train(network(norm=False), recipe=RECIPE, test_data=data(50, 5), out=tmp_path / "single")
    for name, value in state(single).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5, msg=name)

    curves = [json.loads((folder / "train.json").read_text())["curve"] for folder in (out, tmp_path / "single")]
    for together, alone in zip(*curves, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert together["metrics"] == alone["metrics"]  # each process measured on half of the test data

    for rank, found in enumerate((first, second)):
        checks = {name.removeprefix("check."): value.tolist() for name, value in found.items() if name.startswith("check.")}
        assert checks == {
            "mean": [1.5, 1.5], "count": rank, "gradient": [1.0, 1.0], "one": [[1.5]], "none": True, "flags": [True, False],
            "gathered": [[0], [1]],
        }  # fmt: skip


def test_a_companion_that_learns_is_the_same_in_two_processes_as_in_one_even_after_a_kill(tmp_path: Path) -> None:
    out, single = tmp_path / "out", tmp_path / "single"
    assert two_processes(out, kill=8, method="companion") != 0
    assert two_processes(out, method="companion") == 0
    with method_in_place(Mutual):
        train(network(norm=False), recipe=RECIPE, test_data=data(50, 5), out=single)
    together, alone = (load_file(folder / ".work" / "last.safetensors") for folder in (out, single))
    names = [name for name in alone if name.startswith(("model.", "networks.teacher."))]
    assert sum(name.startswith("networks.teacher.") for name in names) == len(list(network(norm=False).parameters()))
    for name in names:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-5, msg=name)
    float_network = dict(network(norm=False).named_parameters())
    assert not any(torch.equal(together[f"networks.teacher.{name}"], value) for name, value in float_network.items())
    ranks = [load_file(out / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0] if not name.startswith("check."))


@pytest.mark.parametrize("procedure", ["qkd", "effective_lowbit", "profit"])
def test_a_procedure_and_its_teacher_are_the_same_in_two_processes_as_in_one_even_after_a_kill(procedure: str, tmp_path: Path) -> None:
    out, single = tmp_path / "out", tmp_path / "single"
    assert two_processes(out, kill=8, method=procedure) != 0
    assert two_processes(out, method=procedure) == 0
    train(network(norm=False), recipe=RECIPE, test_data=data(50, 5), out=single, procedure=procedure, teacher=network(norm=False))
    together, alone = (load_file(folder / ".work" / "last.safetensors") for folder in (out, single))
    names = [name for name in alone if name.startswith(("model.", "networks.teacher."))]
    assert any(name.startswith("networks.teacher.") for name in names)
    for name in names:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-5, msg=name)
    is_at_rest = any(torch.equal(together[f"networks.teacher.{name}"], value) for name, value in network(norm=False).named_parameters())
    assert is_at_rest is (procedure == "profit")


@pytest.mark.parametrize("method", METHODS)
def test_frozen_shares_and_several_widths_are_the_same_in_two_processes_as_in_one_even_after_a_kill(method: str, tmp_path: Path) -> None:
    out, single = tmp_path / "out", tmp_path / "single"
    assert two_processes(out, kill=8, method=method) != 0
    assert two_processes(out, method=method) == 0
    train(frozen_norm(), recipe=RECIPE, test_data=data(50, 5), out=single, **METHODS[method])
    together, alone = (load_file(folder / ".work" / "last.safetensors") for folder in (out, single))
    names = [name for name in alone if name.startswith("model.")]
    assert names and any(not torch.equal(together[name], torch.zeros_like(together[name])) for name in names)
    for name in names:  # the order of a sum decides on which side of a tie a 2-bit code falls, so that less than 1e-5 is luck
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=5e-4, msg=name, equal_nan=True)
    ranks = [load_file(out / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0] if not name.startswith("check."))


def test_an_auxiliary_module_is_the_same_in_two_processes_even_after_a_kill(tmp_path: Path) -> None:
    """Its norms see half of a batch in each process, so that one process alone ends elsewhere."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert two_processes(whole, method="fp_auxiliary") == 0
    assert two_processes(out, kill=8, method="fp_auxiliary") != 0
    assert two_processes(out, method="fp_auxiliary") == 0
    saved, resumed = (load_file(folder / ".work" / "last.safetensors") for folder in (whole, out))
    names = [name for name in saved if name.startswith(("model.", "networks.auxiliary."))]
    assert any(name.endswith("running_mean") for name in names)
    assert all(torch.equal(saved[name], resumed[name]) for name in names)
    ranks = [load_file(out / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0] if not name.startswith("check."))
