"""Finding, in a traced net, what can run as one operator."""

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
from resbackbone.inference.convolution import FoldedConv2d
from resbackbone.layers import ConvAWS2d, ConvWS2d, DeformConv2d, DropPath, FrozenBatchNorm2d, SAConv2d, StdConv2d
from resbackbone.utils.validation import warn_user

Conv = TypeVar("Conv", bound=FoldedConv2d)
_UNTRACEABLE = (fx.proxy.TraceError, TypeError)
_ADD = {operator.add, operator.iadd, torch.add}
_CONVOLUTIONS = (nn.Conv2d, ConvWS2d, StdConv2d, ConvAWS2d)  # these, but not what is derived from them
_WHOLE = (*_CONVOLUTIONS, DeformConv2d, SAConv2d, FrozenBatchNorm2d)
# What returns no view of its input, nor changes that; what is derived from it may.
_ANEW = {*_WHOLE, nn.BatchNorm2d, nn.SyncBatchNorm, nn.MaxPool2d, nn.AvgPool2d}


class _Tracer(fx.Tracer):
    """Takes as one step what is fused as one, and layers that compute with sizes, which no graph can hold.

    Args:
        whole: Classes of such layers.
    """

    def __init__(self, whole: tuple[type[nn.Module], ...] = _WHOLE) -> None:
        super().__init__()
        self.whole = whole
        self.obstacle: nn.Module | None = None  # the layer that could not be traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.whole) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, *args: Any) -> Any:
        try:
            return super().call_module(m, *args)
        except _UNTRACEABLE:
            self.obstacle = self.obstacle or m
            raise


def trace(net: nn.Module) -> fx.GraphModule:
    """Record what a net computes; layers that depend on their input are steps that run as they are.

    Args:
        net: It loses its hooks.

    Raises:
        ValueError: If a whole backbone depends on its input, or what calls it does, so that no graph can hold it.
    """
    _drop_hooks(net)
    root = net if len(inspect.signature(net.forward).parameters) == 1 else _OneInput(net)
    tracer = _Tracer()
    while True:
        try:
            graph = tracer.trace(root)
            break
        except _UNTRACEABLE as error:
            if tracer.obstacle is None or isinstance(tracer.obstacle, (Backbone, tracer.whole)):
                raise ValueError(f"{type(net).__name__} cannot be traced: {error}") from error
            tracer = _Tracer((*tracer.whole, type(tracer.obstacle)))
    for node in graph.nodes:
        node.type = None  # annotations come as text, with which no graph can be pickled
    return fx.GraphModule(root, graph)


