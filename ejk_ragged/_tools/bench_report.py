"""The benchmark as a user meets it: which rows are run, progress, tables, and the files that are left."""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from ejk_ragged.testing import Case

from . import bench, devices
from .report import here
from .report import table as plain_table
from .rows import CPU_ROWS, ROWS


SHAPES, MODELS = ROWS[:10], ROWS[10:]
GROUPS = {"shapes": SHAPES, "models": MODELS, "cpu": CPU_ROWS}
GRADIENT_ROWS = {"full", "ragged", "mha", "cap", "skew", "cpu-full"}
SPLIT_ROWS = {"full", "one", "cpu-full"}
SCALING = {
    "cpu": Case("scaling", 4, 4096, 32, 8, 128, "float32"),
    "elsewhere": Case("scaling", 16, 16384, 32, 8, 128, "bfloat16"),
}
PACKAGES = ("ejk-ragged", "jax", "jaxlib", "torch", "tokamax", "ejkernel", "flash-attn3-jax")


def named_rows(names: Sequence[str]) -> list[Case]:
    """The rows of names and of groups of names.

    Raises:
        ValueError: a name that is neither.
    """
    known = {row.name: [row] for row in (*ROWS, *CPU_ROWS)} | GROUPS
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(unknown)} not known; choose from {', '.join(known)}")
    return list(dict.fromkeys(row for name in names for row in known[name]))


def default_rows() -> list[Case]:
    """The rows that suit this machine."""
    return named_rows(("cpu",) if here() == "cpu" else ("shapes", "models"))


def new_seed() -> int:
    return int.from_bytes(os.urandom(3), "little")


def run(
    rows: Sequence[str] | None = None,
    backends: Sequence[str] = (),
    dtype: str | None = None,
    grad: str | None = None,
    peers: bool = False,
    split: str | None = None,
    scaling: bool | None = None,
    seed: int | None = None,
    runs: int = 15,
) -> dict[str, Any]:
    """The whole benchmark, as data.

    Args:
        rows: names of rows or groups; None is what suits the platform, and the scaling with it.
        backends: names; none is the automatic choice.
        dtype: of all rows, instead of each row's own.
        grad: None, "also" for gradients beside the forward rows, "only" for gradients alone: of rows that are named, and of some of
            those in a group.
        peers: also measure other implementations.
        split: None, "also" for steps whose cache is split over all devices, or "only"; of rows as with `grad`.
        scaling: also measure how time follows live tokens and the cache's size.
        seed: of lengths and data; None draws one.
        runs: of each call.
    """
    began = time.monotonic()
    machine = bench.Machine.here(copying=grad is not None)
    seed = new_seed() if seed is None else seed
    cases = named_rows(rows) if rows else default_rows()
    only = "only" in (grad, split)
    scaling = rows is None and split != "only" if scaling is None else scaling

    def among(names):
        return [case for case in cases if case.name in names or case.name in (rows or ())]

    jobs = [(case, False) for case in cases if not only]
    jobs += [(case, True) for case in among(GRADIENT_ROWS) if grad]
    splits = among(SPLIT_ROWS) if split else []
    data: dict[str, Any] = {
        "machine": dataclasses.asdict(machine),
        "versions": _versions(),
        "seed": seed,
        "runs": runs,
        "rows": [],
        "splits": [],
        "skipped": {},
    }
    with progress(len(jobs) + len(splits) + bool(scaling)) as advance:
        for case, gradients in jobs:
            advance(f"{case.name}{' gradient' if gradients else ''}")
            case = dataclasses.replace(case, dtype=dtype or case.dtype)
            entrants = bench.candidates(machine.platform, backends or [None], peers, gradients)
            try:
                data["rows"].append(bench.measure(case, machine, entrants, seed, runs, gradients))
                if not sys.stderr.isatty():  # what a run that is cut short has found
                    print("   ", _line(data["rows"][-1]), file=sys.stderr, flush=True)
            except ValueError as error:  # too large, and the like
                data["skipped"][case.name] = str(error)
        for case in splits:
            advance(f"{case.name} split")
            case = dataclasses.replace(case, dtype=dtype or case.dtype)
            try:
                data["splits"].append(devices.measure(case, machine, jax.devices(), seed, (backends or [None])[0], runs))
            except ValueError as error:
                data["skipped"][f"{case.name} split"] = str(error)
        if scaling:
            advance("scaling")
            base = SCALING["cpu" if machine.platform == "cpu" else "elsewhere"]
            data["scaling"] = bench.scaling(machine, base, seed, backends[0] if backends else None, runs)
    data["tables"] = [made for made in (_table(data, "forward"), _table(data, "gradient"), _split_table(data)) if made]
    data["took_seconds"] = round(time.monotonic() - began, 1)
    return data


