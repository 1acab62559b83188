"""Puts what `python -m ejk_ragged bench --out docs/performance` has left there into the page on performance."""

import json
import pathlib


MARK = "<!-- results -->"


def on_page_markdown(markdown, page, config, files):
    """What mkdocs calls with every page."""
    if MARK not in markdown:
        return markdown
    found = sorted(pathlib.Path(config.docs_dir, "performance").glob("*.json"), key=lambda file: file.stem)  # a device's own first
    sections = [section(file) for file in found] or ["No results have been kept yet."]
    return markdown.replace(MARK, "\n\n".join(sections))


def section(file: pathlib.Path) -> str:
    """One device: versions, tables and pictures."""
    data = json.loads(file.read_text())
    if "steps" in data:
        return whole_steps(file, data)
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [
        f"### {', '.join(filter(None, (data['machine']['device'], data['name'])))}",
        f"{versions}; seed {data['seed']}; [all data]({file.name})",
    ]
    for table in data["tables"]:
        lines += [f"**{table['title']}.**", markdown_table(table), picture(file, table["picture"], table["title"])]
        if table["notes"]:
            lines.append("\n".join(f"- {note}" for note in table["notes"]))
    lines.append(picture(file, "scaling", "Time against live tokens, and against the size of the cache"))
    return "\n\n".join(line for line in lines if line)


def whole_steps(file: pathlib.Path, data) -> str:
    """What `smollm2.py --random --json` printed: milliseconds and tokens a second, by batch."""
    batches = sorted({line["batch"] for line in data["steps"]})
    ways: dict[tuple, dict] = {}
    for line in data["steps"]:
        ways.setdefault((line["attention"], line["cache"], line["tokens"]), {})[line["batch"]] = line
    cell = lambda line: f"{line['ms']:.2f} ms, {line['tokens_per_second']:.0f}" if line else "-"
    rows = [[*map(str, way), *(cell(lines.get(batch)) for batch in batches)] for way, lines in ways.items()]
    table = {"columns": ["attention", "cache", "tokens a step", *(f"batch {batch}" for batch in batches)], "rows": rows}
    title = f"Whole decode steps of {data['model']}, {data['device']}"
    parts = [
        f"### {title}",
        f"jax {data['jax']}; random weights in bfloat16, sequences of {data['rows'] // 8} to {data['rows']} tokens; time of a step "
        f"and tokens a second, all layers and the choice of the next token; [all data]({file.name})",
        markdown_table(table),
        picture(file, "steps", title),
    ]
    return "\n\n".join(part for part in parts if part)


def markdown_table(table) -> str:
    """Figures and their units stay on one line; what stands above them need not."""
    rows = [[cell.replace(" ", "&nbsp;").replace("-", "&#8209;") for cell in row] for row in table["rows"]]
    aligned = ["---"] + ["--:"] * (len(table["columns"]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (table["columns"], aligned, *rows))


def picture(file: pathlib.Path, kind: str, text: str) -> str:
    name = f"{file.stem}-{kind}.png"
    return f"![{text}]({name})" if file.with_name(name).exists() else ""
