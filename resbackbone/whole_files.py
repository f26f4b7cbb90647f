"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Hand out another path beside a file's; what is there at the end takes its name, unless the block raises."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def delete_parts(path: Path) -> None:
    """Delete what processes that were killed left beside a file that nobody else is writing."""
    for part in path.parent.glob(f".{escape(path.stem)}.*{escape(path.suffix)}"):
        part.unlink(missing_ok=True)
