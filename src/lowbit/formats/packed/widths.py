"""Several widths of one network in one packed file: what they share is stored once, what differs is looked up.

The file holds one graph. Where an argument, or a whole part of it, depends on widths, ``{"choice": [slots, values]}`` stands in its place; which
stored tensor a name of the graph means is looked up in a table of the same form. ``slots`` says whose width decides: that of the whole network
(``WHOLE``), of a layer, or of two layers, for a norm between them. ``values`` has an entry for each width, or for each pair of widths, the last
slot's running fastest; ``null`` is none. So any combination of layers' widths can be read, without a graph for each of them.

Codes of fewer bits that are those of more bits without their last ones, as in AdaBits and Bit-Mixer, are not stored (``cut_from``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lowbit.errors import FileFormatError, GraphError, SpecError
from lowbit.formats.packed.contents import contents_of, fingerprint
from lowbit.formats.packed.packing import pack
from lowbit.formats.packed.tensor import PackedTensor
from lowbit.formats.program.calls import Graph, graph_from_exported, graph_from_json, graph_to_json
from lowbit.formats.program.program import Program, module_paths
from lowbit.formats.program.structure import Json
from lowbit.network.bits import current_switch, layer_quantizers, layer_widths, switching_layers
from lowbit.network.insert import weight_sites
from lowbit.network.record import QuantizationRecord
from lowbit.network.surgery.switchable_norm import SwitchableNorm, pair_key
from lowbit.quantizers.switchable import SwitchableQuantizer
from lowbit.spec import LayerBits, parse_bits, switch_name

WHOLE = ""  # the slot of a network that switches as a whole
MOST_SWITCHES = 64
MOST_SLOTS = 2  # of one choice
Rounding = Literal["floor", "trunc"]
ROUNDINGS: tuple[Rounding, ...] = ("floor", "trunc")
Tensors = Mapping[str, Tensor | PackedTensor]


@dataclass(frozen=True)
class Choice:
    """A value for each width, or each combination of widths, of its slots."""

    slots: tuple[str, ...]
    values: tuple[Json, ...]

    def at(self, places: Mapping[str, int], count: int) -> Json:
        """The value where each slot has the width of that place among ``count``."""
        index = 0
        for slot in self.slots:
            index = index * count + places[slot]
        return self.values[index]

    def to_json(self) -> Json:
        """``[slots, values]``."""
        return [list(self.slots), list(self.values)]


@dataclass(frozen=True)
class Widths:
    """What a packed file holds of a network with several widths.

    Attributes:
        switches: The widths of the network, from the highest on.
        switching: Whether the ``network`` switches as a whole, or each ``layer``.
        layers: The bits of each layer at each switch.
        tied: Layers whose bits always are those of another one, and which that is.
        graph: The graph in JSON, with choices.
        names: The stored tensor of each name in the graph that does not simply mean the tensor of that name; ``None`` is none.
        tensors: Every stored tensor.
        layouts: Memory format of those that are not row-major.
    """

    switches: tuple[LayerBits, ...]
    switching: Literal["network", "layer"]
    layers: Mapping[str, tuple[LayerBits, ...]]
    tied: Mapping[str, str]
    graph: Json
    names: Mapping[str, Choice]
    tensors: Tensors
    layouts: Mapping[str, str] = field(default_factory=dict)

    @property
    def slots(self) -> tuple[str, ...]:
        """What has a width of its own."""
        if self.switching == "network":
            return (WHOLE,)
        return tuple(name for name, at in self.layers.items() if name not in self.tied and len(set(at)) > 1)

    def places(self, bits: Mapping[str, LayerBits], switch: LayerBits | None) -> dict[str, int]:
        """The place of each slot's width among the switches, for the bits of all layers, which ``switch`` gives if it is one.

        Raises:
            SpecError: There are no such widths.
        """
        if switch is not None:
            return dict.fromkeys(self.slots, self.switches.index(switch))
        if self.switching == "network":
            raise SpecError(f"the network switches as a whole between {', '.join(map(switch_name, self.switches))}. Choose one of these.")
        return {slot: self.layers[slot].index(bits[slot]) for slot in self.slots}

    def bits_at(self, places: Mapping[str, int]) -> dict[str, LayerBits]:
        """The bits of every layer where the slots have the widths of these places."""
        if self.switching == "network":
            return {name: at[places[WHOLE]] for name, at in self.layers.items()}
        return {name: at[places.get(self.tied.get(name, name), 0)] for name, at in self.layers.items()}

    def content_at(self, places: Mapping[str, int]) -> tuple[Graph, dict[str, Tensor | PackedTensor], dict[str, str]]:
        """The graph of one combination of widths, checked as that of any file, and the tensors and layouts that it reads.

        Raises:
            FileFormatError: The graph is not a valid one, or the file lacks a tensor of this combination.
        """
        held = {name: choice.at(places, len(self.switches)) for name, choice in self.names.items()}
        stored = {
            **{name: name for name in self.tensors if name not in held},
            **{n: cast(str, s) for n, s in held.items() if s is not None},
        }
        graph = graph_from_json(_resolved(self.graph, self._choice_in_graph, places, len(self.switches)), frozenset(stored))
        read = {name: stored[name] for name in stored if name in graph.tensors}
        return (
            graph,
            {name: self.tensors[s] for name, s in read.items()},
            {n: self.layouts[s] for n, s in read.items() if s in self.layouts},
        )

    def uniform(self) -> Iterator[dict[str, int]]:
        """The places of the slots at each switch."""
        return (dict.fromkeys(self.slots, place) for place in range(len(self.switches)))

    def to_json(self) -> dict[str, Json]:
        """What the manifest says besides the graph and the tensors; ``widths_from`` reads it."""
        return {
            "widths": [[switch.weight, switch.activation] for switch in self.switches],
            "each": self.switching,
            "layers": {name: [[b.weight, b.activation, b.output] for b in at] for name, at in self.layers.items()},
            "tied": dict(self.tied),
            "names": {name: choice.to_json() for name, choice in self.names.items()},
        }

    def _choice_in_graph(self, content: object) -> Choice:
        return _choice(content, self.slots, len(self.switches), "graph")


def _resolved(value: Json, choice_of: Callable[[object], Choice], places: Mapping[str, int], count: int) -> Json:
    """``value`` with every choice replaced by its value at these places; values of choices hold no choices themselves."""
    if isinstance(value, dict):
        if set(value) == {"choice"}:
            return choice_of(value["choice"]).at(places, count)
        return {key: _resolved(item, choice_of, places, count) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, choice_of, places, count) for item in value]
    return value


# Writing


def widths_of(model: nn.Module, record: QuantizationRecord, programs: Sequence[Program]) -> tuple[Widths, dict[str, int]]:
    """Put the programs of a network at each of its switches, from the highest on, together; with the places of its current widths.

    Raises:
        GraphError: Something differs between widths of layers that belongs to none of them.
    """
    owners, own, rename = _Owners.of(model, record), layer_widths(model), _names_without_widths(model)
    contents: list[dict[str, tuple[Tensor | PackedTensor, str]]] = []
    graphs: list[Json] = []
    for program in programs:
        held = contents_of(program)
        graph = graph_from_exported(program.exported, program.structure, {name: rename(name) for name in held}, program.batch_dims)
        contents.append({rename(name): tensor for name, tensor in held.items()})
        graphs.append(graph_to_json(graph))
    store, table = _Store(), {}
    labels = [switch_name(switch) for switch in record.switches]
    for name in dict.fromkeys(name for held in contents for name in held):
        found = [store.add(name, label, *held[name]) if name in held else None for held, label in zip(contents, labels, strict=True)]
        choice = owners.choice_of_tensor(name, found, store)
        if choice != Choice((), (name,)):
            table[name] = choice
    at = {name: widths.at for name, widths in own.items()}
    graph_json = owners.merged(graphs, module_paths(programs[0]))
    widths = Widths(record.switches, record.switching, at, dict(record.tied), graph_json, table, store.tensors, store.layouts)
    return widths, widths.places({name: found.bits for name, found in own.items()}, current_switch(model))


class _Store:
    """Tensors by their names in the file, those of equal content once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor | PackedTensor] = {}
        self.layouts: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def add(self, name: str, label: str, tensor: Tensor | PackedTensor, layout: str = "") -> str:
        """The name under which the tensor is stored: its own where that is free, else with the widths behind it."""
        key = fingerprint(name, tensor) + layout
        if key not in self._names:
            more = (f"{name}@{label}@{number}" for number in itertools.count(2))
            stored = next(free for free in itertools.chain([name, f"{name}@{label}"], more) if free not in self.tensors)
            self._names[key], self.tensors[stored] = stored, tensor
            if layout:
                self.layouts[stored] = layout
        return self._names[key]


