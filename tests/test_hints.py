"""Tuned hints: how they are kept and found, and what happens if the kept hints are of no use."""

import concurrent.futures
import contextvars
import dataclasses
import json
import os
import stat
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
import pytest
from tuning import Notes, PROBLEM, TARGET

from ejk_ragged import _hints, Backend, explain, FwdParams, ragged_decode_attention, Target, tuned_hints
from ejk_ragged.__main__ import main
from ejk_ragged._registry import registry
from ejk_ragged._tools import hints_file
from ejk_ragged._tools import tune as _tune
from ejk_ragged.testing import TextbookBackend


pytestmark = pytest.mark.usefixtures("on_a_cpu")


@pytest.fixture
def backend():
    return Notes()


def arguments(**options):
    query = jnp.ones((3, 4, 64))
    cache = jnp.ones((3, 48, 2, 64))
    return {"query": query, "key": cache, "value": cache, **options}


def save(file, backend, problem=PROBLEM, **hints):
    key = _hints.key_of(backend, problem, TARGET)
    assert key is not None
    hints_file.save(file, {key: {"fwd_params": hints}})


def chosen(**options):
    return explain(**arguments(**options))[TARGET.platform]


# ---------------------------------------------------------------------------------------------------------------------------
# Picking up


def test_calls_pick_up(backend, file):
    save(file, backend, num_warps=8)
    ragged_decode_attention(**arguments(backend=backend))
    with tuned_hints(file):
        ragged_decode_attention(**arguments(backend=backend))
        ragged_decode_attention(**arguments(backend=backend))
        assert backend.traced == (1, 8)  # compiled once, with the hints of the file
        save(file, backend, num_warps=16)
        jax.jit(lambda arrays: ragged_decode_attention(**arrays, backend=backend))(arguments())
        with tuned_hints(None):
            ragged_decode_attention(**arguments(backend=backend))
    assert backend.traced == (1, 8, 16)


def test_explain_says_where_hints_come_from(backend, file):
    save(file, backend, num_warps=8)
    assert chosen(backend=backend).hints_from == "default"
    with tuned_hints(file):
        tuned = explain(**arguments(backend=backend))
        assert tuned[TARGET.platform].hints_from == "tuned"
        assert tuned[TARGET.platform].fwd_params == FwdParams(num_warps=8)
        assert "notes; tuned hints: num_warps 8" in str(tuned)
        given = explain(**arguments(backend=backend, fwd_params=FwdParams(num_warps=2)))
        assert given[TARGET.platform].hints_from == "given"
        assert "given hints: num_warps 2" in str(given)
        assert chosen(backend=backend, fwd_params=FwdParams()).hints_from == "tuned"


def test_hints_of_a_backend_alone(backend, file):
    """A backend's own hints, `others`, reach the backend from the caller and from a file. A program of their own is compiled for
    them."""
    save(file, backend, num_warps=8, others={"depth": 3})
    with tuned_hints(file):
        tuned = explain(**arguments(backend=backend))
        assert tuned[TARGET.platform].fwd_params == FwdParams(num_warps=8, others={"depth": 3})
        assert "notes; tuned hints: num_warps 8, depth 3" in str(tuned)
    given = chosen(backend=backend, fwd_params=FwdParams(others={"depth": 2}))
    assert (given.hints_from, given.fwd_params.given["depth"]) == ("given", 2)
    for depth in (2, 2, 5):
        ragged_decode_attention(**arguments(backend=backend, fwd_params=FwdParams(others={"depth": depth})))
    assert len(backend.traced) == 2


def test_splits_that_are_given_stand_alone(backend, file):
    """With `num_key_splits` given, a sequence's result must not depend on the batch. So hints from a file, which depend on the
    batch, are not merged in."""
    save(file, backend, num_warps=8)
    with tuned_hints(file):
        choice = chosen(backend=backend, fwd_params=FwdParams(num_key_splits=3))
    assert choice.fwd_params == FwdParams(num_key_splits=3, num_warps=1)


def test_gradients_keep_the_defaults(backend, file):
    save(file, backend, num_warps=8)
    with tuned_hints(file):
        chosen = [registry.select(TARGET.platform, PROBLEM, backend, way, _hints.current()) for way in ("forward", "backward")]
    assert [selection.problem.fwd_params for selection in chosen] == [FwdParams(num_warps=8), FwdParams(num_warps=1)]


