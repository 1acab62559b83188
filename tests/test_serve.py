"""`docs/examples/serve.py`, with a small model of random weights. The text of each request is the text that it gets alone."""

import dataclasses
import functools
import io
import queue
import sys
from typing import Any
from unittest import mock

import engine
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
import serve
import smollm2
from engine import ATTENTION, Engine
from pages import Pages
from test_smollm2 import Letters, model


pytestmark = pytest.mark.usefixtures("promoted_ranks")

SIZES: dict[str, Any] = {"slots": 3, "num_pages": 24, "page_size": 4, "rows": 48, "chunk": 8}
BEGINNING = np.random.default_rng(5).integers(1, 64, 30).tolist()
COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **about: COMPILED.append(about.get("fun_name")) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture(autouse=True, scope="module")
def _precision():
    """The precision of the example, so that the tests share what is compiled."""
    with jax.default_matmul_precision("highest"):
        yield


def make(**options: Any) -> Engine:
    """An engine for the small model. The sizes are the same in all tests, so that its programs are compiled once."""
    return Engine(model(), **(SIZES | options))


def finish(engine):
    for _ in range(300):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("it goes on and on")


def run(engine, *requests):
    """The tokens of requests (prompt, tokens) that arrive together."""
    taken = [engine.submit(*request) for request in requests]
    finish(engine)
    assert_all_free(engine)
    return [request.new for request in taken]


def assert_all_free(engine):
    assert sorted(engine.pages.free) == list(range(engine.pages.count))
    assert not any(engine.pages.holders)


@functools.cache
def alone(prompt, tokens):
    return run(make(), (list(prompt), tokens))[0]


def as_alone(requests):
    return [alone(tuple(prompt), tokens) for prompt, tokens in requests]


def test_alone_is_full_attention():
    text = BEGINNING[:13]
    for _ in range(8):
        padded = np.array([text + [0] * (24 - len(text))], np.int32)
        text = [*text, int(jnp.argmax(llama.whole(model(), padded)[0, len(text) - 1]))]
    assert alone(tuple(text[:13]), 8) == text[13:]


# ---------------------------------------------------------------------------------------------------------------------------
# Any requests at any times

tails = st.lists(st.integers(1, 63), max_size=6)
prompts = st.builds(lambda known, tail: BEGINNING[:known] + tail, st.integers(0, 24), tails).filter(len)