def _names_without_widths(model: nn.Module) -> Callable[[str], str]:
    """Renames tensors so that they go by the same name at each width: ``norm.weight`` for ``norm.norms.4/4.weight``."""
    plain: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SwitchableNorm):
            plain |= {f"{path}.norms.{key}.": f"{path}." for key in module.norms}
        elif isinstance(module, SwitchableQuantizer):
            plain |= {f"{path}.at.{key}.": f"{path}." for key in module.at}

    def rename(name: str) -> str:
        found = next((prefix for prefix in plain if name.startswith(prefix)), None)
        return name if found is None else plain[found] + name.removeprefix(found)

    return rename


@dataclass(frozen=True)
class _Owners:
    """Whose widths decide on what lies at a path of the network.

    Attributes:
        switches: The number of switches.
        slots: What has a width of its own.
        at: The slots by the paths of modules and parameters; nothing where the network switches as a whole.
        norms: Norms for pairs of widths by their paths, each with the layers' weight bits at each switch.
    """

    switches: int
    slots: tuple[str, ...]
    at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norms: Mapping[str, tuple[SwitchableNorm, tuple[tuple[str, tuple[int | None, ...]] | None, ...]]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, record: QuantizationRecord) -> _Owners:
        count = len(record.switches)
        if record.switching == "network":
            return _Owners(count, (WHOLE,))
        slots, own = switching_layers(model), layer_widths(model)
        at: dict[str, tuple[str, ...]] = {}
        norms = {}
        names: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(path)
        sites = weight_sites(model)
        for name, found in layer_quantizers(model).items():
            slot = record.tied.get(name, name)
            if slot not in slots:
                continue
            at |= {sites[name].path: (slot,), sites[name].layer_name: (slot,)}
            for quantizer in (found.activation, found.output):
                for path in [] if quantizer is None else names[id(quantizer)]:
                    if at.setdefault(path, (slot,)) != (slot,):
                        raise GraphError(
                            f"the layers {at[path][0]!r} and {slot!r} share the quantizer {path!r}, so that a file cannot let them choose their "
                            "widths apart. Write a file for one width: bits=4."
                        )
        for path, module in model.named_modules():
            if isinstance(module, SwitchableNorm):
                mains = [None if layer is None else record.tied.get(layer, layer) for layer in module.layers]
                at[path] = tuple(dict.fromkeys(main for main in mains if main in slots))
                norms[path] = (
                    module,
                    tuple(None if main is None else (main, tuple(bits.weight for bits in own[main].at)) for main in mains),
                )
        return _Owners(count, slots, at, norms)

    def slots_of(self, path: str) -> tuple[str, ...]:
        """The slots that decide on what lies at ``path``; none where its width is fixed."""
        if self.slots == (WHOLE,):
            return self.slots
        while path and path not in self.at:
            path = path.rpartition(".")[0]
        return self.at.get(path, ())

    def choice_of_tensor(self, name: str, stored: Sequence[str | None], store: _Store) -> Choice:
        """The choice between stored tensors for a name in the graph, where ``stored`` has those at each switch."""
        slots = self.slots_of(name)
        path = next((path for path in self.norms if name.startswith(f"{path}.")), "")
        own = name.removeprefix(f"{path}.")
        if len(slots) < MOST_SLOTS or own not in self.norms[path][0].current.state_dict():
            return self._chosen(name, slots, stored)
        norm, layers = self.norms[path]
        found: list[str | None] = []
        for places in itertools.product(range(self.switches), repeat=len(slots)):
            at = dict(zip(slots, places, strict=True))
            key = pair_key(*(None if layer is None else layer[1][at.get(layer[0], 0)] for layer in layers))
            found.append(store.add(name, key, norm.norms[key].state_dict()[own]) if key in norm.norms else None)
        if found[:: self.switches + 1] != list(stored):  # both slots at the same switch
            raise GraphError(
                f"{name!r} is computed from the norms of {path!r} when the network is exported, so that a file cannot hold it for each pair of "
                "widths. Write a file for one width: bits=4."
            )
        return Choice((), (found[0],)) if len(set(found)) == 1 else Choice(slots, tuple(found))

    def merged(self, graphs: Sequence[Json], paths: Mapping[str, str]) -> Json:
        """One graph with choices; ``paths`` has the path of the module of each node."""
        whole = [cast(dict[str, Json], graph) for graph in graphs]
        nodes = [cast(list[Json], graph["nodes"]) for graph in whole]
        rest = {key: self._merge([graph[key] for graph in whole], key, self.slots_of("")) for key in whole[0] if key != "nodes"}
        if len(set(map(len, nodes))) > 1:
            return {**rest, "nodes": self._merge([list(found) for found in nodes], "the graph", self.slots_of(""))}
        where = [str(cast(list[Json], node)[0]) for node in nodes[0]]
        pairs = zip(where, zip(*nodes, strict=True), strict=True)
        return {**rest, "nodes": [self._merge(same, name, self.slots_of(paths.get(name, ""))) for name, same in pairs]}

    def _merge(self, values: Sequence[Json], where: str, slots: tuple[str, ...]) -> Json:
        first = values[0]
        if all(_is_same(value, first) for value in values):
            return first
        if isinstance(first, list) and all(isinstance(value, list) and len(value) == len(first) for value in values):
            return [self._merge(items, where, slots) for items in zip(*cast(Sequence[list[Json]], values), strict=True)]
        if isinstance(first, dict) and "tensor" not in first and all(isinstance(v, dict) and v.keys() == first.keys() for v in values):
            return {key: self._merge([cast(dict[str, Json], value)[key] for value in values], where, slots) for key in first}
        return {"choice": self._chosen(where, slots, values).to_json()}

    def _chosen(self, where: str, slots: tuple[str, ...], values: Sequence[Json]) -> Choice:
        if all(_is_same(value, values[0]) for value in values):
            return Choice((), (values[0],))
        if len(slots) != 1:
            raise GraphError(
                f"{where!r} differs between the widths, but belongs to no layer whose width is chosen, so that a file cannot hold every "
                "combination. Write a file for one width: bits=4."
            )
        return Choice(slots, tuple(values))


