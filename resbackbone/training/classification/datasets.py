"""Image classification dataset in folders, one per class."""

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
from resbackbone.training.engine.sampler import SeededIndex
from resbackbone.utils.validation import UnknownKeyError, check_choice, check_flag, nearest


class UnreadablePictureError(ValueError):
    """A picture of a dataset cannot be read; the message has its path and the reason."""


@DATASETS.register_module()
class ImageFolder(Dataset[dict[str, Any]]):
    """Classification dataset of pictures in one subfolder per class.

    Args:
        root: The folder: ``root/cat/1.jpg``, ``root/cat/more/2.png``, ``root/dog/3.webp``, ...
        transforms: Configs of transforms, or callables of a picture and a ``random.Random``. Their outputs must
            all have the same size.
        classes: The subfolders to use, in the order of their labels; None for all, sorted by name.
        channels: 3 for color, 1 for grayscale.
        allow_empty: Whether entries of ``classes`` may have no folder or no pictures; they keep their labels.
        unreadable: How to handle unreadable pictures: "raise" stops the run with the path; "replace" warns with the
            path and uses the next readable picture.

    Attributes:
        metainfo: ``classes``, the class names in the order of their labels.

    Raises:
        FileNotFoundError: If the folder does not exist.
        KeyError: If it lacks one of ``classes``.
        ValueError: If there are no classes, or one has no pictures.
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
            # Strings, as a million Path objects take a gigabyte.
            try:
                found = find_pictures([self.root / name], on_skipped=skipped.__setitem__)
            except (FileNotFoundError, ValueError):
                if not allow_empty:
                    raise
            else:
                self.items += [(str(path), label) for path in found]
        if not self.items:
            raise ValueError(f"no pictures in {str(self.root)!r}, in the folders {', '.join(names[:5])}, ...")
        for line in describe_skipped(skipped):
            print_log(line, logger="current", level=logging.WARNING)

    def relabel(self, classes: Sequence[str]) -> None:
        """Renumber the labels by another list of classes, such as the model's, which must contain all classes."""
        numbers = [classes.index(name) for name in self.metainfo["classes"]]
        self.items = [(path, numbers[label]) for path, label in self.items]
        self.metainfo = {"classes": tuple(classes)}

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.items)

    def __getitem__(self, index: SeededIndex | int) -> dict[str, Any]:
        """Read and augment one picture.

        Args:
            index: Its index, and the seed of its augmentation; 0 for a plain integer.

        Returns:
            ``inputs``, a uint8 tensor ``(channels, H, W)``, and ``labels``, an integer.

        Raises:
            UnreadablePictureError: If it cannot be read; with "replace" if no picture can.
        """
        index, seed = index if isinstance(index, tuple) else (index, 0)
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
                    raise UnreadablePictureError(str(error)) from error
                print_log(f"{error}; using the next one instead", logger="current", level=logging.WARNING)
        raise UnreadablePictureError(f"no picture in {str(self.root)!r} can be read")


def _find_classes(
    root: Path, wanted: Sequence[str] | None, skipped: dict[Path, str], allow_empty: bool
) -> tuple[str, ...]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}; it must have one subfolder of pictures per class")
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    ancestors = (root.resolve(), *root.resolve().parents)  # a link to one of them is a loop, not a class
    found = [path.name for path in entries if path.is_dir() and path.resolve() not in ancestors]
    suffixes = readable_suffixes()
    for path in entries:
        if path.is_symlink() and not path.exists():
            skipped[path] = "a broken link"
        elif path.is_file() and path.suffix.lower() in suffixes:
            skipped[path] = "not in a class folder"
    if not found:
        raise ValueError(f"{str(root)!r} has no subfolders; it must have one per class")
    for name in () if allow_empty else wanted or ():
        if str(name) not in found:
            raise UnknownKeyError(f"{str(root)!r} has no class {name!r}{nearest(name, found)}; or allow_empty=True")
    return tuple(found if wanted is None else map(str, wanted))


def _to_tensor(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, -1)
    return pixels.permute(2, 0, 1).contiguous()
