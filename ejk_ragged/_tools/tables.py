"""The results of the benchmark as tables and lines of text. The terminal and the documentation show the same tables."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import devices
from .report import table as plain_table


# The tables of cases, by direction and kind: each with its title.
TITLES = {
    ("forward", "plain"): "Decode steps",
    ("forward", "tokens"): "Several query tokens",
    ("forward", "cache"): "Quantised caches",
    ("forward", "pages"): "Caches in pages",
    ("gradient", "plain"): "Gradients",
    ("gradient", "tokens"): "Gradients, several query tokens",
    ("gradient", "cache"): "Gradients to the query, quantised caches",
    ("gradient", "pages"): "Gradients to the query, caches in pages",
}
PICTURES = {("forward", "plain"): "forward", ("gradient", "plain"): "gradient"} | {
    ("forward", kind): kind for kind in ("tokens", "cache", "pages")
}


def of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables that have rows. Each has a title, the kind of its picture, columns, rows and notes."""
    tables = [_table(data, direction, kind) for direction, kind in TITLES]
    return [made for made in (*tables, _split_table(data)) if made]


def kind_of(case) -> str:
    """The kind of the table that a case belongs to."""
    if case["page_size"]:
        return "pages"
    return "cache" if case["cache_dtype"] else "tokens" if case["variant"] else "plain"


def seconds_of(case) -> float | None:
    """The time from which the fraction of our first candidate is computed, or None."""
    found = _first(case)
    return found["timings"][_clocked(case)]["seconds"] if "timings" in found else None


def fraction_of(case) -> float | None:
    """The fraction of our first candidate, or None."""
    return _first(case).get("fraction")


def line(case) -> str:
    """A case as one line: the time of each candidate, or that it was not timed."""
    return ", ".join(f"{c['name']} {_time(_whole(case, c)) if 'timings' in c else 'not timed'}" for c in case["candidates"])


def _first(case) -> Mapping[str, Any]:
    return next((c for c in case["candidates"] if c["ours"]), {})


def _clocked(case) -> str:
    return "backward" if case["direction"] == "gradient" else "forward"


def _whole(case, found) -> float:
    """The time that a user waits for. Ratios to peers are ratios of this time."""
    return found["timings"][case["direction"]]["seconds"]


def _table(data, direction, kind) -> dict[str, Any] | None:
    shown = [case for case in data["cases"] if case["direction"] == direction and kind_of(case) == kind]
    if not shown:
        return None
    times = ["forward + backward", "backward"] if direction == "gradient" else ["time"]
    compared = [column for column in COMPARED if any(case[column.key] is not None for case in shown)]
    others = _others(shown)
    return {
        "title": _title(data["machine"], direction, kind, compared, others),
        "picture": PICTURES.get((direction, kind)),
        "columns": ["case", "MB", *times, "fraction", *(column.name for column in compared), *others],
        "rows": [_cells(case, len(times), compared, others) for case in shown],
        "notes": _grouped([note for case in shown for note in _notes(case)], len(shown)),
    }


class Column(NamedTuple):
    """A column that compares a case with another case: its name, its key in the data, its format, and its words in the title."""

    name: str
    key: str
    show: Callable[[Any], str]
    title: str


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _fraction(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.3f}"


PLAIN = "; beside plain: by the time of the same case with one token and a cache of the query's dtype"
COMPARED = (
    Column("beside plain", "beside_plain", _ratio, PLAIN),
    Column("padded", "padded_fraction", _fraction, "; padded: the fraction of the same call on a padded cache"),
    Column("beside padded", "beside_padded", _ratio, "; beside padded: by the time of that call"),
)


def _others(shown) -> list[str]:
    """The candidates that were timed in at least one case, without our first candidate."""
    names = dict.fromkeys(c["name"] for case in shown for c in case["candidates"] if "timings" in c)
    return [name for name in names if name != _first(shown[0]).get("name")]


def _title(machine, direction, kind, compared, others) -> str:
    copying = direction == "gradient" and kind in ("plain", "tokens")
    bandwidth = f"{machine['copy'] / 1e9:.0f} GB/s copying" if copying else f"{machine['read'] / 1e9:.0f} GB/s reading"
    title = f"{TITLES[direction, kind]} on {machine['device']}; fraction of {bandwidth} memory, measured in the same run"
    return title + "".join(column.title for column in compared) + ("; others by their times beside ours" if others else "")


def _cells(case, times: int, compared, others) -> list[str]:
    """One line of a table."""
    found = {c["name"]: c for c in case["candidates"]}
    cells = [_label(case), f"{case['moved_bytes'] / 1e6:.0f}", *_ours(case, _first(case), times)]
    return cells + [column.show(case[column.key]) for column in compared] + [_theirs(case, found.get(name)) for name in others]