def _is_same(a: Json, b: Json) -> bool:
    """Whether two values are equal and print alike: 1, 1.0 and True are not the same argument."""
    return type(a) is type(b) and (repr(a) == repr(b))


# Reading


def widths_from(section: object, graph: object, tensors: Tensors, layouts: Mapping[str, str]) -> tuple[Widths, dict[str, int]]:
    """Rebuild what ``Widths.to_json`` described, and the places of the widths that the file starts with; every switch is checked.

    Raises:
        FileFormatError: Something is not as it must be.
    """
    if not isinstance(section, dict):
        raise FileFormatError(f"its switches must be an object, got {type(section).__name__}")
    listed, each, layers, tied, names = (section.get(key) for key in ("widths", "each", "layers", "tied", "names"))
    if not (isinstance(listed, list) and 1 < len(listed) <= MOST_SWITCHES and each in ("network", "layer")):
        raise FileFormatError(
            f"its switches must be 2 to {MOST_SWITCHES} widths of the network or each layer, got {str((listed, each))[:80]}"
        )
    if not (isinstance(layers, dict) and isinstance(tied, dict) and isinstance(names, dict)):
        raise FileFormatError("its switches must have objects for layers, tied and names")
    switches = tuple(_bits_from(item, "its switches", 2) for item in listed)
    if len(set(switches)) < len(switches):
        raise FileFormatError(f"its switches list a width twice: {', '.join(map(switch_name, switches))}")
    at = {}
    for name, found in layers.items():
        if not (isinstance(found, list) and len(found) == len(switches)):
            raise FileFormatError(f"layer {name[:80]!r}: its bits must be listed for {len(switches)} switches, got {str(found)[:80]}")
        at[name] = tuple(_bits_from(item, f"layer {name[:80]!r}", 3) for item in found)
    for name, main in tied.items():
        if name not in at or not isinstance(main, str) or main not in at or main in tied:
            raise FileFormatError(f"layer {name[:80]!r} is tied to {str(main)[:80]!r}, which must be another layer that is not tied itself")
    widths = Widths(switches, each, at, tied, cast(Json, graph), {}, tensors, layouts)
    slots, table = widths.slots, {}
    for name, item in names.items():
        choice = table[name] = _choice(item, slots, len(switches), f"tensor {name[:80]!r}")
        for stored in choice.values:
            if stored is not None and not (isinstance(stored, str) and stored in tensors):
                raise FileFormatError(f"tensor {name[:80]!r}: it means {str(stored)[:80]!r}, which the file does not contain")
    widths = Widths(switches, each, at, tied, cast(Json, graph), table, tensors, layouts)
    places = section.get("places")
    if not (isinstance(places, dict) and set(places) == set(slots) and all(_is_place(p, len(switches)) for p in places.values())):
        raise FileFormatError(f"its switches must say where it starts for {', '.join(map(repr, slots[:9]))}, got {str(places)[:80]}")
    for uniform in widths.uniform():
        widths.content_at(uniform)
    return widths, places


