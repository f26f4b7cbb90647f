"""Deformable convolution: three backends against each other, a scalar reference and mmcv; which of them is chosen."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resbackbone.layers import DeformConv2d, ModulatedDeformConv2d, deform_operator
from resbackbone.layers.deform_operator import available_backends, deform_conv2d

CLASSES = (DeformConv2d, ModulatedDeformConv2d)


def needs(backend: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        backend not in available_backends(), reason=f"{backend}'s compiled operators do not load in this environment"
    )


COMPILED = [pytest.param(name, marks=needs(name)) for name in ("mmcv", "torchvision")]
BACKENDS = [*COMPILED, "torch"]


@dataclass(frozen=True)
class Case:
    cls: type[DeformConv2d]
    stride: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    deform_groups: int = 1
    kernel_size: int | tuple[int, int] = 3
    padding: int | tuple[int, int] = 1
    bias: bool = False
    size: tuple[int, int] = (6, 7)

    def __str__(self) -> str:
        version = CLASSES.index(self.cls) + 1
        return f"v{version}-s{self.stride}-d{self.dilation}-g{self.groups}-dg{self.deform_groups}-{self.size}"

    def layer(self, backend: str, dtype: torch.dtype = torch.float32) -> DeformConv2d:
        """Build a layer whose offsets reach far outside of the image; the same for every backend."""
        torch.manual_seed(0)
        layer = self.cls(
            4,
            6,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deform_groups,
            self.bias,
            backend=backend,
        )
        nn.init.normal_(layer.conv_offset.weight, std=0.5)
        nn.init.normal_(layer.conv_offset.bias, std=2.0)
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
        return layer.to(dtype)

    def image(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(2, 4, *self.size, generator=torch.Generator().manual_seed(1), dtype=dtype)


CASES = [Case(*options) for options in itertools.product(CLASSES, (1, 2), (1, 2), (1, 2), (1, 2))]
CASES += [
    case
    for cls in CLASSES
    for case in (
        Case(cls, bias=True, deform_groups=4),
        Case(cls, size=(1, 1)),
        Case(cls, size=(2, 5), stride=2, bias=True),
        Case(cls, kernel_size=(3, 5), stride=(2, 1), padding=(0, 3), dilation=(1, 2), groups=2, deform_groups=2),
        Case(cls, kernel_size=1, padding=0),
    )
]
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
both = pytest.mark.parametrize("cls", CLASSES, ids=("v1", "v2"))


def run(layer: DeformConv2d, image: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of a loss that weighs every output differently."""
    image = image.clone().requires_grad_()
    out = layer(image)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    (out * weights).sum().backward()
    return {"output": out.detach(), "x": image.grad, **{name: p.grad for name, p in layer.named_parameters()}}


# What it computes.


def bilinear(plane: np.ndarray, y: float, x: float) -> float:
    height, width = plane.shape
    if not (-1 < y < height and -1 < x < width):
        return 0.0
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return total


