"""The contract that every backbone keeps, as a check for variants: ``check_backbone``."""

from __future__ import annotations

import copy
import math
import pickle
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone.backbones import Backbone
from resbackbone.config import build_backbone, load_config
from resbackbone.layers.arguments import parameters_of

__all__ = ["BackboneContractError", "check_backbone", "randomize_norms"]

Config = dict[str, Any]
Net = TypeVar("Net", bound=nn.Module)
ROUNDING = 2e-5  # of the largest value of a feature map: float32 has 24 bits, and a net some hundred sums in a row


class BackboneContractError(AssertionError):
    """A backbone breaks the contract; the message names the property and the layer or output."""


def check_backbone(
    config: str | Path | Config,
    *,
    image_sizes: Sequence[tuple[int, int]] = ((64, 64), (65, 97), (33, 47)),
    zero_gradients: Collection[str] = (),
) -> None:
    """Check that a backbone keeps the contract that necks, heads, training and inference rely on.

    1. Building leaves the config unchanged; from its YAML dump the same architecture is built.
    2. ``feature_info``, ``out_channels`` and ``out_strides`` describe the outputs, for images of any size; in
       channels_last or double precision they are the same up to rounding; the images are not modified.
    3. A copy by ``state_dict``, ``deepcopy`` or ``pickle`` returns the same outputs and shares no parameter.
    4. A shorter ``out_indices`` returns the same maps.
    5. Every trainable parameter gets a gradient.
    6. ``norm_eval`` keeps batch norms in eval mode, and without it they train.
    7. ``frozen_stages`` freezes the stem and the first stages, also after ``train()``; the others train.
    8. ``with_cp=True`` and ``with_cp="norms"`` recompute every block and change no output, gradient or statistic.

    The backbone is built about twenty times, on the CPU: take a shallow depth and few channels. Its ``forward`` must
    accept a single tensor of images. The global random state is left as it was.

    Args:
        config: As for :func:`~resbackbone.build_backbone`: a name, a file, or a dict with ``type``, a registered name
            or a class. Its constructor must accept ``out_indices``, ``frozen_stages``, ``norm_eval`` and ``with_cp``.
        image_sizes: Heights and widths of test images, in pixels.
        zero_gradients: Endings of the names of parameters with a gradient of zero in a new net, such as the input
            layers of a branch that is multiplied by zero; exactly these must have one.

    Raises:
        BackboneContractError: At the first property that does not hold.

    >>> check_backbone(dict(type="ResNet", depth=18, base_channels=8))
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        arguments = _check_config(config)
        _check_features(arguments, image_sizes)
        _check_copies(arguments)
        _check_out_indices(arguments)
        _check_gradients(arguments, tuple(zero_gradients))
        _check_norm_eval(arguments)
        _check_freezing(arguments)
        _check_checkpointing(arguments)


def randomize_norms(net: Net) -> Net:
    """Give the norms of a net random weights and statistics, so that no branch is zero and no two layers are alike.

    Returns:
        The net.
    """
    for module in net.modules():
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if "running_mean" not in tensors and not isinstance(module, nn.GroupNorm):
            continue
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in ("weight", "running_var"):
                    tensor.uniform_(0.5, 1.5)
                elif name in ("bias", "running_mean"):
                    tensor.normal_(0, 0.1)
    return net


def _check_config(config: str | Path | Config) -> Config:
    """Check property 1; return the backbone's dict."""
    before = copy.deepcopy(config)
    net = build_backbone(config)
    _require(_equal(config, before), f"building changed the config to {config!r} from {before!r}")
    arguments = load_config(config).backbone
    rebuilt = build_backbone(copy.deepcopy(arguments))
    if isinstance(arguments["type"], str):
        with tempfile.TemporaryDirectory() as folder:
            dump = Path(folder) / "dump.yaml"
            dump.write_text(yaml.dump(arguments), encoding="utf-8")
            rebuilt = build_backbone(dump)
    _require(type(rebuilt) is type(net), f"a dump of the config builds {type(rebuilt).__name__}")
    _require(rebuilt.feature_info == net.feature_info, "a dump of the config builds other `feature_info`")
    shapes, expected = ({name: value.shape for name, value in n.state_dict().items()} for n in (rebuilt, net))
    differing = sorted(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))
    _require(not differing, f"a dump of the config builds other weights: {_list(differing)}")
    return arguments


def _equal(one: Any, other: Any) -> bool:
    """Compare two configs, type by type: a tuple is no list, and True is not 1."""
    return repr(one) == repr(other)