def _bits_from(item: object, where: str, count: int) -> LayerBits:
    if not (isinstance(item, list) and len(item) == count):
        raise FileFormatError(f"{where}: a width must be a list of {count} numbers of bits, got {str(item)[:80]}")
    return LayerBits(*(parse_bits(bits, where) for bits in item))


def _is_place(value: object, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _choice(item: object, slots: Sequence[str], count: int, where: str) -> Choice:
    if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and isinstance(item[1], list)):
        raise FileFormatError(f"{where}: a choice must be [slots, values], got {str(item)[:80]}")
    chosen, values = item
    if len(chosen) > MOST_SLOTS or not all(isinstance(slot, str) and slot in slots for slot in chosen) or len(set(chosen)) < len(chosen):
        raise FileFormatError(f"{where}: a choice must be between widths of up to {MOST_SLOTS} of its slots, got {str(chosen)[:80]}")
    if len(values) != count ** len(chosen):
        raise FileFormatError(
            f"{where}: a choice of {len(chosen)} slots with {count} widths has {count ** len(chosen)} values, got {len(values)}"
        )
    return Choice(tuple(chosen), tuple(values))


# Codes that are cut out of others


def cut_codes(source: PackedTensor, bit_width: int, rounding: Rounding) -> Tensor:
    """The codes of ``source`` without their last bits: ``floor`` or ``trunc`` of ``code / 2**(source.bit_width - bit_width)``.

    >>> from lowbit.quantizers.qtensor import AffineDecoder, QTensor
    >>> from lowbit.spec import Granularity
    >>> decoder = AffineDecoder(torch.ones(()), torch.zeros(()), Granularity.tensor())
    >>> source = PackedTensor.of(QTensor(torch.tensor([-5, -4, 3, 7], dtype=torch.int8), decoder, 4))
    >>> cut_codes(source, 2, "floor").tolist(), cut_codes(source, 2, "trunc").tolist()
    ([-2, -1, 0, 1], [-1, -1, 0, 1])
    """
    return torch.div(source.unpack().codes.to(torch.int16), 2 ** (source.bit_width - bit_width), rounding_mode=rounding)


