"""Kept memory is reused without page faults."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from resbackbone.utils.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(20_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
print(keep_freed_memory(), plain, [faults() for _ in range(5)][-1])  # the heap grows until a freed block fits
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is a C library of Linux")
def test_pages_of_large_tensors_are_not_fetched_again():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, plain, after = run.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert int(plain) > 1000
    assert int(after) < 100
