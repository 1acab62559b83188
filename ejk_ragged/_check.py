"""Checks of the arguments, while tracing. Every error names the argument, what the caller passed and what is accepted.

A wrong value, shape or dtype is a ValueError, and a wrong type is a TypeError. An array is anything with a shape and a dtype. Its
dtype is the dtype after conversion by JAX: a NumPy array of float64 counts as float32 unless 64-bit types are enabled.
"""

import collections
import math
import operator
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._formats import CACHE_DTYPES, FLOATING_DTYPES, is_quantised, QUANTISED
from ._messages import as_array, other_order, refuse_ref, shown
from ._problem import FwdParams


AnyArray = Array | np.ndarray  # the type of arguments; results are always JAX arrays
Window = tuple[int, int]
Scale = (
    float
    | Float[AnyArray, ""]
    | Float[AnyArray, " num_kv_heads"]
    | Float[AnyArray, "batch num_kv_heads"]
    | Float[AnyArray, "batch num_kv_heads seq_len"]
    | Float[AnyArray, "num_pages num_kv_heads page_size"]
)


# The arrays of a call, as the caller passed them. `window_left` is the left side of the sliding window.
Arguments = collections.namedtuple(
    "Arguments",
    "query key value sequence_start sequence_end softmax_aux page_table query_lengths key_scale value_scale window_left",
)


def check_arrays(arrays: dict[str, Any], value_columns, softmax_scale) -> tuple[int, int] | None:
    """Checks that the arrays of a call and `value_columns` fit together. Returns `value_columns` as two integers, or None."""
    types: dict[str, Any] = {
        name: None if x is None and name not in ("query", "key") else array_type(name, x) for name, x in arrays.items()
    }
    query, key, value, page_table = (types[name] for name in ("query", "key", "value", "page_table"))
    columns = check_columns(value_columns, value, key, softmax_scale)
    check_cache(query, key, value, page_table)
    batch, num_kv_heads = query.shape[0], key.shape[2]
    for name in ("sequence_start", "sequence_end", "query_lengths"):
        if types[name] is not None:
            check_lengths(name, types[name], batch)
    if types["query_lengths"] is not None and len(query.shape) == 3:
        raise ValueError(
            f"query_lengths must be None for a query of one token per sequence, [batch, num_q_heads, head_dim]; got query "
            f"{query.shape}. For several tokens the query is [batch, num_tokens, num_q_heads, head_dim]."
        )
    if types["softmax_aux"] is not None:
        check_sinks(types["softmax_aux"], query.shape[-2], num_kv_heads)
    check_scales(key, value, page_table, types["key_scale"], types["value_scale"])
    return columns