def _line(row) -> str:
    """A row in a line: everyone's time, or that there is none."""
    gradients = row["direction"] == "gradient"
    return ", ".join(f"{c['name']} {_theirs(c, gradients) if 'timings' in c else 'not timed'}" for c in row["candidates"])


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Gives a function to be called with the name of each of `total` parts when it begins: a bar on a terminal, lines elsewhere,
    on the error stream."""
    done = itertools.count()
    bar = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
    if bar is None:
        yield lambda text: print(f"[{next(done) + 1}/{total}] {text}", file=sys.stderr, flush=True)
        return
    with bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, completed=next(done), description=text)


# ---------------------------------------------------------------------------------------------------------------------------
# Showing


def _table(data, direction) -> dict[str, Any] | None:
    """Title, columns, rows and notes: the same table on a terminal and in the documentation."""
    rows = [row for row in data["rows"] if row["direction"] == direction]
    if not rows:
        return None
    names = list(dict.fromkeys(c["name"] for row in rows for c in row["candidates"] if "timings" in c))
    first = next((c["name"] for c in rows[0]["candidates"] if c["ours"]), None)
    others = [name for name in names if name != first]
    gradient = direction == "gradient"
    machine = data["machine"]
    bandwidth, kind = (machine["copy"], "copying") if gradient else (machine["read"], "reading")
    columns = ["row", "MB", "time", "10-90 %", "GB/s", "fraction", *others]
    if gradient:
        columns[2:3] = ["forward + backward", "backward"]
    body, notes = [], []
    for row in rows:
        found = {c["name"]: c for c in row["candidates"]}
        body.append([row["row"], f"{row['moved_bytes'] / 1e6:.0f}", *_ours(found.get(first), gradient)])
        body[-1] += [_theirs(found.get(name), gradient) for name in others]
        notes += [f"{row['row']}: {name}: {c['refused']}" for name, c in found.items() if "refused" in c]
        notes += _fewer(row, int(row["problem"].split(",")[0][2:]))
    what = "Gradients" if gradient else "Decode steps"
    title = f"{what} on {machine['device']}; fraction of {bandwidth / 1e9:.0f} GB/s {kind} memory, measured in the same run"
    return {"title": title, "picture": direction, "columns": columns, "rows": body, "notes": _grouped(notes, len(rows))}


def _fewer(row, batch) -> list[str]:
    asked = row["batch_asked"]
    return [] if batch == asked else [f"{row['row']}: B {batch} sequences instead of {asked}, to fit into memory"]


def _split_table(data) -> dict[str, Any] | None:
    """Likewise: a time for each way to split the cache, and how many times as fast as one device that is."""
    rows = data["splits"]
    if not rows:
        return None
    names = [devices.ONE, *devices.SPLITS]
    title = f"Decode steps on {rows[0]['devices']} of {data['machine']['device']}, the cache split"
    body, notes = [], []
    for row in rows:
        body.append([row["row"], f"{row['live_bytes'] / 1e6:.0f}", *(_way(row["ways"][name]) for name in names)])
        reasons = {name: way.get("refused", way.get("cannot")) for name, way in row["ways"].items()}
        notes += [f"{row['row']}: {name}: {reason}" for name, reason in reasons.items() if reason]
        notes += _fewer(row, row["batch"])
    return {"title": title, "picture": None, "columns": ["row", "MB", *names], "rows": body, "notes": _grouped(notes, len(rows))}


def _way(found) -> str:
    if "seconds" not in found:
        return "-"
    return _time(found["seconds"]) + (f" ({found['speedup']:.2f}x)" if "speedup" in found else "")


def _ours(found, gradient) -> list[str]:
    if found is None or "timings" not in found:
        return ["-"] * (5 if gradient else 4)
    timing = found["timings"]["backward" if gradient else "forward"]
    spread = f"{_time(timing['time']['p10'], unit=False)}-{_time(timing['time']['p90'])}"
    cells = [_time(timing["seconds"]), spread, f"{found['bytes_per_second'] / 1e9:.0f}", f"{found['fraction']:.3f}"]
    return [_time(found["timings"]["gradient"]["seconds"]), *cells] if gradient else cells


def _theirs(found, gradient) -> str:
    if found is None or "timings" not in found:
        return "-"
    seconds = _time(found["timings"]["gradient" if gradient else "forward"]["seconds"])
    return seconds if found["ratio"] is None else f"{seconds} ({found['ratio']:.2f}x)"


def _time(seconds: float, unit: bool = True) -> str:
    scale, name = (1e6, "us") if seconds < 1e-2 else (1e3, "ms")
    text = f"{seconds * scale:.{1 if seconds * scale < 1000 else 0}f}"
    return f"{text} {name}" if unit else text


def _grouped(notes: Sequence[str], count: int) -> list[str]:
    """Notes on `count` rows; those that differ in the row only, as one."""
    rows: dict[str, list[str]] = {}
    for note in notes:
        row, rest = note.split(": ", 1)
        rows.setdefault(rest, []).append(row)
    return [f"{rest} ({'all rows' if len(which) == count > 1 else ', '.join(which)})" for rest, which in rows.items()]


def show(data: dict[str, Any]) -> str:
    """Tables for reading, as text."""
    parts = []
    for made in data["tables"]:
        parts += [made["title"], plain_table([made["columns"], *made["rows"]]), *[f"  {note}" for note in made["notes"]], ""]
    parts += [f"  skipped {name}: {why}" for name, why in data["skipped"].items()]
    parts += _show_scaling(data.get("scaling"))
    parts.append(f"seed {data['seed']}, {data['took_seconds']:.0f} s")
    return "\n".join(parts)


def print_rich(data: dict[str, Any]) -> bool:
    """Prints the tables with rich, where it is installed and someone watches."""
    if not sys.stdout.isatty():
        return False
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    console = Console()
    for made in data["tables"]:
        drawn = Table(title=made["title"], title_justify="left", caption="\n".join(made["notes"]), caption_justify="left")
        for i, column in enumerate(made["columns"]):
            drawn.add_column(column, justify="left" if i == 0 else "right")
        for row in made["rows"]:
            drawn.add_row(*row)
        console.print(drawn)
    console.print(show(data | {"tables": []}), highlight=False)
    return True


def _show_scaling(scaling) -> list[str]:
    if not scaling:
        return []
    lines = [f"Time against live tokens, and against the cache's size ({scaling['problem']})"]
    for name, unit in (("live", "live_tokens"), ("size", "seq_len")):
        points = [[f"{point[unit]}", _time(point["seconds"])] for point in scaling[name]]
        lines.append(f"  {unit.replace('_', ' ')}: " + ", ".join(f"{x}: {y}" for x, y in points))
    return [*lines, ""]


def slug(data: dict[str, Any]) -> str:
    """The device's name, as the name of a file."""
    name = data["machine"]["device"].lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def write(data: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes DEVICE.json and, where matplotlib is installed, the pictures; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{slug(data)}.json"
    file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    try:
        from . import plots
    except ImportError:
        return [file]
    return [file, *plots.draw(data, folder / slug(data))]
