"""The way of pictures to files of features: read ahead, batched, computed in the main thread, written behind."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from resbackbone.cli.background import read_ahead, usable_threads, write_behind
from resbackbone.cli.console import one_line
from resbackbone.cli.features import Extractor, Features
from resbackbone.cli.result_files import ResultFiles
from resbackbone.data.pictures import Size, read_image, resize

BATCH_PIXELS = 8 * 512 * 512  # of a batch; larger pictures gain nothing by company
AHEAD_BYTES = 1 << 28  # of pictures that wait for the net
BEHIND_BYTES = 1 << 29  # of features that wait for the disk
ENTRY_BYTES = 1 << 10  # of what waits and has no pixels
# RuntimeError is how torch says that memory ran out, or that a picture is too small for a norm.
ERRORS = (ValueError, RuntimeError, MemoryError, OSError)


@dataclass(frozen=True)
class Job:
    """A picture's file, and the folder for its results."""

    path: Path
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """The outcome for one picture.

    Attributes:
        job: Which one.
        status: "kept" if its results were there already.
        error: Why it failed.
        not_finite: Levels with infinities or NaN.
    """

    job: Job
    status: Literal["extracted", "kept", "failed"]
    error: str = ""
    not_finite: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A picture, its normalized pixels, ``(1, C, H, W)``, and the record for its results."""

    job: Job
    picture: Image.Image
    image: Tensor
    record: str


@dataclass(frozen=True)
class Computed:
    """A picture and its features."""

    loaded: Loaded
    features: Features


class Pipeline:
    """Extracts features of pictures; one that fails does not stop the others.

    Args:
        extractor: What computes.
        files: What writes.
        size: What pictures are resized to first; None to leave them.
        batch_size: How many consecutive pictures of one size are computed at a time, at most.
        resume: Whether results that are complete and made with the same settings are kept.
        warn: Called, in the main thread, with a line for the user.
    """

    def __init__(
        self,
        extractor: Extractor,
        files: ResultFiles,
        *,
        size: Size | None,
        batch_size: int,
        resume: bool,
        warn: Callable[[str], None],
    ) -> None:
        self.extractor = extractor
        self.files = files
        self.size = size
        self.batch_size = 1 if extractor.one_by_one else batch_size
        self.resume = resume
        self.warn = warn

    def run(self, jobs: Iterable[Job]) -> Generator[Outcome]:
        """Yield the outcome for each picture, once its files are written."""
        Image.init()  # loads Pillow's plugins, which threads cannot do at the same time
        threads = usable_threads()
        loaded = read_ahead(jobs, self._load, threads=threads, limit=AHEAD_BYTES, weigh=_loaded_bytes)
        computed = self._compute_all(in_batches(loaded, self.batch_size))
        yield from write_behind(computed, self._write, threads=threads, limit=BEHIND_BYTES, weigh=_computed_bytes)

    def _load(self, job: Job) -> Loaded | Outcome:
        try:
            # Before the pixels, lest those of a file that is being replaced pass for those of the new one.
            record = self.files.record(job.path)
            if self.resume and self.files.are_complete(job.folder, record):
                return Outcome(job, "kept")
            picture = read_image(job.path, channels=self.extractor.in_channels)
            if self.size is not None:
                picture = resize(picture, size=self.size)
            return Loaded(job, picture, self.extractor.preprocessing(picture), record)
        except ERRORS as error:
            return Outcome(job, "failed", one_line(error))

    def _compute_all(self, batches: Iterable[list[Loaded] | Outcome]) -> Iterator[Computed | Outcome]:
        for batch in batches:
            if isinstance(batch, Outcome):
                yield batch
            else:
                yield from self._compute(batch)

    def _compute(self, batch: list[Loaded]) -> Iterator[Computed | Outcome]:
        try:
            features = self.extractor(torch.cat([loaded.image for loaded in batch]))
        except ERRORS as error:
            if len(batch) == 1:
                yield Outcome(batch[0].job, "failed", one_line(error))
                return
            self.warn(f"{len(batch)} pictures at a time did not work: {one_line(error)}; taking them one by one")
        else:
            yield from map(Computed, batch, features)
            return
        # Outside of the handler: the error holds what the batch had computed so far in memory.
        for loaded in batch:
            yield from self._compute([loaded])

    def _write(self, result: Computed | Outcome) -> Outcome:
        if isinstance(result, Outcome):
            return result
        loaded, features = result.loaded, result.features
        try:
            overview = features.draw(loaded.picture, title=f"{loaded.job.path.name}   {self.extractor.title}")
            self.files.write(loaded.job.folder, features, overview, loaded.record)
            return Outcome(loaded.job, "extracted", not_finite=tuple(features.not_finite()))
        except ERRORS as error:
            return Outcome(loaded.job, "failed", one_line(error))


def in_batches(items: Iterable[Loaded | Outcome], batch_size: int) -> Iterator[list[Loaded] | Outcome]:
    """Gather consecutive pictures of one size, up to ``batch_size`` and ``BATCH_PIXELS``; let all else pass."""
    batch: list[Loaded] = []
    for item in items:
        if isinstance(item, Outcome):
            yield item
            continue
        if batch and item.image.shape != batch[0].image.shape:
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == max(1, min(batch_size, BATCH_PIXELS // item.image[0, 0].numel())):
            yield batch
            batch = []
    if batch:
        yield batch


def _loaded_bytes(result: Loaded | Outcome) -> int:
    return ENTRY_BYTES + (result.image.nbytes if isinstance(result, Loaded) else 0)


def _computed_bytes(result: Computed | Outcome) -> int:
    return ENTRY_BYTES + (result.features.nbytes if isinstance(result, Computed) else 0)