def array_type(name: str, x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, or of a number given as a scale."""
    array: Any = np.float32(x) if name.endswith("_scale") and type(x) in (int, float) else x
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise TypeError(f"{name} must be an array, got {shown(x)} of type {type(x).__name__}.{as_array(name, x)}")
    refuse_ref(name, array)
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True))


PADDED, POOL = "[batch, seq_len, num_kv_heads, {}]", "[num_pages, page_size, num_kv_heads, {}]"


def check_columns(columns, value, key, softmax_scale) -> tuple[int, int] | None:
    """Checks `value_columns`, which must be given exactly if there is no value array. Returns two integers, or None."""
    if columns is None:
        if value is None:
            raise ValueError(
                "value must be an array, or None with value_columns=(first, end), the columns of key's rows that are the value; "
                "got None without value_columns."
            )
        return None
    if value is not None:
        raise ValueError(
            f"value_columns must be None for a cache with a value of its own, got {shown(columns)} and value {value.shape}. Pass "
            "value=None if the value is in the key's rows."
        )
    try:
        first, end = map(operator.index, columns)
    except (TypeError, ValueError):
        raise ValueError(f"value_columns must be two integers (first, end) or None, got {shown(columns)}.") from None
    if len(key.shape) == 4 and not 0 <= first < end <= key.shape[3]:
        raise ValueError(
            f"value_columns must be (first, end) with 0 <= first < end <= {key.shape[3]}, the columns of key's rows; got "
            f"{columns!r} and key {key.shape}."
        )
    if softmax_scale is None:
        raise ValueError(
            "softmax_scale must be given where the value is in the key's rows (value=None), got None. The default, head_dim "
            "** -0.5, is wrong for MLA: there the scale comes from the head dimension before absorption."
        )
    return first, end


def check_cache(query, key, value, page_table=None):
    """Checks that query [B, Hq, D] or [B, T, Hq, D] fits key and value [B, S, Hkv, ...], or fits pools and a page table."""
    layout = PADDED if page_table is None else POOL
    if len(query.shape) not in (3, 4):
        raise ValueError(
            f"query must be [batch, num_q_heads, head_dim] or [batch, num_tokens, num_q_heads, head_dim], got shape {query.shape}."
        )
    order = lambda: other_order(query.shape, key.shape, None if value is None else value.shape, page_table is not None)
    cached = {"key": key} | ({} if value is None else {"value": value})
    arrays = {"query": query} | cached
    for name, array in cached.items():
        if len(array.shape) != 4:
            raise ValueError(f"{name} must be {layout.format('head_dim')}, got shape {array.shape}.")
    for name, array in arrays.items():
        _check_dtype(name, array, CACHE_DTYPES if name in cached else FLOATING_DTYPES)
    if value is not None and key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must have the same shape but for the last axis, got key {key.shape} and value {value.shape}. Both are "
            f"{layout.format('...')}.{order()}"
        )
    if any(array.dtype != key.dtype for array in (cached if is_quantised(key.dtype) else arrays).values()):
        dtypes = ", ".join(f"{name} {array.dtype.name}" for name, array in arrays.items())
        raise ValueError(
            f"query, key and value must have the same dtype, got {dtypes}. Key and value of a quantised cache have one of "
            f"{', '.join(QUANTISED)}, both the same."
        )
    if page_table is None and query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query and key must have the same batch, got query {query.shape} and key {key.shape}."
            f"{order() or ' If key is a pool of pages, pass page_table.'}"
        )
    if value is not None and query.shape[-1] != key.shape[3]:
        raise ValueError(f"query and key must have the same head_dim, got query {query.shape} and key {key.shape}.{order()}")
    if value is None and query.shape[-1] > key.shape[3]:
        raise ValueError(
            f"query must have no more columns than key's rows, of which the first head_dim are the key; got query {query.shape} "
            f"and key {key.shape}.{order()}"
        )
    for name, array in arrays.items():
        if 0 in array.shape:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}.")
    if query.shape[-2] % key.shape[2]:
        raise ValueError(
            f"query must have a multiple of key's num_kv_heads, got {query.shape[-2]} query heads and {key.shape[2]} kv heads."
            f"{order()}"
        )
    if page_table is not None:
        check_page_table(page_table, query.shape[0])


def _check_dtype(name, array, accepted):
    if array.dtype.name not in accepted:
        raise ValueError(f"{name} must have one of the dtypes {', '.join(accepted)}; got {array.dtype.name}.")


def check_integers(name, array, shape, accepted):
    """Checks that an array is integers of a shape. `accepted` is what the error says of it."""
    if array.shape != shape or 0 in shape or not jnp.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be {accepted} got {shown(array)}.")


def check_page_table(page_table, batch):
    accepted = f"integers of shape ({batch}, pages), the pages of each sequence in order, or None for a padded cache;"
    check_integers("page_table", page_table, (batch, *page_table.shape[-1:]), accepted)


def check_lengths(name, lengths, batch):
    check_integers(name, lengths, (batch,), f"None or integers of shape ({batch},),")


def check_scales(key, value, page_table, key_scale, value_scale):
    """Checks the scales of a quantised cache. A cache of floats must have none."""
    if value is None and value_scale is None:
        value_scale = key_scale
    (pages, rows, num_kv_heads), dtype = key.shape[:3], key.dtype
    shapes = {
        "[num_kv_heads]": (num_kv_heads,),
        "[batch, num_kv_heads]": (pages, num_kv_heads),
        "[batch, num_kv_heads, seq_len]": (pages, num_kv_heads, rows),
    }
    if page_table is not None:
        shapes = {"[num_kv_heads]": (num_kv_heads,), "[num_pages, num_kv_heads, page_size]": (pages, num_kv_heads, rows)}
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scale is None:
            if is_quantised(dtype) and QUANTISED[dtype.name].needs_scales:
                raise ValueError(
                    f"{name} must be given for an {dtype.name} cache, got None. `quantize` returns the scale with the rows. If the "
                    f"cache holds integers up to {QUANTISED[dtype.name].largest:.0f} that stand for themselves, pass {name}=1.0."
                )
            continue
        if not is_quantised(dtype):
            raise ValueError(
                f"{name} must be None for a cache of floats, got {shown(scale)} and key of dtype {dtype.name}. Scales are for a "
                f"cache of one of {', '.join(QUANTISED)}."
            )
        if scale.shape not in ((), *shapes.values()) or scale.dtype.name not in FLOATING_DTYPES:
            swapped = f" Pass {name}.swapaxes(1, 2)." if scale.shape == (pages, rows, num_kv_heads) else ""
            accepted = [f"{axes} {shape}" for axes, shape in shapes.items()]
            raise ValueError(
                f"{name} must be a number, or floats of shape {', '.join(accepted[:-1])} or {accepted[-1]}; "
                f"got {shown(scale)}.{swapped}"
            )


def check_sinks(aux, num_q_heads, num_kv_heads):
    """Checks the sinks, which are shared by all heads, or given per query head or per kv head."""
    _check_dtype("softmax_aux", aux, FLOATING_DTYPES)
    axes = len(aux.shape)
    if axes not in (1, 2) or 0 in aux.shape or (axes == 2 and aux.shape[0] not in (num_q_heads, num_kv_heads)):
        raise ValueError(
            f"softmax_aux must have shape (num_sinks,), ({num_q_heads}, num_sinks) for query heads or ({num_kv_heads}, num_sinks) "
            f"for kv heads; got {aux.shape}."
        )
    if aux.shape == (num_q_heads,) and num_q_heads > 1:
        warnings.warn(
            f"softmax_aux of shape ({num_q_heads},) means {num_q_heads} sinks shared by all heads. If it is one sink for each of "
            f"the {num_q_heads} query heads, pass softmax_aux[:, None].",
            UserWarning,
            stacklevel=5,  # the caller of the public function
        )


def check_number(name: str, given: Any, positive: bool = False, dtype: Any = None) -> float:
    """A number that is known while tracing, as a finite float. It must be finite in `dtype`, too, if that is given."""
    try:
        number = None if isinstance(given, str | bool) else float(given)
    except TypeError:  # JAX raises one for a traced value, too
        number = None
    except OverflowError:  # an integer beyond any float
        number = math.inf
    if number is None:
        raise TypeError(f"{name} must be a number known while tracing, or None; got {shown(given)} of type {type(given).__name__}.")
    if not math.isfinite(number) or (positive and number <= 0):
        accepted = "positive and finite, or None;" if positive else "finite or None,"
        raise ValueError(f"{name} must be {accepted} got {shown(given)}.")
    if dtype is not None and abs(number) > float(jnp.finfo(dtype).max):
        raise ValueError(f"{name} must be finite in {np.dtype(dtype).name}, the dtype of logits, or None; got {shown(given)}.")
    return number


def check_window(window) -> int | None:
    """The number of keys that the window keeps before a token's own key. None means all keys."""
    if window is None:
        return None
    try:
        if any(isinstance(side, bool) for side in window):
            raise TypeError
        left, _ = map(operator.index, window)
    except (TypeError, ValueError):
        message = f"sliding_window must be two integers (left, right) or None, got {shown(window)}.{_pair(window)}"
        raise ValueError(message) from None
    return None if left < 0 else left


def _pair(window) -> str:
    """Advice for a window that was passed as one number."""
    try:
        keys = 0 if isinstance(window, bool) else operator.index(window)
    except TypeError:
        return ""
    return f" For {keys} keys per token, the token's own included, pass ({keys - 1}, 0)." if keys > 0 else ""


def check_fwd_params(fwd_params) -> FwdParams:
    hints = FwdParams() if fwd_params is None else fwd_params
    if not isinstance(hints, FwdParams):
        raise TypeError(f"fwd_params must be an ejk_ragged.FwdParams or None, got {shown(hints)}.")
    return hints