def _check_features(arguments: Config, image_sizes: Sequence[tuple[int, int]]) -> None:
    """Check property 2."""
    net = _build(arguments).eval()
    infos = net.feature_info
    _require(net.out_channels == tuple(info.channels for info in infos), "`out_channels` differs from `feature_info`")
    _require(net.out_strides == tuple(info.stride for info in infos), "`out_strides` differs from `feature_info`")
    names = [info.name if info.stage < 0 else net.res_layers[info.stage] for info in infos]
    _require([info.name for info in infos] == names, f"`feature_info` names {[info.name for info in infos]}")
    for height, width in image_sizes:
        images = torch.randn(2, net.in_channels, height, width)
        before = images.clone()
        outs = _run(net, images)
        _require(images.equal(before), "`forward` modifies the images")
        _require(len(outs) == len(infos), f"{len(outs)} outputs, but {len(infos)} entries in `feature_info`")
        for out, info in zip(outs, infos, strict=True):
            shape = (2, info.channels, math.ceil(height / info.stride), math.ceil(width / info.stride))
            _require(
                out.shape == shape,
                f"`feature_info` says {shape} for {info.name} and images of {height}x{width}, got {tuple(out.shape)}",
            )
        last: Any = copy.deepcopy(net)
        last.to(memory_format=torch.channels_last)
        outs_of_last = _run(last, images.contiguous(memory_format=torch.channels_last))
        _require_close("channels_last", outs_of_last, outs, tolerance=ROUNDING)
        exact = _run(copy.deepcopy(net).double(), images.double())
        _require_close("double precision", exact, [out.double() for out in outs], tolerance=ROUNDING)


def _check_copies(arguments: Config) -> None:
    """Check property 3."""
    net = _build(arguments).eval()
    images = _images(net)
    outs = _run(net, images)
    loaded = _build(arguments).eval()
    loaded.load_state_dict(net.state_dict())
    try:
        copies = {"state_dict": loaded, "deepcopy": copy.deepcopy(net), "pickle": pickle.loads(pickle.dumps(net))}
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # what both raise for a lambda or an open file
        raise BackboneContractError(f"the net cannot be copied or pickled: {error}") from error
    own = {parameter.data_ptr() for parameter in net.parameters()}
    for way, twin in copies.items():
        _require_close(f"a copy by {way}", _run(twin, images), outs)
        shared = [name for name, parameter in twin.named_parameters() if parameter.data_ptr() in own]
        _require(not shared, f"a copy by {way} shares {_list(shared)}")


def _check_out_indices(arguments: Config) -> None:
    """Check property 4."""
    net = _build(arguments).eval()
    images = _images(net)
    outs = _run(net, images)
    single = _build({**arguments, "out_indices": net.out_indices[:1]}).eval()
    single.load_state_dict(net.state_dict())
    _require_close(f"out_indices={single.out_indices}", _run(single, images), outs[:1])


def _check_gradients(arguments: Config, zero_gradients: tuple[str, ...]) -> None:
    """Check property 5."""
    net = _build({**arguments, "norm_eval": False}).train()
    _loss(net(_images(net))).backward()  # type: ignore[no-untyped-call]
    trainable = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trainable.items() if parameter.grad is None]
    _require(not without, f"no gradient for {_list(without)}")
    zero = {name for name, parameter in trainable.items() if parameter.grad is None or not parameter.grad.any()}
    expected = {name for name in trainable if name.endswith(zero_gradients)}
    _require(not zero - expected, f"the gradient is zero for {_list(sorted(zero - expected))}")
    _require(not expected - zero, f"`zero_gradients` names {_list(sorted(expected - zero))}: the gradient is not zero")


def _check_norm_eval(arguments: Config) -> None:
    """Check property 6."""
    for norm_eval in (True, False):
        net = _build({**arguments, "norm_eval": norm_eval, "frozen_stages": -1})
        for modes in ((), (True,), (False, True)):
            for mode in modes:
                net.train(mode)
            wrong = [name for name, norm in _batch_norms(net) if norm.training is norm_eval]
            after = " and ".join(f"train({mode})" for mode in modes) or "construction"
            _require(not wrong, f"norm_eval={norm_eval}: training={norm_eval} after {after} in {_list(wrong)}")


