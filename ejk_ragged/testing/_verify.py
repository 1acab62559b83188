"""Compares the output, lse and gradients of a call with the oracle's. The result is errors, with their tolerances."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ejk_ragged._api import ragged_decode_attention
from ejk_ragged._backend import Backend

from ._cases import Case, CHECKS
from ._oracle import oracle, oracle_gradients, relative_error, seen_rows, tolerance


class Verdict(NamedTuple):
    """One comparison with the oracle.

    Attributes:
        what: "out", "lse", "d_query", "d_key", "d_value", "d_softmax_aux", "dead d_key" or "dead d_value".
        error: for "dead d_key" and "dead d_value", the number of elements that are not exactly 0 in rows that no token sees. For
            "lse", the largest error, relative to max(1, |lse|). Otherwise the relative L2 error.
        tolerance: the largest error that is accepted.
    """

    what: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self):
        return f"{self.what}: error {self.error:.2g}, tolerance {self.tolerance:.2g}"


def verify(call: Callable, arguments: dict[str, Any], gradients: bool = True, seed: int = 0) -> tuple[Verdict, ...]:
    """Compares `call(**arguments, return_lse=True)`, and its gradients for random cotangents, with the oracle.

    Args:
        call: `ragged_decode_attention`, or a function with the same meaning. `functools.partial` can set its `backend`.
        arguments: keyword arguments, as `Case.draw` returns them.
        gradients: whether to compare the gradients, too: of query and sinks, and of the cache unless the cache is quantised or in
            pages.
        seed: seed of the cotangents.

    Returns:
        One verdict per result that was compared.
    """
    exact: dict[str, Any] = {name: np.asarray(x) if isinstance(x, jax.Array) else x for name, x in arguments.items()}
    # `jnp.asarray` would compile a program for each shape.
    arguments = {name: jax.device_put(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    query, key = arguments["query"], arguments["key"]
    frozen = key.dtype != query.dtype or arguments.get("page_table") is not None
    floating = ("query",) if frozen else ("query", "key", "value")
    names = [name for name in (*floating, "softmax_aux") if arguments.get(name) is not None]

    def function(*differentiated):
        return call(**arguments | dict(zip(names, differentiated, strict=True)), return_lse=True)

    differentiated = [arguments[name] for name in names]
    (out, lse), pullback = jax.vjp(function, *differentiated) if gradients else (function(*differentiated), None)
    want_out, want_lse = oracle(**exact)
    out_error = relative_error(out, want_out) if out.dtype == query.dtype else np.inf
    verdicts = [
        Verdict("out", out_error, tolerance(query.dtype, out.size)),
        Verdict("lse", _lse_error(lse, want_lse) if lse.dtype == jnp.float32 else np.inf, tolerance("float32", lse.size)),
    ]
    if pullback is None:
        return tuple(verdicts)

    rng = np.random.default_rng(seed)
    d_out, d_lse = (jax.device_put(rng.standard_normal(x.shape).astype(x.dtype)) for x in (out, lse))
    want = oracle_gradients(**exact, d_out=d_out, d_lse=d_lse)
    for name, got in zip(names, pullback((d_out, d_lse)), strict=True):
        same_type = got.dtype == arguments[name].dtype
        error = relative_error(got, getattr(want, name), want.size[name]) if same_type else np.inf
        verdicts.append(Verdict(f"d_{name}", error, tolerance(query.dtype, got.size, gradient=True)))
        if name in ("key", "value"):
            verdicts.append(Verdict(f"dead d_{name}", _nonzero_unseen(got, exact), 0))
    return tuple(verdicts)


def verify_backend(backend: str | Backend, cases: Sequence[Case] = CHECKS) -> dict[str, tuple[Verdict, ...] | str]:
    """Runs `backend` on every case, and compares the results with the oracle. Rows that no token sees hold junk.

    The cases cover bounds beyond the cache, tokens that see no row, calls without lengths or sinks, scales of every shape, pages,
    and values of another width. One more check, "junk between tokens", maps lengths over one cache with `vmap`. Rows with NaN then
    lie between the ranges of a sequence's tokens, which no single call can produce.

    Args:
        backend: a name, or an instance.
        cases: the cases to run.

    Returns:
        A dictionary by the name of the case. The value is the verdicts, gradients included, or the reason why the backend refuses
        the case.
    """
    call = functools.partial(ragged_decode_attention, backend=backend)
    found: dict[str, tuple[Verdict, ...] | str] = {}
    for case in cases:
        try:
            found[case.name] = verify(call, case.draw(poison=True))
        except ValueError as error:
            found[case.name] = str(error)
    try:
        found["junk between tokens"] = _junk_between_tokens(call)
    except ValueError as error:
        found["junk between tokens"] = str(error)
    return found


def _junk_between_tokens(call) -> tuple[Verdict, ...]:
    """Maps two pairs of lengths over one cache. They become two tokens with separate ranges. Rows between the ranges are NaN."""
    case = Case("", 2, 80, 4, 2, 16, "bfloat16", lengths=("ranges", (0, 10), (5, 9)))
    arguments = case.draw()
    for name in ("key", "value"):
        arguments[name][:, 10:60] = np.nan
    starts, ends = np.array([[0, 5], [60, 70]], np.int32), np.array([[10, 9], [80, 71]], np.int32)
    arrays = {name: jax.device_put(arguments[name]) for name in ("query", "key", "value")}
    one = lambda start, end: call(**arrays, sequence_start=start, sequence_end=end, return_lse=True)
    out, lse = jax.vmap(one)(*jax.device_put((starts, ends)))
    wanted = [oracle(**arguments | {"sequence_start": start, "sequence_end": end}) for start, end in zip(starts, ends, strict=True)]
    want_out, want_lse = map(np.stack, zip(*wanted, strict=True))
    return (
        Verdict("out", relative_error(out, want_out), tolerance("bfloat16", out.size)),
        Verdict("lse", _lse_error(lse, want_lse), tolerance("float32", lse.size)),
    )


def _lse_error(got, want):
    """The largest error, relative to max(1, |lse|): where |lse| is below 1, the absolute error counts."""
    got = np.asarray(got).astype(np.float64)
    if got.shape != want.shape:
        return np.inf
    other = got != want  # equal infinities are no error
    error = np.abs(got[other] - want[other]) / np.maximum(1, np.abs(want[other]))
    return np.inf if np.isnan(error).any() else float(error.max(initial=0))


def _nonzero_unseen(gradient, arguments):
    """The number of elements that are not 0 in rows that no token sees."""
    lengths = [arguments.get(name) for name in ("sequence_start", "sequence_end", "sliding_window", "query_lengths")]
    query = arguments["query"]
    num_tokens = query.shape[1] if query.ndim == 4 else 1
    unseen = [
        np.delete(rows, seen_rows(b, len(rows), *lengths, num_tokens=num_tokens), axis=0)
        for b, rows in enumerate(np.asarray(gradient))
    ]
    return sum(int(np.count_nonzero(rows)) for rows in unseen)  # NaN counts
