"""Files that people write, read within limits: whether a path can be read, and YAML as plain values that know their lines."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lowbit.errors import DataError, LowbitError, SpecError, unknown_name

LARGEST_YAML = 2**20  # bytes; a policy for a thousand layers needs a tenth of it
LARGEST_JSON = 2**28  # bytes
DEEPEST_YAML = 32  # levels of nesting
MOST_VALUES = 100_000  # with every alias written out


def check_readable(path: Path | str, *, max_bytes: int | None = None, error: type[LowbitError] = DataError) -> Path:
    """``path`` if it is an ordinary file of at most ``max_bytes`` bytes; reading a pipe or a device might never end.

    Raises:
        LowbitError: There is no such file, it is not an ordinary file, or it is too large; an object of the class ``error``.
    """
    path = Path(path)
    try:
        found = path.stat()
        is_allowed = os.access(path, os.R_OK)
    except (OSError, ValueError) as problem:  # ValueError: a zero in the name
        name = str(path) if len(str(path)) < 300 else f"{str(path)[:100]}..."
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{name}: {'there is no such file' if isinstance(problem, FileNotFoundError) else reason}") from problem
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: {'a folder' if stat.S_ISDIR(found.st_mode) else 'a pipe or a device'}, expected a file")
    if not is_allowed:
        raise error(f"{path}: no permission to read it")
    if max_bytes is not None and found.st_size > max_bytes:
        raise error(f"{path}: {found.st_size:,} bytes, at most {max_bytes:,} are read")
    return path


class Lined(dict[Any, Any]):
    """A mapping from a YAML file.

    Attributes:
        line: The line of the file where it starts.
        lines: The line of each key.
    """

    line: int = 0
    lines: dict[Any, int] = {}  # noqa: RUF012 - replaced, never changed


def line_of(value: object, key: object = None) -> str:
    """``", line 3"`` for a mapping from a YAML file, or for one of its keys, else nothing: for the place in an error."""
    return f", line {value.lines.get(key, value.line)}" if isinstance(value, Lined) else ""


def entries_of(value: object, first: str, names: Collection[str], where: str, *, other: Collection[str] = ()) -> dict[str, Any]:
    """The entries of a mapping that a user wrote: text, but for those in ``other``.

    Args:
        value: The mapping.
        first: The entry that it must have.
        names: The entries that it may have.
        where: The place, for errors.
        other: Entries that may be anything.

    Raises:
        SpecError: It is no mapping, lacks ``first``, or an entry is not text.
        UnknownNameError: An entry that is not in ``names``.
    """
    if not isinstance(value, Mapping) or first not in value:
        raise SpecError(f"{where}{line_of(value)}: expected a name, or names and values with {first!r} among them, got {shorten(value)}")
    for name, entry in value.items():
        place = f"{where}{line_of(value, name)}"
        if name not in names:
            raise unknown_name(f"entry of {place}", str(name), names)
        if name not in other and not isinstance(entry, str):
            raise SpecError(f"{place}: {name} must be text, got {shorten(entry)}")
    return dict(value)


def shorten(value: object, longest: int = 100) -> str:
    """What ``value`` looks like, in at most that many characters."""
    text = repr(value) if not isinstance(value, (dict, list, tuple)) or len(value) < longest else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= longest else f"{text[:longest]}..."


def read_json(path: Path | str, *, max_bytes: int = LARGEST_JSON) -> object:
    """The plain values in a JSON file.

    Raises:
        DataError: It cannot be read, is too large or too deep, or no JSON; names the file.
    """
    path = check_readable(path, max_bytes=max_bytes)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: it is no JSON ({shorten(str(error))})") from error


def read_yaml(path: Path | str) -> object:
    """The plain values in a YAML file; mappings are ``Lined``.

    Raises:
        SpecError: It cannot be read, is too large, too deep or no YAML, or has a key twice; names file and line.
    """
    path = check_readable(path, max_bytes=LARGEST_YAML, error=SpecError)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as text in UTF-8 ({error})") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> object:
    """The plain values in YAML text; ``where`` is for errors.

    Raises:
        SpecError: As for ``read_yaml``.

        >>> parse_yaml("{bits: 4, keep: [head]}", "the option")
        {'bits': 4, 'keep': ['head']}
    """
    if len(text) > LARGEST_YAML:
        raise SpecError(f"{where}: {len(text):,} characters of YAML, at most {LARGEST_YAML:,} are read")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SpecError(f"{where}{'' if mark is None else f', line {mark.line + 1}'}: {error.problem or error.context}") from error
    except (yaml.YAMLError, *_OF_TAGS) as error:
        raise SpecError(f"{where}: cannot be understood as YAML ({shorten(str(error))})") from error


_OF_TAGS = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError)  # what PyYAML raises for a date or number that is none


class _Loader(yaml.SafeLoader):
    """Plain values only, within limits, with every key once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}
        self._finished: list[yaml.Node] = []  # keeps nodes alive, so that their ids stay theirs

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth >= DEEPEST_YAML:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEEPEST_YAML} levels", self.peek_event().start_mark)
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "a value that contains itself", mark)
        if not is_alias:
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            total = 1 + (sum(self._sizes[id(part)] for part in parts) if isinstance(node, yaml.CollectionNode) else 0)
            if total > MOST_VALUES:
                raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES:,} values, aliases written out", mark)
            self._sizes[id(node)] = total
            self._finished.append(node)
        return node

    def construct_yaml_map(self, node: yaml.MappingNode) -> Any:
        data = Lined()
        data.line = node.start_mark.line + 1
        yield data
        data.update(self.construct_mapping(node))
        data.lines = {self.construct_object(key): key.start_mark.line + 1 for key, _ in node.value if isinstance(key, yaml.ScalarNode)}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key: Hashable = self.construct_object(key_node)
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {shorten(key)} stands twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