class _OneInput(nn.Module):
    """Calls a net with one input, so that its other arguments have their defaults and are no part of the graph."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


def fuse(traced: fx.GraphModule, kind: type[Conv], dtype: torch.dtype) -> list[Conv]:
    """Replace, in place, each convolution and what follows it (norm, sum, ReLU) by the call of one operator.

    Args:
        traced: A net that :func:`trace` recorded, in evaluation.
        kind: What takes their place: :class:`~resbackbone.inference.convolution.FusedConv2d` on CPUs with oneDNN,
            :class:`~resbackbone.inference.convolution.FoldedConv2d` anywhere.
        dtype: What the operators compute in.

    Returns:
        The operators. The graph gets another input: what it calls in place of each, in this order.
    """
    graph = traced.graph
    _drop_idle(traced)
    first = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(first):
        calls = graph.placeholder("calls")
    order = {node: position for position, node in enumerate(graph.nodes)}
    fused: list[Conv] = []
    for node in list(graph.nodes):
        conv = _module(traced, node)
        if not _is_fusible(conv):
            continue
        last = _behind(traced, node, lambda user: _is_foldable(_module(traced, user)))
        module = kind(conv, None if last is node else _module(traced, last), dtype)
        addition = _behind(traced, last, lambda user: user.op == "call_function" and user.target in _ADD)
        other = None if addition is last else _other_operand(addition, last)
        if other is not None and order[other] < order[node]:
            last = addition
        else:
            other = None
        rectified = _behind(traced, last, lambda user: isinstance(_module(traced, user), nn.ReLU))
        module.relu, last = rectified is not last, rectified
        with graph.inserting_before(last):
            replacement = fused_call(graph, calls, len(fused), [node.args[0], *([] if other is None else [other])])
        order[replacement] = order[last]
        fused.append(module)
        last.replace_all_uses_with(replacement)
        _erase(graph, last, stop={node.args[0], other})
    _let_overwrite(traced, fused)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return fused


def fused_call(graph: fx.Graph, calls: fx.Node, index: int, tensors: Sequence[Argument]) -> fx.Node:
    """Add the call of one of the operators to a graph."""
    return graph.call_method("__call__", (graph.call_function(operator.getitem, (calls, index)), *tensors))


def fused_index(node: fx.Node) -> int | None:
    """Return which operator a step calls; None if it is another step."""
    is_call = node.op == "call_method" and node.target == "__call__"
    return node.args[0].args[1] if is_call else None  # type: ignore[union-attr,return-value]


def operands(call: fx.Node) -> list[fx.Node]:
    """Return what such a call convolves, and what it adds, if anything."""
    return list(call.args[1:])  # type: ignore[arg-type]


def _behind(traced: fx.GraphModule, node: fx.Node, wanted: Callable[[fx.Node], bool]) -> fx.Node:
    """Return the only user of a node, if it is what is wanted and can be waited for; otherwise the node itself.

    What waits sees what is changed in place meanwhile.
    """
    users = list(node.users)
    if len(users) != 1 or not wanted(users[0]):
        return node
    between = node.next
    while between is not users[0]:
        if not (_is_anew(traced, between) or between.target is operator.getitem):
            return node
        between = between.next
    return users[0]


def _erase(graph: fx.Graph, node: fx.Node, stop: set[fx.Node | None]) -> None:
    """Erase a node that has no users, and what it alone used."""
    inputs = [source for source in node.all_input_nodes if source not in stop]
    graph.erase_node(node)
    for source in inputs:
        if not source.users:
            _erase(graph, source, stop)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_fusible(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    return type(module) in _CONVOLUTIONS and module.padding_mode == "zeros" and not isinstance(module.padding, str)  # type: ignore[union-attr]


def _is_foldable(module: nn.Module | None) -> bool:
    return isinstance(module, (_BatchNorm, FrozenBatchNorm2d)) and getattr(module, "running_var", None) is not None


def _other_operand(addition: fx.Node, one: fx.Node) -> fx.Node | None:
    operands = [operand for operand in addition.args if operand is not one]
    if len(operands) != 1 or not isinstance(operands[0], fx.Node) or addition.kwargs:
        return None
    return operands[0]


def _drop_hooks(net: nn.Module) -> None:
    """Take out what is called beside modules, which will not be called, and say so."""
    hooked = []
    for name, module in net.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                hooked.append(name)
                hooks.clear()
    if hooked:
        warn_user(
            f"hooks of {type(net).__name__} are dropped, since operators run in place of its modules: "
            f"of {hooked[0]!r} and {len(hooked) - 1} others; register them on what is returned",
        )


def _drop_idle(traced: fx.GraphModule) -> None:
    """Take out what does nothing in evaluation."""
    for node in list(traced.graph.nodes):
        if isinstance(_module(traced, node), (nn.Identity, nn.Dropout, DropPath)):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _is_anew(traced: fx.GraphModule, node: fx.Node) -> bool:
    return fused_index(node) is not None or type(_module(traced, node)) in _ANEW


def _let_overwrite(traced: fx.GraphModule, fused: Sequence[FoldedConv2d]) -> None:
    """Let sums be written over a tensor that is not used later: neither the caller, nor through a view."""
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    anew = {node for node in order if _is_anew(traced, node)}
    for call in order:
        index = fused_index(call)
        if index is not None and len(operands(call)) == 2:
            x, other = operands(call)
            looks = other.users.keys() - {call}
            is_last = all(look in anew and order[look] < order[call] for look in looks)
            fused[index].overwrite = other is not x and other in anew and is_last
