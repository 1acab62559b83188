"""The benchmark's pictures. Needs matplotlib."""

import pathlib
from typing import Any

import matplotlib as mpl

from .tables import kind_of, seconds_of


mpl.use("agg")  # a renderer that needs no screen. It must be chosen before pyplot is imported
import matplotlib.pyplot as plt
from matplotlib import patheffects


OURS = "#00796b"
CASES_OF_PANEL = 8
SHADES = (OURS, "#4db6ac", "#b2dfdb", "#26a69a", "#80cbc4")  # colours of our implementation
DARK = ("#e65100", "#1565c0", "#6a1b9a", "#4e342e", "#33691e", "#ad1457")  # colours of lines
# A white edge, so that the reference line does not strike out the numbers on bars.
EDGE = [patheffects.withStroke(linewidth=2.5, foreground="white")]
THEIRS = ("#b0bec5", "#ffb74d", "#90caf9", "#ce93d8", "#bcaaa4", "#aed581", "#f48fb1")


def draw(data: dict[str, Any], stem: pathlib.Path) -> list[pathlib.Path]:
    """Draws the pictures of a run. Returns the PNG files, whose names begin with `stem`."""
    machine, scaling = data["machine"], data.get("scaling")
    scaling = scaling if scaling and scaling["live"] and scaling["size"] else None
    of = lambda kind, direction="forward": [
        case for case in data["cases"] if kind_of(case) == kind and case["direction"] == direction and seconds_of(case)
    ]
    varied = {kind: [case for case in of(kind) if case["beside_plain"]] for kind in ("tokens", "cache")}
    pictures = {
        "forward": (_fractions, of("plain"), machine, "decode step", "read"),
        "gradient": (_fractions, of("plain", "gradient"), machine, "backward operation", "copy"),
        "pages": (_fractions, of("pages"), machine, "decode step, cache in pages", "read"),
        "tokens": (_tokens, varied["tokens"], machine),
        "cache": (_cache, varied["cache"], of("plain"), machine),
        "scaling": (_scaling, scaling, machine),
        "summary": (_summary, scaling and of("plain"), scaling, machine),  # only for runs with all parts
    }
    return [_save(make(what, *rest), stem, kind) for kind, (make, what, *rest) in pictures.items() if what]


def _save(figure, stem, kind):
    file = stem.with_name(f"{stem.name}-{kind}.png")
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return file


def _fractions(cases, machine, what, bandwidth):
    """Bars with the fraction of the bandwidth, by case, of our implementation and of the peers. `bandwidth` is "read" or "copy"."""
    names = list(dict.fromkeys(c["name"] for case in cases for c in case["candidates"] if "fraction" in c))
    ours = dict.fromkeys(c["name"] for case in cases for c in case["candidates"] if c["ours"])
    theirs = [name for name in names if name not in ours]
    colors = {
        name: color for some, of in ((ours, SHADES), (theirs, THEIRS)) for name, color in zip(some, of * len(names), strict=False)
    }
    panels = [cases[i : i + CASES_OF_PANEL] for i in range(0, len(cases), CASES_OF_PANEL)]
    size = (9, 3.2 * len(panels))
    figure, all_axes = plt.subplots(len(panels), 1, figsize=size, sharey=True, squeeze=False, layout="constrained")
    width = 0.85 / max(len(names), 1)
    for axes, panel in zip(all_axes[:, 0], panels, strict=True):
        for i, name in enumerate(names):
            fractions = [next((c.get("fraction", 0) for c in case["candidates"] if c["name"] == name), 0) for case in panel]
            at = [j + (i - (len(names) - 1) / 2) * width for j in range(len(panel))]
            bars = axes.bar(at, fractions, width * 0.92, label=name, color=colors[name])
            if name in ours:
                axes.bar_label(bars, [f"{f:.2f}" if f else "" for f in fractions], fontsize=8, path_effects=EDGE)
        labels = ["\n".join(filter(None, [case["case"], *case["variant"].split(", ")])) for case in panel]
        axes.set_xticks(range(len(panel)), labels)
        axes.set_xlim(-0.6, min(len(cases), CASES_OF_PANEL) - 0.4)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{what}, {machine['device']}: fraction of {machine[bandwidth] / 1e9:.0f} GB/s ({bandwidth})", fontsize=10)
    figure.legend(*all_axes[-1, 0].get_legend_handles_labels(), fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    return figure


def _tokens(cases, machine):
    """Time against query rows (tokens times query heads per kv head), relative to the time of one token. One line per case."""
    figure, axes = plt.subplots(figsize=(6.5, 3.4))
    for name, color in zip(dict.fromkeys(case["case"] for case in cases), (OURS, *DARK) * len(cases), strict=False):
        mine = sorted((case for case in cases if case["case"] == name), key=lambda case: case["num_tokens"])
        group = mine[0]["group"]
        at = [group, *(group * case["num_tokens"] for case in mine)]
        axes.plot(at, [1, *(case["beside_plain"] for case in mine)], "o-", color=color, linewidth=1, label=f"{name} (G {group})")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.1 * max(case["beside_plain"] for case in cases))
    axes.set_xlabel("query rows of a kv head, T * G; the first point is one token")
    axes.set_ylabel("time, relative to one token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"several query tokens, {machine['device']}", fontsize=10)
    figure.tight_layout()
    return figure


def _cache(cases, plain, machine):
    """Bars with the time, divided by the time of the same case in 16 bits. A line marks the ratio of the bytes."""
    moved = {case["case"]: case["moved_bytes"] for case in plain}
    names = list(dict.fromkeys(case["case"] for case in cases))
    kinds = list(dict.fromkeys(case["variant"] for case in cases))
    figure, axes = plt.subplots(figsize=(9, 3.4))
    width = 0.85 / len(kinds)
    for i, (kind, color) in enumerate(zip(kinds, SHADES * len(kinds), strict=False)):
        mine = [case for case in cases if case["variant"] == kind]
        at = [names.index(case["case"]) + (i - (len(kinds) - 1) / 2) * width for case in mine]
        bars = axes.bar(at, [case["beside_plain"] for case in mine], width * 0.92, label=kind, color=color)
        axes.bar_label(bars, [f"{case['beside_plain']:.2f}" for case in mine], fontsize=7, path_effects=EDGE)
        limits = [case["moved_bytes"] / moved[case["case"]] for case in mine]
        axes.hlines(limits, [x - width / 2 for x in at], [x + width / 2 for x in at], color="black", linewidth=1.2)
    axes.plot([], [], color="black", linewidth=1.2, label="what the bytes allow")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"quantised caches, {machine['device']}: time, as a part of that with a cache of the query's dtype", fontsize=10
    )
    figure.legend(fontsize=8, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 0.02))
    figure.tight_layout()
    return figure