def scalar_reference(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """Compute the papers' sums number by number in float64; it shares no code with the library."""
    image, shift, kernel = (tensor.detach().double().numpy() for tensor in (x, offset, weight))
    out_channels, group_channels, kernel_height, kernel_width = kernel.shape
    points = kernel_height * kernel_width
    channels_per_offset = image.shape[1] // (shift.shape[1] // (2 * points))
    outputs_per_group = out_channels // (image.shape[1] // group_channels)
    out = np.zeros((image.shape[0], out_channels, *shift.shape[2:]))
    for n, i, j, c in np.ndindex(image.shape[0], *shift.shape[2:], image.shape[1]):
        group, within = divmod(c, group_channels)
        outputs = slice(group * outputs_per_group, (group + 1) * outputs_per_group)
        for u, v in np.ndindex(kernel_height, kernel_width):
            point = (c // channels_per_offset) * points + u * kernel_width + v
            y = i * stride[0] - padding[0] + u * dilation[0] + shift[n, 2 * point, i, j]
            z = j * stride[1] - padding[1] + v * dilation[1] + shift[n, 2 * point + 1, i, j]
            factor = 1.0 if mask is None else mask[n, point, i, j].item()
            out[n, outputs, i, j] += kernel[outputs, within, u, v] * factor * bilinear(image[n, c], y, z)
    if bias is not None:
        out += bias.detach().double().numpy()[:, None, None]
    return torch.from_numpy(out)


def scalar_forward(layer: DeformConv2d, x: Tensor) -> Tensor:
    offset, mask = layer.conv_offset(x).detach(), None
    if isinstance(layer, ModulatedDeformConv2d):
        first, second, mask = offset.chunk(3, dim=1)
        offset, mask = torch.cat((first, second), dim=1), mask.sigmoid()
    return scalar_reference(x, offset, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, mask)


@all_cases
def test_torch_backend_equals_scalar_reference(case: Case) -> None:
    layer, image = case.layer("torch", torch.float64), case.image(torch.float64)
    torch.testing.assert_close(layer(image), scalar_forward(layer, image), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", COMPILED)
@all_cases
def test_compiled_backends_agree_with_torch(case: Case, backend: str) -> None:
    expected, got = run(case.layer("torch"), case.image()), run(case.layer(backend), case.image())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


# mmcv's DCN v1 has no bias and refuses an image smaller than its kernel.
@needs("mmcv")
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.cls is not DeformConv2d or not (case.bias or min(case.size) < 3)], ids=str
)
def test_mmcv_backend_is_bit_identical_to_mmcv(case: Case) -> None:
    from mmcv import ops

    layer = case.layer("mmcv")
    peer_class = ops.DeformConv2dPack if case.cls is DeformConv2d else ops.ModulatedDeformConv2dPack
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.deform_groups)
    peer = peer_class(4, 6, *geometry, bias=case.bias)
    peer.load_state_dict(layer.state_dict(), strict=True)
    got, expected = run(layer, case.image()), run(peer, case.image())
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("deform_groups", [1, 2])
@pytest.mark.parametrize("modulated", [False, True])
def test_torch_gradients_are_those_of_finite_differences(modulated: bool, deform_groups: int) -> None:
    torch.manual_seed(0)
    points = 4 * deform_groups
    # A quarter pixel from the grid at least, where the derivative jumps; -3 to 3 pixels leaves the image.
    offset = torch.randint(-3, 3, (2, 2 * points, 3, 3)) + 0.25 + 0.5 * torch.rand(2, 2 * points, 3, 3)
    inputs = [torch.randn(2, 4, 4, 4), offset, torch.randn(4, 2, 2, 2), torch.randn(4)]
    if modulated:
        inputs.append(torch.rand(2, points, 3, 3))
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *args: deform_conv2d(*args, backend="torch"), inputs)


