"""Safe readers of checkpoint files: every format becomes tensors and plain values, and no code in a file is run."""

from resbackbone.checkpoints.readers.files import describe_placeholders, read_file
from resbackbone.checkpoints.readers.placeholders import Placeholder

__all__ = ["Placeholder", "describe_placeholders", "read_file"]
