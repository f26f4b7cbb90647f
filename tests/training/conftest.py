"""Fixtures of the training tests."""

import pytest
from torch import distributed


@pytest.fixture(scope="module")
def group_of_one(tmp_path_factory):
    """A process group of this process only, in which ``DistributedDataParallel`` works as in any other."""
    store = distributed.FileStore(str(tmp_path_factory.mktemp("one") / "store"), 1)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