def test_torchvision_adapter_passes_its_arguments_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with torchvision's documented signature; where torchvision loads, the real one is compared above."""

    def deform_conv2d(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
        return scalar_reference(input, offset, weight, bias, stride, padding, dilation, mask)

    package, module = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    vars(package)["ops"], vars(module)["deform_conv2d"] = module, deform_conv2d
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.ops", module)
    for cls in CLASSES:
        case = Case(cls, (2, 1), (1, 2), groups=2, deform_groups=2, kernel_size=(3, 5), padding=(0, 3), bias=True)
        layer, image = case.layer("torch", torch.float64), case.image(torch.float64)
        expected = layer(image)
        layer.backend = "torchvision"
        torch.testing.assert_close(layer(image), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@both
def test_zero_offsets_give_a_plain_convolution(cls: type[DeformConv2d], backend: str) -> None:
    torch.manual_seed(0)
    layer = cls(4, 6, 3, stride=2, padding=1, groups=2, bias=False, backend=backend)
    image = torch.randn(2, 4, 9, 8)
    factor = 0.5 if cls is ModulatedDeformConv2d else 1.0  # sigmoid(0)
    torch.testing.assert_close(layer(image), factor * F.conv2d(image, layer.weight, None, 2, 1, 1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [1e9, -1e9])
def test_positions_far_outside_read_zero(far: float, backend: str) -> None:
    assert_reads_zero(far, backend)


@pytest.mark.parametrize("backend", [pytest.param("mmcv", marks=needs("mmcv")), "torch"])
@pytest.mark.parametrize("shift", [(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)])
def test_one_pixel_outside_is_where_the_image_ends(shift: tuple[float, float], backend: str) -> None:
    """Not of torchvision, whose offsets have a gradient at exactly -1."""
    offset = torch.tensor(shift).reshape(1, 2, 1, 1).requires_grad_()
    image = torch.ones(1, 1, 1, 1, requires_grad=True)
    out = deform_conv2d(image, offset, torch.ones(1, 1, 1, 1), backend=backend)
    out.sum().backward()
    assert all(tensor.eq(0).all() for tensor in (out, image.grad, offset.grad))


@pytest.mark.parametrize("nowhere", [math.inf, -math.inf, math.nan])
def test_positions_that_are_no_number_read_zero(nowhere: float) -> None:
    """Only of the torch backend: mmcv's and torchvision's operators give other gradients for some of these."""
    assert_reads_zero(nowhere, "torch")


def assert_reads_zero(outside: float, backend: str) -> None:
    offset = torch.full((1, 18, 5, 5), outside, requires_grad=True)
    image = torch.ones(1, 2, 5, 5, requires_grad=True)
    out = deform_conv2d(image, offset, torch.ones(3, 2, 3, 3), padding=(1, 1), backend=backend)
    out.sum().backward()
    assert all(tensor.eq(0).all() for tensor in (out, image.grad, offset.grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_low_precision_reads_the_right_pixels(cls: type[DeformConv2d], dtype: torch.dtype) -> None:
    """Neither dtype can tell pixel 4095 from 4096, so the positions themselves must not be of it."""
    torch.manual_seed(0)
    layer = cls(1, 1, (1, 3), padding=(0, 1), bias=False).to(dtype)
    image = torch.randn(1, 1, 1, 5000, dtype=dtype)
    factor = 0.5 if cls is ModulatedDeformConv2d else 1.0
    expected = factor * F.conv2d(image.float(), layer.weight.float(), None, 1, (0, 1))
    assert layer(image).dtype == dtype
    torch.testing.assert_close(layer(image).float(), expected, rtol=1e-2, atol=1e-2)


@both
def test_autocast_decides_the_dtype(cls: type[DeformConv2d]) -> None:
    layer, image = Case(cls, bias=True).layer("auto"), Case(cls).image()
    nn.init.zeros_(layer.conv_offset.weight)  # a bias alone gives offsets that bfloat16 rounds the same everywhere
    layer.conv_offset.bias.data = layer.conv_offset.bias.data.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(image)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(image), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@both
def test_memory_format_and_frozen_input_do_not_matter(cls: type[DeformConv2d], backend: str) -> None:
    layer, image = Case(cls).layer(backend), Case(cls).image()
    expected = layer(image).detach()
    out = layer.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected)
    out.sum().backward()  # the image asks for no gradient
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@both
def test_empty_batch(cls: type[DeformConv2d], backend: str) -> None:
    out = cls(4, 6, 3, stride=2, padding=1, backend=backend)(torch.zeros(0, 4, 9, 9))
    assert out.shape == (0, 6, 5, 5)


@needs("mmcv")
@pytest.mark.parametrize(("images", "im2col_step"), [(33, 32), (7, 4), (6, 4), (4, 64)])
def test_mmcv_takes_any_batch(images: int, im2col_step: int) -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(2, 3, 3, padding=1, im2col_step=im2col_step, backend="mmcv")
    nn.init.normal_(layer.conv_offset.weight)
    image = torch.randn(images, 2, 5, 4)
    got = run(layer, image)
    layer.zero_grad()
    layer.backend = "torch"
    for name, value in run(layer, image).items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@both
def test_a_bias_set_later_is_added(cls: type[DeformConv2d], backend: str) -> None:
    """As when a batch norm is folded into the convolution."""
    layer, image = Case(cls).layer(backend), Case(cls).image()
    expected = layer(image) + 3.0
    layer.bias = nn.Parameter(torch.full((6,), 3.0))
    torch.testing.assert_close(layer(image), expected)


# Compilers.


@both
def test_compiles_without_a_graph_break(cls: type[DeformConv2d]) -> None:
    layer = Case(cls, groups=2, deform_groups=2, bias=True).layer("auto")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 4, 6, 7), (3, 4, 9, 5)):
        image = torch.randn(shape)
        layer.zero_grad()
        expected = run(layer, image)
        layer.zero_grad()
        for name, value in run(compiled, image).items():
            torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-5)


@both
def test_exports_with_dynamic_shapes_as_plain_reads(cls: type[DeformConv2d]) -> None:
    layer = Case(cls, groups=2, deform_groups=2, bias=True).layer("auto").eval()
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(layer, (torch.randn(2, 4, 6, 7),), dynamic_shapes={"x": dims})
    for shape in ((1, 4, 1, 1), (3, 4, 9, 5)):
        image = torch.randn(shape)
        torch.testing.assert_close(program.module()(image), layer(image), rtol=1e-5, atol=1e-5)
    # Exported to ONNX, an embedding bag is a loop over the positions, hundreds of times slower.
    assert "embedding_bag" not in str(program.graph)


def test_fake_tensors_never_reach_a_compiled_operator() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert DeformConv2d(4, 6, 3)(torch.zeros(2, 4, 8, 8)).shape == (2, 6, 6, 6)


# The choice of a backend.


def test_import_leaves_mmcv_ops_and_torchvision_alone() -> None:
    code = "import sys, resbackbone.layers.deform_operator; print(*({'mmcv.ops', 'torchvision'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_torch_is_always_available_and_last() -> None:
    assert available_backends()[-1] == "torch"
    assert set(available_backends()) <= {"mmcv", "torchvision", "torch"}


@pytest.fixture
def forget_probes() -> None:
    deform_operator.compiled_devices.cache_clear()
    yield
    deform_operator.compiled_devices.cache_clear()


@pytest.mark.usefixtures("forget_probes")
@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AssertionError, DeprecationWarning])
def test_broken_operators_are_not_available(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> tuple[str, ...]:
        raise error("operator torchvision::nms does not exist")

    monkeypatch.setattr(deform_operator, "_mmcv_devices", probe)
    monkeypatch.setattr(deform_operator, "_torchvision_devices", probe)
    assert available_backends() == ("torch",)


@pytest.mark.parametrize(
    ("devices", "dtype", "chosen"),
    [
        ({"mmcv": ("cpu",), "torchvision": ("cpu",)}, torch.float32, "mmcv"),
        ({"mmcv": ("cpu",), "torchvision": ("cpu",)}, torch.float64, "mmcv"),
        ({"mmcv": ("cpu",), "torchvision": ("cpu",)}, torch.float16, "torch"),
        ({"mmcv": ("cpu",), "torchvision": ("cpu",)}, torch.bfloat16, "torch"),
        ({"mmcv": (), "torchvision": ("cpu",)}, torch.float32, "torchvision"),
        ({"mmcv": ("cuda",), "torchvision": ()}, torch.float32, "torch"),
    ],
)
def test_auto_takes_the_first_that_takes_the_tensor(
    devices: dict[str, tuple[str, ...]], dtype: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deform_operator, "compiled_devices", devices.__getitem__)
    assert deform_operator.choose_backend(torch.zeros(1, dtype=dtype)) == chosen


def test_a_backend_that_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deform_operator, "compiled_devices", lambda backend: ())
    message = r"`backend` 'mmcv' does not run here, only 'torch'; use 'auto' or install an mmcv or onedl-mmcv with"
    with pytest.raises(ValueError, match=message):
        DeformConv2d(4, 6, 3, backend="mmcv")
    with pytest.raises(ValueError, match="use 'auto' or install the torchvision release that goes with torch"):
        ModulatedDeformConv2d(4, 6, 3, backend="torchvision")
