"""Generate docs/upstream_defects.md, the defects of OpenMMLab's ResNets, from the docstrings of regression tests.

A test named ``test_defect_07_...`` belongs to defect 7; its docstring describes the upstream behavior and the behavior
here. Run ``python tools/upstream_defects.py`` after adding or changing such a test.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "upstream_defects.md"
INTRODUCTION = """\
# Defects of OpenMMLab's ResNets

Defects of mmdet 3.3.0, mmseg 1.2.2, mmpretrain 1.2.0, mmcv 2.1.0 and mmengine 0.10.7 that are fixed in this library,
with their regression tests: `pytest -k defect_07` runs those of number 7. Other differences are in
[differences](differences.md).

`python tools/upstream_defects.py` generates this page from the tests' docstrings; edit those.
"""


@dataclass(frozen=True)
class Defect:
    """One entry of the page.

    Attributes:
        title: The defect in one line.
        unfixed: What is not fixed here, and why.
        details: Markdown after the list of tests.
    """

    title: str
    unfixed: str = ""
    details: str = ""


@dataclass(frozen=True)
class Case:
    """A regression test of a defect; ``path`` is relative to the repository."""

    number: int
    name: str
    path: str
    text: str


OPERATORS = """\
Largest differences on CPUs between a channels_last input and the same contiguous input, in mmcv 2.1.0 and in onedl-mmcv
2.3.6, for random inputs from `tests/support/mmcv_operators.py`. With one of our integrations all are 0, except
SAConv2d's.

