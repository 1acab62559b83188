"""Parts of error messages: the value that the caller passed, and the way out."""

import itertools
from typing import Any

import jax
import numpy as np


LONGEST = 120  # characters of a shown value


def shown(x: Any) -> str:
    """A value as a short text. An array is shown as its dtype and shape."""
    if hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, np.generic):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    if isinstance(x, tuple | list) and any(hasattr(item, "shape") for item in x):
        opening, closing = "()" if isinstance(x, tuple) else "[]"
        return _cut(f"{opening}{', '.join(map(shown, x))}{closing}")
    return _cut(" ".join(repr(x).split("\n")))


def _cut(text):
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def as_array(name: str, x: Any) -> str:
    """The way out where `x` is not an array. "" if there is none."""
    if name in ("key", "value") and isinstance(x, tuple) and len(x) == 2:
        return f" If that is what `quantize` returned, unpack it: {name}, {name}_scale = quantize(...)."
    if name in ("key", "value") and hasattr(x, "arguments"):
        return " Pass the arrays of a KVCache by name: **cache.arguments()."
    if name in ("sequence_start", "sequence_end", "query_lengths", "at", "lengths") and type(x) is int:
        return f" Pass one integer per sequence: jnp.full(batch, {x})."
    return f" Pass jnp.asarray({name})." if isinstance(x, list) else ""


def refuse_ref(name: str, x: Any):
    """Refuses a `jax.Ref`, which has a shape and a dtype but is not an array.

    Raises:
        TypeError: `x` is a `jax.Ref`.
    """
    if isinstance(x, jax.Ref):
        raise TypeError(f"{name} must be an array, got a jax.Ref, {shown(x)}. Pass the array that the Ref holds: {name}[...].")


# Orders of axes that other libraries use, as the transpositions to the order of this package, which comes first.
CACHE_ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (1, 2, 0, 3), (0, 3, 1, 2), (0, 1, 3, 2)]
QUERY_ORDERS = {4: [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)], 3: [(0, 1, 2), (1, 0, 2), (0, 2, 1)]}


def other_order(query: tuple, key: tuple, value: tuple | None, paged: bool) -> str:
    """For shapes that do not fit: the order of axes in which the shapes would fit, and the transposition to pass. "" if there is
    no such order."""
    shapes = {"query": query, "key": key} | ({} if value is None else {"value": value})
    if not all(isinstance(n, int) for shape in shapes.values() for n in shape):
        return ""
    pages, rows = ("num_pages", "page_size") if paged else ("batch", "seq_len")
    axes = {name: [pages, rows, "num_kv_heads", "head_dim"] for name in shapes}
    axes["query"] = ["batch", *["num_tokens"] * (len(query) == 4), "num_q_heads", "head_dim"]
    orders = [QUERY_ORDERS[len(query)]] + [CACHE_ORDERS] * (len(shapes) - 1)
    ours, *guesses = [dict(zip(shapes, guess, strict=True)) for guess in itertools.product(*orders)]
    changed = lambda guess: [name for name in shapes if guess[name] != ours[name]]
    layout = lambda guess, name: f"{name} [{', '.join(axes[name][guess[name].index(i)] for i in range(len(axes[name])))}]"
    # The guess with the fewest changed arrays comes first, and key and value in the same order before two orders.
    for guess in sorted(guesses, key=lambda guess: (len(changed(guess)), guess.get("value") != guess["key"])):
        if _fit(**{name: tuple(shapes[name][axis] for axis in guess[name]) for name in shapes}, paged=paged):
            names = changed(guess)
            came, taken = (", ".join(layout(one, name) for name in names) for one in (guess, ours))
            passed = ", ".join(f"{name}.transpose{guess[name]}" for name in names)
            advice = f" The sizes would fit {came}; the order here is {taken}: pass {passed}."
            copies = " Transposing the cache copies it at every step. The docs' recipes avoid the copy."
            return advice if names == ["query"] else advice + copies
    return ""


def _fit(query, key, value=None, *, paged) -> bool:
    heads = query[-2] > 0 and key[2] > 0 and query[-2] % key[2] == 0
    rows = value is None or value[:3] == key[:3]
    width = query[-1] == key[3] if value is not None else query[-1] <= key[3]
    return heads and rows and width and (paged or query[0] == key[0])
