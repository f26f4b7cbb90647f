"""Documentation: Python examples run, links, file paths and names resolve, and generated pages are up to date."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from mmengine.registry import Registry

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
NAME = re.compile(r"\bresbackbone(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"(?<![\w./-])(?:configs|constraints|docs|resbackbone|tests|tools)/[\w./-]*\w")


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


def headings(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub and GitLab derive them from headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def registered_names() -> set[str]:
    """Return the types that configs can name as ``resbackbone.<type>``."""
    import resbackbone.training.classification  # noqa: F401  # registers
    from resbackbone import registry

    registries = [value for value in vars(registry).values() if isinstance(value, Registry)]
    return {name for each in registries for name in each.module_dict}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in headings(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in sorted(set(NAME.findall(text)) - {"resbackbone.plugins"}):  # a group of entry points
        if name.startswith("resbackbone.integrations."):  # importing one requires its host
            assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
        elif name.removeprefix("resbackbone.") not in registered_names() | set(re.findall(r"^class (\w+)", text, re.M)):
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_exist(page):
    files = set(FILE.findall(page.read_text(encoding="utf-8")))
    assert not [file for file in files if not (ROOT / file).exists()]


def test_the_page_of_upstream_defects_is_fresh_and_complete():
    tool = [sys.executable, str(ROOT / "tools" / "upstream_defects.py"), "--check"]
    run = subprocess.run(tool, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    page = (ROOT / "docs" / "upstream_defects.md").read_text(encoding="utf-8")
    assert sorted(map(int, re.findall(r"^##+ (\d+)\. ", page, re.M))) == list(range(1, 22))
