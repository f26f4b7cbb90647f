"""What the commands share: where they print, and how they end when the user's input is at fault."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

from resbackbone.utils.validation import one_line

Item = TypeVar("Item")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a module of yours that registers types, before CONFIG is read. May be repeated.",
        show_default=False,
    ),
]

results = Console(highlight=False)
messages = Console(stderr=True, highlight=False)

USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, MemoryError, RecursionError)


def say(text: str, *, style: str = "", console: Console = results) -> None:
    """Print text as it is: never as markup, never wrapped, and with escapes for what is not :func:`printable`."""
    lines = "\n".join(map(printable, text.split("\n")))
    console.print(Text(lines, style=style), soft_wrap=True)


def printable(text: object) -> str:
    r"""Escape what names of files may hold and no terminal should get: line breaks, control characters, no UTF-8.

    >>> print(printable("a\nb\x1b[2J.png"))
    a\nb\x1b[2J.png
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def with_progress(
    items: Iterable[Item], description: str, *, total: int | None = None, shown: bool = True
) -> Iterable[Item]:
    """Go through the items, with a bar where somebody watches.

    Args:
        items: What is gone through.
        description: What stands beside the bar.
        total: How many there are, where they cannot say it themselves.
        shown: False for no bar at all.
    """
    if not (shown and messages.is_terminal):
        return items
    return track(items, description, total=total, console=messages, transient=True)


def import_named(modules: Iterable[str] | None) -> None:
    """Import what ``--import`` names, from the current folder as well, which is searched last.

    Raises:
        ImportError: If a module cannot be imported.
    """
    from resbackbone.registry.lookup import import_modules

    if modules:
        sys.path.append(str(Path.cwd()))
        import_modules(list(modules))


def check_folder(option: str, path: Path) -> None:
    """Raise ValueError where a folder cannot be made, as a file stands in its way."""
    for there in (path, *path.parents):
        if there.exists() and not there.is_dir():
            raise ValueError(f"{option} needs a folder, but {str(there)!r} is a file; give another one")


def check_file(option: str, path: Path | None) -> None:
    """Raise ValueError where a file cannot be written because of what is there, before it takes time to find out."""
    if path is not None and path.is_dir():
        raise ValueError(f"{option} needs the name of a file, but {str(path)!r} is a folder")
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{option} needs a folder that is there, but {str(path.parent)!r} is none")


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the command with one red line and status 2 where the block raises what is the user's to mend.

    Args:
        kinds: The exceptions in question; ``USER_ERRORS`` unless given.
    """
    caught: tuple[type[Exception], ...] = (*kinds, MemoryError) if kinds else USER_ERRORS
    try:
        yield
    except caught as error:
        say(f"error: {one_line(error)}", style="red", console=messages)
        raise typer.Exit(2) from error
