"""The benchmark as a user runs it: the cases and their variants, and the files that it writes."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from ejk_ragged.testing import Case

from . import bench, cases, devices, tables
from .inputs import TooLarge
from .machine import default_platform, Machine
from .progress import progress


SCALING = {
    "cpu": Case("scaling", 4, 4096, 32, 8, 128, "float32"),
    "elsewhere": Case("scaling", 16, 16384, 32, 8, 128, "bfloat16"),
}
PACKAGES = ("ejk-ragged", "jax", "jaxlib", "torch", "tokamax", "ejkernel", "flash-attn3-jax", "fa3-fwd", "flashinfer-python")


def new_seed() -> int:
    return int.from_bytes(os.urandom(3), "little")


@dataclasses.dataclass(frozen=True)
class Asked:
    """The parts of the benchmark that the user asks for.

    Attributes:
        names: names of cases or groups. None means the cases that suit the platform, and the scaling.
        backends: names of backends. An empty sequence means the automatic choice.
        dtype: dtype of all cases. None means each case's own.
        tokens: numbers of query tokens per sequence to measure, in addition to one. They apply to all named cases, and to some
            cases of a group.
        cache_dtypes: dtypes of quantised caches to measure, in addition, with one token and with `tokens`.
        scales: scales of the quantised caches, as in `Case`.
        page_sizes: page sizes to measure, in addition to padded caches. A size of 0 has no effect.
        grad: None, "also" to measure gradients in addition to forward steps, or "only" to measure gradients alone. It applies to
            all named cases, and to some cases of a group.
        peers: whether to measure other implementations, too.
        split: None, "also" to measure caches that are split over all devices, too, or "only". It applies to the same cases as
            `grad`.
        scaling: whether to measure how time follows live tokens and the cache's size. None: only if `names` is None.
        seed: seed of lengths and data.
        runs: number of runs of each call.
        name: name of the run, or None. Files of runs with different names do not replace each other.
    """

    names: Sequence[str] | None = None
    backends: Sequence[str] = ()
    dtype: str | None = None
    tokens: Sequence[int] = ()
    cache_dtypes: Sequence[str] = ()
    scales: str = "row"
    page_sizes: Sequence[int] = ()
    grad: str | None = None
    peers: bool = False
    split: str | None = None
    scaling: bool | None = None
    seed: int = dataclasses.field(default_factory=new_seed)
    runs: int = 15
    name: str | None = None

    def among(self, some: set[str]) -> Callable[[Case], bool]:
        """A function that says whether a case is in `some` or is named by the user."""
        return lambda case: case.name in some or case.name in (self.names or ())


@dataclasses.dataclass(frozen=True)
class Part:
    """One measurement: its name, the list of the data for its result, and the function that measures."""

    name: str
    kind: str
    work: Callable[[], Any]


def default_cases() -> list[Case]:
    """The cases that suit this machine."""
    return cases.named(("cpu",) if default_platform() == "cpu" else ("shapes", "models"))


def run(keep: Callable[[dict[str, Any]], Any] = lambda data: None, **asked: Any) -> dict[str, Any]:
    """Runs the whole benchmark, and returns the data.

    If a part fails, the data have the reason, and the other parts go on.

    Args:
        keep: a function that is called with the data after each part, so that a run that is cut short leaves its results.
        asked: the fields of `Asked`.
    """
    ask, began = Asked(**asked), time.monotonic()
    machine = Machine.here(copying=ask.grad is not None)
    data = _nothing_yet(ask, machine)
    parts = [*_of_cases(ask, machine), *_of_splits(ask, machine), *_of_scaling(ask, machine)]
    with progress(len(parts)) as advance:
        for part in parts:
            advance(part.name)
            _measure(part, data)
            data |= {"tables": tables.of(data), "took_seconds": round(time.monotonic() - began, 1)}
            keep(data)
    return data


def _nothing_yet(ask: Asked, machine: Machine) -> dict[str, Any]:
    """The data before anything is measured."""
    known = {"name": ask.name, "machine": dataclasses.asdict(machine), "versions": _versions(), "seed": ask.seed, "runs": ask.runs}
    return known | {"cases": [], "splits": [], "skipped": {}, "failed": {}, "tables": [], "took_seconds": 0.0}


def _variants(ask: Asked) -> list[Case]:
    """The cases that the user asks for, each in all its variants."""
    found: list[Case] = []
    for case in cases.named(ask.names) if ask.names else default_cases():
        plain = dataclasses.replace(case, dtype=ask.dtype or case.dtype)
        tokens = ask.tokens if ask.among(cases.TOKEN_CASES)(case) else ()
        found += cases.variants(plain, tokens, ask.cache_dtypes, ask.scales, ask.page_sizes)
    return found


def _of_cases(ask: Asked, machine: Machine) -> Iterator[Part]:
    """The parts that measure forward steps, and then those that measure gradients."""
    every = _variants(ask)
    forward = every if "only" not in (ask.grad, ask.split) else []
    backward = filter(ask.among(cases.GRADIENT_CASES), every) if ask.grad else []
    for some, gradients in ((forward, False), (backward, True)):
        entrants = bench.candidates(machine.platform, ask.backends or [None], ask.peers, gradients)
        for case in some:
            work = functools.partial(bench.measure, case, machine, entrants, ask.seed, ask.runs, gradients)
            yield Part(cases.label(case) + " gradient" * gradients, "cases", work)


def _of_splits(ask: Asked, machine: Machine) -> Iterator[Part]:
    """The parts that measure a padded cache that is split over all devices."""
    first = ask.backends[0] if ask.backends else None
    for case in filter(ask.among(cases.SPLIT_CASES), _variants(ask)) if ask.split else []:
        if case.page_size is None:
            work = functools.partial(devices.measure, case, machine, jax.devices(), ask.seed, first, ask.runs)
            yield Part(f"{cases.label(case)} split", "splits", work)


def _of_scaling(ask: Asked, machine: Machine) -> Iterator[Part]:
    """The part that measures how time follows sizes, if there is one."""
    first = ask.backends[0] if ask.backends else None
    if ask.scaling or (ask.scaling is None and ask.names is None and ask.split != "only"):
        base = SCALING["cpu" if machine.platform == "cpu" else "elsewhere"]
        yield Part("scaling", "scaling", functools.partial(bench.scaling, machine, base, ask.seed, first, ask.runs))


def _measure(part: Part, data: dict[str, Any]):
    """Measures one part, and adds the result to the data, or the reason why there is none."""
    try:
        result = part.work()
        if part.kind == "scaling":
            data["scaling"] = result
            return
        if part.kind == "cases":
            result |= _beside(data["cases"], result)
            if not sys.stderr.isatty():
                print("   ", tables.line(result), file=sys.stderr, flush=True)
        data[part.kind].append(result)
    except TooLarge as error:
        data["skipped"][part.name] = str(error)
    except Exception as error:
        data["failed"][part.name] = bench.reason(error)


def _beside(before, result) -> dict[str, Any]:
    """The time of a variant, divided by the time of the plain case. For a cache in pages, divided by that of the padded cache."""
    alike = ("case", "direction", "differentiated", "batch")
    variant = ("num_tokens", "cache_dtype")  # all quantised caches of a run have the same scales
    in_pages = result["page_size"] is not None
    same = lambda one, names: all(one[name] == result[name] for name in names)
    padded = next((one for one in before if one["page_size"] is None and same(one, alike + variant)), None) if in_pages else None
    plain = next((one for one in before if not one["variant"] and same(one, alike)), None) if not in_pages else None
    return {
        "beside_plain": _ratio(result, plain) if result["variant"] else None,
        "beside_padded": _ratio(result, padded),
        "padded_fraction": None if padded is None else tables.fraction_of(padded),
    }


def _ratio(result, other) -> float | None:
    ours, theirs = (None if one is None else tables.seconds_of(one) for one in (result, other))
    return ours / theirs if ours and theirs else None


def failed(data: dict[str, Any]) -> bool:
    """Whether a result of this package was wrong, or a part failed."""
    ours = [found for case in data["cases"] for found in case["candidates"] if found["ours"]]
    ours += [way for case in data["splits"] for way in case["ways"].values()]
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
    """Writes the data as JSON. Readers see the old file or the new file, and never a part of one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = _stem(data, folder).with_suffix(".json")
    new = file.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    os.replace(new, file)
    return file


def draw(data: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws the pictures if matplotlib is installed. Returns their files."""
    try:
        from . import plots
    except ImportError:
        return []
    return plots.draw(data, _stem(data, folder))


def _stem(data, folder) -> pathlib.Path:
    """The beginning of the names of a run's files: the name of the device, and the name of the run."""
    text = " ".join(filter(None, (data["machine"]["device"], data["name"]))).lower()
    return folder / "-".join("".join(c if c.isalnum() else " " for c in text).split())
