"""The benchmark as a command: which cases run in which variants, failures that end nothing else, the tables, and the files that
are written."""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import types

import jax
import pytest

from ejk_ragged.__main__ import main
from ejk_ragged._registry import registry
from ejk_ragged._tools import bench, cases, devices, peers, suite, tables
from ejk_ragged._tools.inputs import draw
from ejk_ragged._tools.machine import Machine
from ejk_ragged._tools.timing import Spread, Timing
from ejk_ragged.testing import Case, TextbookBackend


TINY = Case("tiny", 3, 48, 4, 2, 64, lengths=("uniform", 3, 40))
FEATURES = Case("features", 3, 48, 4, 2, 64, "bfloat16", ("skew", 3, 9), 0.2, (20, 0), 1.5, ("query", 1))
MACHINE = Machine("cpu", "a test", 1 << 30, 1e9, 2e9)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(cases.GROUPS, "cpu", (TINY, FEATURES))
    monkeypatch.setitem(suite.SCALING, "cpu", dataclasses.replace(TINY, seq_len=24))
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, copying=False: MACHINE))


@pytest.fixture
def textbook(monkeypatch):
    """The name of a backend that compiles quickly."""
    backend = TextbookBackend()
    monkeypatch.setattr(registry, "get", lambda name: backend)
    return "textbook"


@pytest.fixture
def instant(monkeypatch):
    """Made-up times, and no peers: 100 us, 10 us more per token, half of the time with 8 bits, and a quarter more in pages."""

    def measure(case, machine, entrants, seed, runs, gradients=False):
        seconds = (100e-6 + 10e-6 * (case.num_tokens or 0)) * (0.5 if case.cache_dtype else 1)
        seconds *= 1.25 if case.page_size else 1
        timing = Timing("kernels", Spread(seconds, seconds, seconds, seconds))
        timings = dict.fromkeys(("gradient", "backward") if gradients else ("forward",), timing)
        found = {one.name: {"ok": True, "timings": timings} if one.ours else {"refused": "not today"} for one in entrants}
        return bench._summary(case, case, machine, draw(case, seed, 1, on_device=False), entrants, found, seed, gradients)

    monkeypatch.setattr(bench, "measure", measure)


def results_of(data):
    return [(case["case"], case["variant"], case["direction"]) for case in data["cases"]]


# ---------------------------------------------------------------------------------------------------------------------------
# What runs