def cut_from(widths: Widths) -> dict[str, tuple[str, Rounding]]:
    """The packed tensors that need not be stored: the one of more bits from which their codes are cut, and how."""
    packed = {name: tensor for name, tensor in widths.tensors.items() if isinstance(tensor, PackedTensor)}
    found: dict[str, tuple[str, Rounding]] = {}
    sources: set[str] = set()
    for choice in widths.names.values():
        rows = [name for name in choice.values if isinstance(name, str) and name in packed and name not in found]
        source = max(rows, key=lambda name: packed[name].bit_width, default="")
        for name in (name for name in dict.fromkeys(rows) if name not in sources | {source}):
            rounding = next((rounding for rounding in ROUNDINGS if _is_cut(packed[name], packed[source], rounding)), None)
            if rounding is not None:
                found[name] = (source, rounding)
                sources.add(source)
    return found


@dataclass(frozen=True)
class Nesting:
    """How the codes of weights at fewer bits are stored.

    Attributes:
        cut: Weights, counted at each width, whose codes are cut out of those of the most bits.
        stored: Those that have codes of their own.
        stored_bytes: What these codes take.
    """

    cut: int
    stored: int
    stored_bytes: int

    @staticmethod
    def of(widths: Widths) -> Nesting:
        """Count them."""
        cuts, own = cut_from(widths), dict[str, int]()
        for choice in widths.names.values():
            rows = {name: t for name in choice.values if isinstance(name, str) and isinstance(t := widths.tensors[name], PackedTensor)}
            first = next(iter(rows), "")
            own |= {name: tensor.code_bytes for name, tensor in rows.items() if name != first and name not in cuts}
        return Nesting(len(cuts), len(own), sum(own.values()))

    def __str__(self) -> str:
        found = []
        if self.cut:
            found.append(f"codes of fewer bits are those of the most bits without their last ones, so that {self.cut} tensors need none")
        if self.stored:
            found.append(f"{self.stored} tensors of fewer bits do not nest, and their own codes take {self.stored_bytes:,} bytes")
        return "; ".join(found)


