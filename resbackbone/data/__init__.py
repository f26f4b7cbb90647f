"""Reading pictures and preprocessing them into tensors."""