class Forward(Notes):
    """A backend without gradients. Its hints mean nothing to `Gradients`."""

    name = "forward_only"
    priority = 9
    backward = Backend.backward

    def fwd_params(self, problem, target):
        if problem.fwd_params.num_warps not in (None, 6):
            raise ValueError("FwdParams.num_warps must be 6")
        return problem.fwd_params.over(FwdParams(num_warps=6, block_size_keys=48))


class Gradients(TextbookBackend):
    """A backend that takes powers of two, and notes the hints that it gets."""

    name = "gradients"
    asked: tuple = ()

    def fwd_params(self, problem, target):
        if problem.fwd_params.num_warps not in (None, 1, 2, 4):
            raise ValueError("FwdParams.num_warps must be a power of two")
        return problem.fwd_params.over(FwdParams(num_warps=4))

    def backward(self, problem, *args, **kwargs):
        Gradients.asked += (problem.fwd_params,)
        return super().backward(problem, *args, **kwargs)


@pytest.mark.parametrize("named", [None, "forward_only", Forward()], ids=["automatic", "by name", "an instance"])
@pytest.mark.parametrize("splits", [None, 3])
def test_hints_are_for_the_backend_of_the_forward(install, monkeypatch, named, splits):
    """Another backend has the gradients. It resolves its own hints, and keeps the batch invariance that was asked for."""
    install(Forward, Gradients)
    monkeypatch.setattr(Gradients, "asked", ())
    jax.clear_caches()  # an equal instance may have been used before
    given = FwdParams(num_warps=6, block_size_keys=16, num_key_splits=splits)
    call = arguments(backend=named, fwd_params=given)
    jax.grad(lambda query: jnp.sum(ragged_decode_attention(**call | {"query": query})))(call["query"])
    assert Gradients.asked == (FwdParams(num_warps=4, num_key_splits=splits),)
    explanation = explain(**call)
    choice = explanation[TARGET.platform]
    assert (choice.forward, choice.backward, choice.error) == ("forward_only", "gradients", None)
    assert (choice.fwd_params, choice.hints_from) == (given, "given")
    assert choice.not_for_backward == ("block_size_keys", "num_warps")
    assert "        hints that are not for gradients: block_size_keys, num_warps" in str(explanation).splitlines()
    with pytest.raises(ValueError, match="num_warps must be 6"):
        ragged_decode_attention(**arguments(backend=named, fwd_params=FwdParams(num_warps=4)))


def test_hints_of_a_backend_that_has_both(install, monkeypatch):
    install(Gradients)
    monkeypatch.setattr(Gradients, "asked", ())
    call = arguments(fwd_params=FwdParams(num_warps=2))
    jax.grad(lambda query: jnp.sum(ragged_decode_attention(**call | {"query": query})))(call["query"])
    assert Gradients.asked == (FwdParams(num_warps=2),)
    assert chosen(fwd_params=FwdParams(num_warps=2)).not_for_backward == ()


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 5},
        {"num_tokens": 2},
        {"seq_len": 65},
        {"num_q_heads": 8},
        {"num_kv_heads": 4},
        {"head_dim": 32},
        {"dtype": np.dtype("float16")},
        {"cache_dtype": np.dtype("int8")},
        {"cache_dtype": np.dtype(jnp.float8_e4m3fn)},
        {"logits_soft_cap": 3.0},
    ],
    ids=str,
)
def test_other_classes(backend, change):
    other = dataclasses.replace(PROBLEM, **change)
    assert _hints.key_of(backend, other, TARGET) != _hints.key_of(backend, PROBLEM, TARGET)


def test_one_class(backend):
    """Sizes count up to the next power of two. The scale, the cap and the axes of `vmap` do not count."""
    same = dataclasses.replace(PROBLEM, batch=4, seq_len=33, softmax_scale=1.0, maps=(2,))
    assert _hints.key_of(backend, same, TARGET) == _hints.key_of(backend, PROBLEM, TARGET)
    caps = [dataclasses.replace(PROBLEM, logits_soft_cap=cap) for cap in (3.0, 4.0)]
    assert _hints.key_of(backend, caps[0], TARGET) == _hints.key_of(backend, caps[1], TARGET)


