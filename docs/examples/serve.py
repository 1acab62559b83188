"""SmolLM2-135M serves requests that come over time: continuous batching from pages of `ragged_decode_attention`.

`smollm2.py` says how to install the model. Then serve prompts from the command line, from a file, or from standard input:

    python docs/examples/serve.py "The capital of Italy is" "@0.5 The capital of Italy was" "@1 Water boils at" --tokens 24
    python docs/examples/serve.py --file docs/examples/requests.txt --slots 4 --pages 10 --rows 128 --one-by-one --dense
    python docs/examples/serve.py --file - --chat --cache int8 --draft 4

A line of a file is a prompt. `@SECONDS` before a prompt says when it arrives. A prompt without `@SECONDS` arrives when it is read.
`--one-by-one` writes the same texts one after another and compares. `--dense` says how much memory a cache without pages needs.

`engine.py` decides what runs, and `pages.py` knows who holds which page.
"""

import argparse
import dataclasses
import functools
import pathlib
import queue
import re
import statistics
import sys
import threading
import time

import jax
import smollm2
from engine import Engine, Request
from rich.console import Console, Group
from rich.live import Live
from rich.progress import track
from rich.text import Text


LINE = re.compile(r"(?:@(\d+(?:\.\d+)?)\s+)?(.*)", re.DOTALL)


@dataclasses.dataclass
class Arrival:
    """A prompt, and the times of its arrival, of its first token and of its end, in seconds after the start."""

    prompt: str
    at: float
    request: Request | None = None  # None where it was refused
    first: float | None = None
    end: float | None = None


@dataclasses.dataclass
class Served:
    """All arrivals so far, the seconds until now, and (seconds, pages in use) after each step."""

    arrivals: list[Arrival] = dataclasses.field(default_factory=list)
    pages: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def accepted(self) -> list[tuple[Arrival, Request]]:
        return [(arrival, arrival.request) for arrival in self.arrivals if arrival.request]

    @property
    def tokens(self) -> int:
        return sum(len(request.new) for _, request in self.accepted)


def read(prompts, file, lines):
    """Puts all prompts into the queue `lines`, each as soon as it can be read. None marks the end."""
    for prompt in prompts:
        lines.put(prompt)
    if file:
        # Standard input by its number: a thread that still reads `sys.stdin` when the program ends would end it with an error.
        with open(0 if file == "-" else file, encoding="utf-8", closefd=file != "-") as source:
            for line in source:
                lines.put(line.rstrip("\n"))
    lines.put(None)


def serve(engine, encode, lines, tokens, served, show=lambda changed: None):
    """Serves the prompts that come out of `lines`, and fills `served` on the way. Calls `show` with each arrival that changed, and
    with the reason where it was refused."""
    begin = time.perf_counter()
    now = lambda: time.perf_counter() - begin
    later, of, more = [], {}, True
    while more or later or engine.busy:
        while more and not lines.empty():
            line = lines.get()
            more = line is not None
            if line is not None:
                match = LINE.fullmatch(line)
                assert match, "any line matches"
                at, prompt = match.groups()
                later.append(Arrival(prompt, now() if at is None else float(at)))
        due = sorted((arrival for arrival in later if arrival.at <= now()), key=lambda arrival: arrival.at)
        for arrival in due:
            later.remove(arrival)
            served.arrivals.append(arrival)
            try:
                arrival.request = engine.submit(encode(arrival.prompt), tokens)
                of[arrival.request] = arrival
            except ValueError as error:
                arrival.end = now()
                show(arrival, str(error))
        if not engine.busy:
            time.sleep(0.005)
            continue
        for request, _ in engine.step():
            arrival = of[request]
            arrival.first = arrival.first or now()
            arrival.end = now() if request.done else None
            show(arrival)
        served.seconds = now()
        served.pages.append((served.seconds, engine.pages.count - len(engine.pages.free)))


def one_by_one(engine, served, tokens):
    """Runs the same requests again, each alone. Returns their tokens, and the seconds that all took."""
    begin, found = time.perf_counter(), []
    for _, request in served.accepted:
        alone = engine.submit(request.prompt, tokens)
        while engine.busy:
            engine.step()
        found.append(alone.new)
    return found, time.perf_counter() - begin


