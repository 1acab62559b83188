"""The benchmark as a user meets it: which cases are run in which variants, and the files that are left."""

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
    """What is measured.

    Attributes:
        names: of cases or groups; None is what suits the platform, and the scaling with it.
        backends: names; none is the automatic choice.
        dtype: of all cases, instead of each case's own.
        tokens: also with so many query tokens a sequence: cases that are named, and some of those in a group.
        cache_dtypes: also with quantised caches, and with these and the tokens.
        scales: of the quantised caches, as in `Case`.
        page_sizes: all of this also with the cache in pages of so many rows; 0 says nothing, as padded caches are measured anyway.
        grad: None, "also" for gradients beside the forward steps, "only" for gradients alone: of cases that are named, and of some
            of those in a group.
        peers: also measure other implementations.
        split: None, "also" for steps whose cache is split over all devices, or "only"; of cases as with `grad`.
        scaling: also measure how time follows live tokens and the cache's size.
        seed: of lengths and data.
        runs: of each call.
        name: of the run, where a device has several that are to be kept.
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
        """Whether a case is one of `some`, or is named."""
        return lambda case: case.name in some or case.name in (self.names or ())


@dataclasses.dataclass(frozen=True)
class Part:
    """One measurement: what it is called, in which list of the data its result stands, and what measures it."""

    name: str
    kind: str
    work: Callable[[], Any]


def default_cases() -> list[Case]:
    """The cases that suit this machine."""
    return cases.named(("cpu",) if default_platform() == "cpu" else ("shapes", "models"))


def run(keep: Callable[[dict[str, Any]], Any] = lambda data: None, **asked: Any) -> dict[str, Any]:
    """The whole benchmark, as data.

    A part that fails is named with the reason, and the others go on.

    Args:
        keep: called with the data after each part, that a run which is cut short leaves something.
        asked: as `Asked` has it.
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
    """Every case that is asked for, in every variant."""
    found: list[Case] = []
    for case in cases.named(ask.names) if ask.names else default_cases():
        plain = dataclasses.replace(case, dtype=ask.dtype or case.dtype)
        tokens = ask.tokens if ask.among(cases.TOKEN_CASES)(case) else ()
        found += cases.variants(plain, tokens, ask.cache_dtypes, ask.scales, ask.page_sizes)
    return found


def _of_cases(ask: Asked, machine: Machine) -> Iterator[Part]:
    """Forward steps, and gradients."""
    every = _variants(ask)
    forward = every if "only" not in (ask.grad, ask.split) else []
    backward = filter(ask.among(cases.GRADIENT_CASES), every) if ask.grad else []
    for some, gradients in ((forward, False), (backward, True)):
        entrants = bench.candidates(machine.platform, ask.backends or [None], ask.peers, gradients)
        for case in some:
            work = functools.partial(bench.measure, case, machine, entrants, ask.seed, ask.runs, gradients)
            yield Part(cases.label(case) + " gradient" * gradients, "cases", work)


def _of_splits(ask: Asked, machine: Machine) -> Iterator[Part]:
    """Steps whose cache, which is padded, is split over all devices."""
    first = ask.backends[0] if ask.backends else None
    for case in filter(ask.among(cases.SPLIT_CASES), _variants(ask)) if ask.split else []:
        if case.page_size is None:
            work = functools.partial(devices.measure, case, machine, jax.devices(), ask.seed, first, ask.runs)
            yield Part(f"{cases.label(case)} split", "splits", work)


def _of_scaling(ask: Asked, machine: Machine) -> Iterator[Part]:
    """How time follows sizes: where it is asked for, and with what suits the platform."""
    first = ask.backends[0] if ask.backends else None
    if ask.scaling or (ask.scaling is None and ask.names is None and ask.split != "only"):
        base = SCALING["cpu" if machine.platform == "cpu" else "elsewhere"]
        yield Part("scaling", "scaling", functools.partial(bench.scaling, machine, base, ask.seed, first, ask.runs))


def _measure(part: Part, data: dict[str, Any]):
    """Puts the result of one part, or the reason why there is none, in its place."""
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
    """Its time beside that of the same case without tokens and 8 bits, or, in pages, of the same variant without pages."""
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
    """Whether anything of ours was wrong or failed."""
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
