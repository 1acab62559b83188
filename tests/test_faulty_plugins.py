"""A plug-in that raises when it is asked: other backends do the call, and a caller who named the plug-in gets the error. And
which backends are equal."""

import contextlib
import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import backend, entries, Entry, PROBLEM
from support import draw

from ejk_ragged import Backend, explain, FwdParams, ragged_decode_attention
from ejk_ragged._registry import BackendFailed, Registry, registry
from ejk_ragged.testing import Case, TextbookBackend


def fails(self, *args):
    raise KeyError("it was careless")


@contextlib.contextmanager
def cannot_be_entered(self, target):
    fails(self)
    yield


# The place in which the plug-in raises: its name in the message, and the member of the class.
FAULTS = {
    "supports": ("supports", fails),
    "unavailable": ("unavailable", fails),
    "fwd_params": ("fwd_params", fails),
    "lowering": ("lowering", fails),
    "entering the lowering": ("lowering", cannot_be_entered),
    "platforms": ("platforms", property(fails)),
    "platforms that are none": ("platforms", 3),
    "supports that is none": ("supports", lambda self: None),
    "hints that nobody gave": ("fwd_params", lambda self, problem, target: FwdParams(num_warps=0)),
}


def faulty(kind) -> Any:
    what, member = FAULTS[kind]
    return Entry("faulty", backend("faulty", 9, **{what: member}), "faulty-dist")


