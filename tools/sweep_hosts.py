"""Compare our backbones with a host's own, bit for bit, over every backbone of the family in the host's config tree.

Run it where the host is installed: ``python tools/sweep_hosts.py --host mmdet`` (or mmseg, or mmpretrain). Every
distinct dict is built by the host and by us, given the same random weights and images, and compared: outputs in eval
and in training mode, the gradient of every parameter, every buffer after the step. The exit status is 1 unless every
difference is zero.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from mmengine.config import Config
from mmengine.registry import DefaultScope
from peers import import_torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor, nn

# The types that each host has of its own.
FAMILY = {
    "mmdet": (
        *("ResNet", "ResNetV1d", "ResNeXt", "RegNet", "Res2Net", "ResNeSt"),
        *("DetectoRS_ResNet", "DetectoRS_ResNeXt", "TridentResNet", "ResLayer"),
    ),
    "mmseg": ("ResNet", "ResNetV1c", "ResNetV1d", "ResNeXt", "ResNeSt"),
    "mmpretrain": (
        *("ResNet", "ResNetV1c", "ResNetV1d", "ResNeXt", "RegNet", "Res2Net", "ResNeSt"),
        *("SEResNet", "SEResNeXt", "ResNet_CIFAR"),
    ),
}
HOSTS = tuple(FAMILY)
SHOWN = 3  # differences per backbone in the table; --json has them all


@dataclass(frozen=True)
class Case:
    """One distinct backbone dict of a host.

    Attributes:
        name: The first config that has it, without suffix; unique within the host.
        config: The dict, without ``init_cfg`` and ``pretrained``: the weights are drawn here.
    """

    name: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a comparison found: one line per difference, so none where host and ours are identical."""

    name: str
    config: dict[str, Any]
    differences: tuple[str, ...]


def config_tree(host: str) -> Path:
    """Return the folder of configs that the host's wheel ships; the host is not imported for it.

    Raises:
        ModuleNotFoundError: If the host is not installed.
    """
    spec = find_spec(host)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{host} is not installed here; tools/test_hosts.sh makes environments that have it")
    return Path(spec.origin).parent / ".mim" / "configs"


def find_cases(host: str) -> tuple[list[Case], dict[str, str]]:
    """Find every distinct backbone dict of the family in the host's configs.

    Returns:
        The backbones, and for each config that could not be loaded the reason.
    """
    root = config_tree(host)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    unloadable = {}
    for path in sorted(root.rglob("*.py")):
        source = path.relative_to(root).with_suffix("").as_posix()
        try:
            content = Config.fromfile(path, import_custom_modules=False).to_dict()
        except Exception as error:  # a config may fail in any way: it is Python
            unloadable[source] = f"{type(error).__name__}: {error}"
            continue
        for backbone in _backbones_in(content, host):
            config = {key: value for key, value in backbone.items() if key not in ("init_cfg", "pretrained")}
            found.setdefault(json.dumps(config, sort_keys=True), (source, config))
    seen: Counter[str] = Counter()
    cases = []
    for source, config in found.values():
        seen[source] += 1
        cases.append(Case(source if seen[source] == 1 else f"{source}-{seen[source]}", config))
    return cases, unloadable


def _backbones_in(value: Any, host: str) -> Iterator[dict[str, Any]]:
    if isinstance(value, Mapping):
        type_ = value.get("type")
        known = isinstance(type_, str) and type_.removeprefix(f"{host}.") in FAMILY[host]
        if known and value.get("_scope_", host) == host:  # another host's, as in type="mmpretrain.ResNet", are its own
            yield dict(value)
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _backbones_in(item, host)


