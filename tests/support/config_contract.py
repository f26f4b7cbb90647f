"""What every config keeps: built, it runs, trains and is built again from its dump; else it is refused in words."""

from __future__ import annotations

import copy
import logging
import math
import re
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from random_configs import Draw
from torch import Tensor, nn

import resbackbone
from resbackbone import build_backbone
from resbackbone.backbones import Backbone, SharedHead, TridentResNet
from resbackbone.config import construct_backbone
from resbackbone.necks import FPN
from resbackbone.utils.validation import UnknownKeyError, to_builtin

PACKAGE = Path(resbackbone.__file__).parent
LARGEST_STRIDE = 128  # for which images have two pixels at least
SECONDS = 30  # the longest that a config may take
# The message of a refusal may name these without their being given, since they have defaults.
ALWAYS_NAMED = ("base_channels", "stem_channels", "num_outs", "start_level", "end_level")
# Notes for a config that is right and has an entry without effect.
NOTES = ("no effect", "does nothing", "deprecated", "old spelling")


@dataclass(frozen=True)
class Outcome:
    """What came of a config.

    Attributes:
        built: Whether there is a net.
        finding: What is wrong about it, or "".
    """

    built: bool
    finding: str = ""


class Broken(Exception):
    """A net was built that does not keep its promise."""


def try_config(drawn: Draw) -> Outcome:
    """Build a config and run the net, or see it refused."""
    torch.manual_seed(drawn.seed)
    before = repr((drawn.config, drawn.neck))
    built: list[nn.Module] = []
    try:
        with _guarded():
            try:
                with _recorded(built):
                    net, neck = _build(drawn)
            except Exception as error:
                return Outcome(False, _judge(error, drawn, built))
            if repr((drawn.config, drawn.neck)) != before:
                raise Broken("the config was changed")
            _run(net, neck, drawn)
    except Exception as error:
        return Outcome(True, f"built, then {_describe(error)}")
    return Outcome(True)


def _build(drawn: Draw) -> tuple[Any, FPN | None]:
    if drawn.config["type"] == "ImageClassifier":
        from resbackbone.training.classification.classifier import ImageClassifier

        classifier = ImageClassifier(**_without_type(drawn.config))
        classifier.init_weights()
        return classifier, None
    if drawn.config["type"] == "ResLayer":
        head = SharedHead(**_without_type(drawn.config))
        head.init_weights()
        return head, None
    net = build_backbone(drawn.config)
    if drawn.neck is None:
        return net, None
    neck = FPN(**{"in_channels": net.out_channels, **_without_type(drawn.neck)})
    neck.init_weights()
    return net, neck


def _without_type(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "type"}


