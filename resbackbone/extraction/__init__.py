"""Feature extraction: the feature maps of many pictures, written to files."""

from resbackbone.extraction.api import ExtractionSummary, extract
from resbackbone.extraction.distributed import DistributedContext
from resbackbone.extraction.pipeline import PictureResult

__all__ = ["DistributedContext", "ExtractionSummary", "PictureResult", "extract"]
