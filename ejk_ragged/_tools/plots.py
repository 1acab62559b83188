"""The benchmark's pictures. Needs matplotlib."""

import pathlib
from typing import Any

import matplotlib as mpl


mpl.use("agg")  # needs no screen, and must be chosen first
import matplotlib.pyplot as plt


OURS = "#00796b"
ROWS_OF_PANEL = 8
THEIRS = ("#b0bec5", "#ffb74d", "#90caf9", "#ce93d8", "#bcaaa4", "#aed581", "#f48fb1")


def draw(data: dict[str, Any], stem: pathlib.Path) -> list[pathlib.Path]:
    """PNG files whose names begin with `stem`."""
    files = []
    for direction in ("forward", "gradient"):
        rows = [row for row in data["rows"] if row["direction"] == direction]
        if rows:
            files.append(_save(_fractions(rows, data["machine"], direction), stem, f"{direction}"))
    if data.get("scaling"):
        files.append(_save(_scaling(data["scaling"], data["machine"]), stem, "scaling"))
    return files


def _save(figure, stem, kind):
    file = stem.with_name(f"{stem.name}-{kind}.png")
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return file


def _fractions(rows, machine, direction):
    """Bars: the fraction of the bandwidth by row, ours and the peers'."""
    names = list(dict.fromkeys(c["name"] for row in rows for c in row["candidates"] if "fraction" in c))
    ours = {c["name"] for row in rows for c in row["candidates"] if c["ours"]}
    colors = dict(zip([name for name in names if name not in ours], THEIRS * len(names), strict=False)) | dict.fromkeys(ours, OURS)
    panels = [rows[i : i + ROWS_OF_PANEL] for i in range(0, len(rows), ROWS_OF_PANEL)]
    figure, all_axes = plt.subplots(len(panels), 1, figsize=(9, 3.2 * len(panels)), sharey=True, squeeze=False)
    width = 0.85 / max(len(names), 1)
    for axes, panel in zip(all_axes[:, 0], panels, strict=True):
        for i, name in enumerate(names):
            fractions = [next((c.get("fraction", 0) for c in row["candidates"] if c["name"] == name), 0) for row in panel]
            at = [j + (i - (len(names) - 1) / 2) * width for j in range(len(panel))]
            bars = axes.bar(at, fractions, width * 0.92, label=name, color=colors[name])
            if name in ours:
                axes.bar_label(bars, [f"{f:.2f}" if f else "" for f in fractions], fontsize=8)
        axes.set_xticks(range(len(panel)), [row["row"] for row in panel])
        axes.set_xlim(-0.6, min(len(rows), ROWS_OF_PANEL) - 0.4)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    bandwidth, kind = (machine["copy"], "copy") if direction == "gradient" else (machine["read"], "read")
    what = "backward operation" if direction == "gradient" else "decode step"
    figure.suptitle(f"{what}, {machine['device']}: fraction of {bandwidth / 1e9:.0f} GB/s ({kind})", fontsize=10)
    figure.tight_layout()
    all_axes[-1, 0].legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return figure


def _scaling(scaling, machine):
    """Time against live tokens, with a line through the origin, and against the cache's size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, points, x, label in (
        (left, scaling["live"], "live_tokens", "live tokens, the cache's size fixed"),
        (right, scaling["size"], "seq_len", "rows of the cache, live tokens fixed"),
    ):
        at = [point[x] for point in points]
        times = [point["seconds"] * 1e6 for point in points]
        low = [max(0.0, t - point["time"]["p10"] * 1e6) for t, point in zip(times, points, strict=True)]
        high = [max(0.0, point["time"]["p90"] * 1e6 - t) for t, point in zip(times, points, strict=True)]
        axes.errorbar(at, times, [low, high], fmt="o", color=OURS, capsize=3)
        axes.set_xlabel(label)
        axes.set_ylabel("time (us)")
        axes.set_ylim(0, 1.1 * max([t + h for t, h in zip(times, high, strict=True)], default=1))
        axes.spines[["top", "right"]].set_visible(False)
    if scaling["live"]:
        last = scaling["live"][-1]
        left.plot([0, last["live_tokens"]], [0, last["seconds"] * 1e6], color=OURS, linewidth=0.8, linestyle="--")
        left.set_xlim(0, None)
    right.set_xscale("log", base=2)
    figure.suptitle(f"{scaling['problem']}, {machine['device']}", fontsize=10)
    figure.tight_layout()
    return figure