| operator | outputs | gradients |
|---|---|---|
| `roi_align`, average / maximum | 0.43 / 0.46 | 0 / 0.78 |
| `roi_align_rotated` | 0.53 | 0 |
| `bezier_align` | 0.45 | 0 |
| `rotated_feature_align` | 0.81 | 11.5 |
| `modulated_deform_conv2d` (DCNv2) | 9.1 | 11 |
| `deform_conv2d` (DCN), `SAConv2d` with `use_deform` | RuntimeError: input must be contiguous | |
| `psa_mask`, collect and distribute | RuntimeError: view size is not compatible | |
| `SAConv2d` | 0 | 2.9e-6 |
| `upfirdn2d`, `bias_act`, `filtered_lrelu` | 0 | 0 |
| `CrissCrossAttention`, `CornerPool`, `point_sample`, `SimpleRoIAlign` | 0 | 0 |
| `roi_pool`, `riroi_align_rotated`, `deform_roi_pool`, `border_align` | not implemented on CPUs | |
| `masked_conv2d`, `carafe`, `correlation`, `tin_shift`, `sigmoid_focal_loss` | not implemented on CPUs | |
"""
DEFECTS = {
    1: Defect("Only the last of several plugins at one position runs"),
    2: Defect("`fallback_on_stride` is removed from the caller's config and applies to one block only"),
    3: Defect("`zero_init_residual` is ignored for subclassed blocks and beside `init_cfg`"),
    4: Defect("Plugins are built with the wrong width"),
    5: Defect("The last stage of TridentNet is not initialized"),
    6: Defect("The last stage of TridentNet fails under `with_cp`, and its `dcn` is ignored"),
    7: Defect("RegNet changes the expansion of all other bottlenecks, and cannot freeze a deep stem"),
    8: Defect("DetectoRS does not zero-initialize its feedback, and builds its layers twice"),
    9: Defect("Res2Net ignores `style`, `deep_stem` and `avg_down`"),
    10: Defect("`se_ratio`, `drop_path_rate` and `init_cfg` are accepted and ignored"),
    11: Defect("Loaded weights are overwritten with zeros"),
    12: Defect(
        "An integer drop path rate fails, and `get_layer_depth` supports only five depths",
    ),
    13: Defect("SyncBN stays in train mode under `norm_eval`"),
    14: Defect("Arguments that do not match the number of stages raise unrelated errors"),
    15: Defect('An unknown type raises "Cannot find None in registry"'),
    16: Defect("Activation checkpointing updates running statistics twice per step"),
    17: Defect(
        "Batch-norm fusion pairs layers by registration order",
        unfixed="mmcv's function treats every subclass of `nn.Conv2d` as a plain convolution, so it changes the "
        "outputs of `ConvWS`, `ConvAWS` and `SAC`, which rescale their filters at each use. It fails on `ResNetV2` "
        "with `final_norm` and a plain stem.",
    ),
    18: Defect(
        "`torch.fx` fails on ResNeSt and on `with_cp`",
        unfixed="mmengine's function raises KeyError where a batch norm follows a function rather than a layer: in "
        "`ResNetV2`, IBN-a and `TridentResNet`, and with `ConvWS`, `ConvAWS` or `SAC`.",
    ),
    19: Defect(
        "bfloat16 training on CPUs, resuming, and checkpoint loading in mmengine",
        unfixed="`AmpOptimWrapper`, `Runner` and `CheckpointLoader` belong to mmengine and stay in use under its "
        "runner. Weights loaded by `resbackbone.checkpoints.load_checkpoint`, also through `init_cfg`, never "
        "execute code, and logs and NumPy values in the file are accepted.",
    ),
    20: Defect(
        "`mmdet::` configs and `mmengine.hub` need `pkg_resources`, removed in setuptools 82",
        unfixed="This concerns mmengine only; this library does not import it.",
    ),
    21: Defect(
        "mmcv's compiled operators read channels_last feature maps as if they were contiguous",
        unfixed="without an integration, and for CUDA operators that were not tested, channels_last inputs are still "
        "misread. This library's feature maps are contiguous unless the images or weights are in channels_last.",
        details=OPERATORS,
    ),
}


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if the page is out of date.")] = (
        False
    ),
) -> None:
    """Write docs/upstream_defects.md from the tests named test_defect_NN_..."""
    try:
        page = render(list(find_cases(ROOT / "tests")))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date; run `python tools/upstream_defects.py`")


def find_cases(folder: Path) -> Iterator[Case]:
    """Yield the regression tests of defects in a folder, sorted by file and line, with tests/hosts last.

    Raises:
        ValueError: If a test has a number that is not in ``DEFECTS``, or no docstring.
    """
    for path in sorted(folder.rglob("test_*.py"), key=lambda path: (len(path.parts), path)):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = re.match(r"test_defect_(\d+)_", node.name) if isinstance(node, ast.FunctionDef) else None
            if found is None:
                continue
            assert isinstance(node, ast.FunctionDef)
            where, text = path.relative_to(folder.parent).as_posix(), ast.get_docstring(node)
            if int(found[1]) not in DEFECTS:
                raise ValueError(f"{where}: {node.name} has a number without an entry in DEFECTS, 1 to {len(DEFECTS)}")
            if not text:
                raise ValueError(f"{where}: {node.name} needs a docstring: the behavior upstream, the behavior here")
            yield Case(int(found[1]), node.name, where, " ".join(text.split()).replace("``", "`"))


def render(cases: list[Case]) -> str:
    """Return the page.

    Raises:
        ValueError: If a defect has neither a test nor ``unfixed``.
    """
    tested, untested = [], []
    for number, defect in DEFECTS.items():
        lines = [f"- {case.text} [{case.name}](../{case.path})" for case in cases if case.number == number]
        if lines:
            unfixed = f"\nNot fixed: {defect.unfixed}\n" if defect.unfixed else ""
            details = f"\n{defect.details}" if defect.details else ""
            tested.append(f"## {number}. {defect.title}\n\n" + "\n".join(lines) + f"\n{details}{unfixed}")
        elif defect.unfixed:
            untested.append(f"### {number}. {defect.title}\n\n{defect.unfixed}\n")
        else:
            raise ValueError(f"defect {number} has neither a test nor `unfixed` in DEFECTS")
    rest = ["## Outside this library, without a test\n", *untested] if untested else []
    return "\n".join([INTRODUCTION, *tested, *rest])


if __name__ == "__main__":
    typer.run(main)
