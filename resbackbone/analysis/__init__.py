"""Cost of backbones (parameters, multiply-accumulates) and benchmarking utilities."""
