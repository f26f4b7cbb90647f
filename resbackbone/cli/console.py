"""What the commands share: where they print, and how they end when the user's input is at fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

Item = TypeVar("Item")

results = Console(highlight=False)
messages = Console(stderr=True, highlight=False)

USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError)


def say(text: str, *, style: str = "", console: Console = results) -> None:
    """Print text as it is: never as markup, never wrapped, and with escapes where a file name is no valid UTF-8."""
    console.print(Text(text.encode("utf-8", "backslashreplace").decode("utf-8"), style=style), soft_wrap=True)


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


def one_line(error: BaseException) -> str:
    """Return an error's message in one line."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if "Original Traceback (most recent call last):" in text:  # a data loader's worker has all of it in its message
        text = text.strip().splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the command with one red line and status 2 where the block raises what is the user's to mend.

    Args:
        kinds: The exceptions in question; ``USER_ERRORS`` unless given.
    """
    caught = kinds or USER_ERRORS
    try:
        yield
    except caught as error:
        say(f"error: {one_line(error)}", style="red", console=messages)
        raise typer.Exit(2) from error
