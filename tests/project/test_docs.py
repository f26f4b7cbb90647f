"""Every Python example in README.md and docs/ runs, page by page; links lead somewhere; generated pages are fresh."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def python_blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S))


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_examples_run(page, monkeypatch, tmp_path):
    from resbackbone import MODELS

    monkeypatch.setattr(MODELS, "_module_dict", dict(MODELS.module_dict))  # what an example registers ends with it
    monkeypatch.chdir(tmp_path)
    module = ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)  # pickle finds an example's classes by it
    exec(compile(python_blocks(page), str(page), "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_page_of_upstream_defects_is_fresh_and_complete():
    tool = [sys.executable, str(ROOT / "tools" / "upstream_defects.py"), "--check"]
    run = subprocess.run(tool, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    page = (ROOT / "docs" / "upstream_defects.md").read_text(encoding="utf-8")
    assert sorted(map(int, re.findall(r"^##+ (\d+)\. ", page, re.M))) == list(range(1, 22))