def dense(model, slots, rows, served, tokens, **settings):
    """Runs the same requests from a padded cache: one page per slot, as long as the longest request may be. Returns their tokens,
    and the engine with this cache."""
    engine = Engine(model, slots=slots, num_pages=slots, page_size=rows, rows=rows, **settings)
    again = [engine.submit(request.prompt, tokens) for _, request in served.accepted]
    while engine.busy:
        engine.step()
    return [request.new for request in again], engine


# ---------------------------------------------------------------------------------------------------------------------------
# The report


def megabytes(engine, pages):
    """The size of `pages` pages in all layers, scales included."""
    return sum(x.nbytes for x in jax.tree.leaves(engine.pool)) / engine.pages.count * pages / 1e6


def chart(pages, columns=64):
    """Pages in use over time, as a line of text. Each column is a bar of eight heights, the most pages of its piece of time."""
    end, highest, last, bars = pages[-1][0], max(used for _, used in pages) or 1, 0, []
    for column in range(columns):
        here = [used for seconds, used in pages if column < columns * seconds / end <= column + 1]
        bars.append(max(here, default=last))
        last = here[-1] if here else last  # without a step, nothing changes
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * used // highest)] for used in bars)


def picture(pages, count, file):
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.6))
    seconds, used = zip(*pages, strict=True)
    axes.fill_between(seconds, used, step="post", color="#00796b")
    axes.axhline(count, color="#b0bec5")
    axes.set(xlabel="seconds", ylabel="pages in use", ylim=(0, 1.05 * count), xlim=(0, pages[-1][0]))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def report(engine, served, say):
    counts, pages = engine.counts, engine.pages
    waits = [arrival.first - arrival.at for arrival, _ in served.accepted if arrival.first is not None]
    say(
        f"{len(served.accepted)} requests, {served.tokens} tokens in {served.seconds:.1f} s: {speed(served.tokens, served.seconds)}"
    )
    if waits:
        say(f"time to first token: {statistics.median(waits):.2f} s (median), {max(waits):.2f} s (longest)")
    if served.pages:
        say(f"pages in use over time, {counts.most_pages} of {pages.count} at most:")
        say("|" + chart(served.pages) + "|")
    say(f"{counts.shared_rows} rows shared and not computed again, {counts.put_back} times a request was put back")


def speed(tokens, seconds):
    return f"{tokens / max(seconds, 1e-9):.1f} tokens a second"


# ---------------------------------------------------------------------------------------------------------------------------
# The program


def parse(argv):
    parser = argparse.ArgumentParser(description="SmolLM2-135M serves requests that come over time, from pages.")
    option = parser.add_argument
    option("prompts", nargs="*", metavar="PROMPT", help="text to continue; '@2.5 PROMPT' arrives after 2.5 seconds")
    option("--file", help="read more prompts, one per line, from this file; - is standard input")
    option("--tokens", type=int, default=32, help="tokens to write after each prompt [%(default)s]")
    option("--chat", action="store_true", help="a prompt is what a user says, and the answer ends where the model ends it")
    option("--cache", choices=smollm2.CACHES, default="float32", help="dtype of the pages [%(default)s]")
    option("--draft", type=int, default=0, metavar="N", help="verify up to N drafted tokens per step [%(default)s]")
    option("--slots", type=int, default=8, help="requests that run at a time [%(default)s]")
    option("--pages", type=int, default=128, help="pages of the pool [%(default)s]")
    option("--page-size", type=int, default=16, help="rows of a page [%(default)s]")
    option("--rows", type=int, default=512, help="rows of the longest request [%(default)s]")
    option("--chunk", type=int, default=32, help="tokens of a prompt that are read in one step [%(default)s]")
    option("--one-by-one", action="store_true", help="write the same texts one after another; exit with 1 if they differ")
    option("--dense", action="store_true", help="serve the same prompts from a padded cache, and compare the memory")
    option("--picture", metavar="PNG", help="draw the pages in use, with matplotlib")
    options = parser.parse_args(argv)
    if not (options.prompts or options.file):
        parser.error("give a PROMPT or --file")
    if options.file and options.file != "-" and (not pathlib.Path(options.file).exists() or pathlib.Path(options.file).is_dir()):
        parser.error(f"--file must be a file that is there, or - for standard input; got {options.file}")
    sizes = options.tokens, options.slots, options.pages, options.page_size, options.rows, options.chunk
    if min(sizes) < 1 or options.draft < 0:
        parser.error(
            "--tokens, --slots, --pages, --page-size, --rows and --chunk must be at least 1, --draft at least 0; got "
            f"{', '.join(map(str, sizes))} and {options.draft}"
        )
    return options


