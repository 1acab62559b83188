"""Puts what `python -m ejk_ragged bench --out docs/performance` has left there into the page on performance."""

import json
import pathlib


MARK = "<!-- results -->"


def on_page_markdown(markdown, page, config, files):
    """What mkdocs calls with every page."""
    if MARK not in markdown:
        return markdown
    found = sorted(pathlib.Path(config.docs_dir, "performance").glob("*.json"))
    sections = [section(file) for file in found] or ["No results have been kept yet."]
    return markdown.replace(MARK, "\n\n".join(sections))


def section(file: pathlib.Path) -> str:
    """One device: versions, tables and pictures."""
    data = json.loads(file.read_text())
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


def markdown_table(table) -> str:
    """Figures and their units stay on one line; what stands above them need not."""
    rows = [[cell.replace(" ", "&nbsp;").replace("-", "&#8209;") for cell in row] for row in table["rows"]]
    aligned = ["---"] + ["--:"] * (len(table["columns"]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (table["columns"], aligned, *rows))


def picture(file: pathlib.Path, kind: str, text: str) -> str:
    name = f"{file.stem}-{kind}.png"
    return f"![{text}]({name})" if file.with_name(name).exists() else ""
