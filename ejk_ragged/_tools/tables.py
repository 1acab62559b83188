"""What the benchmark has found, for reading: the tables, the same on a terminal and in the documentation, and lines of text."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import devices
from .report import table as plain_table


# The tables of rows, by direction and kind: each with its title, or those of its rows that no variant has.
TITLES = {
    ("forward", "plain"): "Decode steps",
    ("forward", "tokens"): "Several query tokens",
    ("forward", "cache"): "Quantised caches",
    ("gradient", "plain"): "Gradients",
    ("gradient", "tokens"): "Gradients, several query tokens",
    ("gradient", "cache"): "Gradients to the query, quantised caches",
}


def of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Title, the kind of the picture that goes with it, columns, rows and notes of each table that has rows."""
    tables = [_table(data, direction, kind) for direction, kind in TITLES]
    return [made for made in (*tables, _split_table(data)) if made]


def kind_of(row) -> str:
    """In which of the tables a row stands."""
    return "cache" if row["cache_dtype"] else "tokens" if row["variant"] else "plain"


def seconds_of(row) -> float | None:
    """Of our first candidate: the time that its fraction is of."""
    found = next((c for c in row["candidates"] if c["ours"]), {})
    return found["timings"][_clocked(row)]["seconds"] if "timings" in found else None


def line(row) -> str:
    """A row in a line: everyone's time, or that there is none."""
    return ", ".join(f"{c['name']} {_time(_whole(row, c)) if 'timings' in c else 'not timed'}" for c in row["candidates"])


def _clocked(row) -> str:
    return "backward" if row["direction"] == "gradient" else "forward"


def _whole(row, found) -> float:
    """What users wait for, and what ratios to peers are of."""
    return found["timings"][row["direction"]]["seconds"]


def _table(data, direction, kind) -> dict[str, Any] | None:
    rows = [row for row in data["rows"] if row["direction"] == direction and kind_of(row) == kind]
    if not rows:
        return None
    names = list(dict.fromkeys(c["name"] for row in rows for c in row["candidates"] if "timings" in c))
    first = next((c["name"] for c in rows[0]["candidates"] if c["ours"]), None)
    others = [name for name in names if name != first]
    gradient, beside = direction == "gradient", any(row["beside_plain"] for row in rows)
    copying = gradient and kind != "cache"
    times = ["forward + backward", "backward"] if gradient else ["time"]
    body, notes = [], []
    for row in rows:
        found = {c["name"]: c for c in row["candidates"]}
        label = _label(row)
        cells = [label, f"{row['moved_bytes'] / 1e6:.0f}", *_ours(row, found.get(first), len(times))]
        cells += [_ratio(row["beside_plain"])] if beside else []
        body.append(cells + [_theirs(row, found.get(name)) for name in others])
        notes += [(label, name, c["refused"]) for name, c in found.items() if "refused" in c]
        notes += _fewer(label, row)
    bandwidth = data["machine"]["copy" if copying else "read"] / 1e9
    title = f"{TITLES[direction, kind]} on {data['machine']['device']}; fraction of {bandwidth:.0f} GB/s "
    title += f"{'copying' if copying else 'reading'} memory, measured in the same run"
    title += "; beside plain: by the time of the same row with one token and a cache of the query's dtype" if beside else ""
    title += "; others by their times beside ours" if others else ""
    columns = ["row", "MB", *times, "fraction", *(["beside plain"] if beside else []), *others]
    picture = direction if kind == "plain" else None if gradient else kind
    return {"title": title, "picture": picture, "columns": columns, "rows": body, "notes": _grouped(notes, len(rows))}


def _label(row) -> str:
    return " ".join(filter(None, (row["row"], row["variant"])))


def _fewer(label, row) -> list[tuple[str, str, str]]:
    batch, asked = row["batch"], row["batch_asked"]
    return [] if batch == asked else [(label, "", f"B {batch} sequences instead of {asked}, to fit into memory")]


def _split_table(data) -> dict[str, Any] | None:
    """Likewise: a time for each way to split the cache, and how many times as fast as one device that is."""
    rows = data["splits"]
    if not rows:
        return None
    names = [devices.ONE, *devices.SPLITS]
    title = f"Decode steps on {rows[0]['devices']} of {data['machine']['device']}, the cache split"
    body, notes = [], []
    for row in rows:
        label = _label(row)
        body.append([label, f"{row['live_bytes'] / 1e6:.0f}", *(_way(row["ways"][name]) for name in names)])
        reasons = {name: way.get("refused", way.get("cannot")) for name, way in row["ways"].items()}
        notes += [(label, name, reason) for name, reason in reasons.items() if reason]
        notes += _fewer(label, row)
    return {"title": title, "picture": None, "columns": ["row", "MB", *names], "rows": body, "notes": _grouped(notes, len(rows))}


def _way(found) -> str:
    if "seconds" not in found:
        return "-"
    return _time(found["seconds"]) + (f" ({_ratio(found['speedup'])})" if "speedup" in found else "")


def _ours(row, found, times) -> list[str]:
    """As many times as there are columns for, and the fraction."""
    if found is None or "timings" not in found:
        return ["-"] * (times + 1)
    seconds = [_whole(row, found), found["timings"][_clocked(row)]["seconds"]][-times:]
    return [*map(_time, seconds), f"{found['fraction']:.3f}"]


def _theirs(row, found) -> str:
    if found is None or "timings" not in found:
        return "-"
    return _time(_whole(row, found)) if found["ratio"] is None else _ratio(found["ratio"])


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _time(seconds: float) -> str:
    scale, name = (1e6, "us") if seconds < 1e-2 else (1e3, "ms")
    return f"{seconds * scale:.{1 if seconds * scale < 1000 else 0}f} {name}"


def _grouped(notes: Sequence[tuple[str, str, str]], count: int) -> list[str]:
    """Notes, of a row, who is meant, and a reason, on `count` rows: as one where only the row differs, and then where only who
    is meant does."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row, who, why in notes:
        rows.setdefault((who, why), []).append(row)
    meant: dict[tuple[str, str], list[str]] = {}
    for (who, why), which in rows.items():
        where = "all rows" if len(which) == count > 1 else ", ".join(which)
        meant.setdefault((why, where), []).append(who)
    return [": ".join(filter(None, (", ".join(who), f"{why} ({where})"))) for (why, where), who in meant.items()]


def text(data: Mapping[str, Any]) -> str:
    """All of it, as text."""
    parts = []
    for made in data["tables"]:
        parts += [made["title"], plain_table([made["columns"], *made["rows"]]), *[f"  {note}" for note in made["notes"]], ""]
    for word in ("skipped", "failed"):
        parts += [f"  {word} {name}: {why}" for name, why in data[word].items()]
    parts += _scaling_lines(data.get("scaling"))
    parts.append(f"seed {data['seed']}, {data['took_seconds']:.0f} s")
    return "\n".join(parts)


def show(data: dict[str, Any]):
    """Prints it; with tables in colour on a terminal, where rich is installed."""
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
