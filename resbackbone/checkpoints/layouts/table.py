"""A table of names that reads in both directions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

PARAMETERS = "weight|bias|running_mean|running_var|num_batches_tracked"

_TEXTS = {"p": PARAMETERS, "rest": ".+"}  # fields that are no numbers
_FIELD = re.compile(r"\{(\w+?)([+-]\d+|:\w+)?\}")


@dataclass(frozen=True)
class _Spelling:
    """How a number is written: what it looks like, to the number, and from the number and the stage's blocks."""

    pattern: str
    read: Callable[[str], int]
    write: Callable[[int, int], str]


_LETTER = _Spelling("[a-z]", lambda text: ord(text) - ord("a") + 1, lambda number, _: chr(ord("a") + number - 1))
_BLOCK = _Spelling(
    r"b[1-9]\d*|[a-z]",
    lambda text: int(text[1:]) if text[1:] else ord(text) - ord("a"),
    lambda number, blocks: f"b{number}" if blocks > 10 and number else chr(ord("a") + number),
)


_UNIT = _Spelling(r"\d\d+", lambda text: int(text) - 1, lambda number, _: f"{number + 1:02d}")


def _shifted(by: int) -> _Spelling:
    return _Spelling(r"\d+", lambda text: int(text) - by, lambda number, _: str(number + by))


def _spelling(kind: str) -> _Spelling:
    return {":letter": _LETTER, ":block": _BLOCK, ":unit": _UNIT}.get(kind) or _shifted(int(kind or 0))


class Template:
    """A name with fields, which it finds in names and fills in.

    A field is a number: ``{b}`` as it is; ``{s+1}`` and ``{k-1}`` one more or less than on the table's other side;
    ``{k:letter}`` "a" for 1, "b" for 2; ``{b:block}`` "a" for 0, "b" for 1, but "b1", "b2" behind "a" in a stage of
    more than ten blocks; ``{b:unit}`` "01" for 0. Where it comes twice, it is the same twice. ``{p}`` is the name of a
    parameter or buffer, ``{rest}`` whatever else a name has.
    """

    def __init__(self, text: str) -> None:
        self._parts: list[tuple[str, str, _Spelling | None]] = []  # what stands before a field, its name, its spelling
        pattern, end = "", 0
        for found in _FIELD.finditer(text):
            before, name = text[end : found.start()], found[1]
            spelling = None if name in _TEXTS else _spelling(found[2] or "")
            self._parts.append((before, name, spelling))
            again = f"(?P<{name}>" in pattern
            shape = _TEXTS[name] if spelling is None else spelling.pattern
            pattern += re.escape(before) + (f"(?P={name})" if again else f"(?P<{name}>{shape})")
            end = found.end()
        self._end = text[end:]
        self._regex = re.compile(pattern + re.escape(self._end))

    def read(self, name: str) -> dict[str, int | str] | None:
        """Return the fields' values, or None where the name is another."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        return {
            field: found[field] if spelling is None else spelling.read(found[field])
            for _, field, spelling in self._parts
        }

    def write(self, values: Mapping[str, int | str], blocks: int = 1) -> str:
        """Return the name with these values in its fields, in a stage of so many blocks."""
        text = ""
        for before, field, spelling in self._parts:
            value = values[field]
            text += before + (spelling.write(int(value), blocks) if spelling is not None else str(value))
        return text + self._end


class Table:
    """Rows of a native and a foreign name.

    Args:
        text: A row per line: the native name, blanks, the foreign name, both without the parameter's own name.
        full_names: Whether the names have their parameters' names already.
        only_with: What one of the native names must contain for the table to be meant.
    """

    def __init__(self, text: str, *, full_names: bool = False, only_with: str = "") -> None:
        end = "" if full_names else ".{p}"
        rows = [line.split() for line in text.splitlines() if line.strip()]
        self.only_with = only_with
        self.rows = [(Template(native + end), Template(foreign + end)) for native, foreign in rows]

    def to_native(self, names: Iterable[str]) -> dict[str, str]:
        """Map the names that the table knows to the native ones."""
        return self._rename(names, self.rows)

    def to_foreign(self, names: Iterable[str]) -> dict[str, str]:
        """Map the native names that the table knows to the foreign ones."""
        names = list(names)
        if not any(self.only_with in name for name in names):
            return {}
        return self._rename(names, [(foreign, native) for native, foreign in self.rows])

    @staticmethod
    def _rename(names: Iterable[str], rows: list[tuple[Template, Template]]) -> dict[str, str]:
        found = {}
        blocks: dict[int | str | None, int] = defaultdict(int)  # how many each stage has
        for name in names:
            for target, source in rows:
                values = source.read(name)
                if values is not None:
                    found[name] = target, values
                    stage = values.get("s")
                    blocks[stage] = max(blocks[stage], int(values.get("b", 0)) + 1)
                    break
        return {name: target.write(values, blocks[values.get("s")]) for name, (target, values) in found.items()}