@contextmanager
def _guarded() -> Iterator[None]:
    """Let nothing take for ever, and no warning pass but a note."""

    def stop(*unused: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            for note in NOTES:
                warnings.filterwarnings("ignore", f"(?s).*{note}")
            yield
    finally:
        signal.alarm(0)
        logging.disable(logging.NOTSET)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def _recorded(built: list[nn.Module]) -> Iterator[None]:
    construct = nn.Conv2d.__init__

    def record(self: nn.Conv2d, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if not self.weight.is_meta:  # that a plugin of mmcv tries without memory
            built.append(self)

    nn.Conv2d.__init__ = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Conv2d.__init__ = construct  # type: ignore[method-assign]


def _judge(error: Exception, drawn: Draw, built: list[nn.Module]) -> str:
    """Say what is wrong about a refusal."""
    if drawn.broken and drawn.broken[-1] in ("pretrained", "checkpoint") and isinstance(error, FileNotFoundError):
        return ""
    if type(error) not in (ValueError, TypeError, KeyError, UnknownKeyError):
        return f"refused by {_describe(error)}"
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if not Path(where).is_relative_to(PACKAGE):
        return f"refused from elsewhere: {_describe(error)}"
    message = str(error.args[0]) if error.args else ""
    quoted = {name for part in re.findall(r"[`'][^`']*[`']", message) for name in re.findall(r"\w+", part)}
    if not quoted & _names(drawn) and "unknown backbone" not in message:
        return f"refused without the argument's name: {_describe(error)}"
    if built and not (drawn.neck is not None or drawn.config["type"] == "ImageClassifier"):
        return f"refused after {len(built)} convolutions: {_describe(error)}"
    return ""


def _names(drawn: Draw) -> set[str]:
    """What a refusal may name: an argument that was given, what lies in it, or one that goes with it."""
    return {*_keys(drawn.config), *_keys(drawn.neck or {}), *map(str, drawn.broken), *ALWAYS_NAMED}


def _keys(value: Any, depth: int = 0) -> set[str]:
    if depth > 4:
        return set()
    if isinstance(value, Mapping):
        return {str(key) for key in value}.union(*(_keys(item, depth + 1) for item in value.values()))
    return set().union(*(_keys(item, depth + 1) for item in value)) if isinstance(value, (list, tuple)) else set()


def _describe(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message} ({Path(ours[-1].filename).name}:{ours[-1].lineno})"


# Running


def _run(net: Any, neck: FPN | None, drawn: Draw) -> None:
    if isinstance(net, Backbone):
        try:
            _run_backbone(net, neck)
            _rebuild(net, drawn)
        except ValueError as error:
            # Norms of single pixels have nothing to normalize; a config does not know the size of images.
            if "Expected more than 1" not in str(error) or _last_stride(net) <= LARGEST_STRIDE:
                raise
    elif isinstance(net, SharedHead):
        x = torch.randn(2, net.in_channels, 7, 7)
        out = net(x)
        _check_shape(out, 2, net.out_channels, None)
        _check_gradients(net, [out])
    else:
        images = torch.randint(0, 256, (2, 3, 64, 64)).float()
        batch = net.data_preprocessor({"inputs": images, "labels": torch.zeros(2, dtype=torch.long)}, True)
        losses = net(**batch, mode="loss")
        _check_gradients(net, [losses["loss"]])


def _sizes(net: Backbone, extra_levels: int = 0) -> list[tuple[int, int]]:
    last = _last_stride(net) * 2**extra_levels
    side = max(64, 2 * last + 1 if last <= LARGEST_STRIDE else 64)
    return [(side, side), (side + 1, side + 9)]


def _last_stride(net: Backbone) -> int:
    return max(info.stride for info in net._stages)


def _run_backbone(net: Backbone, neck: FPN | None) -> None:
    net.eval()
    for size in _sizes(net):
        with torch.no_grad():
            outs = net(torch.randn(2, net.in_channels, *size))
        if len(outs) != len(net.feature_info):
            raise Broken(f"{len(outs)} outputs, {len(net.feature_info)} in feature_info")
        for out, info in zip(outs, net.feature_info, strict=True):
            batch = len(out) if isinstance(net, TridentResNet) else 2
            _check_shape(out, batch, info.channels, [math.ceil(side / info.stride) for side in size], info.stride)
    net.train()
    extra_levels = 0 if neck is None else max(neck.num_outs - len(neck.lateral_convs), 0)
    outs = net(torch.randn(2, net.in_channels, *_sizes(net, extra_levels)[0]))
    if neck is not None:
        outs = neck(outs)
        if len(outs) != neck.num_outs:
            raise Broken(f"{len(outs)} outputs of FPN, `num_outs` is {neck.num_outs}")
        for out in outs:
            _check_shape(out, len(out), neck.out_channels, None)
    _check_gradients(nn.ModuleList([net, *([] if neck is None else [neck])]), outs)


def _check_shape(out: Tensor, batch: int, channels: int, sides: list[int] | None, stride: int = 1) -> None:
    expected = (batch, channels, *(sides or out.shape[2:]))
    if tuple(out.shape) != expected:
        raise Broken(f"an output is {tuple(out.shape)}, not {expected}, stride {stride}")
    if not out.isfinite().all():
        raise Broken("an output is not finite")


def _check_gradients(net: nn.Module, outs: Any) -> None:
    attached = [out.square().mean() for out in outs if out.requires_grad]
    if not attached:
        return
    torch.stack(attached).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in net.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise Broken(f"the gradient of {name} is not finite")


# Dumps


def _rebuild(net: Backbone, drawn: Draw) -> None:
    config = to_builtin(drawn.config)
    if not _is_plain(config):
        return
    from mmengine.config import Config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.yaml"
        path.write_text(yaml.safe_dump(_as_lists(config)))
        dumped = Path(folder) / "dumped.yaml"
        Config({"model": {"backbone": copy.deepcopy(config)}}).dump(dumped)
        for file in (path, dumped)[drawn.seed % 2 :][:1]:
            twin: Any = construct_backbone(file)
            twin.load_state_dict(net.state_dict())
            x = torch.randn(2, net.in_channels, *_sizes(net)[0])
            with torch.no_grad():
                pairs = zip(net.eval()(x), twin.eval()(x), strict=True)
                if not all(torch.equal(out, again) for out, again in pairs):
                    raise Broken(f"built again from {file.name} it computes something else")


def _is_plain(value: Any) -> bool:
    """Whether a dump can hold it."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _as_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
