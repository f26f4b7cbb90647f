"""Key layout of a library: two-way tables of keys, and conversions of values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from resbackbone.checkpoints.layouts.table import PARAMETERS, Table

Tensors = dict[str, Tensor]

# The keys of the backbones of this library.
_NATIVE = re.compile(
    rf"""(
        (conv1 | bn1? | gn1? | in1 | stem\.\d | maxpool\.\d | fc)
      | layer[1-4]\.\d+\.(
            (conv | bn | gn | in)\d | IN | bn\d\.(BN | IN)
          | (downsample | convs | bns)\.\d+
          | conv\d\.(conv | bn\d | fc\d | conv_offset | offset_[sl] | switch | (pre | post)_context)
          | conv\d\.(paths\.\d\.(conv | bn) | attn\.(fc_reduce | bn | fc_select))
          | se_layer\.conv\d\.conv | eca_layer\.conv | cbam\.(channel\.fc\d | spatial\.(conv | bn)) | rfp_conv
        )
    )\.({PARAMETERS} | weight_(diff | gamma | beta))""",
    re.VERBOSE,
)

_BATCH_NORM = re.compile(r"((?:^|\.))bn(?=\d?\.)")
_GROUP_NORM = re.compile(r"((?:^|\.))gn(?=\d?\.)")


def is_native(name: str) -> bool:
    """Whether a name can be a key of the backbones of this library."""
    return _NATIVE.fullmatch(name) is not None


@dataclass(frozen=True)
class Layout:
    """Key layout: how a library names the tensors of a ResNet.

    Attributes:
        name: The library, as in ``convert_state_dict(source=...)``.
        tables: Tables of the keys that are not native; several if one key has two meanings, as timm's ``bn1`` in plain
            and deep stems. The one that fits best is used, of equals the first.
        old: Tables that are read and not written, of older or rarer keys.
        clean: Cleans up foreign keys before they are converted, such as older aliases.
        values_to_native: Converts the values of tensors with native keys.
        values_to_foreign: Its inverse.
    """

    name: str
    tables: tuple[Table, ...] = ()
    old: tuple[Table, ...] = ()
    clean: Callable[[Tensors], Tensors] = dict
    values_to_native: Callable[[Tensors], Tensors] = dict
    values_to_foreign: Callable[[Tensors], Tensors] = dict

    def native_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map cleaned foreign keys to native ones; keys that are in no table stay as they are."""
        names = list(names)
        tables = (*self.tables, *self.old)
        candidates = [table.to_native(names) for table in tables]
        best = max(candidates, key=lambda found: sum(is_native(found.get(name, name)) for name in names), default={})
        return {name: best.get(name, name) for name in names}

    def to_native(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Convert foreign tensors to native keys and values.

        Raises:
            ValueError: If two of them have the same native key.
        """
        cleaned = self.clean(dict(tensors))
        renamed = self.native_names(cleaned)
        counts = Counter(renamed.values())
        if twice := [name for name, native in renamed.items() if counts[native] > 1]:
            raise ValueError(f"{' and '.join(twice[:2])} both mean {renamed[twice[0]]}, the weights of one tensor")
        native = self.values_to_native({renamed[name]: tensor for name, tensor in cleaned.items()})
        if not self.tables or any(name.endswith(".running_mean") for name in native):
            return native
        # Norms without statistics are group norms, which only native keys call otherwise than batch norms.
        return {_BATCH_NORM.sub(r"\1gn", name): tensor for name, tensor in native.items()}

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Convert native tensors to foreign keys and values; keys that are in no table stay as they are."""
        prepared = self.values_to_foreign(dict(tensors))
        renamed: dict[str, str] = {}
        for spelled in ({name: name for name in prepared}, {name: _GROUP_NORM.sub(r"\1bn", name) for name in prepared}):
            for table in self.tables:
                found = table.to_foreign(spelled.values())
                candidate = {name: found[spelling] for name, spelling in spelled.items() if spelling in found}
                renamed = max(renamed, candidate, key=len)
        return {renamed.get(name, name): tensor for name, tensor in prepared.items()}
