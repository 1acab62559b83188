"""What README and the documentation show runs as shown."""

import importlib.util
import inspect
import pathlib
import re

import pytest
from support import assert_right

import ejk_ragged
from ejk_ragged import ragged_decode_attention
from ejk_ragged.testing import CHECKS


ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/tokens.md",
    "docs/quantised-caches.md",
    "docs/backends.md",
    "docs/write-a-backend.md",
    "docs/faq.md",
    "docs/gallery.md",
    "docs/tuning.md",
    "docs/many-devices.md",
    "docs/recipes.md",
]


def python_blocks(page):
    """The Python of a page, included files in place."""
    text = (ROOT / page).read_text()
    text = re.sub(r'^--8<-- "(.*)"$', lambda match: (ROOT / "docs" / match[1]).read_text(), text, flags=re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    blocks = python_blocks(page)
    assert blocks
    names = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_every_public_name_has_its_place_in_the_api():
    public = {name for name, value in vars(ejk_ragged).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(re.findall(r"^::: ejk_ragged\.(\w+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE))


@pytest.fixture(scope="module")
def dense():
    spec = importlib.util.spec_from_file_location("ejk_ragged_dense", ROOT / "docs/plugin/ejk_ragged_dense.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DenseBackend()


@pytest.mark.parametrize("case", CHECKS, ids=lambda case: case.name)
def test_the_backend_of_the_page_is_right(dense, case):
    def call(**arguments):
        return ragged_decode_attention(**arguments, backend=dense)

    assert_right(call, case.draw(poison=True))
