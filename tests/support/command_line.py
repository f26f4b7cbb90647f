"""Running the command in the test's process, and what it reads and writes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from resbackbone import build_backbone
from resbackbone.cli import app

LEVELS = ["layer1", "layer2", "layer3", "layer4"]
SMALL: dict[str, Any] = {"type": "ResNet", "depth": 18, "base_channels": 8}


def plain(text: str) -> str:
    """Text without colors, which some CI services ask for."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def run(*arguments: object, status: int = 0) -> SimpleNamespace:
    """Run the command in this process; no run may end in a traceback."""
    with mock.patch.object(Console, "is_terminal", False):  # whatever the environment pretends (FORCE_COLOR)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return SimpleNamespace(stdout=plain(result.stdout), stderr=plain(result.stderr))


def fails(*arguments: object) -> str:
    """Run a command that the user got wrong: the one line that says so, without "error: "."""
    result = run(*arguments, status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr).removeprefix("error: ").rstrip()


def write_config(path: str | Path, **arguments: Any) -> None:
    Path(path).write_text(json.dumps({**SMALL, **arguments}))  # JSON is YAML


def make_picture(path: str | Path, size: tuple[int, int] = (70, 50), mode: str = "RGB") -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).convert(mode).save(path)
    return path


def written(folder: str | Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def finished(folder: str | Path) -> set[str]:
    """Names of the pictures whose results in a folder are complete."""
    return {path.parent.name for path in Path(folder).glob("*/pyramid.png")}


def maps(folder: str | Path) -> dict[str, Any]:
    return {path.stem: np.load(path) for path in sorted(Path(folder).glob("*.npy"))}


def net_and_checkpoint(randomize_norms: Callable[..., Any], path: str | Path, **arguments: Any) -> Any:
    """A backbone of weights that are no one's initialization, and the file of them."""
    net = randomize_norms(build_backbone({**SMALL, **arguments})).eval()
    torch.save(net.state_dict(), path)
    return net


def start(*arguments: str, launcher: Sequence[str] = (), **variables: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", *launcher, "resbackbone", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