def test_command(capsys, tmp_path, textbook):
    """All cases are measured."""
    options = ["--backends", textbook, "--peers", "--tokens", "2", "--cache-dtype", "int8", "--runs", "1"]
    assert main(["bench", "--cases", "tiny", *options, "--out", str(tmp_path), "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert "Decode steps on a test" in out
    assert "jax.nn xla" in out
    assert "jax.nn xla: no int8 cache (all cases)" in out
    assert "seed 7" in out
    data = json.loads((tmp_path / "a-test.json").read_text())
    assert data["seed"] == 7
    variants = ["", "T 2", "int8", "int8, T 2"]
    assert results_of(data) == [("tiny", variant, "forward") for variant in variants]
    assert all(case["beside_plain"] > 0 for case in data["cases"] if case["variant"])


def test_scaling(instant):
    """Scaling is measured by default, over the sizes that the scaling lists."""
    data = suite.run()
    assert [case["case"] for case in data["cases"]] == ["tiny", "features"]
    assert [point["seq_len"] for point in data["scaling"]["size"]] == [6, 12, 24, 48, 96]
    assert len({point["live_tokens"] for point in data["scaling"]["size"]}) == 1
    assert len({point["live_tokens"] for point in data["scaling"]["live"]}) == 6
    assert "scaling" not in suite.run(names=["tiny"])


def test_cases_of_a_group(instant, monkeypatch):
    """In a group, tokens and gradients are measured for some cases. Cases that are named get both. Quantised caches are measured
    for all cases."""
    monkeypatch.setattr(cases, "TOKEN_CASES", {"features"})
    monkeypatch.setattr(cases, "GRADIENT_CASES", {"tiny"})
    options = {"tokens": [2, 3, 2], "cache_dtypes": ["int8"], "grad": "also", "scaling": False}
    few, all_of_it = ["", "int8"], ["", "T 2", "T 3", "int8", "int8, T 2", "int8, T 3"]
    forward = [("tiny", variant, "forward") for variant in few] + [("features", variant, "forward") for variant in all_of_it]
    assert results_of(suite.run(**options)) == [*forward, *(("tiny", variant, "gradient") for variant in few)]
    named = suite.run(names=["tiny"], **options)
    assert results_of(named) == [("tiny", variant, d) for d in ("forward", "gradient") for variant in all_of_it]


def test_gradients_of_named_cases(instant, capsys):
    assert main(["bench", "--cases", "tiny", "--grad", "only", "--json", "--dtype", "bfloat16"]) == 0
    data = json.loads(capsys.readouterr().out)
    (case,) = data["cases"]
    assert case["direction"] == "gradient"
    assert "bfloat16" in case["problem"]
    assert "scaling" not in data
    (made,) = data["tables"]
    assert made["columns"][2:4] == ["forward + backward", "backward"]


def test_beside_plain(instant):
    data = suite.run(names=["tiny"], tokens=[4], cache_dtypes=["int8"], grad="also")
    beside = {(case["variant"], case["direction"]): case["beside_plain"] for case in data["cases"]}
    assert beside == {
        ("", "forward"): None,
        ("T 4", "forward"): pytest.approx(1.4),
        ("int8", "forward"): pytest.approx(0.5),
        ("int8, T 4", "forward"): pytest.approx(0.7),
        ("", "gradient"): None,
        ("T 4", "gradient"): pytest.approx(1.4),
        ("int8", "gradient"): None,  # other gradients than the plain case's
        ("int8, T 4", "gradient"): None,
    }
    made = {table["title"].split(" on ")[0]: table for table in data["tables"]}
    assert list(made) == [title for (_, kind), title in tables.TITLES.items() if kind != "pages"]
    assert made["Quantised caches"]["columns"] == ["case", "MB", "time", "fraction", "beside plain"]
    assert [row[-1] for row in made["Quantised caches"]["rows"]] == ["0.50x", "0.70x"]
    assert "of 1 GB/s reading" in made["Gradients to the query, quantised caches"]["title"]
    assert "of 2 GB/s copying" in made["Gradients, several query tokens"]["title"]
    assert "beside plain" not in made["Gradients to the query, quantised caches"]["columns"]


def test_pages(instant):
    """Every variant that is asked for is measured in pages too. Each case in pages is compared with the padded case of the same
    variant."""
    data = suite.run(names=["tiny"], tokens=[4], cache_dtypes=["int8"], page_sizes=[0, 16, 16, 20], grad="also")
    found = {(case["variant"], case["direction"]): case for case in data["cases"]}
    variants = ["", "T 4", "int8", "int8, T 4"]
    in_pages = [", ".join(filter(None, (f"pages of {size}", variant))) for size in (16, 20) for variant in variants]
    assert list(found) == [(variant, direction) for direction in ("forward", "gradient") for variant in (*variants, *in_pages)]
    case, padded = found["pages of 20, int8, T 4", "forward"], found["int8, T 4", "forward"]
    assert case["beside_padded"] == pytest.approx(1.25)
    assert case["beside_plain"] is None
    assert case["padded_fraction"] == padded["candidates"][0]["fraction"]
    assert found["pages of 16", "gradient"]["beside_padded"] is None  # other gradients than the padded case's
    assert found["pages of 16, int8", "gradient"]["beside_padded"] == pytest.approx(1.25)
    made = {table["title"].split(" on ")[0]: table for table in data["tables"]}
    assert list(made) == list(tables.TITLES.values())
    table = made["Caches in pages"]
    assert table["columns"] == ["case", "MB", "time", "fraction", "padded", "beside padded"]
    assert [row[0] for row in table["rows"]] == [f"tiny {variant}" for variant in in_pages]
    fraction = f"{found['', 'forward']['candidates'][0]['fraction']:.3f}"
    assert table["rows"][0][-2:] == [fraction, "1.25x"]
    assert "of 1 GB/s reading" in made["Gradients to the query, caches in pages"]["title"]
    assert "beside padded" in made["Gradients to the query, caches in pages"]["columns"]


def test_pages_from_the_command_line(capsys, textbook):
    """Ours is measured. A peer that has no pages, is not installed or fails is listed with its reason, and the benchmark goes
    on."""

    def fails(case):
        raise ArithmeticError("not today")

    def absent(case):
        import no_such_module  # noqa: F401  # pyright: ignore

    made_up = [peers.Peer(name, make, ("pages", "apart"), ("cpu",)) for name, make in (("failing", fails), ("absent", absent))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PEERS", (*bench.PEERS, *made_up))
        options = ["--backends", textbook, "--page-size", "16", "--peers", "--runs", "1", "--seed", "7"]
        assert main(["bench", "--cases", "tiny", *options]) == 0
    out = capsys.readouterr().out
    assert "Caches in pages on a test" in out
    assert "tiny pages of 16" in out
    assert "jax.nn xla: no pages (tiny pages of 16)" in out
    assert "failing: ArithmeticError: not today (tiny pages of 16)" in out
    assert "absent: no_such_module is not installed (tiny pages of 16)" in out
    assert "failing, absent: caches in pages only (tiny)" in out


def test_splits_are_of_padded_caches(instant, monkeypatch):
    split = []
    monkeypatch.setattr(devices, "measure", lambda case, *args: split.append(case.page_size) or {"case": case.name})
    monkeypatch.setattr(tables, "of", lambda data: [])
    suite.run(names=["tiny"], page_sizes=[16], split="only")
    assert split == [None]


def test_fewer_sequences_are_noted(monkeypatch, textbook):
    monkeypatch.setattr(bench, "fit", lambda case, memory, copies: dataclasses.replace(case, batch=2))
    (made,) = suite.run(names=["tiny"], backends=[textbook], runs=1)["tables"]
    assert made["notes"] == ["B 2 sequences instead of 3, to fit into memory (tiny)"]


def test_split(monkeypatch, capsys, tmp_path, textbook):
    timing = Timing("loop", Spread.of([0.1]))
    monkeypatch.setattr(devices, "loop_times", lambda *args: timing)
    options = ["--backends", textbook, "--split", "only", "--runs", "1", "--out", str(tmp_path)]
    assert main(["bench", "--cases", "tiny", *options]) == 0
    out = capsys.readouterr().out
    assert "Decode steps on 8 of a test, the cache split" in out
    assert "100.0 ms (1.00x)" in out
    assert "batch: batch 3 is no multiple of 8 devices" in out
    data = json.loads((tmp_path / "a-test.json").read_text())
    assert data["cases"] == []
    assert [case["case"] for case in data["splits"]] == ["tiny"]
    monkeypatch.setattr(devices, "fit", lambda case, memory, copies: dataclasses.replace(case, batch=2))
    (made,) = suite.run(names=["tiny"], backends=[textbook], split="only", runs=1)["tables"]
    assert "B 2 sequences instead of 3, to fit into memory (tiny)" in made["notes"]
    monkeypatch.setattr(jax, "devices", lambda: ["one"])
    with pytest.raises(SystemExit):
        main(["bench", "--split"])
    assert "there is only one device" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("part", ["tiny", "scaling"])
def test_a_part_that_fails_loses_nothing_else(part, instant, monkeypatch, tmp_path, capsys):
    """Whatever fails, the rest is measured and kept, and the status says that something failed."""

    def fails(measure):
        def call(case_or_machine, *args, **options):
            if part == "scaling" or case_or_machine.name == part:
                raise ValueError("not today")
            return measure(case_or_machine, *args, **options)

        return call

    name = "scaling" if part == "scaling" else "measure"
    monkeypatch.setattr(bench, name, fails(getattr(bench, name)))
    monkeypatch.setattr(suite, "draw", lambda data, folder: [])
    assert main(["bench", "--out", str(tmp_path), "--cases", "tiny", "features", "--scaling"]) == 1
    assert f"failed {part}: ValueError: not today" in capsys.readouterr().out
    data = json.loads((tmp_path / "a-test.json").read_text())
    assert data["failed"] == {part: "ValueError: not today"}
    assert "features" in [case["case"] for case in data["cases"]]
    assert (part == "scaling") == ("scaling" not in data)


def test_a_run_that_is_cut_short_leaves_what_it_has(instant, monkeypatch, tmp_path):
    measured = bench.measure

    def measure(case, *args):
        if case.name == "features":
            raise KeyboardInterrupt
        return measured(case, *args)

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--out", str(tmp_path)])
    data = json.loads((tmp_path / "a-test.json").read_text())
    assert results_of(data) == [("tiny", "", "forward")]
    assert data["tables"][0]["rows"][0][0] == "tiny"


def test_too_large_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, copying=False: dataclasses.replace(MACHINE, memory=1000)))
    assert main(["bench", "--cases", "tiny"]) == 0
    assert "skipped tiny: one sequence needs" in capsys.readouterr().out


@pytest.mark.parametrize("left_out", [{"cannot": "no room"}, {"refused": "wrong"}], ids=str)
def test_points_that_are_left_out(left_out, instant, monkeypatch, capsys):
    scaling = {"problem": "a problem", "live": [], "size": [], "left_out": {"3 of 4 rows": left_out}}
    monkeypatch.setattr(bench, "scaling", lambda *args: scaling)
    assert main(["bench", "--cases", "tiny", "--scaling"]) == ("refused" in left_out)
    assert f"left out 3 of 4 rows: {next(iter(left_out.values()))}" in capsys.readouterr().out


def test_wrong_backend_is_an_exit_status(monkeypatch, capsys):
    class Zeros(TextbookBackend):
        name = "zeros"

        def divided(self, values, total):
            return values * 0

    monkeypatch.setattr(registry, "get", lambda name: Zeros())
    assert main(["bench", "--cases", "tiny", "--backends", "zeros"]) == 1
    assert "ejk-ragged zeros: differs from the oracle: out 1.0e+00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cases", "nonsense"], "nonsense"),
        (["--rows", "nonsense"], "nonsense"),  # the old name of the option
        (["--runs", "0"], "argument --runs: must be a whole number of at least 1, got '0'"),
        (["--runs", "-1"], "argument --runs: must be a whole number of at least 1, got '-1'"),
        (["--page-size", "-16"], "argument --page-size: must be a whole number of at least 0, got '-16'"),
        (["--page-size", "16", "--cache-dtype", "int8", "--scales", "sequence"], "choose from row, head, number"),
        (["--backends", "nonsense"], "nonsense"),
        (["--tokens", "0"], "must be a whole number of at least 1, got '0'"),
        (["--cache-dtype", "int4"], "int4"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *arguments])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("usage: python -m ejk_ragged bench ")