def _summary(cases, scaling, machine):
    """The picture of the README: the fraction by case, next to the best of the others, and time against the cache's size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=(3, 1), squeeze=True)
    best = {
        ours: [max((c.get("fraction", 0) for c in case["candidates"] if c["ours"] == ours), default=0) for case in cases]
        for ours in (True, False)
    }
    others = dict.fromkeys(c["name"] for case in cases for c in case["candidates"] if not c["ours"] and "fraction" in c)
    bars = left.bar([i - 0.2 for i in range(len(cases))], best[True], 0.4, color=OURS, label="ejk-ragged")
    left.bar_label(bars, [f"{f:.2f}" for f in best[True]], fontsize=7, path_effects=EDGE)
    if others:
        at = [i + 0.2 for i in range(len(cases))]
        left.bar(at, best[False], 0.4, color=THEIRS[0], label=f"the best of {', '.join(others)}")
    left.set_xticks(range(len(cases)), [case["case"] for case in cases], rotation=35, ha="right", fontsize=8)
    left.axhline(1, color="black", linewidth=0.8, linestyle=":")
    left.set_title(f"fraction of the read bandwidth, {machine['device']}", fontsize=9)
    left.legend(fontsize=7, frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.02))
    left.set_ylim(0, 1.3)
    _against(right, scaling["size"], "seq_len", "rows of the cache")
    right.set_xscale("log", base=4)
    right.xaxis.set_major_formatter("{x:.0f}")
    right.set_title("the same live tokens", fontsize=9)
    left.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _scaling(scaling, machine):
    """Time against live tokens, with a line through the origin, and time against the cache's size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    _against(left, scaling["live"], "live_tokens", "live tokens, the cache's size fixed")
    _against(right, scaling["size"], "seq_len", "rows of the cache, live tokens fixed")
    last = scaling["live"][-1]
    left.plot([0, last["live_tokens"]], [0, last["seconds"] * 1e6], color=OURS, linewidth=0.8, linestyle="--")
    left.set_xlim(0, None)
    right.set_xscale("log", base=2)
    figure.suptitle(f"{scaling['problem']}, {machine['device']}", fontsize=10)
    figure.tight_layout()
    return figure


def _against(axes, points, x, label):
    """The times of `points` against their size `x`. Error bars are the 10th and the 90th percentile."""
    times = [point["seconds"] * 1e6 for point in points]
    low = [max(0.0, t - point["time"]["p10"] * 1e6) for t, point in zip(times, points, strict=True)]
    high = [max(0.0, point["time"]["p90"] * 1e6 - t) for t, point in zip(times, points, strict=True)]
    axes.errorbar([point[x] for point in points], times, [low, high], fmt="o", color=OURS, capsize=3)
    axes.set_xlabel(label)
    axes.set_ylabel("time (us)")
    axes.set_ylim(0, 1.1 * max(t + h for t, h in zip(times, high, strict=True)))
    axes.spines[["top", "right"]].set_visible(False)
