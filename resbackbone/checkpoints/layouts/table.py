"""Two-way key tables: templates of native and foreign keys."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

PARAMETERS = "weight|bias|running_mean|running_var|num_batches_tracked"

_TEXTS = {"p": PARAMETERS, "rest": ".+"}  # fields that are not numbers
_FIELD = re.compile(r"\{(\w+?)([+-]\d+|:\w+)?\}")


@dataclass(frozen=True)
class _NumberFormat:
    """Format of a number in a key: its pattern, a parser, and a formatter of the number and the stage's blocks."""

    pattern: str
    parse: Callable[[str], int]
    format: Callable[[int, int], str]


_LETTER = _NumberFormat("[a-z]", lambda text: ord(text) - ord("a") + 1, lambda number, _: chr(ord("a") + number - 1))
_BLOCK = _NumberFormat(
    r"b[1-9]\d*|[a-z]",
    lambda text: int(text[1:]) if text[1:] else ord(text) - ord("a"),
    lambda number, blocks: f"b{number}" if blocks > 10 and number else chr(ord("a") + number),
)
_UNIT = _NumberFormat(r"\d\d+", lambda text: int(text) - 1, lambda number, _: f"{number + 1:02d}")


def _shifted(by: int) -> _NumberFormat:
    return _NumberFormat(r"\d+", lambda text: int(text) - by, lambda number, _: str(number + by))


def _number_format(kind: str) -> _NumberFormat:
    return {":letter": _LETTER, ":block": _BLOCK, ":unit": _UNIT}.get(kind) or _shifted(int(kind or 0))


class Template:
    """Template of keys with fields, which parses and formats keys.

    A field is a number: ``{b}`` as it is; ``{s+1}`` and ``{k-1}`` one more or less than on the other side of the table;
    ``{k:letter}`` "a" for 1, "b" for 2; ``{b:block}`` "a" for 0, "b" for 1, but "b1", "b2" after "a" in a stage of more
    than ten blocks; ``{b:unit}`` "01" for 0. A field that occurs twice has the same value. ``{p}`` is the name of a
    parameter or buffer, ``{rest}`` the rest of a key.
    """

    def __init__(self, text: str) -> None:
        self._parts: list[tuple[str, str, _NumberFormat | None]] = []  # text before a field, its name, its format
        pattern, end = "", 0
        for found in _FIELD.finditer(text):
            before, name = text[end : found.start()], found[1]
            number = None if name in _TEXTS else _number_format(found[2] or "")
            self._parts.append((before, name, number))
            again = f"(?P<{name}>" in pattern
            shape = _TEXTS[name] if number is None else number.pattern
            pattern += re.escape(before) + (f"(?P={name})" if again else f"(?P<{name}>{shape})")
            end = found.end()
        self._end = text[end:]
        self._regex = re.compile(pattern + re.escape(self._end))

    def parse(self, name: str) -> dict[str, int | str] | None:
        """Return the values of the fields; None if the key does not match."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        return {
            field: found[field] if number is None else number.parse(found[field]) for _, field, number in self._parts
        }

    def format(self, values: Mapping[str, int | str], blocks: int = 1) -> str:
        """Return the key with these values of the fields, in a stage with this number of blocks."""
        text = ""
        for before, field, number in self._parts:
            value = values[field]
            text += before + (number.format(int(value), blocks) if number is not None else str(value))
        return text + self._end


class Table:
    """Two-way table of native and foreign keys.

    Args:
        text: One row per line: native key, blanks, foreign key, both without the name of the parameter.
        full_names: Whether the keys include the names of the parameters.
        only_with: Text that one of the native keys must contain for the table to apply.
    """

    def __init__(self, text: str, *, full_names: bool = False, only_with: str = "") -> None:
        end = "" if full_names else ".{p}"
        rows = [line.split() for line in text.splitlines() if line.strip()]
        self.only_with = only_with
        self.rows = [(Template(native + end), Template(foreign + end)) for native, foreign in rows]

    def to_native(self, names: Iterable[str]) -> dict[str, str]:
        """Map the foreign keys in the table to native ones."""
        return self._rename(names, self.rows)

    def to_foreign(self, names: Iterable[str]) -> dict[str, str]:
        """Map the native keys in the table to foreign ones."""
        names = list(names)
        if not any(self.only_with in name for name in names):
            return {}
        return self._rename(names, [(foreign, native) for native, foreign in self.rows])

    @staticmethod
    def _rename(names: Iterable[str], rows: list[tuple[Template, Template]]) -> dict[str, str]:
        found = {}
        blocks: dict[int | str | None, int] = defaultdict(int)  # of each stage
        for name in names:
            for target, source in rows:
                values = source.parse(name)
                if values is not None:
                    found[name] = target, values
                    stage = values.get("s")
                    blocks[stage] = max(blocks[stage], int(values.get("b", 0)) + 1)
                    break
        return {name: target.format(values, blocks[values.get("s")]) for name, (target, values) in found.items()}
