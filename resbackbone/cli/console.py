"""Shared by the commands: printing, the ``--import`` option, checks of output paths, and errors in user input."""

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
        help="Module that registers custom types, imported before CONFIG is read; may be repeated.",
        show_default=False,
    ),
]

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, MemoryError, RecursionError)


def echo(text: str, *, style: str = "", console: Console = stdout) -> None:
    """Print text without markup or wrapping, and with control characters escaped by :func:`printable`."""
    lines = "\n".join(map(printable, text.split("\n")))
    console.print(Text(lines, style=style), soft_wrap=True)


def printable(text: object) -> str:
    r"""Escape characters of file names that a terminal must not get: line breaks, control characters, invalid UTF-8.

    >>> print(printable("a\nb\x1b[2J.png"))
    a\nb\x1b[2J.png
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def with_progress(
    items: Iterable[Item], description: str, *, total: int | None = None, shown: bool = True
) -> Iterable[Item]:
    """Iterate over items with a progress bar, if stderr is a terminal.

    Args:
        items: The items.
        description: Label of the bar.
        total: Number of items, if they have no length.
        shown: Whether to show a bar at all.
    """
    if not (shown and stderr.is_terminal):
        return items
    return track(items, description, total=total, console=stderr, transient=True)


def import_user_modules(modules: Iterable[str] | None) -> None:
    """Import the modules named by ``--import``; the current folder is searched, too, after all others.

    Raises:
        ImportError: If a module cannot be imported.
    """
    from resbackbone.registry.lookup import import_modules

    if modules:
        sys.path.append(str(Path.cwd()))
        import_modules(list(modules))


def check_folder(option: str, path: Path) -> None:
    """Raise ValueError if a folder cannot be created because the path or one of its parents is a file."""
    for there in (path, *path.parents):
        if there.exists() and not there.is_dir():
            raise ValueError(f"{option} needs a folder, but {str(there)!r} is a file; give another one")


def check_file(option: str, path: Path | None) -> None:
    """Raise ValueError if a file cannot be written because it is a folder, or its folder does not exist."""
    if path is not None and path.is_dir():
        raise ValueError(f"{option} needs the name of a file, but {str(path)!r} is a folder")
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{option} needs an existing folder, but {str(path.parent)!r} is none")


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Print errors of the block that the user can fix as one red line, and exit with status 2.

    Args:
        kinds: Exceptions to print, and MemoryError; ``USER_ERRORS`` if none are given.
    """
    caught: tuple[type[Exception], ...] = (*kinds, MemoryError) if kinds else USER_ERRORS
    try:
        yield
    except caught as error:
        echo(f"error: {one_line(error)}", style="red", console=stderr)
        raise typer.Exit(2) from error
