"""What the tests share: one thread, a fixed seed, lively weights, an isolated registry, torchvision."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its pool; the workers of xdist share the cores

import pytest
import torch
from peers import import_torchvision
from torch import Tensor, nn

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # mmengine.model imports torch.distributed.optim, which torch itself compiles with the jit that it deprecates.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning:torch.distributed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def randomize_norms() -> Callable[[nn.Module], Any]:
    """Give every norm of a net random weights and statistics, so that no branch is zero and no two layers are alike."""
    from resbackbone.testing import randomize_norms

    return randomize_norms


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Keep CUDA devices from rounding to TF32."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, before in zip(backends, allowed, strict=True):
        backend.allow_tf32 = before


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a small backbone's config."""
    from command_line import write_config

    monkeypatch.chdir(tmp_path)
    write_config("small.yaml")
    return tmp_path


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our registry; whatever a test registers ends with it."""
    from resbackbone import MODELS

    monkeypatch.setattr(MODELS, "_module_dict", dict(MODELS.module_dict))
    return MODELS


@pytest.fixture
def gate(registry: Any) -> dict[str, str]:
    """The config of a registered plugin that needs no mmcv."""
    from cases import Gate

    registry.register_module("Gate", module=Gate)
    return {"type": "Gate"}


@pytest.fixture
def built_convs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Conv2d]:
    """Every ``nn.Conv2d`` that is constructed from here on."""
    built: list[nn.Conv2d] = []
    construct = nn.Conv2d.__init__

    def record(self: nn.Conv2d, *args: Any, **kwargs: Any) -> None:
        built.append(self)
        construct(self, *args, **kwargs)

    monkeypatch.setattr(nn.Conv2d, "__init__", record)
    return built


@pytest.fixture
def refused(built_convs: list[nn.Conv2d]) -> Callable[[type[Exception], str], AbstractContextManager[None]]:
    """A context that must raise such an error, with these words in it, before anything is built."""

    @contextmanager
    def refused(error: type[Exception], words: str) -> Iterator[None]:
        with pytest.raises(error) as caught:
            yield
        assert words in str(caught.value.args[0])
        assert not built_convs

    return refused


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, also where its compiled operators do not load."""
    try:
        return import_torchvision()
    except ModuleNotFoundError as error:
        pytest.skip(f"parity needs torchvision: {error}")


@pytest.fixture(scope="session")
def timm(torchvision: ModuleType) -> ModuleType:
    """timm, which imports torchvision."""
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        pytest.skip(f"parity needs timm: {error}")
