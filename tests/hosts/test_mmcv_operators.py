"""mmcv's compiled operators on CPUs, fed in channels_last."""

from importlib.util import find_spec

import pytest
import torch

if find_spec("mmcv") is None or find_spec("mmcv._ext") is None:
    pytest.skip("mmcv with compiled operators is not installed; tools/test_hosts.sh does", allow_module_level=True)

from mmcv_operators import operators, run

from resbackbone.integrations._mmcv import guard_operators

NAMES = [name for name, _ in operators()]
NOT_ON_CPUS = (RuntimeError, AttributeError)


@pytest.fixture
def guarded():
    assert guard_operators()


def contiguous(name):
    try:
        return run(name, torch.contiguous_format)
    except NOT_ON_CPUS as error:
        pytest.skip(f"not for CPUs: {str(error).splitlines()[0]}")


@pytest.mark.usefixtures("guarded")
@pytest.mark.filterwarnings("ignore:Since aten.cudnn_convolution_backward_weight:UserWarning")  # mmcv's, of itself
@pytest.mark.parametrize("name", NAMES)
def test_defect_21_guarded_operators_read_channels_last(name):
    """In mmcv, compiled operators silently read every tensor as contiguous.

    After ``import resbackbone.integrations.mmdet`` (or ``.mmseg``, ``.mmpretrain``): outputs and gradients are
    the same for channels_last and contiguous inputs.
    """
    expected = contiguous(name)
    got = run(name, torch.channels_last)
    for reference, value in zip(expected, got, strict=True):
        assert torch.allclose(value, reference, atol=1e-5), (value - reference).abs().max()


@pytest.mark.parametrize("host", ["mmdet", "mmseg", "mmpretrain"])
def test_each_integration_guards_the_operators(host, run_python):
    if find_spec(host) is None:
        pytest.skip(f"{host} is not installed")
    found = run_python(f"""
import warnings; warnings.simplefilter("ignore")
import torch, mmcv._ext as operators
before = operators.roi_align_forward
import resbackbone.integrations.{host}
after = operators.roi_align_forward
from resbackbone.integrations._mmcv import guard_operators
guard_operators()
from mmcv.ops import roi_align
x, rois = torch.rand(2, 8, 16, 16), torch.tensor([[0, 1.0, 2.0, 12.0, 13.0]])
last = roi_align(x.contiguous(memory_format=torch.channels_last), rois, 3, 1.0, 2, "avg", True)
same = torch.equal(last, roi_align(x, rois, 3, 1.0, 2, "avg", True))
found = [after.__wrapped__ is before, operators.roi_align_forward is after, same]
""")
    assert found == [True, True, True]


@pytest.mark.usefixtures("guarded")
def test_outputs_that_lie_otherwise_are_written():
    from mmcv.utils import ext_loader

    operators = ext_loader.load_ext("_ext", ["roi_align_forward", "bbox_overlaps"])
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 3.0, 5.0], [2.0, 2.0, 9.0, 9.0]])
    plain, transposed, strided = torch.zeros(3, 2), torch.zeros(2, 3).t(), boxes.t().contiguous().t()
    operators.roi_align_forward(
        torch.rand(1, 2, 8, 8), torch.zeros(1, 5), torch.zeros(1, 2, 2, 2), *[torch.zeros(0)] * 2, 2, 2, 1.0, 2, 1, True
    )
    operators.bbox_overlaps(boxes, boxes[:2], plain, mode=0, aligned=False, offset=0)
    operators.bbox_overlaps(strided, boxes[:2], ious=transposed, mode=0, aligned=False, offset=0)
    assert plain.any()
    assert torch.equal(transposed, plain)
    assert torch.equal(strided, boxes)