def main(argv=None) -> int:
    """Returns the exit status: 1 if a request was refused or a comparison failed, 130 after Ctrl-C."""
    options = parse(argv)
    out = Console(highlight=False)
    say = lambda text: out.print(text, markup=False, soft_wrap=True)
    loading = functools.partial(track, description="loading", console=Console(stderr=True), transient=True)
    try:
        model, tokenizer = smollm2.load(loading)
        with jax.default_matmul_precision("highest"):  # without this, some devices round the inputs of float32 products
            return run(model.stacked(), tokenizer, options, out, say)
    except KeyboardInterrupt:
        say("Stopped by Ctrl-C.")
        return 130


def run(model, tokenizer, options, out, say) -> int:
    """`main`, once the model is there."""
    encode = lambda prompt: tokenizer.encode(prompt, options.chat) if prompt else []
    stop = tokenizer.end if options.chat else None
    settings = {"chunk": options.chunk, "drafts": options.draft, "dtype": options.cache, "stop": stop}
    sizes = {"slots": options.slots, "num_pages": options.pages, "page_size": options.page_size, "rows": options.rows}
    engine, served, lines, at_work = Engine(model, **sizes, **settings), Served(), queue.SimpleQueue(), {}
    engine.warm_up()
    threading.Thread(target=read, args=(options.prompts, options.file, lines), daemon=True).start()

    def text(arrival):
        """The prompt and its text so far, without a character of which a part is missing."""
        new = tokenizer.decode(arrival.request.new, options.chat)
        new = new if arrival.end is not None else new.rstrip("\ufffd")
        return Text.assemble((arrival.prompt, "dim"), "\n" * options.chat, new, "\n")

    def show(arrival, refused=None):
        """Texts that are complete are printed. The other texts stand below them, and grow."""
        at_work[id(arrival)] = arrival
        if arrival.end is not None:
            del at_work[id(arrival)]
            begin = arrival.prompt[:30] + "..." * (len(arrival.prompt) > 30)
            live.console.print(Text(f"refused: {begin!r}: {refused}\n", "red") if refused else text(arrival))
        live.update(Group(*map(text, at_work.values())))

    try:
        with Live(console=out, vertical_overflow="visible") as live:
            serve(engine, encode, lines, options.tokens, served, show)
    except KeyboardInterrupt:
        undone = sum(not request.done for _, request in served.accepted)
        say(f"{undone} of {len(served.accepted)} requests are not done. What is written for them stands above.")
        raise
    finally:
        report(engine, served, say)
    if options.picture and served.pages:
        picture(served.pages, options.pages, options.picture)
    wrong = len(served.accepted) < len(served.arrivals)
    written = [request.new for _, request in served.accepted]

    def differ(name, others, told):
        same = sum(new == other for new, other in zip(written, others, strict=True))
        failed = options.cache == "float32" and same < len(written)
        say(f"{name}: {told}; {same} of {len(written)} requests have the same tokens" + ", FAILED" * failed)
        return failed

    if options.one_by_one:
        others, seconds = one_by_one(engine, served, options.tokens)
        wrong |= differ("one by one", others, speed(served.tokens, seconds))
    if options.dense:
        pool, most = (megabytes(engine, pages) for pages in (options.pages, engine.counts.most_pages))
        others, padded = dense(model, options.slots, options.rows, served, options.tokens, **settings)
        told = f"{megabytes(padded, options.slots):.1f} MB for {options.slots} slots of {options.rows} rows, in place of "
        wrong |= differ("dense", others, told + f"{pool:.1f} MB of pages, of which {most:.1f} MB were in use")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
