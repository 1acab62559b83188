"""The command line: the report as text and as JSON, the exit status, and what the report says of a backend that fails."""

import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import ejk_ragged
from ejk_ragged import _registry, Backend, explain
from ejk_ragged.__main__ import main
from ejk_ragged._tools import report as _report
from ejk_ragged.testing import Case, CHECKS, TextbookBackend, Verdict


TINY = Case("tiny", 2, 64, 4, 2, 32, lengths=("skew", 3, 9))


class Wrong(TextbookBackend):
    """A backend that returns zeros, for heads of 32, without gradients."""

    name = "wrong"
    platforms = frozenset({"cpu", "cuda"})
    backward = Backend.backward

    def supports(self, problem, target):
        return "its heads are 32 wide" if problem.head_dim != 32 else None

    def divided(self, values, total):
        return values * 0


class Raises(TextbookBackend):
    name = "raises"
    platforms = frozenset({"cpu"})

    def forward(self, problem, target, queries, cache):
        raise ArithmeticError("not today")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(_report, "realistic", lambda: TINY)


@pytest.fixture
def install(monkeypatch):
    """Installs made-up backends, `name="module:attribute"`, in addition to the real backends or alone."""

    def install(alone=False, **values):
        real = importlib.metadata.entry_points(group=_registry.GROUP)
        made_up = [importlib.metadata.EntryPoint(name, value, _registry.GROUP) for name, value in values.items()]
        monkeypatch.setattr(_registry.registry, "_given", made_up if alone else [*real, *made_up])
        forget()

    def forget():
        _registry.registry.clear()
        jax.clear_caches()  # a compiled call keeps the backend that was chosen for it

    yield install
    monkeypatch.undo()
    forget()


