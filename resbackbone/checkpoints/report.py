"""The report of loading a checkpoint."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_SHOWN = 8  # keys of each kind in the table


@dataclass(frozen=True)
class LoadReport:
    """What of a checkpoint was loaded, ignored and changed; as a string it is a table.

    Attributes:
        source: Where it came from.
        layout: How its keys are named, as :func:`~resbackbone.checkpoints.detect_layout` says it.
        loaded: Keys of the model that were filled.
        missing: Keys of the model that the checkpoint does not have.
        kept: Keys of the model that the checkpoint does not have and need not have: layers that begin as if they were
            not there (offsets of deformable convolutions, say), and counters.
        unexpected: Keys of the checkpoint, inside of parts that the model has, that the model does not have.
        ignored: Keys of the checkpoint outside of them: classifiers, necks, heads, further stages, other backbones.
        mismatched: Keys whose shapes differ, with both shapes.
        adapted: What was changed on the way, in words.
        not_loaded: Objects beside the weights that were not loaded: each class, and where it is.
    """

    source: str
    layout: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    not_loaded: tuple[str, ...] = ()

    def summary(self) -> str:
        """Count each kind in one line."""
        counts = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.mismatched,
            "kept as they were": self.kept,
            "of heads ignored": self.ignored,
        }
        rest = [f"{len(names)} {what}" for what, names in counts.items() if names]
        if self.not_loaded:
            rest.append(f"objects of {len(self.not_loaded)} other class{'es' * (len(self.not_loaded) > 1)} not loaded")
        return ", ".join([f"{len(self.loaded)} tensors loaded ({self.layout} keys)", *rest, *self.adapted])

    def __rich__(self) -> Table:
        """Draw it as a table."""
        table = Table("what", "count", "keys", title=escape(f"{self.source}: {self.layout} keys"), title_justify="left")
        rows = {
            "loaded": self.loaded,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.mismatched,
            "kept as they were": self.kept,
            "ignored": self.ignored,
            "not loaded": self.not_loaded,
        }
        for what, names in rows.items():
            if names or what in ("loaded", "missing", "unexpected", "of another shape"):
                more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
                keys = "" if what == "loaded" else "\n".join([*names[:_SHOWN], *more])
                table.add_row(what, str(len(names)), escape(keys))
        for change in self.adapted:
            table.add_row("adapted", "", escape(change))
        return table

    def __str__(self) -> str:
        """Write the table."""
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue().rstrip()
