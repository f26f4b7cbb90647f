"""``extract``: feature extraction from Python, which the command ``resbackbone extract`` calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from resbackbone.config import BackboneSource
from resbackbone.data.pictures import Size, check_size, describe_skipped, find_pictures
from resbackbone.extraction.distributed import DistributedContext, local_device
from resbackbone.extraction.extractor import Backend, Dtype, Extractor
from resbackbone.extraction.pipeline import Job, PictureResult, Pipeline
from resbackbone.extraction.writers import OVERVIEW, FeatureWriter, FileFormat
from resbackbone.utils.logs import log_info
from resbackbone.utils.validation import check_choice, check_int, warn_user


@dataclass(frozen=True)
class ExtractionSummary:
    """Outcome of an extraction.

    Attributes:
        num_extracted: Number of pictures extracted, by all ranks if they are connected.
        num_kept: Number of pictures with complete results of an earlier run, likewise.
        num_failed: Number of pictures that failed, likewise.
        errors: The error message of each picture that failed in this process.
        non_finite: Levels with infinities or NaN, for each picture of this process that has any.
        skipped: Broken links, and pictures in the given folders with suffixes that Pillow cannot read, with the reason.
        overview: Overview of the first picture of this process that did not fail.
    """

    num_extracted: int
    num_kept: int
    num_failed: int
    errors: dict[Path, str]
    non_finite: dict[Path, tuple[str, ...]]
    skipped: dict[Path, str]
    overview: Path | None


def _unchanged(results: Iterable[PictureResult], total: int) -> Iterable[PictureResult]:
    return results


def extract(
    config: BackboneSource,
    pictures: str | Path | Iterable[str | Path],
    *,
    out: str | Path,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = "auto",
    size: Size | None = None,
    fpn: bool = False,
    file_format: FileFormat = "npy",
    batch_size: int = 8,
    resume: bool = False,
    progress: Callable[..., Iterable[PictureResult]] = _unchanged,
    report: Callable[[str], object] = log_info,
    warn: Callable[[str], object] = warn_user,
    distributed: DistributedContext | None = None,
) -> ExtractionSummary:
    """Extract the feature maps of pictures with a backbone, and write them to files.

    Each picture gets a folder of its name in ``out``, with every feature map, ``(C, H/stride, W/stride)``, and
    ``pyramid.png``, an overview. A picture that cannot be read or computed does not stop the others.

    Under torchrun, or in an initialized ``torch.distributed`` process group, each rank extracts its shard.

    Args:
        config: The backbone, as for :func:`resbackbone.build_backbone`.
        pictures: Files, and folders that are searched with their subfolders.
        out: Folder for the results. Results of an earlier run are replaced.
        checkpoint: Weights, as for :func:`resbackbone.checkpoints.load_checkpoint`. Without it they are those that the
            config names, else random ones, the same in every run.
        device: Such as "cpu", "cuda", "cuda:1" or "mps".
        dtype: Number format of the model and the files; .npy files hold bfloat16 as float32.
        backend: As for :func:`resbackbone.inference.optimize`; "plain" for the model unchanged, bit by bit, to which
            "auto" falls back.
        size: Resize pictures first: the shorter side in pixels, or (height, width).
        fpn: Write the outputs of an FPN with 256 channels and random weights instead, p2 to p6.
        file_format: "npy", one file per level, or "safetensors", one file for all.
        batch_size: Largest number of consecutive pictures of the same size in a batch; of large ones fewer.
        resume: Keep results that are complete and were made with the same settings.
        progress: Wraps the iterator over the results, such as ``tqdm.tqdm``; called with it and ``total``.
        report: Called with lines about the weights and the model, by the first rank.
        warn: Called with warnings.
        distributed: This process among others; the caller disconnects it. None for that of the environment.

    Returns:
        Counts, and the errors by picture.

    Raises:
        ConnectionError: If another rank dies.
        KeyError, TypeError, ValueError: If an argument is wrong, the checkpoint does not fit, or a folder has no
            pictures.
        OSError: If a file is missing, a download fails, or ``out`` cannot be created.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (64, 48)).save(folder / "gray.png")
    >>> summary = extract("resnet18", folder, out=folder / "features", backend="plain")
    >>> summary.num_extracted, summary.errors
    (1, {})
    >>> import numpy as np
    >>> np.load(folder / "features/gray.png/layer4.npy").shape
    (512, 2, 2)
    """
    check_choice("file_format", file_format, get_args(FileFormat))
    check_int("batch_size", batch_size, low=1)
    if size is not None:
        check_size(size)
    with ExitStack() as stack:
        if distributed is None:
            distributed = stack.enter_context(DistributedContext.from_environment())
        skipped: dict[Path, str] = {}
        paths = [pictures] if isinstance(pictures, (str, Path)) else pictures
        found = find_pictures(paths, exclude=out, on_skipped=skipped.__setitem__)
        jobs = [Job(path, Path(out) / name) for path, name in distributed.shard(found).items()]
        _make_folder(Path(out), jobs)
        device = local_device(device)
        extractor = Extractor(config, checkpoint=checkpoint, device=device, dtype=dtype, fpn=fpn, backend=backend)
        writer = FeatureWriter({**extractor.settings, "size": size}, extractor.levels, file_format)
        pipeline = Pipeline(extractor, writer, size=size, batch_size=batch_size, resume=resume, warn=warn)
        distributed.connect()
        if distributed.rank == 0:
            for line in extractor.notes:
                report(line)
            for line in describe_skipped(skipped):
                warn(line)
        with closing(pipeline.run(jobs)) as results:
            return _summarize(progress(results, total=len(jobs)), skipped, distributed)


def _make_folder(out: Path, jobs: Iterable[Job]) -> None:
    for job in jobs:
        if job.folder.is_file():
            raise ValueError(
                f"the results of {job.path} need a folder {job.folder}, which is a file; give another `out`"
            )
    out.mkdir(parents=True, exist_ok=True)


def _summarize(
    results: Iterable[PictureResult], skipped: dict[Path, str], distributed: DistributedContext
) -> ExtractionSummary:
    """Go through the results, which computes them, and add up those of all ranks."""
    counts: Counter[str] = Counter()
    errors, non_finite = {}, {}
    overview = None
    for result in results:
        counts[result.status] += 1
        if result.status == "failed":
            errors[result.path] = result.error
        elif overview is None:
            overview = result.folder / OVERVIEW
        if result.non_finite:
            non_finite[result.path] = result.non_finite
    num_extracted, num_kept, num_failed = distributed.sum(counts["extracted"], counts["kept"], counts["failed"])
    return ExtractionSummary(num_extracted, num_kept, num_failed, errors, non_finite, skipped, overview)