# ---------------------------------------------------------------------------------------------------------------------------
# The files that are written


@pytest.fixture
def measured(instant):
    variants = {"tokens": [2, 4], "cache_dtypes": ["int8"], "page_sizes": [16]}
    return suite.run(names=["tiny"], **variants, grad="also", peers=True, scaling=True, seed=7)


def test_pictures(measured, tmp_path):
    pytest.importorskip("matplotlib")
    kinds = ["forward", "gradient", "pages", "tokens", "cache", "scaling", "summary"]
    assert [file.name for file in suite.draw(measured, tmp_path)] == [f"a-test-{kind}.png" for kind in kinds]
    assert {table["picture"] for table in measured["tables"]} == {*kinds[:5], None}


def test_pictures_of_less(instant, tmp_path):
    """What was not measured is not drawn, and points may be missing."""
    pytest.importorskip("matplotlib")
    assert suite.draw(suite.run(names=["cpu"], grad="only"), tmp_path) == []  # none of these cases has gradients
    data = suite.run(names=["tiny"], grad="only")
    assert [file.name for file in suite.draw(data, tmp_path)] == ["a-test-gradient.png"]
    data["scaling"] = {"problem": "a problem", "live": [], "size": [], "left_out": {}}
    assert [file.name for file in suite.draw(data, tmp_path)] == ["a-test-gradient.png"]


