"""Helpers without knowledge of neural networks: validation, logging, atomic writes, CPU features, the allocator."""
