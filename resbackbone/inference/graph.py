"""Trace a net into a torch.fx graph, and fuse each convolution with the norm, addition and ReLU behind it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone.backbones.base import Backbone
from resbackbone.inference.fused_conv import FusedConv2d
from resbackbone.layers import ConvAWS2d, ConvWS2d, DeformConv2d, DropPath, FrozenBatchNorm2d, SAConv2d, StdConv2d
from resbackbone.utils.validation import warn_user

ConvT = TypeVar("ConvT", bound=FusedConv2d)
_UNTRACEABLE = (fx.proxy.TraceError, TypeError)
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_IDLE_IN_EVAL = (nn.Identity, nn.Dropout, DropPath)
# Convolutions that are fused. These classes themselves: a subclass may compute something else.
_FUSIBLE = (nn.Conv2d, ConvWS2d, StdConv2d, ConvAWS2d)
# Modules of ours, subclasses included, that are one step of the graph; those of PyTorch are by fx's default.
_LEAVES = (*_FUSIBLE, DeformConv2d, SAConv2d, FrozenBatchNorm2d)
# Modules with a new tensor as output, neither a view of the input nor the input modified in place. Without subclasses.
_OUT_OF_PLACE = {*_LEAVES, nn.BatchNorm2d, nn.SyncBatchNorm, nn.MaxPool2d, nn.AvgPool2d}


class _Tracer(fx.Tracer):
    """Traces a net, with leaf modules as single steps.

    Args:
        leaves: Classes of leaf modules, beside those of PyTorch.

    Attributes:
        obstacle: The innermost module that could not be traced, or None.
    """

    def __init__(self, leaves: tuple[type[nn.Module], ...] = _LEAVES) -> None:
        super().__init__()
        self.leaves = leaves
        self.obstacle: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, *args: Any) -> Any:
        try:
            return super().call_module(m, *args)
        except _UNTRACEABLE:
            self.obstacle = self.obstacle or m
            raise


def trace(net: nn.Module) -> fx.GraphModule:
    """Trace a net into a graph; layers with data-dependent control flow become leaf modules.

    Args:
        net: The net; its hooks are removed.

    Raises:
        ValueError: If the control flow of a backbone, or of what calls it, depends on the data.
    """
    _remove_hooks(net)
    root = net if len(inspect.signature(net.forward).parameters) == 1 else _SingleInput(net)
    tracer = _Tracer()
    while True:
        try:
            graph = tracer.trace(root)
            break
        except _UNTRACEABLE as error:
            if tracer.obstacle is None or isinstance(tracer.obstacle, (Backbone, tracer.leaves)):
                raise ValueError(f"{type(net).__name__} cannot be traced: {error}") from error
            tracer = _Tracer((*tracer.leaves, type(tracer.obstacle)))
    for node in graph.nodes:
        node.type = None  # annotations are strings, with which a graph cannot be pickled
    return fx.GraphModule(root, graph)


class _SingleInput(nn.Module):
    """Calls a net with one input, so that its other arguments have their defaults and are not part of the graph."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


def fuse(traced: fx.GraphModule, conv_class: type[ConvT], dtype: torch.dtype) -> list[ConvT]:
    """Fuse, in place, each convolution with the norm, addition and ReLU behind it.

    Args:
        traced: What :func:`trace` returned for a net in eval mode.
        conv_class: Class of the fused convolutions: :class:`~resbackbone.inference.fused_conv.OneDNNConv2d` on CPUs
            with oneDNN, :class:`~resbackbone.inference.fused_conv.FusedConv2d` on any device.
        dtype: Dtype of the computation.

    Returns:
        The fused convolutions. The graph gets a second input ``calls``: a callable for each of them, in this order.
    """
    graph = traced.graph
    _remove_idle_modules(traced)
    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        calls = graph.placeholder("calls")
    order = {node: position for position, node in enumerate(graph.nodes)}
    fused: list[ConvT] = []
    for node in list(graph.nodes):
        conv = _module(traced, node)
        if not _is_fusible(conv):
            continue
        last = norm = _sole_user(traced, node, lambda user: _is_batch_norm(_module(traced, user)))
        module = conv_class(conv, None if norm is node else _module(traced, norm), dtype)
        addition = _sole_user(traced, last, lambda user: user.op == "call_function" and user.target in _ADDITIONS)
        other = None if addition is last else _other_operand(addition, last)
        if other is not None and order[other] < order[node]:
            last = addition
        else:
            other = None
        relu = _sole_user(traced, last, lambda user: isinstance(_module(traced, user), nn.ReLU))
        module.relu, last = relu is not last, relu
        with graph.inserting_before(last):
            call = call_fused(graph, calls, len(fused), [node.args[0], *([] if other is None else [other])])
        order[call] = order[last]
        fused.append(module)
        last.replace_all_uses_with(call)
        _erase(graph, last, stop={node.args[0], other})
    _mark_overwritable(traced, fused)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return fused


