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


# Orders of axes that other libraries use, each with the transposition to the order of this package.
CACHE_ORDERS = {
    "[batch, seq_len, num_kv_heads, head_dim]": (0, 1, 2, 3),
    "[batch, num_kv_heads, seq_len, head_dim]": (0, 2, 1, 3),
    "[seq_len, batch, num_kv_heads, head_dim]": (1, 0, 2, 3),
    "[num_kv_heads, batch, seq_len, head_dim]": (1, 2, 0, 3),
    "[batch, num_kv_heads, head_dim, seq_len]": (0, 3, 1, 2),
    "[batch, seq_len, head_dim, num_kv_heads]": (0, 1, 3, 2),
}
QUERY_ORDERS = {
    4: {
        "[batch, num_tokens, num_q_heads, head_dim]": (0, 1, 2, 3),
        "[batch, num_q_heads, num_tokens, head_dim]": (0, 2, 1, 3),
        "[num_tokens, batch, num_q_heads, head_dim]": (1, 0, 2, 3),
    },
    3: {
        "[batch, num_q_heads, head_dim]": (0, 1, 2),
        "[num_q_heads, batch, head_dim]": (1, 0, 2),
        "[batch, head_dim, num_q_heads]": (0, 2, 1),
    },
}


def other_order(query: tuple, key: tuple, value: tuple | None, paged: bool) -> str:
    """For shapes that do not fit: the order of axes in which the shapes would fit, and the transposition to pass. "" if there is
    no such order."""
    if not all(isinstance(n, int) for n in (*query, *key, *(value or ()))):
        return ""
    arrays = {"query": query, "key": key} | ({} if value is None else {"value": value})
    orders = [QUERY_ORDERS[len(query)]] + [CACHE_ORDERS] * (len(arrays) - 1)
    guesses = [dict(zip(arrays, names, strict=True)) for names in itertools.product(*orders)]
    ours = guesses[0]
    changed = lambda guess: [name for name in arrays if guess[name] != ours[name]]
    # The guess with the fewest changed arrays comes first, and key and value in the same order before two orders.
    for guess in sorted(guesses, key=lambda guess: (len(changed(guess)), guess.get("value") != guess["key"])):
        axes = {name: order[guess[name]] for name, order in zip(arrays, orders, strict=True)}
        if _fit(**{name: tuple(arrays[name][axis] for axis in axes[name]) for name in arrays}, paged=paged):
            names = changed(guess)
            break
    else:
        return ""
    words = lambda text: text.replace("batch", "num_pages").replace("seq_len", "page_size") if paged else text
    layouts = {name: guess[name] if name == "query" else words(guess[name]) for name in names}
    accepted = {name: ours[name] if name == "query" else words(ours[name]) for name in names}
    came = ", ".join(f"{name} {layout}" for name, layout in layouts.items())
    taken = ", ".join(f"{name} {layout}" for name, layout in accepted.items())
    passed = ", ".join(f"{name}.transpose{axes[name]}" for name in names)
    copies = "" if names == ["query"] else " Transposing the cache copies it at every step. The docs' recipes avoid the copy."
    return f" The sizes would fit {came}; the order here is {taken}: pass {passed}.{copies}"


def _fit(query, key, value=None, *, paged) -> bool:
    heads = query[-2] > 0 and key[2] > 0 and query[-2] % key[2] == 0
    rows = value is None or value[:3] == key[:3]
    width = query[-1] == key[3] if value is not None else query[-1] <= key[3]
    return heads and rows and width and (paged or query[0] == key[0])