def test_no_class(backend):
    assert _hints.key_of(backend, PROBLEM, Target("cuda")) is None  # a target without a device on this machine
    (symbolic,) = jax.export.symbolic_shape("b")
    assert _hints.key_of(backend, dataclasses.replace(PROBLEM, batch=symbolic), TARGET) is None


def test_another_version(backend, file, monkeypatch):
    save(file, backend, num_warps=8)
    monkeypatch.setattr(Notes, "version", "another")
    with tuned_hints(file):
        assert chosen(backend=backend).hints_from == "default"


def test_the_users_own_file(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name, appauthor: tmp_path / name)  # on any system
    _hints.default_file.cache_clear()

    def outside():  # outside of the tests' own fixture
        before = chosen(backend=backend).hints_from
        save(_hints.default_file(), backend, num_warps=8)
        return before, chosen(backend=backend).hints_from

    try:
        assert _hints.default_file() == tmp_path / "ejk-ragged" / "tuned.json"
        assert contextvars.Context().run(outside) == ("default", "tuned")
    finally:
        _hints.default_file.cache_clear()


def test_without_platformdirs(backend, monkeypatch):
    """Calls use the defaults. Nothing can have been tuned on such a machine."""
    _hints.default_file.cache_clear()
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    try:
        assert contextvars.Context().run(lambda: chosen(backend=backend).hints_from) == "default"
        with pytest.raises(SystemExit):
            main(["tune", "--problem", "3,48,4:2,64,float32"])
    finally:
        _hints.default_file.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------------