def call_fused(graph: fx.Graph, calls: fx.Node, index: int, operands: Sequence[Argument]) -> fx.Node:
    """Append a call of a fused convolution to a graph."""
    return graph.call_method("__call__", (graph.call_function(operator.getitem, (calls, index)), *operands))


def fused_index(node: fx.Node) -> int | None:
    """Return the index of the fused convolution that a node calls; None if it calls none."""
    is_call = node.op == "call_method" and node.target == "__call__"
    return node.args[0].args[1] if is_call else None  # type: ignore[union-attr,return-value]


def fused_operands(call: fx.Node) -> list[fx.Node]:
    """Return the operands of a call of a fused convolution: its input, and the tensor to add if there is one."""
    return list(call.args[1:])  # type: ignore[arg-type]


def _sole_user(traced: fx.GraphModule, node: fx.Node, matches: Callable[[fx.Node], bool]) -> fx.Node:
    """Return the only user of a node if it matches and the node can be computed there instead; else the node itself.

    It cannot if a step in between may modify its inputs in place.
    """
    users = list(node.users)
    if len(users) != 1 or not matches(users[0]):
        return node
    between = node.next
    while between is not users[0]:
        if not (_is_out_of_place(traced, between) or between.target is operator.getitem):
            return node
        between = between.next
    return users[0]


def _erase(graph: fx.Graph, node: fx.Node, stop: set[fx.Node | None]) -> None:
    """Erase a node without users, and its inputs that have no other user."""
    inputs = [source for source in node.all_input_nodes if source not in stop]
    graph.erase_node(node)
    for source in inputs:
        if not source.users:
            _erase(graph, source, stop)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_fusible(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    return type(module) in _FUSIBLE and module.padding_mode == "zeros" and not isinstance(module.padding, str)  # type: ignore[union-attr]


def _is_batch_norm(module: nn.Module | None) -> bool:
    """Return whether a module normalizes by running statistics, which makes it an affine map."""
    return isinstance(module, (_BatchNorm, FrozenBatchNorm2d)) and module.running_var is not None


def _other_operand(addition: fx.Node, one: fx.Node) -> fx.Node | None:
    others = [operand for operand in addition.args if operand is not one]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or addition.kwargs:
        return None
    return others[0]


def _remove_hooks(net: nn.Module) -> None:
    """Remove forward hooks, which an engine does not call, with a warning."""
    hooked = []
    for name, module in net.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                hooked.append(name)
                hooks.clear()
    if hooked:
        warn_user(
            f"hooks of {type(net).__name__} are dropped, since fused operators replace its modules: "
            f"of {hooked[0]!r} and {len(hooked) - 1} others; register them on the optimized net",
        )


def _remove_idle_modules(traced: fx.GraphModule) -> None:
    """Remove modules that return their input in eval mode."""
    for node in list(traced.graph.nodes):
        if isinstance(_module(traced, node), _IDLE_IN_EVAL):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _is_out_of_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    return fused_index(node) is not None or type(_module(traced, node)) in _OUT_OF_PLACE


def _mark_overwritable(traced: fx.GraphModule, fused: Sequence[FusedConv2d]) -> None:
    """Set ``overwrite`` where the added tensor is not used later, neither by the caller nor through a view."""
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    out_of_place = {node for node in order if _is_out_of_place(traced, node)}
    for call in order:
        index = fused_index(call)
        if index is not None and len(fused_operands(call)) == 2:
            x, other = fused_operands(call)
            others = other.users.keys() - {call}
            is_last = all(user in out_of_place and order[user] < order[call] for user in others)
            fused[index].overwrite = other is not x and other in out_of_place and is_last
