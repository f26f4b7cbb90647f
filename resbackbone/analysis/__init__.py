"""Measurements of backbones: parameters and multiply-adds, and benchmarks."""
