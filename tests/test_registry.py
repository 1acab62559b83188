"""Backends as plug-ins: found without importing them, loaded when needed, chosen in order, and refused with a reason."""

import dataclasses
import importlib.metadata
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import backend, entries, Entry, PROBLEM
from support import draw

import ejk_ragged
from ejk_ragged import explain, FwdParams, ragged_decode_attention
from ejk_ragged._registry import Backend, Registry
from ejk_ragged.testing import Case, TextbookBackend


# ---------------------------------------------------------------------------------------------------------------------------
# Discovery and loading


def test_listing_loads_nothing():
    given = entries(backend("b"), backend("a"))
    made = Registry(given)
    assert made.names() == ("a", "b")
    assert [entry.loads for entry in given] == [0, 0]


def test_loaded_when_needed_and_once():
    given = entries(backend("a"), backend("b"))
    made = Registry(given)
    assert made.resolve("b") is made.get("b")
    assert [entry.loads for entry in given] == [0, 1]
    assert made.resolve(None) is made.resolve("auto") is None
    assert [entry.loads for entry in given] == [0, 1]


def test_an_instance_will_do_too():
    instance = backend("a")()
    assert Registry(entries(instance)).get("a") is instance
    assert Registry([]).resolve(instance) is instance  # an instance need not be registered


def test_clear_looks_again():
    given = entries(backend("a"))
    made = Registry(given)
    first = made.get("a")
    given += entries(backend("b"))
    assert made.names() == ("a",)
    made.clear()
    assert made.names() == ("a", "b")
    assert made.get("a") is not first


def test_real_entry_points():
    """The class of importlib.metadata itself, without a distribution."""
    made = Registry([importlib.metadata.EntryPoint("textbook", "ejk_ragged.testing:TextbookBackend", "ejk_ragged.backends")])
    assert isinstance(made.get("textbook"), TextbookBackend)
    (info,) = made.backends()
    assert (info.name, info.distribution, info.platforms, info.broken) == ("textbook", "an unknown distribution", None, None)


def test_duplicates_name_both_distributions():
    given: list[Any] = [Entry("a", backend("a"), "one-dist"), Entry("a", backend("a"), "other-dist")]
    made = Registry(given)
    for question in (made.names, made.backends, made.automatic, lambda: made.get("a"), lambda: made.select("cpu", PROBLEM)):
        with pytest.raises(RuntimeError, match=r"Two distributions register a backend named 'a': one-dist .* and other-dist"):
            question()


def test_the_same_entry_twice_is_no_duplicate():
    """The same metadata is found twice on the path."""
    one = backend("a")
    assert Registry(entries(one, one)).names() == ("a",)