def run_json(capsys, *arguments):
    status = main(["--json", "--checks", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_text(capsys):
    assert main(["--checks", "window", "cap"]) == 0
    out = capsys.readouterr().out
    for title in ("Versions", "Devices", "Backends", "What would run", "Checks against", "One decode step"):
        assert title in out
    assert "cpu (here)" in out
    assert "failed. All is well." in out


def test_json(capsys):
    status, data = run_json(capsys, "window", "all")
    assert status == 0
    assert data["ok"]
    assert data["dispatch"]["platforms"]["cpu"]["forward"] == "xla"
    assert set(data["dispatch"]["platforms"]) == set(_registry.KNOWN_PLATFORMS)
    (xla,) = (info for info in data["installation"]["backends"] if info["name"] == "xla")
    assert xla == {"name": "xla", "distribution": "ejk-ragged", "platforms": None, "broken": None, "faulty": False}
    assert {check["case"] for check in data["checks"]} == {"window", "all"}
    compared = {c["what"] for check in data["checks"] if check["case"] == "all" for c in check["compared"]}
    assert compared >= {"out", "lse", "d_query", "d_key", "d_value", "d_softmax_aux", "dead d_key", "dead d_value"}
    assert data["step"]["live_bytes"] == TINY.live_bytes()
    assert data["step"]["speedup"] > 0


def test_every_case_is_checked_by_default(monkeypatch):
    """Each backend checks every case that it can do. The shared suite tests whether the results are right."""
    asked = []

    def verify(call, arguments):
        asked.append(arguments)
        return (Verdict("out", 0.0, 1e-6),)

    monkeypatch.setattr(_report, "verify", verify)
    results = _report.checks()
    assert [result["case"] for result in results if result["backend"] == "xla"] == [case.name for case in CHECKS]
    assert all(result["ok"] for result in results)
    assert len(asked) == len(results)
    poison = next(arguments for arguments in asked if "sequence_end" in arguments)
    assert not all(np.isfinite(np.asarray(poison["key"], np.float32)).ravel())


def test_wrong_backend(capsys, install):
    install(wrong=f"{__name__}:Wrong")
    status, data = run_json(capsys, "mha", "mqa")
    assert status == 1
    assert not data["ok"]
    found = {check["case"]: check for check in data["checks"] if check["backend"] == "wrong"}
    assert found["mha"]["ok"] is False
    assert not found["mha"]["compared"][0]["ok"]
    assert found["mqa"]["ok"] is None
    assert "its heads are 32 wide" in found["mqa"]["refused"]
    assert data["dispatch"]["platforms"]["cpu"]["forward"] == "wrong"

    assert main(["--checks", "mha", "mqa"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "wrong, mha: out is wrong" in out
    assert "refused" in out
    assert "1 failed. NOT WELL." in out


def test_backend_that_raises(capsys, install):
    install(raises=f"{__name__}:Raises")
    status, data = run_json(capsys, "mha")
    assert status == 1
    (found,) = (check for check in data["checks"] if check["backend"] == "raises")
    assert found == {"backend": "raises", "case": "mha", "ok": False, "raised": "ArithmeticError: not today"}
    assert data["step"] == {"error": "ejk-ragged: ArithmeticError: not today"}  # the broken backend would be chosen there
    text = _report.show_checks(data["checks"])
    assert "RAISED" in text
    assert "raises, mha: ArithmeticError: not today" in text
    assert "not today" in _report.show_step(data["step"])


@pytest.mark.filterwarnings("ignore:The backend 'broken':RuntimeWarning")
def test_broken_backend(capsys, install):
    install(broken="no_such_module:Backend")
    status, data = run_json(capsys, "mha")
    assert status == 0  # the broken backend is not used, and the report says so
    (broken,) = (info for info in data["installation"]["backends"] if info["name"] == "broken")
    assert "No module named 'no_such_module'" in broken["broken"]
    assert "BROKEN: ModuleNotFoundError" in _report.show_installation(data["installation"])
    assert "broken" not in {check["backend"] for check in data["checks"]}


@pytest.mark.filterwarnings("ignore:The backend 'broken':RuntimeWarning")
def test_no_backend_works(capsys, install):
    install(alone=True, broken="no_such_module:Backend")
    status, data = run_json(capsys, "mha")
    assert status == 1
    assert not data["ok"]
    assert data["checks"] == []
    assert data["dispatch"]["platforms"]["cpu"]["forward"] is None
    assert "none is installed" in data["dispatch"]["platforms"]["cpu"]["error"]
    assert main([]) == 1
    assert "no backend can run here" in capsys.readouterr().out


def test_only_forward(capsys, install):
    install(alone=True, wrong=f"{__name__}:Wrong")
    choice = explain(**CHECKS[0].draw())["cpu"]
    assert choice.forward == "wrong"
    assert choice.backward is None
    assert "it has no backward operation" in str(choice.error)
    assert main(["--checks", "mha"]) == 1
    assert "wrong, gradients by none" in capsys.readouterr().out


def test_not_finite_is_still_json(monkeypatch, capsys):
    monkeypatch.setattr(_report, "verify", lambda call, arguments: (Verdict("out", float("nan"), 1e-6),))
    status, data = run_json(capsys, "mha")
    assert status == 1
    assert data["checks"][0]["compared"] == [{"what": "out", "ok": False, "error": None, "tolerance": 1e-6}]
    assert "error not finite" in _report.show_checks(data["checks"])


def test_unknown_check(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--checks", "window", "nonsense"])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert "nonsense not known; choose from mha," in err
    assert err.startswith("usage: python -m ejk_ragged [-h]")


@pytest.mark.parametrize("arguments", [[], ["bench"], ["tune"]], ids=str)
def test_help_asks_no_device(arguments):
    """The help text takes no GPU memory, and works where JAX finds no device."""
    command = [sys.executable, "-m", "ejk_ragged", *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "none_such"})
    assert "examples:" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert ejk_ragged.__version__ in capsys.readouterr().out


def test_explain_command(capsys):
    """A named case and shapes, in words and as JSON. For a case that the call would refuse, the command prints the reason and
    exits with 1."""
    assert main(["explain", "full", "3,48,4:2,64,float32"]) == 0
    text = capsys.readouterr().out
    assert text.count("ragged_decode_attention of ") == 2
    assert "B 3, S 48, heads 4:2, D 64, float32" in text
    assert main(["--json", "explain", "full"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["platforms"]["cpu"]["forward"] == "xla"
    assert main(["explain", "full", "--backend", "mosaic_gpu"]) in (0, 1)


def test_explain_command_of_a_case_of_mla(capsys):
    """Named cases include values in the key's rows, and values narrower than the keys."""
    assert main(["explain", "mla", "narrow-value"]) == 0
    text = capsys.readouterr().out
    assert "B 128, S 4096, heads 16:1, D 576" in text
    assert "B 16, S 8192, heads 32:8, D 192" in text


def test_explain_command_refuses(capsys):
    for wrong in (["nothing"], ["full", "--backend", "nobody"]):
        with pytest.raises(SystemExit) as stopped:
            main(["explain", *wrong])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith("usage: python -m ejk_ragged explain ")