def build_pair(host: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build a backbone dict natively and with ours, both through the host's registry.

    The host's class is taken from its module, where it stays whatever the registry says.
    """
    import_host(host)
    name = config["type"].removeprefix(f"{host}.")
    module = "roi_heads.shared_heads" if name == "ResLayer" else "backbones"
    native_class = getattr(import_module(f"{host}.models.{module}"), name)
    import_module(f"resbackbone.integrations.{host}")
    registry = import_module(f"{host}.registry").MODELS
    with DefaultScope.overwrite_default_scope(host):
        native = registry.build({**copy.deepcopy(config), "type": native_class})
        ours = registry.build(copy.deepcopy(dict(config)))
    assert type(native) is native_class
    assert type(ours).__module__.startswith("resbackbone."), f"{type(ours)} is not ours"
    return native, ours


def import_host(host: str) -> None:
    """Import a host's models, which import torchvision where it is installed, and warn about third parties."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if find_spec("torchvision"):
            import_torchvision()
        import_module(f"{host}.models")


def randomize(net: nn.Module, seed: int = 0) -> None:
    """Draw every parameter and running statistic, so that nothing starts at zero or one and hides a difference.

    Weights are small enough for the activations of 101 layers to stay in range.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
        module: Any
        for module in net.modules():
            if hasattr(module, "weight_gamma"):  # ConvAWS, whose standardized filters are that many times as long
                scale = 1 / math.sqrt(module.weight[0].numel())
                module.weight_gamma.uniform_(0.5 * scale, 1.5 * scale, generator=generator)
                module.weight_beta.normal_(0, 0.01, generator=generator)


def compare_backbones(
    native: nn.Module, ours: nn.Module, images: Tensor, rename: Callable[..., None] | None = None
) -> list[str]:
    """Compare two backbones of any weights; ``native`` gets random ones, which ``ours`` then loads.

    Args:
        native: The host's.
        ours: Ours, which takes the host's keys.
        images: A batch; the features in front of it for a shared head.
        rename: For a host whose names are not ours: what gives the keys of a state dict, its second argument, those
            that the backbone, its first, has.

    Returns:
        One line per difference.
    """
    randomize(native)
    our_names = {name: name for name in native.state_dict()}
    if rename is not None:
        rename(ours, our_names)
    our_names = {theirs: name for name, theirs in our_names.items()}
    differences = []
    if list(our_names.values()) != list(ours.state_dict()):
        differences.append(_keys("state dict", our_names.values(), ours.state_dict()))
    try:
        ours.load_state_dict(native.state_dict(), strict=True)
    except RuntimeError as error:
        return [*differences, str(error)]
    trainable = [[name for name, p in net.named_parameters() if p.requires_grad] for net in (native, ours)]
    trainable[0] = [our_names[name] for name in trainable[0]]
    if trainable[0] != trainable[1]:
        differences.append(_keys("trainable parameters", *trainable))
    theirs = _run(native, images)
    for what in ("gradient of", "buffer"):
        theirs[what] = {our_names.get(name, name): tensor for name, tensor in theirs[what].items()}
    for what, tensors in _run(ours, images).items():
        differences += compare_tensors(what, theirs[what], tensors)
    return differences


def _run(net: nn.Module, images: Tensor) -> dict[str, dict[Any, Tensor]]:
    """Run a backbone in eval mode and for one training step; return what came of it."""
    net.eval()
    with torch.no_grad():
        eval_outputs = _as_tuple(net(images))
    net.train()
    return {
        "eval output": dict(enumerate(eval_outputs)),
        "training output": dict(enumerate(_train(net, images))),
        "gradient of": gradients_of(net),
        "buffer": dict(net.named_buffers()),
    }


def _train(net: nn.Module, images: Tensor) -> Sequence[Tensor]:
    """Run one training step's forward and backward pass, every pixel of every output pulled its own way."""
    torch.manual_seed(0)  # for layers that draw
    outputs = _as_tuple(net(images))
    generator = torch.Generator().manual_seed(2)
    pulls = [torch.randn(output.shape, generator=generator) for output in outputs]
    attached = [(output, pull) for output, pull in zip(outputs, pulls, strict=True) if output.requires_grad]
    if attached:
        torch.autograd.backward([output for output, _ in attached], [pull for _, pull in attached])
    return tuple(outputs)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)  # a shared head returns one feature map