BROKEN: dict[str, tuple[Any, str]] = {
    "import fails": (Entry("bad", ImportError("no such library"), "bad-dist"), "ImportError: no such library"),
    "no backend": (Entry("bad", 3, "bad-dist"), "TypeError: its entry point is 3, not an ejk_ragged.Backend"),
    "class of something": (Entry("bad", dict, "bad-dist"), r"TypeError: its entry point is \{\}, not an ejk_ragged.Backend"),
    "abstract": (Entry("bad", Backend, "bad-dist"), "TypeError: Can't instantiate abstract class"),
    "other name": (
        Entry("bad", backend("good"), "bad-dist"),
        "ValueError: its entry point is named 'bad' but the backend calls itself 'good'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_plug_in(kind):
    """A broken plug-in is passed over with one warning if nobody named it, raised with its cause if a call names it, and listed
    with its reason."""
    entry, reason = BROKEN[kind]
    made = Registry([entry, *entries(backend("good", priority=-5))])
    with pytest.warns(RuntimeWarning, match=f"The backend 'bad' of bad-dist cannot be loaded and is passed over: {reason}"):
        assert made.select("cpu", PROBLEM).backend.name == "good"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.select("cpu", PROBLEM)  # the warning is given once
    with pytest.raises(RuntimeError, match=f"The backend 'bad' of bad-dist cannot be loaded: {reason}") as caught:
        made.select("cpu", PROBLEM, "bad")
    assert isinstance(caught.value.__cause__, Exception)
    bad, good = made.backends()
    assert bad.broken is not None
    assert reason.split(":")[0] in bad.broken
    assert (bad.distribution, good.broken) == ("bad-dist", None)


# ---------------------------------------------------------------------------------------------------------------------------
# Selection


def test_order():
    """Backends are asked by priority, then by name."""
    made = Registry(entries(backend("last", -100), backend("b"), backend("a"), backend("first", 7)))
    assert [one.name for one in made.automatic()] == ["first", "a", "b", "last"]
    assert made.select("cpu", PROBLEM).backend.name == "first"


def test_order_by_problem():
    """A backend may come earlier or later for some problems on some targets. This holds for the forward direction, if no backend
    is named."""

    def priority_for(self, problem, target):
        if target.platform == "tpu" or problem.batch == 1:
            return self.priority, ""
        return (9.5, "two and more are its own") if problem.batch < 5 else (-1, "it is slow for many")

    made = Registry(entries(backend("general", 5), backend("other", 3), backend("picky", 4, priority_for=priority_for)))
    for batch, first, why in ((1, "general", ""), (2, "picky", "two and more are its own"), (5, "general", "")):
        problem = dataclasses.replace(PROBLEM, batch=batch)
        chosen = made.select("cpu", problem)
        assert (chosen.backend.name, chosen.preferred) == (first, why)
        assert made.select("tpu", problem).backend.name == "general"
        assert made.select("cpu", problem, direction="backward").backend.name == "general"
        named = made.select("cpu", problem, "other")
        assert (named.backend.name, named.preferred) == ("other", "")
        assert made.select("cpu", problem, "picky").preferred == ""
    refusing = Registry(
        entries(backend("general", 5, why="no"), backend("other", 3), backend("picky", 4, priority_for=priority_for))
    )
    assert refusing.select("cpu", dataclasses.replace(PROBLEM, batch=5)).backend.name == "other"
    assert [one.name for one in made.automatic()] == ["general", "picky", "other"]


def test_order_of_equal_priorities_by_problem():
    """Equal priorities are ordered by name, as in general. A backend that does not run on the platform is not asked for its
    priority."""
    never = backend("elsewhere", 9, frozenset({"tpu"}), priority_for=lambda self, problem, target: 1 / 0)
    made = Registry(entries(backend("b", 5), backend("a", 1, priority_for=lambda self, problem, target: (5, "as b")), never))
    assert made.select("cpu", PROBLEM).preferred == "as b"


def test_reasons():
    unavailable = backend("missing", 3, unavailable=lambda self: "its library is missing")
    made = Registry(
        entries(
            backend("elsewhere", 9, frozenset({"tpu", "cuda"})), unavailable, backend("picky", 2, why="it is picky"), backend("any")
        )
    )
    chosen = made.select("cpu", PROBLEM)
    assert chosen.backend.name == "any"
    assert dict(chosen.passed_over) == {
        "elsewhere": "it runs on cuda, tpu, not on cpu",
        "missing": "its library is missing",
        "picky": "it is picky",
    }
    assert made.select("tpu", PROBLEM).backend.name == "elsewhere"
    assert {info.name: info.broken for info in made.backends()}["missing"] == "its library is missing"


def test_named_is_used_or_refused():
    """A named backend is never replaced. The message says which backends could do the call."""
    made = Registry(entries(backend("picky", why="it is picky"), backend("any", -1), backend("tpu", 5, frozenset({"tpu"}))))
    assert made.select("cpu", PROBLEM, "any").backend.name == "any"
    with pytest.raises(
        ValueError, match=r"backend 'picky' cannot do this call \(.*\) on cpu: it is picky\. Backends that can: any\."
    ):
        made.select("cpu", PROBLEM, "picky")
    with pytest.raises(ValueError, match=r"backend 'tpu' .* it runs on tpu, not on cpu\. Backends that can: any\."):
        made.select("cpu", PROBLEM, "tpu")
    with pytest.raises(ValueError, match=r"one of any, picky, tpu; got 'none'"):
        made.select("cpu", PROBLEM, "none")
    made.check_named(made.get("tpu"), PROBLEM)  # it can do the call on one of its platforms
    made.check_named(None, PROBLEM)
    with pytest.raises(ValueError, match="it is picky"):
        made.check_named(made.get("picky"), PROBLEM)


def test_nobody_can():
    with pytest.raises(ValueError, match=r"No backend can do this call \(.*\) on cpu: picky: it is picky\."):
        Registry(entries(backend("picky", why="it is picky"))).select("cpu", PROBLEM)
    with pytest.raises(ValueError, match="none is installed"):
        Registry([]).select("cpu", PROBLEM)


def test_gradients_of_another_backend():
    """A backend without a backward operation leaves the gradients to the next backend, named or not."""
    made = Registry(entries(backend("half", 5, backward=Backend.backward), backend("whole")))
    for named in (None, "half"):
        assert made.select("cpu", PROBLEM, named).backend.name == "half"
        chosen = made.select("cpu", PROBLEM, named, "backward")
        assert chosen.backend.name == "whole"
        assert dict(chosen.passed_over) == {"half": "it has no backward operation"}
    alone = Registry(entries(backend("half", backward=Backend.backward), backend("other", why="it is picky")))
    refused = "(B 2, S 12, heads 4:2, D 8, float32) on cpu: "
    with pytest.raises(
        ValueError,
        match="^"
        + re.escape(
            f"backend 'half' cannot do the gradients of this call {refused}it has no backward operation. "
            "Backends that can: none of those installed."
        )
        + "$",
    ):
        alone.select("cpu", PROBLEM, "half", "backward")
    with pytest.raises(
        ValueError,
        match="^"
        + re.escape(
            f"No backend can do the gradients of this call {refused}half: it has no backward operation; other: it is picky."
        )
        + "$",
    ):
        alone.select("cpu", PROBLEM, direction="backward")


def test_hints_are_resolved_by_the_chosen():
    class Tuned(TextbookBackend):
        name = "tuned"

        def fwd_params(self, problem, target):
            if problem.fwd_params.num_warps == 3:
                raise ValueError("FwdParams.num_warps must be a power of 2, got 3.")
            return problem.fwd_params.over(FwdParams(num_warps=4, num_stages=2))

    made = Registry(entries(Tuned))
    given = dataclasses.replace(PROBLEM, fwd_params=FwdParams(num_stages=1))
    assert made.select("cpu", given).problem.fwd_params == FwdParams(num_warps=4, num_stages=1)
    with pytest.raises(ValueError, match=r"FwdParams\.num_warps must be a power of 2"):
        made.select("cpu", dataclasses.replace(PROBLEM, fwd_params=FwdParams(num_warps=3)))


# ---------------------------------------------------------------------------------------------------------------------------
# Through the public functions


def test_call_and_explanation(install):
    ran = []

    def forward(self, *args):
        ran.append(self.name)
        return TextbookBackend.forward(self, *args)

    install(
        backend("fast", 5, frozenset({"cpu"}), forward=forward, backward=Backend.backward),
        backend("picky", 9, frozenset({"cpu", "tpu"}), "it is picky", forward=forward),
        backend("any", -100, forward=forward),
    )
    arrays, _ = draw(Case("", 2, 13, 3, 1, 8))  # a shape that no other test has compiled
    with jax.default_device(jax.devices("cpu")[0]):
        ragged_decode_attention(**{name: jax.device_put(x, jax.devices("cpu")[0]) for name, x in arrays.items()})
    assert ran == ["fast"]

    explanation = explain(**arrays)
    assert list(explanation.choices) == ["cpu", "cuda", "rocm", "tpu"]
    cpu, tpu = explanation["cpu"], explanation["tpu"]
    assert (cpu.forward, cpu.backward) == ("fast", "any")
    assert cpu.passed_over == {"picky": "it is picky", "fast": "for gradients, it has no backward operation"}
    assert (tpu.forward, tpu.backward, tpu.error) == ("any", "any", None)
    assert tpu.passed_over["fast"] == "it runs on cpu, not on tpu"
    assert explanation.problem.seq_len == 13
    lines = str(explanation).splitlines()
    assert lines[0] == "ragged_decode_attention of B 2, S 13, heads 3:1, D 8, float32"
    assert lines[1] == "  cpu   fast; gradients by any"
    assert "        not picky: it is picky" in lines

    named = explain(**arrays, backend="fast")
    assert named["tpu"].forward is None
    assert "it runs on cpu, not on tpu" in str(named["tpu"].error)
    assert "  tpu   error: backend 'fast' cannot do this call" in str(named)


def test_explain_says_why_one_is_first(install):
    early = lambda self, problem, target: (7, "short sequences") if problem.seq_len < 100 else (self.priority, "")
    install(backend("general", 5), backend("early", 1, frozenset({"cpu", "cuda"}), priority_for=early, backward=Backend.backward))
    arrays, _ = draw(Case("", 2, 13, 3, 1, 8))
    explanation = explain(**arrays)
    cpu = explanation["cpu"]
    assert (cpu.forward, cpu.backward, cpu.preferred) == ("early", "general", "short sequences")
    assert "  cpu   early (short sequences); gradients by general" in str(explanation).splitlines()
    assert (explanation["tpu"].forward, explanation["tpu"].preferred) == ("general", "")
    assert explain(**arrays, backend="early")["cpu"].preferred == ""
    longer, _ = draw(Case("", 2, 113, 3, 1, 8))
    assert (explain(**longer)["cpu"].forward, explain(**longer)["cpu"].preferred) == ("general", "")


def test_explain_computes_nothing():
    cache = jax.ShapeDtypeStruct((8, 2**20, 8, 128), jnp.bfloat16)
    explanation = explain(
        jax.ShapeDtypeStruct((8, 32, 128), jnp.bfloat16), cache, cache, logits_soft_cap=30.0, sliding_window=(5, 0), return_lse=True
    )
    assert all(choice.error is None for choice in explanation.choices.values())
    assert "soft cap 30" in str(explanation)
    with pytest.raises(TypeError, match="missing a required argument: 'value'"):
        explain(cache, cache)


@pytest.mark.parametrize("compiled", [True, False])
def test_what_a_backend_returns_is_checked(compiled):
    """The check runs compiled, and operation by operation."""

    class Careless(TextbookBackend):
        def forward(self, *args, **kwargs):
            out, lse = super().forward(*args, **kwargs)
            return out[..., 0].astype(jnp.float16), lse

    class CarelessBackward(TextbookBackend):
        def backward(self, *args, **kwargs):
            return [x[..., 0].astype(jnp.float16) for x in super().backward(*args, **kwargs)]

    arrays, _ = draw(Case("", 2, 12, 4, 2, 8))
    loss = lambda query, backend: jnp.sum(ragged_decode_attention(**arrays | {"query": query}, backend=backend))
    with jax.disable_jit(not compiled):
        with pytest.raises(TypeError) as forward:
            ragged_decode_attention(**arrays, backend=Careless())
        with pytest.raises(TypeError) as backward:
            jax.grad(loss)(arrays["query"], CarelessBackward())
    says = "The backend 'textbook' must return float32[2, 1, 4, 8]"
    assert str(forward.value) == f"{says}, float32[2, 1, 4] from forward, got float16[2, 1, 4], float32[2, 1, 4]."
    assert str(backward.value) == f"{says} from backward, got float16[2, 1, 4]."


def test_what_a_window_says_of_the_problem():
    """A window bounds the number of rows that a token sees. The bound is coarse, so that calls share programs."""
    arrays, _ = draw(Case("", 2, 12, 4, 2, 8))

    def most_keys(left):
        problem = explain(**arrays, sliding_window=None if left is None else (left, 0)).problem
        return problem.most_keys

    assert [most_keys(left) for left in (None, -1, 0, 1, 15, 16, 255, 256)] == [None, None, 1, 16, 16, 256, 256, 4096]


def test_an_instance_wherever_a_name_is():
    arrays, _ = draw(Case("", 2, 12, 4, 2, 8))
    instance = TextbookBackend()
    want = ragged_decode_attention(**arrays)
    np.testing.assert_allclose(ragged_decode_attention(**arrays, backend=instance), want, rtol=1e-5, atol=1e-6)
    assert explain(**arrays, backend=instance)["cpu"].forward == "textbook"
    module = ejk_ragged.RaggedDecodeAttention(backend=instance)
    np.testing.assert_allclose(module(**arrays), want, rtol=1e-5, atol=1e-6)


def test_ours_are_installed():
    """The backends that pyproject.toml announces are found, they are complete, and one of them can do everything."""
    infos = {info.name: info for info in ejk_ragged.backends()}
    assert infos["xla"].platforms is None
    assert infos["xla"].broken is None
    assert all(info.distribution for info in infos.values())


@pytest.mark.parametrize(
    ("names", "level"),
    [
        (["default", "bfloat16", "BF16_BF16_F32", "F16_F16_F32"], "DEFAULT"),
        (["high", "tensorfloat32", "TF32_TF32_F32"], "HIGH"),
        (["BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "BF16_BF16_F32_X9"], None),
        (["highest", "float32", "F32_F32_F32", "F64_F64_F64", "TF32_TF32_F32_X3", None], "HIGHEST"),
    ],
    ids=str,
)
def test_matmul_precisions(names, level):
    """The level is never lower than the name says. A precision of several passes is the highest, or high."""
    query, cache = jnp.ones((1, 2, 8)), jnp.ones((1, 4, 1, 8))
    for name in names:
        with jax.default_matmul_precision(name):
            found = ejk_ragged.explain(query, cache, cache).problem.precision
        assert found in ([jax.lax.Precision[level]] if level else [jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST]), name
