"""Backends as users install them, in a new process: importing the package loads none, and a distribution of somebody else is
found."""

import json
import os
import pathlib
import subprocess
import sys
import tomllib

import jax
import pytest


def python(script, *path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_package_imports_no_backend():
    script = """
import json, sys
import ejk_ragged
from ejk_ragged._registry import registry
modules = {entry.value.partition(":")[0] for entry in registry.entries().values()}
imported = sorted((modules | {"jax.experimental.pallas"}) & set(sys.modules))
ejk_ragged.backends()
print(json.dumps([sorted(modules), imported, sorted(modules & set(sys.modules))]))
"""
    modules, imported, later = python(script)
    assert "ejk_ragged_xla" in modules
    assert imported == []
    assert later == modules


MISSING = {
    "no Triton": ["jax.experimental.pallas.triton"],
    "no Mosaic GPU": ["jax.experimental.pallas.mosaic_gpu"],
    "neither": ["jax.experimental.pallas.triton", "jax.experimental.pallas.mosaic_gpu"],
    "no Pallas": ["jax.experimental.pallas"],
    "what Triton needs": ["jax._src.pallas.triton"],
    "what Mosaic GPU needs": ["jax._src.pallas.mosaic_gpu"],
}


@pytest.mark.parametrize(("kind", "how"), [*((kind, "not found") for kind in MISSING), ("no Pallas", "None")])
def test_a_jax_without_kernel_languages(kind, how):
    """Some of JAX's modules are missing. The backends that need them say so, and everything else works."""
    script = f"""
import json, sys, warnings
import jax, jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")
missing = {MISSING[kind]!r}


class Gone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if any(name == gone or name.startswith(gone + ".") for gone in missing):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)


if {how!r} == "None":
    sys.modules.update(dict.fromkeys(missing))
else:
    sys.meta_path.insert(0, Gone)
import ejk_ragged

query, cache = jnp.ones((2, 4, 16), jnp.bfloat16), jnp.ones((2, 20, 2, 16), jnp.bfloat16)
call = lambda query: jnp.sum(ejk_ragged.ragged_decode_attention(query, cache, cache).astype(jnp.float32))
value, _ = jax.value_and_grad(call)(query)
infos = {{info.name: info.broken for info in ejk_ragged.backends()}}
explanation = ejk_ragged.explain(query, cache, cache)
lowered = jax.jit(jax.grad(call)).trace(query).lower(lowering_platforms=("cuda",)).as_text()
try:
    ejk_ragged.ragged_decode_attention(query, cache, cache, backend="pallas_triton")
except ValueError as error:
    message = str(error)
print(json.dumps([float(value), infos, explanation["cuda"].forward, explanation["cuda"].backward, message]))
"""
    value, infos, forward, backward, message = python(script)
    assert value == 2 * 4 * 16
    assert infos["xla"] is None
    without_triton, without_mosaic = (
        any(part in name or name.endswith("pallas") for name in MISSING[kind]) for part in ("triton", "mosaic")
    )
    assert (infos["pallas_triton"] is not None) == without_triton
    assert (infos["mosaic_gpu"] is not None) >= without_mosaic
    if without_triton:
        assert "this JAX has no jax.experimental.pallas.triton" in infos["pallas_triton"]
    if without_mosaic:
        needs = (
            "it needs JAX 0.11 (Python 3.12)" if jax.__version_info__ < (0, 11) else "it needs the Mosaic GPU backend of JAX 0.11"
        )
        assert f"{needs} or newer" in infos["mosaic_gpu"]
    able = "mosaic_gpu" if infos["mosaic_gpu"] is None else "xla"
    assert (forward, backward) == ((able, "xla") if without_triton else ("pallas_triton", "pallas_triton"))
    assert "backend 'pallas_triton' cannot do this call" in message


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """Folders that make the distribution of docs/plugin look installed when they are on the path."""
    source = pathlib.Path(__file__).parents[1] / "docs" / "plugin"
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in names.items())
        for group, names in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    return site, source


def test_somebody_elses_backend(plugin):
    """A distribution that this package does not know is listed, chosen where it can do the call, and otherwise passed over with
    its reason."""
    script = """
import json
import jax, jax.numpy as jnp
import ejk_ragged
from ejk_ragged.testing import CHECKS, verify

jax.config.update("jax_platforms", "cpu")
tokens, = [case for case in CHECKS if case.name == "tokens-window"]
query, cache = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 20, 2, 8))
int8 = {"key": cache.astype(jnp.int8), "value": cache.astype(jnp.int8), "key_scale": 1.0, "value_scale": 1.0}
floats, quantised = ejk_ragged.explain(query, cache, cache), ejk_ragged.explain(query, **int8)
try:
    ejk_ragged.ragged_decode_attention(query, **int8, backend="dense")
except ValueError as error:
    message = str(error)
print(json.dumps({
    "distribution": {info.name: info.distribution for info in ejk_ragged.backends()}["dense"],
    "wrong": [str(verdict) for verdict in verify(ejk_ragged.ragged_decode_attention, tokens.draw(poison=True)) if not verdict.ok],
    "floats": [floats["cpu"].forward, floats["cpu"].backward, floats["cpu"].passed_over["dense"]],
    "quantised": str(quantised).splitlines(),
    "message": message,
}))
"""
    said = python(script, *plugin)
    assert said["distribution"] == "ejk-ragged-dense"
    assert said["wrong"] == []
    assert said["floats"] == ["dense", "xla", "for gradients, it has no backward operation"]
    assert "        not dense: it takes no quantised caches, such as int8" in said["quantised"]
    want = (
        "backend 'dense' cannot do this call (B 2, T 3, S 20, heads 4:2, D 8, float32, int8 cache) on cpu: it takes no quantised "
        "caches, such as int8. Backends that can: "
    )
    assert said["message"][: len(want)] == want


def test_the_plug_in_is_gone_without_its_distribution(plugin):
    """The control experiment of the test above."""
    _, source = plugin
    script = "import json, ejk_ragged; print(json.dumps([info.name for info in ejk_ragged.backends()]))"
    assert "dense" not in python(script, source)
