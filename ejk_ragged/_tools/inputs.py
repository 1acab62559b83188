"""The arrays of a case, drawn from the seed of a run, and a sample of them that is compared with the oracle."""

import dataclasses
import functools
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ejk_ragged import quantize
from ejk_ragged.testing import Case, oracle, oracle_gradients, relative_error, tolerance

from .machine import default_platform, Machine


COLD_BYTES = 400e6  # read between two uses of one copy of a cache. A GPU's own caches hold much less
MOST_COPIES = 24
# Peers may round more than our contract allows. These tolerances still find a peer that computes something else.
PEER_TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2, "float64": 1e-9}

CACHE = ("key", "value", "key_scale", "value_scale")


class TooLarge(ValueError):
    """A case does not fit into memory."""


def fit(case: Case, memory: int, copies: int) -> Case:
    """`case` with fewer sequences if needed, so that `copies` of the cache fit into 0.6 of `memory`.

    Raises:
        TooLarge: not even one sequence fits.
    """
    room = 0.6 * memory // copies
    batch = min(case.batch, int(room // (cache_bytes(case) // case.batch)))
    if batch < 1:
        raise TooLarge(f"one sequence needs {cache_bytes(case) // case.batch * copies / 1e9:.1f} GB")
    return dataclasses.replace(case, batch=batch)


def padded(case: Case) -> Case:
    """The case with a padded cache. Its lengths and its bytes are the same as those of the case in pages."""
    return dataclasses.replace(case, page_size=None)


def stored(case: Case) -> Case:
    """A case whose padded cache has the shape of the cache of `case`. If `case` has pages, each page counts as a sequence."""
    if case.page_size is None:
        return case
    pool = {"batch": case.batch * pages(case), "seq_len": case.page_size, "lengths": ("full",), "page_size": None}
    return dataclasses.replace(case, **pool, num_q_heads=case.num_kv_heads, num_tokens=None, sinks=None)


def pages(case: Case) -> int:
    """Number of pages per sequence, which is the number of its entries in the page table."""
    return -(-case.seq_len // (case.page_size or case.seq_len))


def value_dim(case: Case) -> int:
    """Number of columns of the value and of the output."""
    return case.value_columns[1] - case.value_columns[0] if case.value_columns else case.value_dim or case.head_dim


def cache_bytes(case: Case) -> int:
    """Bytes of K and V. Scales count if there is one per row."""
    widths = [case.head_dim] if case.value_columns else [case.head_dim, value_dim(case)]
    itemsize = jnp.dtype(case.cache_dtype or case.dtype).itemsize
    row = sum(width * itemsize + 4 * (case.scales == "row") for width in widths)
    return case.batch * pages(case) * (case.page_size or case.seq_len) * case.num_kv_heads * row


def settings(case: Case) -> dict[str, Any]:
    """The arguments of a call for `case` that are not arrays."""
    in_rows = {"value": None, "value_columns": case.value_columns} if case.value_columns else {}
    return {name: getattr(case, name) for name in ("softmax_scale", "sliding_window", "logits_soft_cap")} | in_rows


def differentiated(case: Case) -> tuple[str, ...]:
    """The names of the arguments that have gradients. A quantised cache and a pool of pages have none."""
    if case.cache_dtype or case.page_size:
        return ("query",)
    return ("query", "key") if case.value_columns else ("query", "key", "value")


def letters_of(name: str, x, case: Case) -> str:
    """The axes of an argument, one letter per axis.

    b sequence, t token, q query head, h kv head, s row of the cache, d head dimension, n sink, p page of a pool, r row of a page,
    e entry of a page table.
    """
    first, rows = ("b", "s") if case.page_size is None else ("p", "r")
    match name:
        case "query":
            return "bqd" if np.ndim(x) == 3 else "btqd"
        case "key" | "value":
            return f"{first}{rows}hd"
        case "key_scale" | "value_scale":
            return ("", "h", "bh", f"{first}h{rows}")[np.ndim(x)]
        case "page_table":
            return "be"
        case "softmax_aux":
            return "n" if np.ndim(x) == 1 else "qn" if case.sinks and case.sinks[0] == "query" else "hn"
    return "b"


# ---------------------------------------------------------------------------------------------------------------------------
# Arrays


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of one case, by the names of a call's arguments.

    Attributes:
        rest: all arguments but the cache. `sequence_start` and `sequence_end` are always there, even if ranges are whole.
            `page_table` is there if the cache is in pages.
        caches: copies of the cache, each with values of its own. Runs use the copies in turn.
        d_out: a cotangent of the output.
    """

    rest: Mapping[str, jax.Array]
    caches: Sequence[Mapping[str, jax.Array]]
    d_out: jax.Array

    def arguments(self, run: int = 0) -> dict[str, jax.Array]:
        return {**self.rest, **self.caches[run % len(self.caches)]}


def types(case: Case) -> dict[str, Any]:
    """The arguments of a call for `case`, with the shape and dtype in place of each array. No large array is drawn."""
    sizes = {"b": case.batch, "s": case.seq_len}

    def type_of(name, x):
        shape = [sizes.get(letter, n) for letter, n in zip(letters_of(name, x, case), x.shape, strict=True)]
        return jax.ShapeDtypeStruct(shape, x.dtype)

    small = dataclasses.replace(case, batch=1, seq_len=1).draw()
    return {name: type_of(name, x) if isinstance(x, np.ndarray) else x for name, x in small.items()}


def draw(case: Case, seed: int, copies: int, on_device: bool) -> Inputs:
    """Draws the arrays of a case. Caches are large, so `on_device` draws them on the device."""
    start, end = padded(case).ranges(seed)
    bounds = {
        "sequence_start": np.zeros(case.batch, np.int32) if start is None else start,
        "sequence_end": np.full(case.batch, case.seq_len, np.int32) if end is None else end,
    }
    small = dataclasses.replace(padded(case), seq_len=1, lengths=("full",), cache_dtype=None, scales=None).draw(seed)
    rest = {name: small[name] for name in ("query", "softmax_aux", "query_lengths") if name in small} | bounds
    rest |= {} if case.page_size is None else {"page_table": _page_table(case, seed)}
    *keys, last = jax.random.split(jax.random.key(seed), copies + 1)
    if on_device:
        caches = [_cache(stored(case), key) for key in keys]
    else:  # on a CPU, NumPy is faster
        drawn = [stored(case).draw(seed + i) for i in range(copies)]
        caches = [{name: jax.device_put(one[name]) for name in CACHE if one.get(name) is not None} for one in drawn]
    d_out = jax.random.normal(last, (*small["query"].shape[:-1], value_dim(case)), jnp.dtype(case.dtype))
    return Inputs({name: jax.device_put(x) for name, x in rest.items()}, caches, d_out)


def _page_table(case: Case, seed: int) -> np.ndarray:
    """A page table in which each page of the pool occurs once, in random order."""
    count = case.batch * pages(case)
    return np.random.default_rng([seed, 3]).permutation(count).astype(np.int32).reshape(case.batch, -1)


@functools.partial(jax.jit, static_argnums=0)
def _cache(case: Case, key) -> dict[str, jax.Array]:
    """A cache of normal values. A quantised cache is quantised row by row. Scales with fewer axes are means of the scales per row:
    the values of the scales do not matter here."""
    widths = {"key": case.head_dim} if case.value_columns else {"key": case.head_dim, "value": value_dim(case)}
    means = {"row": (), "sequence": 2, "head": (0, 2), "number": (0, 1, 2)}
    cache = {}
    for (name, width), one in zip(widths.items(), jax.random.split(key, len(widths)), strict=True):
        cache[name] = jax.random.normal(one, (case.batch, case.seq_len, case.num_kv_heads, width), jnp.dtype(case.dtype))
        if case.cache_dtype:
            cache[name], scale = quantize(cache[name], case.cache_dtype)
            if case.scales:
                cache[f"{name}_scale"] = scale.mean(means[case.scales])
    return cache


def draw_cold(case: Case, seed: int, machine: Machine, runs: int, per_copy: int = 1) -> Inputs:
    """Draws a case with so many copies of the cache that a run never finds its copy in the GPU's own caches.

    There are fewer copies if memory is short. A copy needs `per_copy` times the size of the cache.
    """
    cold = math.ceil(COLD_BYTES / max(padded(case).live_bytes(seed), 1))
    wanted = max(2, min(cold, runs, MOST_COPIES)) if machine.counts_kernels else 1
    gc.collect()  # frees the memory of the previous case
    copies = max(1, min(wanted, int(0.6 * machine.memory // (per_copy * cache_bytes(case)))))
    return draw(case, seed, copies, machine.platform != "cpu")


# ---------------------------------------------------------------------------------------------------------------------------
# Checks


class Wrong(Exception):
    """A result differs from the oracle's by more than the tolerance."""


class Sample:
    """A few sequences and heads of a case, with the oracle's results for them. For a whole case the oracle would take minutes.

    The oracle gets a padded cache. If the cache is a pool, the pages of these sequences are joined first.
    """

    def __init__(self, case: Case, inputs: Inputs, gradients: bool):
        self.case, self.gradients = case, gradients
        arguments = inputs.arguments()
        self.page_table = np.asarray(arguments.pop("page_table", ()))
        lengths = np.asarray(arguments["sequence_end"]) - np.asarray(arguments["sequence_start"])
        self.batch = np.unique([np.argmax(lengths), np.argmin(lengths)])
        last = case.num_kv_heads - 1
        # The oracle's time grows with the tokens, so a sample with several tokens has one kv head.
        self.kv_heads = np.unique([last if case.num_tokens else 0, last])
        group = case.num_q_heads // case.num_kv_heads
        self.heads = np.concatenate([np.arange(h * group, (h + 1) * group) for h in self.kv_heads])
        sampled: dict[str, Any] = {name: self.of(name, x) for name, x in arguments.items()} | settings(case)
        if gradients:
            d_out = self.of("query", inputs.d_out)
            want = oracle_gradients(**sampled, d_out=d_out, d_lse=np.zeros(d_out.shape[:-1]))
            self.want = {f"d_{name}": (getattr(want, name), want.size[name]) for name in differentiated(case)}
        else:
            self.want = {"out": (oracle(**sampled)[0], 0.0)}

    def of(self, name: str, x) -> np.ndarray:
        """The sample's part of an argument, or of a result that is shaped like the argument `name`."""
        letters = letters_of(name, x, self.case)
        if default_platform() == "cpu":
            x = np.asarray(x)  # a view. JAX would compile programs for each slice of its array
        part = {"q": self.heads, "h": self.kv_heads}
        index = tuple(part.get(letter, slice(None)) for letter in letters.lstrip("bp"))
        if letters.startswith("b"):
            return np.stack([np.asarray(x[b][index]) for b in self.batch])
        if letters.startswith("p"):
            return np.stack([_joined(np.asarray(x[self.page_table[b]])[:, *index], letters.index("r")) for b in self.batch])
        return np.asarray(x[index])

    def verify(self, call: Callable[[int], Any]):
        """Raises `Wrong` if the result of a forward call of ours is wrong."""
        verdict = self.compare({"out": call(0)}, strict=True)
        if not verdict["ok"]:
            raise Wrong(differs(verdict))

    def compare(self, results: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        """The largest relative error of the results, its tolerance, and whether the error is within the tolerance."""
        worst, dtype = {"error": -1.0, "tolerance": 0.0, "ok": True}, self.case.dtype
        for name, (want, size) in self.want.items():
            got = self.of("query" if name == "out" else name.removeprefix("d_"), results[name])
            error = relative_error(got, want, size)
            allowed = tolerance(dtype, want.size, self.gradients) if strict else PEER_TOLERANCES[dtype]
            if not error <= allowed or error > worst["error"]:
                finite = error if math.isfinite(error) else None
                worst = {"error": finite, "tolerance": allowed, "ok": error <= allowed, "what": name}
            if not worst["ok"]:
                break
        return worst


def _joined(pages: np.ndarray, axis: int) -> np.ndarray:
    """The rows of pages [P, ...], one page after another. `axis` is the axis of the rows."""
    return np.concatenate(list(pages), axis - 1)


def differs(verdict: Mapping[str, Any]) -> str:
    error = "is not finite" if verdict["error"] is None else f"{verdict['error']:.1e}"
    return f"differs from the oracle: {verdict['what']} {error}, {verdict['tolerance']:.1e} allowed"
