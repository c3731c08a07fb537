"""Hostile files and operator calls, made at random and tried in child processes with little memory and time."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import random
import resource
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lowbit
from lowbit.errors import FileFormatError, LowbitError
from lowbit.formats.program.operators import _ATEN, _LOWBIT, find_operator, find_overload

GIGABYTES = 6  # of addresses; torch itself takes two
SECONDS = 60.0
KINDS = {"float32": "F32", "int64": "I64", "uint8": "U8", "bool": "BOOL", "int32": "I32", "float64": "F64"}


@dataclass(frozen=True)
class Outcome:
    """What became of a case: ``computed``, ``refused`` with lowbit's own error, or a fault in words."""

    seed: int
    kind: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("computed", "refused")


Case = Callable[[int, Path], None]


def try_cases(case: Case, seeds: Sequence[int], folder: Path) -> list[Outcome]:
    """What ``case`` does for each seed. A child works through them; where it dies or hangs, another one goes on behind that seed."""
    outcomes: list[Outcome] = []
    waiting = list(seeds)
    context = multiprocessing.get_context("spawn")
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(case, list(waiting), folder, sender), daemon=True)
        child.start()
        sender.close()
        while waiting:
            if not receiver.poll(SECONDS):
                outcomes.append(Outcome(waiting.pop(0), "hung", f"no answer in {SECONDS:.0f} s"))
                child.kill()
                break
            try:
                outcomes.append(receiver.recv())
            except EOFError:
                child.join()
                outcomes.append(Outcome(waiting.pop(0), "died", f"exit code {child.exitcode}"))
                break
            waiting.pop(0)
        child.join()
    return outcomes


def _work(case: Case, seeds: list[int], folder: Path, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for seed in seeds:
        try:
            case(seed, folder)
            outcome = Outcome(seed, "computed")
        except LowbitError as error:
            outcome = Outcome(seed, "refused", str(error)[:300])
        except BaseException as error:
            outcome = Outcome(seed, "traceback", f"{type(error).__name__}: {str(error)[:300]}")
        sender.send(outcome)


def write_file(
    path: Path, nodes: list[Any], tensors: Mapping[str, Any], inputs: list[Any], *, kernels: bool = False, **sections: Any
) -> Path:
    """A packed file of these parts with right checksums; nothing else about it has to be right."""
    vectors: dict[str, list[bytes]] = {}
    described = {}
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        vectors.setdefault(str(array.dtype), []).append(array.tobytes())
        described[name] = [
            str(array.dtype),
            list(array.shape),
            _digest(f"torch.{array.dtype}{list(array.shape)}".encode() + array.tobytes()),
        ]
    graph = {"inputs": inputs, "batch": [1, None], "nodes": nodes, "outputs": [{"node": nodes[-1][0]}], "structure": {"tensor": 0}}
    manifest = {"lowbit": "0", "info": {}, "graph": graph, "tensors": described, "packed": {}, "layouts": {}, "numbers": {}, **sections}
    text = json.dumps(manifest | ({"kernels": True} if kernels else {})).encode()
    top = {"version": "1", "manifest": base64.b85encode(zlib.compress(text)).decode(), "checksum": _digest(text)}
    header: dict[str, Any] = {"__metadata__": {"lowbit": json.dumps(top)}}
    data = b""
    for dtype in sorted(vectors, key=lambda kind: -np.dtype(kind).itemsize):
        raw = b"".join(vectors[dtype])
        header[dtype] = {
            "dtype": KINDS[dtype], "shape": [len(raw) // np.dtype(dtype).itemsize], "data_offsets": [len(data), len(data) + len(raw)]
        }  # fmt: skip
        data += raw
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def run_file(path: Path, **options: Any) -> None:
    """Load a file and run it twice; AssertionError where equal inputs give other results or a stored tensor has changed."""
    torch.manual_seed(0)
    network = lowbit.load(path, **options)
    inputs = [torch.ones([2 if size is None else size for size in i.shape], dtype=i.dtype) for i in network.packed_graph.inputs]
    before = {name: tensor.clone() for name, tensor in network.stored_tensors().items()}
    with torch.no_grad():
        first, second = _leaves(network(*inputs)), _leaves(network(*inputs))
    for a, b in zip(first, second, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(), b.nan_to_num()), "equal inputs give different results"
    for name, tensor in network.stored_tensors().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), f"the stored tensor {name} was changed"


def _leaves(value: object) -> list[Any]:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (list, tuple)) else [value]


def operator_names() -> list[str]:
    """Every operator of this torch that a file may use."""
    names = []
    for namespace, packets in (("aten", _ATEN), ("lowbit", _LOWBIT)):
        for packet in sorted(packets):
            for overload in getattr(getattr(torch.ops, namespace), packet).overloads():
                name = f"{namespace}.{packet}.{overload}"
                try:
                    find_operator(name)
                except FileFormatError:
                    continue
                names.append(name)
    return names


