"""Published weights: the catalog, downloads into torch's cache, and resolution of checkpoint sources to local files."""

from resbackbone.checkpoints.hub.catalog import Weights, default_weights, find_weights, list_weights
from resbackbone.checkpoints.hub.download import DownloadError, cache_path, fetch
from resbackbone.checkpoints.hub.sources import locate

__all__ = [
    "DownloadError",
    "Weights",
    "cache_path",
    "default_weights",
    "fetch",
    "find_weights",
    "list_weights",
    "locate",
]