def _notes(case) -> list[tuple[str, str, str]]:
    """The candidates that were not timed in a case, with the reasons, and whether the batch was reduced."""
    label = _label(case)
    return [(label, c["name"], c["refused"]) for c in case["candidates"] if "refused" in c] + _fewer(label, case)


def _label(case) -> str:
    return " ".join(filter(None, (case["case"], case["variant"])))


def _fewer(label, case) -> list[tuple[str, str, str]]:
    batch, asked = case["batch"], case["batch_asked"]
    return [] if batch == asked else [(label, "", f"B {batch} sequences instead of {asked}, to fit into memory")]


def _split_table(data) -> dict[str, Any] | None:
    """The table of split caches: for each way to split, the time, and how many times as fast as one device it is."""
    shown = data["splits"]
    if not shown:
        return None
    names = [devices.ONE, *devices.SPLITS]
    body, notes = [], []
    for case in shown:
        label = _label(case)
        body.append([label, f"{case['live_bytes'] / 1e6:.0f}", *(_way(case["ways"][name]) for name in names)])
        reasons = {name: way.get("refused", way.get("cannot")) for name, way in case["ways"].items()}
        notes += [(label, name, reason) for name, reason in reasons.items() if reason] + _fewer(label, case)
    return {
        "title": f"Decode steps on {shown[0]['devices']} of {data['machine']['device']}, the cache split",
        "picture": None,
        "columns": ["case", "MB", *names],
        "rows": body,
        "notes": _grouped(notes, len(shown)),
    }


def _way(found) -> str:
    if "seconds" not in found:
        return "-"
    return _time(found["seconds"]) + (f" ({_ratio(found['speedup'])})" if "speedup" in found else "")


def _ours(case, found, times) -> list[str]:
    """The cells of our first candidate: one or two times, and the fraction."""
    if "timings" not in found:
        return ["-"] * (times + 1)
    seconds = [_whole(case, found), found["timings"][_clocked(case)]["seconds"]][-times:]
    return [*map(_time, seconds), _fraction(found["fraction"])]


def _theirs(case, found) -> str:
    if found is None or "timings" not in found:
        return "-"
    return _time(_whole(case, found)) if found["ratio"] is None else _ratio(found["ratio"])


def _time(seconds: float) -> str:
    scale, name = (1e6, "us") if seconds < 1e-2 else (1e3, "ms")
    return f"{seconds * scale:.{1 if seconds * scale < 1000 else 0}f} {name}"


def _grouped(notes: Sequence[tuple[str, str, str]], count: int) -> list[str]:
    """Joins notes, each of (case, candidate, reason), on `count` cases.

    Notes that differ only in the case are joined first. Then notes are joined that differ only in the candidate.
    """
    cases: dict[tuple[str, str], list[str]] = {}
    for case, who, why in notes:
        cases.setdefault((who, why), []).append(case)
    meant: dict[tuple[str, str], list[str]] = {}
    for (who, why), which in cases.items():
        where = "all cases" if len(which) == count > 1 else ", ".join(which)
        meant.setdefault((why, where), []).append(who)
    return [": ".join(filter(None, (", ".join(who), f"{why} ({where})"))) for (why, where), who in meant.items()]


def text(data: Mapping[str, Any]) -> str:
    """The results as text."""
    parts = []
    for made in data["tables"]:
        parts += [made["title"], plain_table([made["columns"], *made["rows"]]), *[f"  {note}" for note in made["notes"]], ""]
    for word in ("skipped", "failed"):
        parts += [f"  {word} {name}: {why}" for name, why in data[word].items()]
    parts += _scaling_lines(data.get("scaling"))
    parts.append(f"seed {data['seed']}, {data['took_seconds']:.0f} s")
    return "\n".join(parts)


def show(data: dict[str, Any]):
    """Prints the results. A terminal shows tables in colour if rich is installed."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            return _show_rich(data)
    return print(text(data))


def _show_rich(data):
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for made in data["tables"]:
        drawn = Table(title=made["title"], title_justify="left", caption="\n".join(made["notes"]), caption_justify="left")
        for i, column in enumerate(made["columns"]):
            drawn.add_column(column, justify="left" if i == 0 else "right")
        for row in made["rows"]:
            drawn.add_row(*row)
        console.print(drawn)
    console.print(text(data | {"tables": []}), highlight=False)


def _scaling_lines(scaling) -> list[str]:
    if not scaling:
        return []
    lines = [f"Time against live tokens, and against the cache's size ({scaling['problem']})"]
    for name, unit in (("live", "live_tokens"), ("size", "seq_len")):
        points = [[f"{point[unit]}", _time(point["seconds"])] for point in scaling[name]]
        lines.append(f"  {unit.replace('_', ' ')}: " + ", ".join(f"{x}: {y}" for x, y in points))
    reasons = {name: found.get("refused", found.get("cannot")) for name, found in scaling["left_out"].items()}
    return [*lines, *(f"  left out {name}: {why}" for name, why in reasons.items()), ""]
