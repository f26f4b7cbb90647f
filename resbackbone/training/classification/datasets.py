"""Pictures in folders, one folder for each class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from mmengine.logging import print_log
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from resbackbone.data.pictures import describe_skipped, find_pictures, read_picture, readable_suffixes
from resbackbone.registry import DATASETS
from resbackbone.training.classification.transforms import Transform, build_transforms
from resbackbone.training.engine.sampler import Draw
from resbackbone.utils.validation import UnknownKeyError, check_choice, check_flag, nearest


class UnreadablePicture(ValueError):
    """A picture of a dataset cannot be read; the message has its name and why."""


@DATASETS.register_module()
class ImageFolder(Dataset[dict[str, Any]]):
    """The pictures below a folder, whose subfolders are the classes.

    Args:
        root: The folder: ``root/cat/1.jpg``, ``root/cat/more/2.png``, ``root/dog/3.webp``, ...
        transforms: Configs of transforms, or callables of a picture and a ``random.Random``. They must make all
            pictures of one size.
        classes: The subfolders that count, in the order of their labels; None for all, sorted by name.
        channels: 3 for color, 1 for grayscale.
        allow_empty: Whether those of ``classes`` without a folder or pictures keep their labels, and have no pictures.
        unreadable: What becomes of a picture that cannot be read: "raise" ends the run with its name; "replace" warns
            with its name and shows the next one that can be read.

    Attributes:
        metainfo: ``classes``, the names in the order of their labels.

    Raises:
        FileNotFoundError: If there is no such folder.
        KeyError: If it lacks one of ``classes``.
        ValueError: If there are no classes or one has no pictures.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        transforms: Iterable[Mapping[str, Any] | Transform] = (),
        classes: Sequence[str] | None = None,
        channels: Literal[1, 3] = 3,
        allow_empty: bool = False,
        unreadable: Literal["raise", "replace"] = "raise",
    ) -> None:
        check_choice("channels", channels, (1, 3))
        check_flag("allow_empty", allow_empty)
        check_choice("unreadable", unreadable, ("raise", "replace"))
        self.root = Path(root)
        self.transforms = build_transforms(transforms)
        self.channels = channels
        self.unreadable = unreadable
        skipped: dict[Path, str] = {}
        names = _find_classes(self.root, classes, skipped, allow_empty)
        self.metainfo = {"classes": names}
        self.items: list[tuple[str, int]] = []
        for label, name in enumerate(names):
            # As strings: a million paths would take a gigabyte.
            try:
                found = find_pictures([self.root / name], on_skipped=skipped.__setitem__)
            except (FileNotFoundError, ValueError):
                if not allow_empty:
                    raise
            else:
                self.items += [(str(path), label) for path in found]
        if not self.items:
            raise ValueError(f"no pictures in {str(self.root)!r}, in folders called {', '.join(names[:5])}, ...")
        for line in describe_skipped(skipped):
            print_log(line, logger="current", level=logging.WARNING)

    def relabel(self, classes: Sequence[str]) -> None:
        """Number the labels in the order of other classes, such as a model's, among which all of its own must be."""
        numbers = [classes.index(name) for name in self.metainfo["classes"]]
        self.items = [(path, numbers[label]) for path, label in self.items]
        self.metainfo = {"classes": tuple(classes)}

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.items)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        """Read and change one picture.

        Args:
            draw: Which, and the seed of its random changes, without which it is 0.

        Returns:
            ``inputs``, a tensor ``(channels, H, W)`` of 8-bit integers, and ``labels``, an integer.

        Raises:
            UnreadablePicture: If it cannot be read; with "replace" if none can.
        """
        index, seed = draw if isinstance(draw, tuple) else (draw, 0)
        picture, label = self._read(index)
        rng = Random(seed)
        for transform in self.transforms:
            picture = transform(picture, rng)
        return {"inputs": _to_tensor(picture), "labels": label}

    def _read(self, index: int) -> tuple[Image.Image, int]:
        for step in range(len(self)):
            path, label = self.items[(index + step) % len(self)]
            try:
                return read_picture(path, channels=self.channels), label
            except ValueError as error:
                if self.unreadable == "raise":
                    raise UnreadablePicture(str(error)) from error
                print_log(f"{error}; the next one takes its place", logger="current", level=logging.WARNING)
        raise UnreadablePicture(f"no picture in {str(self.root)!r} can be read")


def _find_classes(
    root: Path, wanted: Sequence[str] | None, skipped: dict[Path, str], allow_empty: bool
) -> tuple[str, ...]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}; it should have one subfolder of pictures for each class")
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    holders = (root.resolve(), *root.resolve().parents)  # a link to one of which is a loop, and no class
    there = [path.name for path in entries if path.is_dir() and path.resolve() not in holders]
    suffixes = readable_suffixes()
    for path in entries:
        if path.is_symlink() and not path.exists():
            skipped[path] = "a broken link"
        elif path.is_file() and path.suffix.lower() in suffixes:
            skipped[path] = "as it stands beside the folders of the classes"
    if not there:
        raise ValueError(f"{str(root)!r} has no subfolders; it should have one for each class")
    for name in () if allow_empty else wanted or ():
        if str(name) not in there:
            raise UnknownKeyError(f"{str(root)!r} has no class {name!r}{nearest(name, there)}; or allow_empty=True")
    return tuple(there if wanted is None else map(str, wanted))


def _to_tensor(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, -1)
    return pixels.permute(2, 0, 1).contiguous()