def gradients_of(net: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every parameter that has one."""
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def compare_tensors(what: str, left: Mapping[Any, Tensor], right: Mapping[Any, Tensor]) -> list[str]:
    """Compare tensors of the same names; NaN equals NaN.

    Returns:
        One line for different names, and one per tensor that differs.
    """
    differences = [] if left.keys() == right.keys() else [_keys(what, left, right)]
    for name in left.keys() & right.keys():
        ours = right[name]
        native = left[name]
        if native.requires_grad != ours.requires_grad:
            differences.append(f"{what} {name}: requires_grad {native.requires_grad}, ours {ours.requires_grad}")
        if native.shape != ours.shape or native.dtype != ours.dtype:
            differences.append(f"{what} {name}: {_describe(native)}, ours {_describe(ours)}")
        elif not torch.equal(torch.isnan(native), torch.isnan(ours)):
            differences.append(f"{what} {name}: NaN in different places")
        elif not torch.equal(native.nan_to_num(), ours.nan_to_num()):
            worst = (native.nan_to_num().double() - ours.nan_to_num().double()).abs().max().item()
            differences.append(f"{what} {name}: off by {worst:.3g}")
    return differences


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _keys(what: str, left: Any, right: Any) -> str:
    missing = [name for name in left if name not in right]
    extra = [name for name in right if name not in left]
    return f"{what}: missing in ours {missing}, extra {extra}" if missing or extra else f"{what}: another order"


def compare_case(case: Case, host: str) -> Result:
    """Build a case and compare; an exception in ours is a difference too."""
    # mmcv's deformable convolution wants feature maps of 3x3 pixels at least, and the last stage has a stride of 32.
    size = 96 if case.config.get("dcn") or case.config.get("sac") else 64
    try:
        native, ours = build_pair(host, case.config)
        images = torch.randn(2, ours.in_channels, size, size, generator=torch.Generator().manual_seed(1))
        rename = getattr(import_module(f"resbackbone.integrations.{host}"), "rename_keys", None)
        differences = compare_backbones(native, ours, images, rename)
    except Exception as error:
        differences = [f"{type(error).__name__}: {error}"]
    return Result(case.name, case.config, tuple(differences))


def main(
    host: Annotated[str, typer.Option(help=f"{', '.join(HOSTS)}, as installed here.")],
    only: Annotated[str, typer.Option(help="Only backbones whose name contains this.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of a table.")] = False,
) -> None:
    """Compare our backbones with the host's own, bit for bit, over every backbone in its config tree."""
    console = Console(stderr=True)
    if host not in HOSTS:
        raise typer.BadParameter(f"must be one of {', '.join(HOSTS)}; got {host!r}", param_hint="--host")
    try:
        with console.status(f"loading {host}'s configs"):
            cases, unloadable = find_cases(host)
    except ModuleNotFoundError as error:
        console.print(f"error: {error}", style="red")
        sys.exit(1)
    cases = [case for case in cases if only in case.name]
    with _map(jobs) as run:
        compared = run(partial(compare_case, host=host), cases)
        results = list(track(compared, description=host, total=len(cases), console=console))
    failed = [result for result in results if result.differences]
    if as_json:
        everything = {"host": host, "unloadable": unloadable, "results": [asdict(result) for result in results]}
        print(json.dumps(everything, indent=1))
    else:
        _print(host, results, failed, unloadable)
    if failed or not results:
        sys.exit(1)


@contextmanager
def _map(jobs: int) -> Iterator[Any]:
    _set_up_process()
    if jobs == 1:
        yield map
        return
    # Spawned, because forking a process in which torch has run may hang.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_set_up_process) as pool:
        yield pool.map


def _set_up_process() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # host and ours warn about what the host's configs write; numbers are the topic


def _print(host: str, results: list[Result], failed: list[Result], unloadable: Mapping[str, str]) -> None:
    console = Console()
    if unloadable:
        console.print(f"{len(unloadable)} configs of {host} do not load:", highlight=False)
        for source, reason in unloadable.items():
            console.print(f"  {source}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if failed:
        table = Table(Column("backbone", overflow="fold"), "difference", title="not identical")
        for result in failed:
            more = len(result.differences) - SHOWN
            lines = [*result.differences[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
            table.add_row(result.name, "\n".join(lines))
        console.print(table)
    console.print(f"{host}: {len(results) - len(failed)} of {len(results)} identical", highlight=False)


if __name__ == "__main__":
    typer.run(main)