@pytest.mark.parametrize("before", [False, True])
def test_json_is_all_that_stdout_has(before, instant, tmp_path, capsys):
    arguments = ["bench", "--cases", "tiny", "--page-size", "16", "--scaling", "--peers", "--out", str(tmp_path)]
    assert main(["--json", *arguments] if before else [*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "a-test.json").read_text())
    assert "1 of 3: tiny" in err
    assert "wrote" in err


def test_the_option_of_before(instant, capsys):
    """`--rows` is the old name of `--cases`."""
    assert main(["bench", "--rows", "tiny", "--json"]) == 0
    assert results_of(json.loads(capsys.readouterr().out)) == [("tiny", "", "forward")]
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "--rows" not in capsys.readouterr().out


def test_names_of_files(instant, capsys, tmp_path):
    for name in ([], ["--name", "Quantised caches"]):
        assert main(["bench", "--cases", "tiny", "--out", str(tmp_path / "new"), *name]) == 0
    written = {file.name for file in (tmp_path / "new").glob("*.json")}
    assert written == {"a-test.json", "a-test-quantised-caches.json"}
    assert "wrote" in capsys.readouterr().err


def test_page_of_results(measured, tmp_path):
    """The documentation shows the same tables, and the pictures that exist."""
    file = pathlib.Path(__file__).parents[1] / "docs/hooks/results.py"
    spec = importlib.util.spec_from_file_location("results", file)
    assert spec is not None
    assert spec.loader is not None
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    for name in ("", "tiny cases"):
        suite.write(measured | {"name": name}, tmp_path / "performance")
    (tmp_path / "performance" / "a-test-tiny-cases-cache.png").touch()
    page = results.on_page_markdown("before <!-- results --> after", None, types.SimpleNamespace(docs_dir=tmp_path), None)
    assert page.startswith('before ??? note "a test: ')
    assert '??? note "a test: tiny cases"' in page
    assert page.endswith("after")
    assert "| tiny | " in page
    assert "| tiny&nbsp;int8,&nbsp;T&nbsp;4 | " in page
    assert "(a-test-tiny-cases-cache.png)" in page
    assert "-forward.png)" not in page
    line = {"batch": 2, "live": 9, "cache": "int8", "attention": "ours", "tokens": 4, "ms": 0.5, "tokens_per_second": 16000.0}
    whole = {"model": "small", "rows": 32, "device": "a test", "jax": "1", "steps": [line, line | {"tokens": 1, "batch": 3}]}
    (tmp_path / "performance" / "small.json").write_text(json.dumps(whole))
    page = results.on_page_markdown("<!-- results -->", None, types.SimpleNamespace(docs_dir=tmp_path), None)
    assert '??? note "a test: whole decode steps of small"' in page
    assert "| ours | int8 | 4 | 0.50&nbsp;ms,&nbsp;16000 | &#8209; |" in page
    for file in (tmp_path / "performance").glob("*.json"):
        file.unlink()
    assert "No results" in results.on_page_markdown(
        "<!-- main result --><!-- results -->", None, types.SimpleNamespace(docs_dir=tmp_path), None
    )


def test_without_matplotlib(measured, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ejk_ragged._tools.plots", None)
    monkeypatch.delattr("ejk_ragged._tools.plots", raising=False)
    assert suite.draw(measured, tmp_path) == []


def test_on_a_terminal(instant, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["bench", "--cases", "tiny", "--scaling"]) == 0
    out, err = capsys.readouterr()
    assert "fraction" in out
    assert "tiny" in out
    assert "live tokens:" in out
    assert "[1/2]" not in err


def test_help_names_the_cases(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    words = capsys.readouterr().out.split()
    listed = {name: group for name, group in cases.GROUPS.items() if name != "cpu"}  # which these tests replace
    assert {case.name for group in listed.values() for case in group} <= set(words)
    assert set(listed) <= set(words)
