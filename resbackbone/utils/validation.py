"""Validation of arguments: errors name the argument, the value, the allowed values and the next step."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
import numbers
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableSequence, Sequence
from typing import Any, TypeVar, cast

Constructor = TypeVar("Constructor", bound=Callable[..., None])
_INTERNAL = ("resbackbone", "mmengine", "torch")  # packages whose frames a warning skips to find the user's line


class UnknownKeyError(KeyError):
    """A KeyError that prints its message without quotes."""

    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


def message_of(error: BaseException) -> str:
    """Return the message of an error, without the quotes that ``str`` adds to that of a KeyError."""
    return str(error.args[0] if isinstance(error, KeyError) and len(error.args) == 1 else error)


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, or its type where it has none."""
    text = message_of(error) or ("there is not enough memory" if isinstance(error, MemoryError) else "")
    if "Original Traceback (most recent call last):" in text:  # raised in a worker process of a data loader
        text = text.strip().splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def excerpt(text: str, length: int = 100) -> str:
    """Return untrusted text for use in a message: shortened, and without control characters."""
    text = text if len(text) <= length else f"{text[: length - 3]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the location of the user's call: the nearest line outside this package, mmengine and torch."""
    frame, level = sys._getframe(1), 2  # `stacklevel=2` is the caller of this function
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INTERNAL:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def to_builtin(value: Any) -> Any:
    """Convert a config's value to Python's builtin types, from those of OmegaConf, NumPy, torch and others.

    Mappings become dicts, mutable sequences lists and others tuples, except for strings; NumPy arrays and tensors of at
    most one dimension become lists or numbers; objects with ``__index__`` become integers. Builtin values are returned
    as they are.

    >>> to_builtin({"out_indices": range(2, 4), "depth": 50})
    {'out_indices': (2, 3), 'depth': 50}
    """
    if isinstance(value, (str, bytes, bytearray, memoryview, type)) or value is None:
        return value
    if isinstance(value, Mapping):
        items = {key: to_builtin(item) for key, item in value.items()}
        if not isinstance(value, dict):
            return items
        if all(items[key] is item for key, item in value.items()):
            return value
        changed = copy.copy(value)
        changed.update(items)
        return changed
    if isinstance(value, Sequence):
        entries = [to_builtin(item) for item in value]
        if isinstance(value, (list, tuple)) and all(a is b for a, b in zip(entries, value, strict=True)):
            return value
        return entries if isinstance(value, MutableSequence) else tuple(entries)
    if hasattr(value, "dtype") and getattr(value, "ndim", None) in (0, 1) and not getattr(value, "is_meta", False):
        return value.tolist()
    if hasattr(value, "__index__") and not hasattr(value, "ndim") and not isinstance(value, int):
        return operator.index(value)
    return value


def convert_arguments(constructor: Constructor) -> Constructor:
    """Decorate a constructor to receive its arguments converted by :func:`to_builtin`."""
    names = list(inspect.signature(constructor).parameters)[1:]

    @functools.wraps(constructor)
    def construct(self: object, *args: Any, **kwargs: Any) -> None:
        plain_args = [convert_argument(name, value) for name, value in zip(names, args, strict=False)]
        plain_kwargs = {name: convert_argument(name, value) for name, value in kwargs.items()}
        constructor(self, *plain_args, *args[len(names) :], **plain_kwargs)

    return cast(Constructor, construct)


def convert_argument(name: str, value: Any) -> Any:
    """Return one argument as :func:`to_builtin` does; raise ValueError if it is nested in itself."""
    try:
        return to_builtin(value)
    except RecursionError:
        raise ValueError(f"`{name}` must not contain itself") from None


def nearest(name: object, known: Iterable[str], *, list_all: str = "", same_numbers: bool = False) -> str:
    """Return the end of an error message about an unknown name.

    Args:
        name: What the user wrote.
        known: The known names.
        list_all: How to list them, such as a call or a command; without it they are written out.
        same_numbers: Suggest only names with the same numbers, since others are nets of another size.

    Returns:
        ``"; did you mean 'X'? Known: ..."``, without the question if no name is near.

    >>> nearest("ResNett", ["ResNet", "FPN"])
    "; did you mean 'ResNet'? Known: FPN, ResNet"
    """
    names = sorted(known)
    by_folded = {known_name.lower(): known_name for known_name in reversed(names)}
    numbers = re.findall(r"\d+", str(name)) if same_numbers else []
    fitting = [folded for folded in by_folded if re.findall(r"\d+", folded)[: len(numbers)] == numbers]
    close = difflib.get_close_matches(str(name).lower(), fitting, n=1, cutoff=0.6)
    question = f"did you mean {by_folded[close[0]]!r}? " if close else ""
    return f"; {question}" + (list_all or f"Known: {', '.join(names)}")


