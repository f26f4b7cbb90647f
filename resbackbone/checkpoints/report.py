"""The checkpoint loading report."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_SHOWN = 8  # keys of each kind in the table


@dataclass(frozen=True)
class LoadReport:
    """Checkpoint loading report: what was loaded, ignored and changed; its string is a table.

    Attributes:
        source: Path, URL or name of the checkpoint.
        layout: The key layout, as :func:`~resbackbone.checkpoints.detect_layout` names it.
        loaded: Keys of the model that were loaded.
        missing: Keys of the model that the checkpoint does not have.
        kept: Keys of the model that the checkpoint does not have and need not have, which stay as initialized: layers
            that are initialized as identity (offsets of deformable convolutions, say), and counters.
        unexpected: Keys of the checkpoint, in parts of the model, that the model does not have.
        ignored: Keys of the checkpoint in other parts: classifiers, necks, heads, further stages, other backbones.
        mismatched: Keys with another shape in the checkpoint, with both shapes.
        adapted: The backbone that was selected and the changes of its weights, in words.
        not_loaded: Objects in the checkpoint that were not loaded: class and place of each.
    """

    source: str = ""
    layout: str = ""
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    not_loaded: tuple[str, ...] = ()

    def problems(self, strict: Literal["backbone", "all"] | bool = "backbone") -> list[str]:
        """List what ``strict`` forbids; see :func:`~resbackbone.checkpoints.load_checkpoint`."""
        heads = [key for key in self.ignored if not key.startswith("fc.")] if strict == "all" else []
        problems = [*self.mismatched, *self.missing, *self.unexpected, *heads] if strict else []
        return problems or ([] if self.loaded else ["nothing fits"])

    def _by_kind(self) -> dict[str, tuple[str, ...]]:
        return {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.mismatched,
            "kept as initialized": self.kept,
            "ignored": self.ignored,
        }

    def summary(self) -> str:
        """Return the number of keys of each kind in one line."""
        counts = [f"{len(keys)} {kind}" for kind, keys in self._by_kind().items() if keys]
        if self.not_loaded:
            classes = "class" if len(self.not_loaded) == 1 else "classes"
            counts.append(f"objects of {len(self.not_loaded)} other {classes} not loaded")
        return ", ".join([f"{len(self.loaded)} tensors loaded ({self.layout} keys)", *counts, *self.adapted])

    def __rich__(self) -> Table:
        """Return the report as a table."""
        title = escape(f"{self.source}: {self.layout} keys")
        table = Table("kind", "count", "keys", title=title, title_justify="left")
        table.add_row("loaded", str(len(self.loaded)), "")
        for kind, keys in {**self._by_kind(), "not loaded": self.not_loaded}.items():
            if keys or kind in ("missing", "unexpected", "of another shape"):
                more = [f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
                table.add_row(kind, str(len(keys)), escape("\n".join([*keys[:_SHOWN], *more])))
        for change in self.adapted:
            table.add_row("adapted", "", escape(change))
        return table

    def __str__(self) -> str:
        """Return the table as text."""
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue().rstrip()
