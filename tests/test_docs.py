"""The code that README and the documentation show runs as shown."""

import inspect
import pathlib
import re

import jax
import pytest
from test_ejk_ragged_dense import test_dense as test_dense  # the plug-in's own tests, collected here

import ejk_ragged.testing
from ejk_ragged._tools import options


ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/decode-loop.md",
    "docs/tokens.md",
    "docs/quantised-caches.md",
    "docs/pages.md",
    "docs/mla.md",
    "docs/backends.md",
    "docs/write-a-backend.md",
    "docs/faq.md",
    "docs/gallery.md",
    "docs/tuning.md",
    "docs/many-devices.md",
    "docs/recipes.md",
    "docs/examples/serve.md",
]


def python_blocks(page):
    """The Python blocks of a page, with included files in place."""
    text = (ROOT / page).read_text()
    text = re.sub(r'^--8<-- "(.*)"$', lambda match: (ROOT / "docs" / match[1]).read_text(), text, flags=re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    blocks = python_blocks(page)
    assert blocks
    names = {"__name__": page}
    with jax.numpy_rank_promotion("allow"):  # the pages show what users write
        for block in blocks:
            exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))])
def test_command_lines(page):
    """The command accepts the command lines of a page, and the page uses the first name of each option."""
    text = (ROOT / page).read_text()
    lines = re.findall(r"python -m ejk_ragged((?: [^`#\n]+)?)", text)
    assert "--rows" not in "".join(lines)
    parser = options.parser(*[lambda *args: None] * 4)
    for line in lines:
        if "--help" not in line:
            parser.parse_args(line.split())


@pytest.mark.parametrize("module", [ejk_ragged, ejk_ragged.testing], ids=lambda module: module.__name__)
def test_every_public_name_has_its_place_in_the_api(module):
    public = {name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)}
    named = re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)
    assert public == set(named)