_WHOLE = (0, 1, 2, 3, 4, -1, -2, 5, 7, 8, 16, 2**16, 2**31, 2**33, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))
_LIKELY = (0, 1, 1, 1, 2, 2, 3, 4, -1)
_REAL = (0.0, 1.0, 0.5, 2.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"), 1e-5)
_DTYPES = ("float32", "float32", "float32", "int64", "bool", "uint8", "int32", "float64")
_WORDS = (
    "none",
    "floor",
    "trunc",
    "linear",
    "reflect",
    "constant",
    "replicate",
    "circular",
    "valid",
    "same",
    "ij",
    "bij,bjk->bik",
    "i->i",
    "left",
)


class CallWriter:
    """Random arguments for an operator, some of which it can take, as a file holds them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tensors: dict[str, Any] = {}
        self.usual = [self.random.choice((1, 2, 3, 4, 6)) for _ in range(5)]

    def call(self, name: str) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = [], {}
        for argument in find_overload(name)._schema.arguments:
            optional = argument.has_default_value() or "Optional" in str(argument.real_type)
            if optional and self.random.random() < 0.4 and (argument.kwarg_only or argument.has_default_value()):
                if argument.kwarg_only:
                    continue
                value = _plain(argument.default_value)
            else:
                value = self.value(str(argument.real_type), argument.name)
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return args, kwargs

    def value(self, kind: str, name: str) -> Any:
        chance = self.random.random()
        if kind.startswith("Optional["):
            return None if chance < 0.4 else self.value(kind[9:-1], name)
        if kind.startswith("List["):
            return [self.value(kind[5:-1], name) for _ in range(self.random.choice((1, 2, 2, 2, 3, 4)))]
        if kind == "Tensor":
            return self.tensor()
        if kind == "bool":
            return chance < 0.5
        if kind == "str":
            return self.random.choice(_WORDS)
        if kind in ("ScalarType", "MemoryFormat", "Layout", "Device"):
            return {"ScalarType": {"dtype": self.random.choice(_DTYPES)}, "Device": {"device": None}}.get(kind)
        if kind == "float" or (kind == "number" and chance < 0.5):
            number = self.random.choice(_REAL)
            return number if abs(number) < float("inf") else {"float": str(number)}
        return self.random.choice(_LIKELY if chance < 0.8 else _WHOLE)

    def tensor(self) -> Any:
        chance = self.random.random()
        if chance < 0.25:
            return {"node": "x"}
        if chance < 0.4 and self.tensors:
            return {"tensor": self.random.choice(list(self.tensors))}
        rank = self.random.choice((0, 1, 1, 2, 3, 4, 4, 5))
        shape = self.usual[:rank] if self.random.random() < 0.6 else [self.random.choice((0, 1, 2, 3, 4, 6, 40)) for _ in range(rank)]
        dtype = self.random.choice(_DTYPES)
        values = np.array([self.random.choice((0, 1, 2, 3, -1, 5, 300, -(2**31))) for _ in range(int(np.prod(shape)))], np.float64)
        name = f"t{len(self.tensors)}"
        with np.errstate(invalid="ignore"):
            self.tensors[name] = values.reshape(shape).astype(np.int64).astype(dtype)
        return {"tensor": name}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


def random_call(seed: int, folder: Path) -> None:
    """A file with one call of a random operator on random arguments, loaded and run."""
    writer = CallWriter(seed)
    name = writer.random.choice(operator_names())
    args, kwargs = writer.call(name)
    shape = [None, *writer.usual[1:4]]
    run_file(write_file(folder / "call.lowbit", [["y", name, args, kwargs]], writer.tensors, [["x", shape, "float32"]]))


def random_layer(seed: int, folder: Path) -> None:
    """A file with a quantized layer of random settings that is put on kernels."""
    chooser = random.Random(seed)
    pick = chooser.choice

    def mostly(right: Any, *wrong: Any) -> Any:
        return pick(wrong) if chooser.random() < 0.06 else right

    groups, channels, out, kernel = (
        mostly(pick((1, 1, 2, 3)), 0, -1, 7),
        pick((1, 2, 3, 16, 40)),
        pick((1, 2, 3, 6, 48)),
        pick(((3, 3), (1, 1), (2, 5))),
    )
    size = [*kernel] if chooser.random() < 0.9 else pick(([0, 3], [3], [3, 3, 3]))
    strides, pads, steps = ([mostly(pick(usual), *odd) for _ in range(mostly(2, 1, 3))] for usual, odd in (
        ((1, 1, 2), (0, -1, 2**20, 2**31)), ((0, 1, 2), (-1, 2**12, 2**30)), ((1, 1, 2), (0, 2**12, 2**31)),
    ))  # fmt: skip
    count = int(np.prod([out, channels, *size]))
    codes = np.random.default_rng(seed).integers(0, 256, mostly(count, 3, count + 1), dtype=np.int64).astype(np.uint8)
    bias = np.zeros(mostly(out, 1, 0, 7, (out, 1)), np.float32)
    tensors: dict[str, Any] = {"bias": bias}
    packed: dict[str, Any] = {}
    if pick((True, False)):
        tensors["w"] = np.resize(np.sign(codes.astype(np.float32) - 127.5), (out, channels, *size))
        tensors["b"] = np.array(mostly([-1e-45], [], [-1e-45] * 2, [0.5]), np.float32)
        tensors["l"] = np.array(mostly([-1, 1], [-1], [-1, 1, 1], [[-1, 1]]), np.float32)
        first = ["q", "lowbit.fake_quantize_codebook.default", [{"node": "x"}, {"tensor": "b"}, {"tensor": "l"}], {}]
    else:
        shape = mostly((out, *[1] * (1 + len(size))), (1,), (5, 1, 1, 1))
        tensors |= {"w": codes, "w.scale": np.full(shape, 0.1, np.float32), "s": np.full(mostly((), (2,), (0,)), 0.1, np.float32)}
        tensors["z"] = np.full(mostly((), (1,), (3,)), mostly(0, 300, -1, 0.5), np.float32)
        packed["w"] = {
            "shape": [out, channels, *size], "bit_width": 8, "offset": -128, "decoder": "affine", "parts": [], "granularity": "per_channel", "axis": 0,
        }  # fmt: skip
        limits = mostly(pick(((0, 255), (0, 15), (-128, 127), (0, 3))), (0, 2**30), (5, 2))
        first = ["q", "lowbit.fake_quantize_affine.default", [{"node": "x"}, {"tensor": "s"}, {"tensor": "z"}, *limits], {}]
    settings = [strides, pads, steps, groups][: pick((1, 2, 4, 4))]
    layer = [
        "y",
        "aten.conv2d.default",
        [{"node": "q"}, {"tensor": "w"}, {"tensor": "bias"} if pick((True, False)) else None, *settings],
        {},
    ]
    image = [None, mostly(channels * max(groups, 1) if len(settings) == 4 else channels, 1, channels + 1), pick((8, 6)), pick((8, 9))]
    run_file(
        write_file(folder / "layer.lowbit", [first, layer], tensors, [["x", image, "float32"]], packed=packed, kernels=True), kernels=True
    )


def random_widths(seed: int, folder: Path) -> None:
    """A file of two widths for each layer with random damage in what it says about them, loaded and run at several."""
    chooser = random.Random(seed)
    pick = chooser.choice
    slots = pick(([""], ["a", "b"]))

    def choice(*values: Any) -> list[Any]:
        own = [slots[0]] if len(values) == 2 else slots * (2 // len(slots))
        return [own, list(values)]

    codes = np.random.default_rng(seed).integers(0, 256, 8, dtype=np.int64).astype(np.uint8)
    scales = {"w.scale": np.full((4, 1), 0.1, np.float32), "w@2.scale": np.full((4, 1), 0.4, np.float32)}
    tables = {**scales, "b0": np.zeros(4, np.float32), "b1": np.ones(4, np.float32)}
    affine = {"offset": 0, "decoder": "affine", "parts": [], "granularity": "per_channel", "axis": 0, "shape": [4, 4]}
    packed = {"w": {**affine, "bit_width": 4}, "w@2": {**affine, "bit_width": 2, "cut": ["w", pick(("floor", "trunc"))]}}
    four = ("b0", "b1", "b1", "b0") if slots != [""] else ("b0", "b1")
    bits = [[4, 4, None], [2, 2, None]]
    switches: Any = {
        "widths": [[4, 4], [2, 2]], "each": "network" if slots == [""] else "layer", "layers": {"a": bits, "b": bits}, "tied": {},
        "names": {"w": choice("w", "w@2"), "bias": choice(*four)}, "places": dict.fromkeys(slots, 0),
    }  # fmt: skip
    nodes = [
        ["y", "aten.linear.default", [{"node": "x"}, {"tensor": "w"}, {"tensor": "bias"}], {}],
        ["z", "aten.leaky_relu.default", [{"node": "y"}, {"choice": choice(0.5, 0.25)}], {}],
    ]
    info = {"method": "m", "options": {}, "seed": 0, "policy": {"default": {"weight": 4, "activation": 4}}, "notes": [], "others": []}
    info["layers"] = [[name, "linear", 4, 4, "done", ""] for name in ("a", "b")]
    parts: list[Any] = [switches, switches, nodes[0][2], nodes[1][2], packed, info]
    strange = (
        None,
        True,
        -1,
        2,
        3.5,
        "",
        "a",
        "w",
        "w@2",
        "b",
        [],
        {},
        [[]],
        {"choice": 1},
        {"choice": choice(1, 2)},
        "9" * 400,
        [4, 2],
        2**70,
    )
    for _ in range(pick((0, 1, 1, 1, 2, 3))):
        place: Any = pick(parts)
        while isinstance(place, (dict, list)) and place:
            key = pick(list(place)) if isinstance(place, dict) else chooser.randrange(len(place))
            if chooser.random() < 0.3 or not isinstance(place[key], (dict, list)) or not place[key]:
                if chooser.random() < 0.2:
                    del place[key]
                else:
                    place[key] = pick(strange)
                break
            place = place[key]
    path = write_file(
        folder / "widths.lowbit", nodes, {"w": codes, **tables}, [["x", [None, 4], "float32"]], packed=packed, switches=switches, info=info
    )
    for bits_asked in (None, 2, {"a": 2}, {"a": 4, "b": 2}):
        try:
            run_file(path, bits=bits_asked)
        except LowbitError:
            if bits_asked is None:
                raise


def random_yaml(seed: int, folder: Path) -> None:
    """A policy or recipe with random damage."""
    from lowbit.spec import BitPolicy
    from lowbit.workflows.requests import QuantizeRequest, TrainRequest

    chooser = random.Random(seed)
    policy = (
        "default: {weight: 4, activation: 8}\nfirst_last: {weight: 8, activation: 8}\n"
        "rules:\n- match: layer1.*\n  weight: 3\n- {type: Linear, output: 8}\nmerges: 8\n"
    )
    recipe = "method: lsq\nepochs: 3\noptimizer: {kind: sgd, learning_rate: 0.1}\nkeep: [head]\noptions: {offset: never}\nweight_bits: 4\n"
    reader: Any
    reader, text = chooser.choice(
        ((BitPolicy, policy), (TrainRequest, recipe), (QuantizeRequest, "method: adaround\nkeep: [head]\nweight_bits: 4\n"))
    )
    pieces = (
        "[", "]", "{", "}", ": ", "\n", "- ", "&a ", "*a", "!!int ", "!!float x", "~", "1e999", "2001-99-99", "'", '"', "\x00", "\t", "#", "? ",
        "|", "<<: ", "é", "9" * 5000, "[" * 5000, "true", ".nan", "0x", "!!python/object:os.system x", "%", "---\n", "--- a\n--- b\n", "\ud7ff",
        "!!binary x", "weight: [1]", "rules: 5\n", "5", "a", "x: 1\n", " ",
    )  # fmt: skip
    for _ in range(chooser.choice((1, 1, 2, 3))):
        place = chooser.randrange(len(text) + 1)
        text = text[:place] + chooser.choice(pieces) + text[place + chooser.choice((0, 0, 1, 4)) :]
    path = folder / "case.yaml"
    path.write_bytes(text.encode() if chooser.random() < 0.9 else text.encode()[:-1] + b"\xff")
    reader.from_yaml(path)


def random_picture(seed: int, folder: Path) -> None:
    """A picture or array file with random bytes changed."""
    from PIL import Image

    from lowbit.data.arrays import load_arrays
    from lowbit.data.images import Preprocessing, read_picture

    chooser = random.Random(seed)
    kind = chooser.choice(("png", "jpg", "bmp", "gif", "webp", "tif", "npz", "npy"))
    path = folder / f"case.{kind}"
    size = chooser.choice(((8, 8), (1, 4000), (3000, 1), (1, 1), (33, 17)))
    if kind == "npz":
        np.savez_compressed(path, x=np.zeros((5, *size[::-1]), np.float32), y=np.zeros(5, np.int64))
    elif kind == "npy":
        np.save(path, np.zeros((5, *size), np.float32))
    else:
        Image.new(chooser.choice(("L", "RGB")), size).save(path)
    data = bytearray(path.read_bytes())
    for _ in range(chooser.choice((1, 3, 20))):
        place = chooser.randrange(min(len(data), chooser.choice((64, len(data)))))
        data[place] = chooser.choice((0, 255, chooser.randrange(256)))
    path.write_bytes(bytes(data[: chooser.choice((len(data), len(data), len(data) // 2))]))
    if kind in ("npz", "npy"):
        load_arrays(path)
    else:
        Preprocessing()(read_picture(path))


CASES: dict[str, Case] = {
    "calls": random_call,
    "layers": random_layer,
    "widths": random_widths,
    "yaml": random_yaml,
    "pictures": random_picture,
}


def faults(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Each fault in a line, with its seed."""
    for outcome in outcomes:
        if outcome.is_fault:
            yield f"seed {outcome.seed}: {outcome.kind}: {outcome.detail}"
