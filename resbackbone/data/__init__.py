"""Picture files as tensors: decoding, and the preprocessing that weights expect."""
