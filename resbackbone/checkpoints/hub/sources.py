"""Resolution of the source of a checkpoint (path, URL, catalog name, prefix of a library) to a local file."""

from __future__ import annotations

from pathlib import Path

from resbackbone.checkpoints.hub.catalog import Weights, find_weights, list_weights
from resbackbone.checkpoints.hub.download import fetch
from resbackbone.utils.validation import check_type, nearest

PREFIXES = ("torchvision", "modelzoo", "open-mmlab", "openmmlab", "mmcls", "timm", "detectron2")

_FILES = (".pth", ".pt", ".pkl", ".npz", ".safetensors", ".bin", ".tar", ".ckpt", ".torch")


def locate(source: str | Path) -> tuple[Path, Weights | None]:
    """Return the local file of a checkpoint, and download it if necessary.

    Args:
        source: The path of a file, which has precedence; a name of :func:`~resbackbone.checkpoints.list_weights`, as it
            is or after ``catalog:``; an http or https URL; or one of ``PREFIXES``, ``://`` and a name, as in configs of
            mmengine, timm and detectron2.

    Returns:
        The local file, and its entry in the catalog if it has one.

    Raises:
        TypeError: If ``source`` is neither a string nor a path.
        FileNotFoundError: If it looks like a path, and there is no such file.
        KeyError: If the catalog does not have the name; the nearest is given.
        ValueError: If the prefix is unknown, or the URL is malformed.
        OSError: If a download fails.
    """
    check_type("source", source, (str, Path), "a path, a URL or the name of published weights")
    path = Path(source).expanduser()
    if isinstance(source, Path) or path.exists():
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {str(source)!r}")
        return path, None
    weights = _find_entry(source)
    if weights is None:
        return fetch(source), None
    return fetch(weights.url, sha256_prefix=weights.sha256, max_bytes=_max_bytes(weights)), weights


def _max_bytes(weights: Weights) -> int:
    """Return the largest size to accept: the published one, or else ten times the parameters in float32."""
    expected = weights.params * 4 * 10 if weights.size_mib is None else weights.size_mib * 2**20 * 1.05
    return int(expected) + 2**20


def _find_entry(source: str) -> Weights | None:
    """Return the catalog entry of a name or URL; None for a URL without one."""
    prefix, separator, rest = source.partition(":")
    if prefix == "catalog":
        return find_weights(rest)
    if not separator or not rest.startswith("//"):
        return _find_name(source)
    if prefix in ("http", "https"):
        return next((weights for weights in list_weights() if weights.url == source), None)
    if prefix in PREFIXES:
        return find_weights(source)
    known = ", ".join(f"{prefix}://" for prefix in ("http", "https", *PREFIXES))
    raise ValueError(
        f"a checkpoint's prefix must be catalog: or one of {known}; got {source!r}; download the file and give its path"
    )


def _find_name(source: str) -> Weights:
    names = {weights.name: weights for weights in list_weights()}
    if source in names:
        return names[source]
    if source.endswith(_FILES):
        raise FileNotFoundError(f"no checkpoint at {source!r}")
    hint = nearest(source, names, list_all="`resbackbone list --weights` shows all names", same_numbers=True)
    raise FileNotFoundError(f"there is neither a file nor are there published weights called {source!r}{hint}")
