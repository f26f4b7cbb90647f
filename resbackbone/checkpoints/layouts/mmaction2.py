"""Key layout of mmaction2 and other nets of ``ConvModule``, each of which holds a convolution and its norm.

Source: open-mmlab/mmaction2, ``mmaction/models/backbones/resnet.py``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table


def _table(norm: str) -> Table:
    """Return the table for nets with this attribute name of norms."""
    return Table(
        f"""
        conv1                         conv1.conv
        {norm}1                       conv1.{norm}
        layer{{s}}.{{b}}.conv{{k}}      layer{{s}}.{{b}}.conv{{k}}.conv
        layer{{s}}.{{b}}.{norm}{{k}}    layer{{s}}.{{b}}.conv{{k}}.{norm}
        layer{{s}}.{{b}}.downsample.0  layer{{s}}.{{b}}.downsample.conv
        layer{{s}}.{{b}}.downsample.1  layer{{s}}.{{b}}.downsample.{norm}
        """
    )


MMACTION2 = Layout("mmaction2", tables=(_table("bn"), _table("gn"), _table("in")))
