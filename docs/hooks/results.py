"""Puts the results of `python -m ejk_ragged bench --out docs/performance` into the page on performance."""

import json
import pathlib


MAIN, REST = "<!-- main result -->", "<!-- results -->"
# Older files of the benchmark call a case a row. On the pages, a row is a row of the cache.
WORDS = {"the same row": "the same case", "(all rows)": "(all cases)"}
NOT_INSTALLED = "is not installed"


def on_page_markdown(markdown, page, config, files):
    """The hook that mkdocs calls with every page."""
    if REST not in markdown:
        return markdown
    found = sorted(pathlib.Path(config.docs_dir, "performance").glob("*.json"), key=lambda file: file.stem)
    if not found:
        return markdown.replace(MAIN, "No results have been kept yet.").replace(REST, "")
    main = table_and_picture(found[0], json.loads(found[0].read_text())["tables"][0])
    folded = [fold(*section(file, first=i == 0)) for i, file in enumerate(found)]
    return markdown.replace(MAIN, main).replace(REST, "\n\n".join(folded))


def section(file: pathlib.Path, first: bool) -> tuple[str, str]:
    """One run: its title, and its text with versions, tables and pictures. The main table of the page is left out."""
    data = json.loads(file.read_text())
    if "steps" in data:
        return whole_steps(file, data)
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [f"{versions}; seed {data['seed']}; [all data]({file.name})"]
    for i, table in enumerate(data["tables"]):
        made = "" if first and i == 0 else table_and_picture(file, table)
        lines += [made, "\n".join(f"- {note}" for note in notes(table["notes"]))]
    lines.append(picture(file, "scaling", "Time against live tokens, and against the size of the cache"))
    name = data["name"] or "the run of the table above, with its notes and gradients"
    return f"{data['machine']['device']}: {name}", "\n\n".join(line for line in lines if line)


def table_and_picture(file: pathlib.Path, table) -> str:
    parts = [f"**{plain(table['title'])}.**", markdown_table(table), picture(file, table["picture"], plain(table["title"]))]
    return "\n\n".join(part for part in parts if part)


def notes(said: list[str]) -> list[str]:
    """The notes on implementations that were not timed. An implementation that was not installed is named once only."""
    split = [note.partition(": ")[::2] for note in said]
    missing = sorted({name for who, why in split if NOT_INSTALLED in why for name in who.split(", ")})
    kept = [(", ".join(name for name in who.split(", ") if name not in missing), plain(why)) for who, why in split]
    lines = [": ".join(filter(None, note)) for note in kept if note[0]]
    return lines + [f"not installed for this run, and so not timed: {', '.join(missing)}"] * bool(missing)


def whole_steps(file: pathlib.Path, data) -> tuple[str, str]:
    """The output of `smollm2.py --random --json`: milliseconds and tokens per second, by batch."""
    batches = sorted({line["batch"] for line in data["steps"]})
    ways: dict[tuple, dict] = {}
    for line in data["steps"]:
        ways.setdefault((line["attention"], line["cache"], line["tokens"]), {})[line["batch"]] = line
    cell = lambda line: f"{line['ms']:.2f} ms, {line['tokens_per_second']:.0f}" if line else "-"
    rows = [[*map(str, way), *(cell(lines.get(batch)) for batch in batches)] for way, lines in ways.items()]
    table = {"columns": ["attention", "cache", "tokens per step", *(f"batch {batch}" for batch in batches)], "rows": rows}
    title = f"{data['device']}: whole decode steps of {data['model']}"
    parts = [
        f"jax {data['jax']}; random weights in bfloat16, sequences of {data['rows'] // 8} to {data['rows']} tokens; time per step "
        f"and tokens per second, all layers and the choice of the next token; [all data]({file.name})",
        markdown_table(table),
        picture(file, "steps", title),
    ]
    return title, "\n\n".join(part for part in parts if part)


def fold(title: str, text: str) -> str:
    """A folded part of the page, which is closed at first."""
    return "\n".join([f'??? note "{title}"', "", *(f"    {line}" if line else "" for line in text.splitlines())])


def plain(text: str) -> str:
    for before, after in WORDS.items():
        text = text.replace(before, after)
    return text


def markdown_table(table) -> str:
    """A table in Markdown. Cells do not break. Headings may."""
    columns = ["case" if column == "row" else column for column in table["columns"]]
    rows = [[cell.replace(" ", "&nbsp;").replace("-", "&#8209;") for cell in row] for row in table["rows"]]
    aligned = ["---"] + ["--:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, aligned, *rows))


def picture(file: pathlib.Path, kind: str | None, text: str) -> str:
    name = f"{file.stem}-{kind}.png"
    return f"![{text}]({name})" if file.with_name(name).exists() else ""
