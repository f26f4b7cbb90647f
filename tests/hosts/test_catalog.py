"""The catalog of weights says what mmpretrain's, mmdet's, mmseg's and mmengine's metadata say."""

from importlib import metadata

import build_catalog
import pytest
from catalog_origins import ORIGINS


@pytest.mark.parametrize("origin", ["mmpretrain", "open-mmlab"])
def test_the_catalog_is_what_the_packages_say(origin, capsys):
    packages = ORIGINS[origin].packages
    try:
        installed = {name: metadata.version(name) for name in packages}
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"needs OpenMMLab's own releases: {error}")
    build_catalog.main(check=True)
    assert origin in capsys.readouterr().out, installed