# Of no use


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"text"',
        "{}",
        '{"format": 1, "entries": {}}',
        '{"format": 2, "entries": []}',
        '{"format": 2, "entries": {"a": {}}}',
        '{"format": 2, "entries": {"a": {"fwd_params": {"num_warps": -1}}}}',
        '{"format": 2, "entries": {"a": {"fwd_params": {"num_warps": "4"}}}}',
        '{"format": 2, "entries": {"a": {"fwd_params": {"num_wraps": 4}}}}',
        b"\xff\xfe\x00",
    ],
)
def test_damaged(backend, file, text):
    """One warning is given, and calls go on as if there were no file. Saving repairs the file."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with tuned_hints(file):
        with pytest.warns(RuntimeWarning, match=r"tuned hints in .*tuned.json are ignored: "):
            out = ragged_decode_attention(**arguments(backend=backend))
        assert chosen(backend=backend).hints_from == "default"
        save(file, backend, num_warps=8)
        assert chosen(backend=backend).hints_from == "tuned"
    np.testing.assert_allclose(out, 1, rtol=1e-6)


def test_stale(backend, file):
    """The backend now refuses the kept hints: one warning is given, and the defaults are used."""
    save(file, backend, num_warps=3)
    with tuned_hints(file):
        with pytest.warns(RuntimeWarning, match="Tuned hints are ignored: FwdParams.num_warps must not be 3"):
            ragged_decode_attention(**arguments(backend=backend))
        assert chosen(backend=backend).fwd_params == FwdParams(num_warps=1)
    registry._warned.clear()


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of tuned hints at .*none.json"), tuned_hints(tmp_path / "none.json"):
        pass


def test_file_that_goes_away(backend, file):
    save(file, backend, num_warps=8)
    with tuned_hints(file):
        assert chosen(backend=backend).hints_from == "tuned"
        file.unlink()
        assert chosen(backend=backend).hints_from == "default"


def test_saving_at_once(file, backend):
    keys = [f"{worker} {i}" for worker in range(4) for i in range(10)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(hints_file.save, file, {key: {"fwd_params": {"num_warps": 2}}}) for key in keys]:
            done.result()
    assert sorted(json.loads(file.read_text())["entries"]) == sorted(keys)
    assert [left.name for left in file.parent.iterdir()] == [file.name]


def test_lock_of_the_dead(file, backend):
    """A file that no process holds is no lock, however old or new it is."""
    lock = file.with_suffix(".lock")
    for age in (0, 1000):
        lock.touch()
        os.utime(lock, (time.time() - age, time.time() - age))
        save(file, backend, num_warps=2)
        assert file.exists()
        assert not lock.exists()


def test_an_old_lock_is_held_by_one(file):
    """A held lock counts however long ago it was taken."""
    lock, inside = file.with_suffix(".lock"), threading.Event()
    saving = threading.Thread(target=lambda: (hints_file.save(file, {"a": {"fwd_params": {}}}), inside.set()))
    with hints_file._lock(lock):
        os.utime(lock, (0, 0))
        saving.start()
        assert not inside.wait(0.3)
    saving.join()
    assert "a" in json.loads(file.read_text())["entries"]


SAVE = """
import pathlib, sys
from ejk_ragged._tools import hints_file
file, worker = pathlib.Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    hints_file.save(file, {f"{worker} {i}": {"fwd_params": {"num_warps": 2}}})
"""


def test_processes_saving_at_once(file):
    """Several processes save at the same time, and a lock was left behind. Nothing is lost."""
    lock = file.with_suffix(".lock")
    lock.touch()
    os.utime(lock, (0, 0))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers: list[Any] = [subprocess.Popen([sys.executable, "-c", SAVE, str(file), f"{n}"], **pipes) for n in range(4)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate()
    assert [worker.returncode for worker in workers] == [0] * 4
    assert len(json.loads(file.read_text())["entries"]) == 4 * 40
    assert [left.name for left in file.parent.iterdir()] == [file.name]


def test_a_lock_dies_with_its_process(file):
    held = "from ejk_ragged._tools.hints_file import _lock\nwith _lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    lock = file.with_suffix(".lock")
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; {held}", str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.kill()
    assert lock.exists()
    began = time.monotonic()
    hints_file.save(file, {"a": {"fwd_params": {}}})
    assert time.monotonic() - began < 1
    assert [left.name for left in file.parent.iterdir()] == [file.name]


@pytest.mark.skipif(os.name != "posix", reason="tests the umask and the modes of group and others, which Windows does not have")
def test_mode(file, backend):
    """A new file has the mode that the umask gives. An old file keeps the mode that the user gave it."""
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            save(file, backend, num_warps=2)
            assert stat.S_IMODE(file.stat().st_mode) == mode
        finally:
            os.umask(before)
        file.unlink()
    save(file, backend, num_warps=2)
    file.chmod(0o640)
    save(file, backend, num_warps=4)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_newer_format_is_left_alone(file, backend, capsys):
    text = json.dumps({"format": _hints.FORMAT + 1, "entries": {"of": "another kind"}})
    file.write_text(text)
    newer = "A newer version of ejk-ragged wrote the file, in format 3; this version knows format 2."
    with pytest.warns(RuntimeWarning, match=rf"tuned hints are not saved in .*tuned.json: {newer} Update ejk-ragged"):
        save(file, backend, num_warps=8)
    with (
        tuned_hints(file),
        pytest.warns(RuntimeWarning, match=rf"tuned hints in .*tuned.json are ignored: {newer} Update ejk-ragged"),
    ):
        assert chosen(backend=backend).hints_from == "default"
    with pytest.raises(SystemExit):
        main(["tune", "--problem", "3,48,4:2,64,float32", "--file", str(file)])  # before any time is spent
    assert newer in capsys.readouterr().err
    assert file.read_text() == text


def test_a_file_that_cannot_be_read_is_not_replaced(file, backend, monkeypatch):
    file.write_text("not for us")

    def denied(path):
        raise PermissionError(f"{path} is another user's")

    monkeypatch.setattr(type(file), "read_bytes", denied)
    with pytest.raises(PermissionError):
        save(file, backend, num_warps=8)
    assert file.read_text() == "not for us"


def test_a_write_that_fails_leaves_the_old_file(file, backend):
    save(file, backend, num_warps=2)
    before = file.read_bytes()
    with pytest.raises(TypeError):
        hints_file.save(file, {"a": {"fwd_params": object()}})
    assert file.read_bytes() == before
    assert [left.name for left in file.parent.iterdir()] == [file.name]


def test_calls_do_not_tune(backend, file, monkeypatch):
    for name in ("tune", "run"):
        monkeypatch.setattr(_tune, name, None)
    save(file, backend, dataclasses.replace(PROBLEM, batch=64), num_warps=8)
    before = file.read_bytes()
    with tuned_hints(file):
        ragged_decode_attention(**arguments(backend=backend))
    assert backend.traced == (1,)
    assert file.read_bytes() == before
