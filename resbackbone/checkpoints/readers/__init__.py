"""Read checkpoint files of every format as tensors and plain values; nothing in a file is run."""
