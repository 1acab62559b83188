"""Problems for hypothesis to draw: every feature of a call, in few shapes."""

import hypothesis.strategies as st

from ejk_ragged.testing import Case


@st.composite
def ranges(draw, batch, seq_len):
    """One range per sequence: empty, of one key, full, out of bounds, reversed, or any range."""
    anywhere = st.integers(-3, seq_len + 3)
    inside = st.integers(0, seq_len - 1)
    kinds = [
        inside.map(lambda i: (i, i)),
        inside.map(lambda i: (i, i + 1)),
        st.just((0, seq_len)),
        st.tuples(st.integers(-(2**63), 0), st.integers(seq_len, 2**64 - 1)),  # to the ends of any type
        st.tuples(anywhere, anywhere),
    ]
    return ("ranges", *draw(st.lists(st.one_of(kinds), min_size=batch, max_size=batch)))


@st.composite
def operands(draw, head_dim):
    """Fields of `Case`, by name: pages, and the width of the value, or its columns in the key's rows and the width of these
    rows."""
    pages = {"page_size": draw(st.sampled_from([None, 1, 2, 7, 16, 64]))}
    kind = draw(st.sampled_from(["plain", "value_dim", "any columns", "latent", "fused"]))
    if kind == "plain":
        return pages
    if kind == "value_dim":
        return pages | {"value_dim": draw(st.integers(8, 2 * head_dim))}
    if kind == "fused":
        return pages | {"value_columns": (head_dim, 2 * head_dim), "row_dim": 2 * head_dim}
    row_dim = draw(st.integers(head_dim, 2 * head_dim))
    first = 0 if kind == "latent" else draw(st.integers(0, row_dim - 8))
    return pages | {"value_columns": (first, draw(st.integers(first + 8, row_dim))), "row_dim": row_dim}


@st.composite
def tiled_operands(draw, head_dim):
    """Like `operands`, with the pages and widths that a GPU copies in tiles."""
    pages = {"page_size": draw(st.sampled_from([None, 8, 16, 24, 32, 64]))}
    if draw(st.booleans()):
        return pages | {"value_dim": draw(st.sampled_from([None, 64, 128, 320]))}
    first, width = draw(st.sampled_from([0, 64, 128])), draw(st.sampled_from([64, 128, 192]))
    row_dim = max(head_dim, first + width) + draw(st.sampled_from([0, 8]))
    return pages | {"value_columns": (first, first + width), "row_dim": row_dim}


@st.composite
def cases(draw, shapes, dtypes, operands=operands):
    """A case with one of `shapes` (B, S, Hq, Hkv, D), one of `dtypes`, and any features."""
    batch, seq_len, num_q_heads, num_kv_heads, head_dim = draw(st.sampled_from(shapes))
    num_tokens = draw(st.sampled_from([None, None, 1, 3]))
    query_lengths = st.lists(st.integers(-1, 4) | st.sampled_from([-(2**63), 2**64 - 1]), min_size=batch, max_size=batch).map(tuple)
    cache_dtype = draw(st.sampled_from([None, None, "int8", "float8_e4m3fn", "float8_e5m2"]))
    dtype = draw(st.sampled_from(dtypes))
    integers = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, *[64] * (dtype == "float64"))]
    operand = draw(operands(head_dim))
    by_sequence = ["sequence"] * (operand.get("page_size") is None)
    scales = ["number", "head", *by_sequence, "row", *[None] * (cache_dtype != "int8")]
    return Case(
        "drawn",
        batch,
        seq_len,
        num_q_heads,
        num_kv_heads,
        head_dim,
        dtype,
        draw(ranges(batch, seq_len) | st.just(("full",))),
        draw(st.sampled_from([None, 0.4])),
        draw(st.none() | st.tuples(st.integers(-1, seq_len), st.integers(-1, 3))),
        draw(st.sampled_from([None, 1.5, 50.0])),
        draw(st.none() | st.tuples(st.sampled_from(["shared", "query", "kv"]), st.sampled_from([1, 3]))),
        num_tokens,
        draw(st.none() | query_lengths) if num_tokens else None,
        cache_dtype,
        draw(st.sampled_from(scales)) if cache_dtype else None,
        draw(st.sampled_from(["int32", *integers])),
        **operand,
    )