def check_type(name: str, value: object, allowed: type | tuple[type, ...], expected: str) -> None:
    """Raise TypeError unless ``value`` is an instance of ``allowed``; bool is not accepted as a number."""
    types = allowed if isinstance(allowed, tuple) else (allowed,)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"`{name}` must be {expected}, got {value!r} of type {type(value).__name__}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    check_type(name, to_builtin(value), bool, "True or False")


def check_int(name: str, value: object, *, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int, or raise unless it is an integer in ``low..high``.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is out of range.
    """
    number = to_builtin(value)
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r} of type {type(value).__name__}")
    if number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` must be {allowed}, got {number}")
    return number


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
) -> float:
    """Return ``value`` as a Python number.

    Args:
        name: The argument's name.
        value: An integer or floating-point number, of Python or NumPy, but not a bool.
        low: Lower limit.
        high: Upper limit.
        above: Whether ``low`` itself is excluded.
        below: Whether ``high`` itself is excluded.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range, infinite or NaN.
    """
    allowed = _range_in_words(low, high, above, below)
    check_type(name, value, numbers.Real, ", ".join(filter(None, ("a number", allowed))))
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    fits = math.isfinite(number) and low <= number <= high
    if not fits or (above and number == low) or (below and number == high):
        raise ValueError(f"`{name}` must be {allowed or 'finite'}, got {value}")
    return number


def _range_in_words(low: float, high: float, above: bool, below: bool) -> str:
    if math.isfinite(low) and math.isfinite(high) and not (above or below):
        return f"from {low:g} to {high:g}"
    bounds = []
    if math.isfinite(low):
        bounds.append(f"above {low:g}" if above else f"at least {low:g}")
    if math.isfinite(high):
        bounds.append(f"below {high:g}" if below else f"at most {high:g}")
    return " and ".join(bounds)


def check_count(name: str, value: object, *, most: int, low: int = 1) -> int:
    """Return ``value`` as an int, or raise unless it is from ``low`` to ``most``, a limit beyond any realistic net.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below ``low`` or above ``most``.
    """
    number = check_int(name, value, low=low)
    if number > most:
        raise ValueError(f"`{name}` must be at most {most}, got {number}")
    return number


def check_choice(name: str, value: object, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    # Type first, since comparing an array returns an array.
    if not any(isinstance(value, type(choice)) and value == choice for choice in allowed):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_mapping(name: str, value: object, *, optional: bool = True) -> None:
    """Raise TypeError unless ``value`` is a dict, or None if that is allowed."""
    if value is None and optional:
        return
    check_type(name, value, Mapping, "a dict or None" if optional else "a dict")


def check_sequence(name: str, value: object, *, length: int | None = None, why: str = "") -> tuple[Any, ...]:
    """Return ``value`` as a tuple.

    Args:
        name: The argument's name.
        value: A list, a tuple or another sequence, but not a string.
        length: Required number of entries, if it is fixed.
        why: The reason for this length, such as "one per stage, `num_stages`=3".

    Raises:
        TypeError: If it is not a sequence.
        ValueError: If its length is wrong.
    """
    entries = to_builtin(value)
    if not isinstance(entries, (list, tuple)):
        raise TypeError(f"`{name}` must be a list or tuple, got {value!r} of type {type(value).__name__}")
    if length is not None and len(entries) != length:
        reason = f" ({why})" if why else ""
        raise ValueError(f"`{name}` must have {length} entries{reason}, got {len(entries)}: {tuple(entries)!r}")
    return tuple(entries)


def check_ints(
    name: str, value: object, *, low: int, most: int | None = None, length: int | None = None, why: str = ""
) -> tuple[int, ...]:
    """Return ``value`` as a tuple of integers, each in ``low..most``; raises as the checks above do."""
    numbers = check_sequence(name, value, length=length, why=why)
    for index, number in enumerate(numbers):
        if most is None:
            check_int(f"{name}[{index}]", number, low=low)
        else:
            check_count(f"{name}[{index}]", number, low=low, most=most)
    return numbers