@st.composite
def traffic(draw):
    """Requests (prompt, tokens) with the step at which each arrives, and for some the step at which its stream is closed."""
    requests = draw(st.lists(st.tuples(prompts, st.integers(1, 16)), min_size=1, max_size=6))
    come = [draw(st.integers(0, 12)) for _ in requests]
    close = [draw(st.none() | st.integers(0, 30)) for _ in requests]
    most = max(-(-(len(prompt) + tokens - 1) // 4) for prompt, tokens in requests)
    return requests, come, close, draw(st.integers(most, most + 4)), draw(st.sampled_from([0, 3])), draw(st.integers(1, 9))


def guesses(requests, period):
    """A function in place of `look_up`. It guesses the tokens that will be written, also beyond the tokens that are asked for,
    and gets every `period`-th token wrong."""
    texts = [prompt + alone(tuple(prompt), tokens + 4) for prompt, tokens in requests]

    def look_up(text, count):
        known = next(known for known in texts if known[: len(text)] == text)
        return [token if at % period else 0 for at, token in enumerate(known)][len(text) :][:count]

    return look_up


@hypothesis.settings(max_examples=5 * hypothesis.settings().max_examples)
@hypothesis.given(traffic())
def test_whatever_comes(drawn):
    requests, come, close, num_pages, drafts, period = drawn
    served = make(drafts=drafts)
    served.pages = Pages(num_pages, 4)  # fewer pages than the pool has, so that the programs are the same
    with mock.patch.object(engine, "look_up", guesses(requests, period)):
        taken, closed = go_on(served, requests, come, close)
    assert_all_free(served)
    for i, want in enumerate(as_alone(requests)):
        assert taken[i].done
        assert taken[i].new == want[: closed.get(i)]


def go_on(engine, requests, come, close):
    """The requests as the engine took them, and the tokens that closed requests had when they were closed."""
    taken, closed = {}, {}
    for step in range(300):
        for i in range(len(requests)):
            if come[i] == step:
                taken[i] = engine.submit(*requests[i])
            if close[i] == step and i in taken:
                engine.cancel(taken[i])
                closed[i] = len(taken[i].new)
        if step > max(come) and not engine.busy:
            return taken, closed
        engine.step()
        ages = [request.number for request in (*engine.running, *engine.waiting)]
        assert ages == sorted(set(ages))  # the newest request waits
    raise AssertionError("it goes on and on")


def test_right_drafts_save_steps():
    served, request = make(drafts=3), (BEGINNING[:9], 12)
    with mock.patch.object(engine, "look_up", guesses([request], 1000)):
        assert run(served, request) == as_alone([request])
    assert served.counts.steps == 1 + 3  # one step reads 8 tokens, and each further step writes four tokens


def crowd():
    """Requests that meet everything: pages are shared, copied and short, and drafts are right and wrong."""
    engine = make(drafts=3)
    engine.pages = Pages(10, 4)
    requests = [
        (BEGINNING[:18], 12),
        (BEGINNING[:10], 20),
        ([*BEGINNING[:15], 3, 1, 2], 12),
        ([7], 25),
        (BEGINNING[:18], 12),
    ]
    return engine, requests


def test_everything_happens_and_changes_nothing(monkeypatch):
    engine, requests = crowd()
    copied, copy = [], engine._copy
    monkeypatch.setattr(engine, "_copy", lambda *pages: copied.append(pages) or copy(*pages))
    assert run(engine, *requests) == as_alone(requests)
    assert copied
    assert 1 < engine.counts.put_back < 8  # without a spare page for each running request there would be 8
    assert engine.counts.shared_rows > 20
    assert engine.counts.most_pages == 10
    assert engine.counts.steps < sum(tokens for _, tokens in requests) + 12  # some drafts are right


def not_copied(self, held, first, end, copy, spare=0):
    holders, self.holders = self.holders, [1] * self.count
    done = PROVIDE(self, held, first, end, copy, spare)
    self.holders = [max(pair) for pair in zip(holders, self.holders, strict=True)]
    return done


def back_with_a_row_too_many(self):
    before = self.running
    ADMIT(self)
    for request in self.running:
        request.rows += request not in before and bool(request.new)


def release_without_counting(self, held):
    held.clear()


def one_too_many(draft, best, stop=None):
    return best[: len(smollm2.accepted(draft, best)) + 1]


PROVIDE, ADMIT, ALIKE = Pages.provide, Engine._admit, engine._alike
MISTAKES = {
    "a shared page is written without a copy": (Pages, "provide", not_copied),
    "the copy goes elsewhere": (Engine, "_copy", lambda self, source, target: None),
    "who was put back has a row too many": (Engine, "_admit", back_with_a_row_too_many),
    "holders are not counted down": (Pages, "release", release_without_counting),
    "one token too many of a draft is accepted": (engine, "accepted", one_too_many),
    "one row too many is shared": (engine, "_alike", lambda text, other: min(ALIKE(text, other) + 1, len(text), len(other))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(monkeypatch, mistake):
    served, requests = crowd()
    wanted = as_alone(requests)  # before the mistake is there
    monkeypatch.setattr(*MISTAKES[mistake])
    taken = [served.submit(*request) for request in requests]
    for _ in range(300):
        served.step()
    right = [request.new for request in taken] == wanted
    assert not (right and len(served.pages.free) == served.pages.count)


def test_the_bits_are_those_of_a_request_alone():
    """Without drafts, shared pages and requests that are put back. All of these round differently."""
    pools = []
    for others in ([], [([9, 9, 3], 12), (BEGINNING[5:25], 6)]):
        engine = make()
        for request in others:
            engine.submit(*request)
        request = engine.submit(BEGINNING[:18], 12)
        while len(request.new) < 11:
            engine.step()
        pool = np.asarray(engine.pool.key).reshape(2, -1, *engine.pool.key.shape[1:])[:, request.pages]
        pools.append(pool.reshape(2, -1, *pool.shape[3:])[:, : request.rows])
    np.testing.assert_array_equal(*pools)


def test_pages_of_8_bits():
    engine = make(dtype="int8")
    requests = [(BEGINNING[:9], 6), (BEGINNING[:11], 6), ([4, 2], 6)]
    new = run(engine, *requests)
    same = [a == b for got, want in zip(new, as_alone(requests), strict=True) for a, b in zip(got, want, strict=True)]
    assert np.mean(same) > 0.6
    assert engine.pool.key.dtype == jnp.int8
    wide = make()
    assert serve.megabytes(engine, 10) == pytest.approx(serve.megabytes(wide, 10) * (8 + 4) / 32)  # head_dim 8, and a scale


def test_programs_are_compiled_once_and_write_in_place():
    engine = make(slots=2, num_pages=21, drafts=2)
    COMPILED.clear()
    engine.warm_up()
    assert len(COMPILED) == 3, COMPILED
    pool = engine.pool.key
    rng = np.random.default_rng(0)
    run(engine, *[([*BEGINNING[: rng.integers(2, 20)], int(i)], 1 + int(i)) for i in rng.integers(1, 20, 12)])
    assert engine.counts.shared_rows
    assert len(COMPILED) == 3, COMPILED
    assert pool.is_deleted()
    pool = engine.pool.key
    engine._copy(0, 1)
    assert pool.is_deleted()
    large = make(num_pages=10000)
    table, one = np.zeros((3, 24), np.int32), np.ones((3, 1), np.int32)
    cache = dataclasses.replace(large.pool, page_table=table)
    program = llama.step.lower(model(), cache, one, one[:, 0], one[:, 0], one, attention=ATTENTION).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * sum(x.nbytes for x in jax.tree.leaves(large.pool))


# ---------------------------------------------------------------------------------------------------------------------------
# Streams, and what is not accepted


def test_streams_that_are_closed():
    engine = make()
    first, second, third = (engine.stream(prompt, 8) for prompt in (BEGINNING[:9], BEGINNING[:14], BEGINNING[:7]))
    want = [alone(tuple(BEGINNING[:n]), 8) for n in (9, 14, 7)]
    assert [next(second) for _ in range(3)] == want[1][:3]
    second.close()
    third.close()  # nobody has asked for the tokens of this stream
    assert list(first) == want[0]
    assert not engine.busy
    assert_all_free(engine)
    forgotten = engine.stream(BEGINNING[:9], 8)
    next(forgotten)
    del forgotten
    assert not engine.busy


def test_an_interrupt_between_programs_loses_nothing(monkeypatch):
    served, requests = crowd()
    taken = [served.submit(*request) for request in requests]
    for at in (4, 9, 15):
        calls = iter(range(at))

        def interrupted(*args, _calls=calls, **kwargs):
            if next(_calls, None) is None:
                raise KeyboardInterrupt
            return llama.step(*args, **kwargs)

        monkeypatch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(served)
    monkeypatch.undo()
    finish(served)
    assert [request.new for request in taken] == as_alone(requests)
    assert_all_free(served)


@pytest.mark.parametrize(
    ("prompt", "tokens", "said"),
    [
        ([], 1, "prompt must have at least one token"),
        ([1], 0, "tokens must be at least 1, got 0"),
        ([1] * 40, 10, r"must fit into 48 rows, 12 pages of 4; got a prompt of 40 tokens and 10 to write, which take 49 rows"),
    ],
)
def test_requests_that_are_refused(prompt, tokens, said):
    engine = make()
    with pytest.raises(ValueError, match=said):
        engine.stream(prompt, tokens)
    assert not engine.busy


def test_the_longest_request_fits():
    engine = make(rows=1000)
    assert len(run(engine, ([1] * 90, 7))[0]) == 7  # 96 rows, 24 pages of 4
    with pytest.raises(ValueError, match="96 rows, 24 pages of 4"):
        engine.submit([1] * 90, 8)


@pytest.mark.parametrize(("name", "size"), [("slots", 0), ("num_pages", 0), ("page_size", -1), ("chunk", 0), ("drafts", -1)])
def test_sizes_that_are_refused(name, size):
    with pytest.raises(ValueError, match=f"{name} must be at least ., got {size}"):
        make(**{name: size})


def test_pages_without_an_engine():
    copied, pool = [], Pages(5, 4)
    copy = lambda *pair: copied.append(pair)
    one, two = [], []
    assert pool.provide(one, 0, 7, copy)
    two = pool.share(one, 5)
    assert two == one
    assert not pool.provide(two, 5, 17, copy)  # a copy and three more pages are four, and three are free
    assert two == one
    assert not pool.provide(two, 5, 9, copy, spare=2)
    assert pool.provide(two, 5, 9, copy, spare=1)
    assert copied == [(one[1], two[1])]
    assert two[0] == one[0]
    assert len({*one, *two}) == 4
    assert pool.provide(one, 7, 8, copy)  # the request gets its own page again
    assert len(copied) == 1
    pool.release(one)
    assert len(pool.free) == 2
    pool.release(two)
    assert sorted(pool.free) == list(range(5))


# ---------------------------------------------------------------------------------------------------------------------------
# The program

OPTIONS = ["--slots", "3", "--pages", "24", "--page-size", "4", "--rows", "48", "--chunk", "8", "--tokens", "10"]


@pytest.fixture
def program(monkeypatch):
    """`main` with the small model."""
    monkeypatch.setattr(smollm2, "load", lambda progress: (Unstacked(), Letters()))
    return serve.main


class Unstacked:
    stacked = staticmethod(model)


def written(prompt, tokens=10):
    return Letters().decode(alone(tuple(Letters().encode(prompt)), tokens))


def test_serve_and_compare(program, capsys, tmp_path):
    drawn, file = tmp_path / "pages.png", tmp_path / "requests.txt"
    file.write_text("some more of it\n@0.02 some more of that\n")
    arguments = ["abc", "@0.1 x", "--file", str(file), "--one-by-one", "--dense", "--picture", str(drawn)]
    assert program([*arguments, *OPTIONS]) == 0
    out = capsys.readouterr().out
    for prompt in ("abc", "x", "some more of it", "some more of that"):
        assert prompt + written(prompt) in out.replace("\n", "")
    assert "4 requests, 40 tokens in " in out
    assert "time to first token: " in out
    assert " of 24 at most:\n|" in out
    assert "one by one: " in out
    assert "dense: 0.0 MB for 3 slots of 48 rows, in place of " in out
    assert out.count("4 of 4 requests have the same tokens") == 2
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_other_tokens_are_a_failure(program, monkeypatch, capsys):
    monkeypatch.setattr(serve, "one_by_one", lambda *_: ([[1]], 1.0))
    assert program(["abc", "--one-by-one", *OPTIONS]) == 1
    assert "0 of 1 requests have the same tokens, FAILED" in capsys.readouterr().out


def test_what_is_refused_does_not_stop_the_others(program, capsys):
    assert program(["abc", "", "y" * 60, *OPTIONS]) == 1
    out = capsys.readouterr().out.replace("\n", " ")
    assert "refused: '': prompt must have at least one token" in out
    assert f"refused: '{'y' * 30}...': prompt and tokens must fit into 48 rows, 12 pages of 4" in out
    assert "1 requests, 10 tokens" in out


def test_ctrl_c(program, monkeypatch, capsys):
    step, calls = Engine.step, iter(range(6))

    def interrupted(self):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    assert program(["abc", "x", "@60 late", *OPTIONS]) == 130
    out = capsys.readouterr().out
    assert "2 of 2 requests are not done. What is written for them stands above." in out
    assert out.endswith("Stopped by Ctrl-C.\n")
    assert "abc" + written("abc")[:4] in out
    assert "x" + written("x")[:4] in out


def test_standard_input(monkeypatch):
    lines = queue.SimpleQueue()
    monkeypatch.setattr(serve, "open", lambda file, **_: io.StringIO("a b\nc\n") if file == 0 else sys.exit(), raising=False)
    serve.read(["x"], "-", lines)
    assert [lines.get() for _ in range(lines.qsize())] == ["x", "a b", "c", None]


def test_chart():
    assert serve.chart([(1.0, 0), (2.0, 4), (4.0, 8)], columns=4) == " ▄▄█"
    assert serve.chart([(1.0, 0)], columns=3) == "   "


def test_bad_options(program, capsys):
    for argv in ([], ["a", "--tokens", "0"], ["a", "--pages", "0"], ["a", "--draft", "-1"], ["--file", "/no/such/file"]):
        with pytest.raises(SystemExit, match="2"):
            program(argv)
        assert "error: " in capsys.readouterr().err