def _is_cut(tensor: PackedTensor, source: PackedTensor, rounding: Rounding) -> bool:
    if tensor.shape != source.shape or tensor.bit_width >= source.bit_width:
        return False
    return torch.equal(cut_codes(source, tensor.bit_width, rounding), tensor.unpack().codes.to(torch.int16))


def cut_packed(description: Mapping[str, object], tensors: Mapping[str, PackedTensor]) -> Tensor:
    """The packed codes that a description with the entry ``cut`` (``[source, rounding]``) stands for.

    Raises:
        FileFormatError, SpecError: There is no such source, or its codes do not fit.
    """
    cut, bit_width, offset = (description.get(key) for key in ("cut", "bit_width", "offset"))
    if not (isinstance(cut, list) and len(cut) == 2 and isinstance(cut[0], str) and cut[0] in tensors and cut[1] in ROUNDINGS):
        raise FileFormatError(f"its codes must be cut from those of a stored tensor, got {str(cut)[:80]}")
    source = tensors[cut[0]]
    if not (_is_place(bit_width, source.bit_width) and isinstance(offset, int) and bit_width and -(2**8) <= offset <= 0):
        raise FileFormatError(f"{str((bit_width, offset))[:80]} is no width and offset of codes cut from those of {source.bit_width} bits")
    return pack(cut_codes(source, cast(int, bit_width), cut[1]) - offset, cast(int, bit_width))
