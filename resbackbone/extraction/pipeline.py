"""Feature extraction from pictures to files: load ahead, batch, compute in the main thread, write behind."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from resbackbone.data.pictures import Size, read_picture, resize
from resbackbone.extraction.extractor import Extractor, Features
from resbackbone.extraction.prefetch import num_worker_threads, prefetch, write_behind
from resbackbone.extraction.writers import FeatureWriter
from resbackbone.utils.validation import one_line

Status = Literal["extracted", "kept", "failed"]
MAX_BATCH_PIXELS = 8 * 512 * 512  # larger batches are no faster
MAX_PREFETCHED_BYTES = 1 << 28  # of pictures that wait for the model
MAX_UNWRITTEN_BYTES = 1 << 29  # of features that wait for the disk
ENTRY_BYTES = 1 << 10  # of what waits and has no pixels
# torch raises RuntimeError when memory runs out, or when a picture is too small for a norm.
ERRORS = (ValueError, RuntimeError, MemoryError, OSError)


@dataclass(frozen=True)
class PictureResult:
    """Outcome of the extraction for one picture.

    Attributes:
        path: The picture's file.
        folder: The folder of its results.
        status: "kept" where the results of an earlier run are complete.
        error: Why it failed.
        non_finite: Levels that contain infinities or NaN.
    """

    path: Path
    folder: Path
    status: Status
    error: str = ""
    non_finite: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A picture's file, and the folder for its results."""

    path: Path
    folder: Path

    def result(
        self,
        status: Status,
        error: BaseException | None = None,
        non_finite: Iterable[str] = (),
    ) -> PictureResult:
        """Return the result for this picture."""
        text = "" if error is None else one_line(error)
        return PictureResult(self.path, self.folder, status, text, tuple(non_finite))


@dataclass(frozen=True)
class LoadedPicture:
    """A decoded picture, its normalized image, ``(1, C, H, W)``, and the metadata of its results."""

    job: Job
    picture: Image.Image
    image: Tensor
    metadata: str


@dataclass(frozen=True)
class ComputedPicture:
    """A picture and its features."""

    loaded: LoadedPicture
    features: Features


class Pipeline:
    """Extracts the features of pictures; one that fails does not stop the others.

    Args:
        extractor: Computes the features.
        writer: Writes them.
        size: Size to resize pictures to, or None.
        batch_size: Largest number of consecutive pictures of the same size in a batch.
        resume: Whether to keep results that are complete and were made with the same settings.
        warn: Called, in the main thread, with warnings.
    """

    def __init__(
        self,
        extractor: Extractor,
        writer: FeatureWriter,
        *,
        size: Size | None,
        batch_size: int,
        resume: bool,
        warn: Callable[[str], object],
    ) -> None:
        self.extractor = extractor
        self.writer = writer
        self.size = size
        self.batch_size = 1 if extractor.uses_batch_statistics else batch_size
        self.resume = resume
        self.warn = warn

    def run(self, jobs: Iterable[Job]) -> Generator[PictureResult]:
        """Yield the result for each picture, once its files are written."""
        Image.init()  # loads Pillow's plugins, which is not thread-safe
        threads = num_worker_threads()
        loaded = prefetch(
            jobs, self._load, num_threads=threads, max_bytes=MAX_PREFETCHED_BYTES, nbytes=_num_loaded_bytes
        )
        computed = self._compute_all(in_batches(loaded, self.batch_size))
        yield from write_behind(
            computed, self._write, num_threads=threads, max_bytes=MAX_UNWRITTEN_BYTES, nbytes=_num_computed_bytes
        )

    def _load(self, job: Job) -> LoadedPicture | PictureResult:
        try:
            # Before the pixels: a file that is replaced in between must not get the metadata of the new one.
            metadata = self.writer.metadata(job.path)
            if self.resume and self.writer.is_complete(job.folder, metadata):
                return job.result("kept")
            picture = read_picture(job.path, channels=self.extractor.in_channels)
            if self.size is not None:
                picture = resize(picture, size=self.size)
            return LoadedPicture(job, picture, self.extractor.preprocessing(picture), metadata)
        except ERRORS as error:
            return job.result("failed", error)

    def _compute_all(
        self, batches: Iterable[list[LoadedPicture] | PictureResult]
    ) -> Iterator[ComputedPicture | PictureResult]:
        for batch in batches:
            if isinstance(batch, PictureResult):
                yield batch
            else:
                yield from self._compute(batch)

    def _compute(self, batch: list[LoadedPicture]) -> Iterator[ComputedPicture | PictureResult]:
        try:
            features = self.extractor(torch.cat([loaded.image for loaded in batch]))
        except ERRORS as error:
            if len(batch) == 1:
                yield batch[0].job.result("failed", error)
                return
            self.warn(f"a batch of {len(batch)} pictures failed: {one_line(error)}; computing them one by one")
        else:
            yield from map(ComputedPicture, batch, features)
            return
        # Outside the handler, because the error keeps the intermediate tensors of the batch in memory.
        for loaded in batch:
            yield from self._compute([loaded])

    def _write(self, computed: ComputedPicture | PictureResult) -> PictureResult:
        if isinstance(computed, PictureResult):
            return computed
        loaded, features = computed.loaded, computed.features
        job = loaded.job
        try:
            overview = features.draw(loaded.picture, title=f"{job.path.name}   {self.extractor.title}")
            self.writer.write(job.folder, features, overview, loaded.metadata)
            return job.result("extracted", non_finite=features.non_finite())
        except ERRORS as error:
            return job.result("failed", error)


def in_batches(
    items: Iterable[LoadedPicture | PictureResult], batch_size: int
) -> Iterator[list[LoadedPicture] | PictureResult]:
    """Batch consecutive pictures of the same size, up to ``batch_size`` and ``MAX_BATCH_PIXELS``; pass results on."""
    batch: list[LoadedPicture] = []
    for item in items:
        if isinstance(item, PictureResult):
            yield item
            continue
        if batch and item.image.shape != batch[0].image.shape:
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == max(1, min(batch_size, MAX_BATCH_PIXELS // item.image[0, 0].numel())):
            yield batch
            batch = []
    if batch:
        yield batch


def _num_loaded_bytes(item: LoadedPicture | PictureResult) -> int:
    return ENTRY_BYTES + (item.image.nbytes if isinstance(item, LoadedPicture) else 0)


def _num_computed_bytes(item: ComputedPicture | PictureResult) -> int:
    return ENTRY_BYTES + (item.features.nbytes if isinstance(item, ComputedPicture) else 0)
