"""Short runs of the examples. `generate.py` checks itself, and these tests show that its check finds a wrong decode step."""

import dataclasses
import functools
import importlib.util
import io
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest

from ejk_ragged import ragged_decode_attention


pytestmark = pytest.mark.usefixtures("promoted_ranks")

PATH = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "generate.py"
CONFIG = {"layers": 2, "width": 32, "query_heads": 4, "kv_heads": 2, "head_dim": 8, "window": 4}


@pytest.fixture
def generate():
    """The example as a fresh module: a test may change it, and nothing that was traced before is used again."""
    spec = importlib.util.spec_from_file_location("generate", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_short_run(generate, monkeypatch, capsys):
    monkeypatch.setattr(generate, "Config", functools.partial(generate.Config, **CONFIG))
    assert generate.main(["--steps", "5", "--tokens", "8"]) == 0
    done = capsys.readouterr()
    assert done.err == ""
    assert done.out.count("\n--- ") == 6
    assert "OK: every byte is what recomputing full attention writes" in done.out


def test_bad_options(generate, capsys):
    for argv in (["--steps", "0"], ["--tokens", "0"], ["--prompt", ""]):
        with pytest.raises(SystemExit, match="2"):
            generate.main(argv)
        assert "must be at least 1" in capsys.readouterr().err


def compare(generate):
    """The verdict of the example's check on an untrained model. The sinks differ from head to head. They are drawn, so that the
    bytes vary."""
    config = generate.Config(**CONFIG)
    model = generate.Model(config, jax.random.key(0))
    for block, key in zip(model.blocks, jax.random.split(jax.random.key(1), config.layers), strict=True):
        sinks = 2 * jax.random.normal(key, block.attend.sinks.shape, jnp.float32)
        object.__setattr__(block, "attend", dataclasses.replace(block.attend, sinks=sinks))
    lengths = np.array([1, 7, 4], np.int32)
    prompts = np.random.default_rng(0).integers(0, 256, (3, 7)).astype(np.int32)
    keys = jax.random.split(jax.random.key(2), 20)
    cache = generate.empty_cache(config, 3, 27)
    written, _ = generate.write_cached(model, cache, prompts, lengths, 1.0, keys)
    assert all(rows.is_deleted() for rows in jax.tree.leaves(cache))  # donated
    assert len(np.unique(written[0])) > 20
    return generate.disagreements(written, generate.write_recomputed(model, prompts, lengths, 1.0, keys))


def test_cached_equals_recomputed(generate):
    wrong, error = compare(generate)
    assert wrong == []
    assert error < 1e-5


def other_order_of_heads(q):
    return q.reshape(*q.shape[:2], -1, 2, q.shape[3]).swapaxes(2, 3).reshape(q.shape)


MISTAKES = {
    "no sinks": lambda full, q, k, v, sinks, window: full(q, k, v, jnp.full_like(sinks, -jnp.inf), window),
    "one sink for all heads": lambda full, q, k, v, sinks, window: full(q, k, v, jnp.full_like(sinks, sinks[0, 0]), window),
    "no window": lambda full, q, k, v, sinks, window: full(q, k, v, sinks, None),
    "window off by one": lambda full, q, k, v, sinks, window: full(q, k, v, sinks, window and (window[0] + 1, 0)),
    "wrong kv head": lambda full, q, k, v, sinks, window: full(other_order_of_heads(q), k, v, sinks, window),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_notices(generate, monkeypatch, mistake):
    full = generate.full_attention
    monkeypatch.setattr(generate, "full_attention", lambda *args: MISTAKES[mistake](full, *args))
    wrong, _ = compare(generate)
    assert wrong


def test_failure_is_the_exit_status(generate, monkeypatch, capsys):
    monkeypatch.setattr(generate, "train", lambda model, *_: model)
    full = generate.full_attention
    monkeypatch.setattr(generate, "full_attention", lambda q, k, v, sinks, window: full(q, k, v, sinks + 1, window))
    assert generate.main(["--tokens", "2", "--prompt", "ab", "--prompt", "abc"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_disagreements_by_hand(generate):
    scores = np.zeros((3, 2, 256), np.float32)
    scores[..., ord("a")] = 1
    other = scores.copy()
    other[1, 1, ord("b")] = 1.25
    other[2, 1] = 99  # after the two texts differ, nothing counts

    def written(scores):
        return scores.argmax(-1), scores

    assert generate.disagreements(written(scores), written(scores)) == ([], 0)
    lines, error = generate.disagreements(written(scores), written(other))
    assert error == 1.25
    assert lines == [
        "scores differ by 1.2, more than 0.001",
        "prompt 1, byte 1: b'a' in place of b'b', whose score is higher by 0.25",
    ]
    lines, _ = generate.disagreements(written(np.full_like(scores, np.nan)), written(scores))
    assert lines[0] == "scores differ by nan, more than 0.001"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(generate, monkeypatch, terminal):
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    for done in range(1, 201):
        generate.show_progress(done, 200, 2.0 * done, "note")
    text = out.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == (1 if terminal else 10)
    assert text.count("\r") == (199 if terminal else 0)
    assert "] 100/200, note, 200 s, 200 s left" in text


@pytest.mark.parametrize("right", [True, False])
def test_many_devices(monkeypatch, capsys, right):
    """With smaller heads than the example has; and the check finds a step that gives another result on one device."""
    monkeypatch.setattr(many_devices, "HEAD_DIM", 8)
    monkeypatch.setattr(many_devices, "SPLITS", dict(list(many_devices.SPLITS.items())[-1:]))
    jax.clear_caches()  # nothing that was traced before is used again
    if not right:
        monkeypatch.setattr(many_devices, "ragged_decode_attention", wrong_on_one_device())
    assert many_devices.main() == (0 if right else 1)
    assert capsys.readouterr().out.count("OK: every split") == right


def wrong_on_one_device():
    traces = itertools.count()

    def attention(query, *args, **kwargs):
        return ragged_decode_attention(query, *args, **kwargs) * (1 if next(traces) else 2)

    return attention