def raised_in(kind, direction):
    what, _ = FAULTS[kind]
    return f"raised in `{what}{'_backward' * (what == 'supports' and direction == 'backward')}`"


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_passed_over(kind, direction):
    """The plug-in is passed over with one warning. `explain` has the reason."""
    made = Registry([faulty(kind), *entries(backend("good"))])
    what = raised_in(kind, direction)
    with pytest.warns(RuntimeWarning, match=f"^The backend 'faulty' of faulty-dist {what}: .*It is passed over") as caught:
        chosen = made.select("cpu", PROBLEM, direction=direction)
    assert len(caught) == 1
    assert chosen.backend.name == "good"
    assert what in dict(chosen.passed_over)["faulty"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.select("cpu", dataclasses.replace(PROBLEM, batch=3), direction=direction).backend.name == "good"


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_named(kind, direction):
    """A call that names the plug-in raises an error, chained to what the plug-in raised."""
    made = Registry([faulty(kind), *entries(backend("good"))])
    what = raised_in(kind, direction)
    with pytest.raises(BackendFailed, match=f"^The backend 'faulty' of faulty-dist {what}: ") as caught:
        made.select("cpu", PROBLEM, "faulty", direction)
    assert isinstance(caught.value.__cause__, Exception)


NONE = "TypeError: it must return a number and a text, got "
PRIORITIES = {
    "raises": (fails, "KeyError: 'it was careless'"),
    "no pair": (lambda self, problem, target: 3, "TypeError: "),
    "no number": (lambda self, problem, target: ("first", "it is new"), f"{NONE}'first' and 'it is new'"),
    "not a number": (lambda self, problem, target: (float("nan"), ""), f"{NONE}nan and ''"),
    "no text": (lambda self, problem, target: (99, None), f"{NONE}99 and None"),
}


@pytest.mark.parametrize("kind", PRIORITIES)
def test_priorities_that_are_none(kind):
    """One warning is given. The general priority counts, and the backend is asked in its turn."""
    member, says = PRIORITIES[kind]
    entry: Any = Entry("faulty", backend("faulty", 5, priority_for=member), "faulty-dist")
    given = [entry, *entries(backend("first", 9, why="no"))]
    made = Registry(given)
    match = f"^The backend 'faulty' of faulty-dist raised in `priority_for`: {says}.*Its general priority counts"
    with pytest.warns(RuntimeWarning, match=match) as caught:
        chosen = made.select("cpu", PROBLEM)
    assert len(caught) == 1
    assert (chosen.backend.name, chosen.preferred, chosen.passed_over) == ("faulty", "", (("first", "no"),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.select("cpu", PROBLEM).backend.name == "faulty"
        assert Registry(given).select("cpu", PROBLEM, "faulty").backend.name == "faulty"


@pytest.mark.filterwarnings("ignore:The backend 'faulty'")
def test_everybody_else_is_served():
    """The plug-in fails where it is asked for other reasons than to do a call."""
    for kind in ("supports", "unavailable", "platforms"):
        made = Registry([faulty(kind), *entries(backend("good"), backend("picky", why="it is picky"))])
        with pytest.raises(ValueError, match=r"backend 'picky' cannot do this call .*: it is picky\. Backends that can: good\."):
            made.select("cpu", PROBLEM, "picky")
        infos = {info.name: info for info in made.backends()}
        assert infos["good"].broken is None
        assert ("raised in" in str(infos["faulty"].broken)) == (kind != "supports")
        with pytest.raises(BackendFailed, match=f"raised in `{kind}`"):
            made.check_named(made.get("faulty"), PROBLEM)
        with pytest.raises(ValueError, match=r"No backend can do this call .*faulty: The backend 'faulty' of faulty-dist raised"):
            Registry([faulty(kind)]).select("cpu", PROBLEM)


def test_one_platform_is_enough():
    """A named plug-in that raises for some platforms is kept for the others."""
    picky = backend("picky", supports=lambda self, problem, target: {"cpu": None, "cuda": "no"}[target.platform])
    made = Registry(entries(picky))
    made.check_named(made.get("picky"), PROBLEM)
    with pytest.raises(BackendFailed, match=r"raised in `supports`: KeyError: 'tpu'"):
        made.select("tpu", PROBLEM, "picky")


def test_gradients_of_the_next():
    """A named plug-in that fails for gradients raises. If another backend is named, the plug-in is passed over."""
    made = Registry(
        entries(backend("half", 9, backward=Backend.backward), backend("faulty", 5, supports_backward=fails), backend("good"))
    )
    with pytest.warns(RuntimeWarning, match=r"raised in `supports_backward`: KeyError"):
        assert made.select("cpu", PROBLEM, "half", "backward").backend.name == "good"
    with pytest.raises(BackendFailed, match="supports_backward"):
        made.select("cpu", PROBLEM, "faulty", "backward")
    assert made.select("cpu", PROBLEM, "faulty").backend.name == "faulty"


def test_hints_that_cannot_work_are_the_callers():
    """The caller's hints are at fault, not the plug-in."""

    def fwd_params(self, problem, target):
        if problem.fwd_params.num_warps == 3:
            raise ValueError("FwdParams.num_warps must not be 3")
        return problem.fwd_params

    made = Registry(entries(backend("first", 9, fwd_params=fwd_params), backend("good")))
    with pytest.raises(ValueError, match="num_warps must not be 3"):
        made.select("cpu", dataclasses.replace(PROBLEM, fwd_params=FwdParams(num_warps=3)))


def test_a_priority_that_is_no_number():
    bad: Any = Entry("bad", backend("bad", "high"), "bad-dist")
    made = Registry([bad, *entries(backend("good"))])
    with pytest.warns(RuntimeWarning, match="'bad' of bad-dist cannot be loaded .* its priority must be a number, got 'high'"):
        assert made.select("cpu", PROBLEM).backend.name == "good"


def test_through_a_call(install):
    """Output and gradients come from the next backend. A call that names the plug-in raises."""
    install(backend("faulty", 9, lowering=fails), backend("good"))
    arrays, _ = draw(Case("", 2, 14, 4, 2, 8))  # a shape that no other test has compiled
    loss = lambda query, name=None: jnp.sum(ragged_decode_attention(**arrays | {"query": query}, backend=name))
    with pytest.warns(
        RuntimeWarning, match="^The backend 'faulty' of made-up raised in `lowering`: .* It is passed over"
    ) as caught:
        got = jax.value_and_grad(loss)(arrays["query"])
    assert len(caught) == 1
    want = jax.value_and_grad(lambda query: loss(query, "good"))(arrays["query"])
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for choice in explain(**arrays).choices.values():
        assert (choice.forward, choice.backward, choice.error) == ("good", "good", None)
        assert "raised in `lowering`" in choice.passed_over["faulty"]
    named = explain(**arrays, backend="faulty")["cpu"]
    assert (named.forward, named.error) == (
        None,
        "The backend 'faulty' of made-up raised in `lowering`: KeyError: 'it was careless'.",
    )
    with pytest.raises(BackendFailed, match="raised in `lowering`"):
        loss(arrays["query"], "faulty")


def test_an_instance_that_nobody_registered():
    """What the message calls such an instance."""
    instance = backend("alone", supports=fails)()
    with pytest.raises(BackendFailed, match=r"^The backend 'alone' of \w+\.Alone raised in `supports`: KeyError"):
        registry.select("cpu", PROBLEM, instance)


# ---------------------------------------------------------------------------------------------------------------------------
# Which are equal


class Plain(TextbookBackend):
    """A class as users write it, without a definition of equality."""

    def __init__(self, tile=3, sizes=()):
        self.tile = tile
        self.sizes = list(sizes)


def test_equal_by_class_and_fields():
    assert Plain(3, [1]) == Plain(3, [1])
    assert hash(Plain(3, [1])) == hash(Plain(3, [1]))
    assert Plain(3) != Plain(4)
    assert Plain(3, [1]) != Plain(3, [2])
    assert Plain() != TextbookBackend()
    assert TextbookBackend() != type("Other", (TextbookBackend,), {})()
    assert Plain() != 3
    instance = Plain()
    held = {instance: "compiled"}
    instance.seen = True  # pyright: ignore[reportAttributeAccessIssue]
    assert held[instance] == "compiled"  # an attribute that is set later does not change the key


def test_fresh_instances_share_what_is_compiled():
    """An equal instance shares it, and no other instance does."""
    traced = []

    class Counted(Plain):
        def forward(self, *args, **kwargs):
            traced.append(self.tile)
            return super().forward(*args, **kwargs)

    arrays, _ = draw(Case("", 2, 12, 4, 2, 8))
    for tile in (3, 3, 4, 3):
        ragged_decode_attention(**arrays, backend=Counted(tile))
    assert traced == [3, 4]