def _check_freezing(arguments: Config) -> None:
    """Check property 7."""
    plain_net = _build({**arguments, "frozen_stages": -1})
    trainable = {name for name, parameter in plain_net.named_parameters() if parameter.requires_grad}
    for frozen_stages in (0, len(plain_net.res_layers) // 2):
        net = _build({**arguments, "norm_eval": False, "frozen_stages": frozen_stages})
        frozen = [module for root in net.frozen_modules() for module in root.modules()]
        stages = [getattr(net, name) for name in net.res_layers]
        where = f"with frozen_stages={frozen_stages}"
        missed = [net.res_layers[index] for index in range(frozen_stages) if stages[index] not in frozen]
        _require(not missed, f"{where} `frozen_modules` lacks {_list(missed)}")
        _require(
            not any(stage in frozen for stage in stages[frozen_stages:]), f"{where} `frozen_modules` has more stages"
        )
        _require(bool(frozen), f"{where} `frozen_modules` lacks the stem")
        frozen_parameters = {id(parameter) for module in frozen for parameter in module.parameters()}
        for _ in range(2):
            net.eval()
            _require(net.train() is net, "`train()` must return the net")
            training = [name for name, module in net.named_modules() if module in frozen and module.training]
            _require(not training, f"{where} in training mode after train(): {_list(training)}")
            _check_step(net, trainable, frozen_parameters, set(frozen), where)


def _check_step(
    net: Backbone, trainable: set[str], frozen_parameters: set[int], frozen: set[nn.Module], where: str
) -> None:
    """Check which parameters and statistics a training step changes."""
    idle = {module for root in net.idle_modules() for module in root.modules()}
    norms = {name: norm for name, norm in _batch_norms(net) if norm not in idle}
    means: dict[str, Any] = {name: copy.deepcopy(norm.running_mean) for name, norm in norms.items()}
    net.zero_grad()
    _loss(net(_images(net))).backward()  # type: ignore[no-untyped-call]
    for name, parameter in net.named_parameters():
        expected = name in trainable and id(parameter) not in frozen_parameters
        state = "trainable" if expected else "frozen"
        _require(parameter.requires_grad is expected, f"{where} {name} must be {state} after train()")
        _require(
            (parameter.grad is not None) is expected, f"{where} {name} is {state}, its gradient is {parameter.grad}"
        )
    for name, norm in norms.items():
        if norm.running_mean is None:
            continue
        is_same = norm.running_mean.equal(means[name])
        _require(
            is_same is (norm in frozen), f"{where} a step {'keeps' if is_same else 'changes'} statistics of {name}"
        )


def _check_checkpointing(arguments: Config) -> None:
    """Check property 8, with dropped paths, which must be the same when they are recomputed."""
    arguments = {**arguments, "norm_eval": False, "frozen_stages": -1}
    backbone_class: Any = type(_build(arguments))
    if "drop_path_rate" in parameters_of(backbone_class)[0]:
        arguments["drop_path_rate"] = 0.2
    reference = _build({**arguments, "with_cp": False}).train()
    images = _images(reference)
    weights = copy.deepcopy(reference.state_dict())
    outs, calls = _step(reference, images)
    for with_cp in (True, "norms"):
        net = _build({**arguments, "with_cp": with_cp}).train()
        net.load_state_dict(weights)
        name = f"with_cp={with_cp!r}"
        outs_of_net, calls_of_net = _step(net, images)
        once = [block for block, count in calls.items() if calls_of_net[block] <= count]
        _require(not once, f"{name} does not recompute {_list(once)}")
        _require_close(name, outs_of_net, outs)
        for kind in ("parameters", "buffers"):
            pairs = zip(getattr(reference, f"named_{kind}")(), getattr(net, f"named_{kind}")(), strict=True)
            tensors = [(key, *((t.grad, s.grad) if kind == "parameters" else (t, s))) for (key, t), (_, s) in pairs]
            differing = [
                key for key, t, s in tensors if (t is None) != (s is None) or (t is not None and not t.equal(s))
            ]
            _require(
                not differing, f"{name} changes {'gradients' if kind == 'parameters' else kind}: {_list(differing)}"
            )


def _step(net: Backbone, images: Tensor) -> tuple[Sequence[Tensor], dict[str, int]]:
    """Run a forward and a backward pass; return the outputs, and how many modules of each block were called."""
    calls: dict[str, int] = {}
    blocks = {
        f"{stage}.{name}": block for stage in net.res_layers for name, block in getattr(net, stage).named_children()
    }
    for name, block in blocks.items():

        def count(*args: Any, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1

        for module in block.modules():
            if module is not block and next(module.parameters(), None) is not None:
                module.register_forward_pre_hook(count)
    torch.manual_seed(1)  # so that the same paths are dropped
    outs = net(images)
    _loss(outs).backward()  # type: ignore[no-untyped-call]
    return outs, calls


def _build(arguments: Config) -> Backbone:
    """Build a backbone with random norms."""
    return randomize_norms(build_backbone(arguments))


def _images(net: Backbone) -> Tensor:
    return torch.randn(2, net.in_channels, 64, 64)


def _run(net: Backbone, images: Tensor) -> tuple[Tensor, ...]:
    """Run ``forward`` without gradients."""
    with torch.no_grad():
        outs = net(images)
    _require(isinstance(outs, tuple), f"`forward` must return a tuple of feature maps, got {type(outs).__name__}")
    return outs  # type: ignore[no-any-return]


def _loss(outs: Sequence[Tensor]) -> Tensor:
    return torch.stack([out.square().mean() for out in outs]).sum()


def _batch_norms(net: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(name, module) for name, module in net.named_modules() if isinstance(module, _BatchNorm)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BackboneContractError(message)


def _require_close(what: str, outs: Sequence[Tensor], expected: Sequence[Tensor], *, tolerance: float = 0.0) -> None:
    _require(len(outs) == len(expected), f"{what}: {len(outs)} outputs instead of {len(expected)}")
    for index, (out, reference) in enumerate(zip(outs, expected, strict=True)):
        try:
            largest = max(1.0, reference.abs().max().item()) if tolerance else 1.0
            torch.testing.assert_close(out, reference, rtol=0.0, atol=tolerance * largest)
        except AssertionError as error:
            raise BackboneContractError(f"{what}: output {index} differs: {error}") from error


def _list(names: Sequence[str]) -> str:
    """Join the first names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
