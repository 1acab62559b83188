"""The benchmark as a user meets it: which rows are run in which variants, and the files that are left."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ejk_ragged.testing import Case

from . import bench, devices, rows, tables
from .inputs import TooLarge
from .machine import default_platform, Machine
from .progress import progress


SCALING = {
    "cpu": Case("scaling", 4, 4096, 32, 8, 128, "float32"),
    "elsewhere": Case("scaling", 16, 16384, 32, 8, 128, "bfloat16"),
}
PACKAGES = ("ejk-ragged", "jax", "jaxlib", "torch", "tokamax", "ejkernel", "flash-attn3-jax")


def default_rows() -> list[Case]:
    """The rows that suit this machine."""
    return rows.named(("cpu",) if default_platform() == "cpu" else ("shapes", "models"))


def new_seed() -> int:
    return int.from_bytes(os.urandom(3), "little")


def run(
    names: Sequence[str] | None = None,
    backends: Sequence[str] = (),
    dtype: str | None = None,
    tokens: Sequence[int] = (),
    cache_dtypes: Sequence[str] = (),
    scales: str = "row",
    grad: str | None = None,
    peers: bool = False,
    split: str | None = None,
    scaling: bool | None = None,
    seed: int | None = None,
    runs: int = 15,
    name: str | None = None,
    keep: Callable[[dict[str, Any]], Any] = lambda data: None,
) -> dict[str, Any]:
    """The whole benchmark, as data.

    A part that fails is named with the reason, and the others go on.

    Args:
        names: of rows or groups; None is what suits the platform, and the scaling with it.
        backends: names; none is the automatic choice.
        dtype: of all rows, instead of each row's own.
        tokens: also with so many query tokens a sequence: rows that are named, and some of those in a group.
        cache_dtypes: also with quantised caches, and with these and the tokens.
        scales: of the quantised caches, as in `Case`.
        grad: None, "also" for gradients beside the forward rows, "only" for gradients alone: of rows that are named, and of some of
            those in a group.
        peers: also measure other implementations.
        split: None, "also" for steps whose cache is split over all devices, or "only"; of rows as with `grad`.
        scaling: also measure how time follows live tokens and the cache's size.
        seed: of lengths and data; None draws one.
        runs: of each call.
        name: of the run, where a device has several that are to be kept.
        keep: called with the data after each part, that a run which is cut short leaves something.
    """
    began = time.monotonic()
    machine = Machine.here(copying=grad is not None)
    seed = new_seed() if seed is None else seed
    first = backends[0] if backends else None
    data: dict[str, Any] = {
        "name": name,
        "machine": dataclasses.asdict(machine),
        "versions": _versions(),
        "seed": seed,
        "runs": runs,
        "rows": [],
        "splits": [],
        "skipped": {},
        "failed": {},
        "tables": [],
        "took_seconds": 0.0,
    }

    def among(some):
        return lambda case: case.name in some or case.name in (names or ())

    cases: list[Case] = []
    for case in rows.named(names) if names else default_rows():
        plain = dataclasses.replace(case, dtype=dtype or case.dtype)
        cases += rows.variants(plain, tokens if among(rows.TOKEN_ROWS)(case) else (), cache_dtypes, scales)

    jobs: list[tuple[str, str, Callable[[], Any]]] = []
    forward = cases if "only" not in (grad, split) else []
    backward = filter(among(rows.GRADIENT_ROWS), cases) if grad else []
    for some, gradients in ((forward, False), (backward, True)):
        entrants = bench.candidates(machine.platform, backends or [None], peers, gradients)
        for case in some:
            work = functools.partial(bench.measure, case, machine, entrants, seed, runs, gradients)
            jobs.append((rows.label(case) + " gradient" * gradients, "rows", work))
    for case in filter(among(rows.SPLIT_ROWS), cases) if split else []:
        work = functools.partial(devices.measure, case, machine, jax.devices(), seed, first, runs)
        jobs.append((f"{rows.label(case)} split", "splits", work))
    if scaling or (scaling is None and names is None and split != "only"):
        base = SCALING["cpu" if machine.platform == "cpu" else "elsewhere"]
        jobs.append(("scaling", "scaling", functools.partial(bench.scaling, machine, base, seed, first, runs)))

    with progress(len(jobs)) as advance:
        for part, kind, work in jobs:
            advance(part)
            try:
                _add(data, kind, work())
            except TooLarge as error:
                data["skipped"][part] = str(error)
            except Exception as error:
                data["failed"][part] = bench.reason(error)
            data |= {"tables": tables.of(data), "took_seconds": round(time.monotonic() - began, 1)}
            keep(data)
    return data


def _add(data, kind, result):
    """One part's result in its place; a row with its time beside that of the same row without tokens and 8 bits."""
    if kind == "scaling":
        data["scaling"] = result
        return
    if kind == "rows":
        result["beside_plain"] = _beside_plain(data["rows"], result)
        if not sys.stderr.isatty():
            print("   ", tables.line(result), file=sys.stderr, flush=True)
    data[kind].append(result)


def _beside_plain(before, row) -> float | None:
    same = ("row", "direction", "differentiated", "batch")
    plain = next((one for one in before if not one["variant"] and all(one[name] == row[name] for name in same)), None)
    ours, theirs = (tables.seconds_of(one) for one in (row, plain)) if plain and row["variant"] else (None, None)
    return ours / theirs if ours and theirs else None


def failed(data: dict[str, Any]) -> bool:
    """Whether anything of ours was wrong or failed."""
    ours = [found for row in data["rows"] for found in row["candidates"] if found["ours"]]
    ours += [way for row in data["splits"] for way in row["ways"].values()]
    ours += data.get("scaling", {}).get("left_out", {}).values()
    return bool(data["failed"]) or any("refused" in found for found in ours)


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# ---------------------------------------------------------------------------------------------------------------------------
# Files


def write(data: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """The data, as JSON. The file is whole at any moment: old or new."""
    folder.mkdir(parents=True, exist_ok=True)
    file = _stem(data, folder).with_suffix(".json")
    new = file.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    os.replace(new, file)
    return file


def draw(data: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """The pictures, where matplotlib is installed."""
    try:
        from . import plots
    except ImportError:
        return []
    return plots.draw(data, _stem(data, folder))


def _stem(data, folder) -> pathlib.Path:
    """What its files begin with: the device's name, and the run's."""
    text = " ".join(filter(None, (data["machine"]["device"], data["name"]))).lower()
    return folder / "-".join("".join(c if c.isalnum() else " " for c in text).split())
