"""Kv heads of 8-bit caches that Mosaic GPU joins, lowered for cuda on a machine without a GPU: XLA moves nothing for the kernels,
and the kernels store what is read."""

import collections
import functools
import re

import jax
import pytest
from support import has_mosaic_gpu, kernels_of, unsigned_lines

from ejk_ragged import ragged_decode_attention


def lowered(*arrays, **named):
    call = functools.partial(ragged_decode_attention, backend="mosaic_gpu")
    return jax.jit(call).trace(*arrays, **named).lower(lowering_platforms=("cuda",))


@has_mosaic_gpu
@pytest.mark.parametrize(("head_dim", "num_kv_heads"), [(64, 8), (112, 8), (112, 12), (80, 4), (80, 16), (80, 6)])
def test_the_query_is_not_moved(joins_always, head_dim, num_kv_heads):
    """A kernel puts zeros into the query, in the columns of other kv heads and beyond the last one. Six kv heads of 80
    dimensions are not joined."""
    shape = jax.ShapeDtypeStruct
    cache, scale = shape((4, 1024, num_kv_heads, head_dim), "int8"), shape((4, num_kv_heads, 1024), "float32")
    query = shape((4, 4 * num_kv_heads, head_dim), "bfloat16")
    text = lowered(query, cache, cache, key_scale=scale, value_scale=scale).as_text()
    moves = [line for line in text.splitlines() if "bf16>" in line.rpartition("->")[2] and "stablehlo" in line]
    operations = {line.partition("stablehlo.")[2].split()[0] for line in moves}
    assert operations == {"broadcast_in_dim", "reshape", "custom_call"}  # the first one gives the query an axis of tokens


@has_mosaic_gpu
@pytest.mark.parametrize(
    ("head_dim", "heads", "seq_len"),
    [(64, 2, 1024), (80, 4, 1024), (96, 4, 1024), (112, 4, 1024), (320, 1, 1024), (512, 1, 1024), (80, 4, 1002), (128, 1, 1002)],
)
def test_nothing_of_the_cache_is_moved(joins_always, head_dim, heads, seq_len):
    """The joined cache is the cache, and so is one whose rows are copied end to end, with its scales. Two kernels read it. On a
    machine without a GPU the call is lowered for cuda."""
    shape = jax.ShapeDtypeStruct
    cache, scale, lengths = shape((4, seq_len, 8, head_dim), "int8"), shape((4, 8, seq_len), "float32"), shape((4,), "int32")
    arguments = {"key_scale": scale, "value_scale": scale, "sequence_start": lengths, "sequence_end": lengths}
    text = lowered(shape((4, 32, head_dim), "bfloat16"), cache, cache, **arguments).as_text()
    assert text.count("mosaic_gpu_v2") == 2
    sizes = f"4x{seq_len}" if seq_len % 8 == 0 else f"1x{4 * seq_len}"
    assert f"{sizes}x{8 // heads}x{heads * head_dim}xi8" in text
    # The copies of joined kv heads that share a line of 128 bytes begin with this line, and see rows of all kv heads.
    assert (f"tensor<{sizes}x{8 * head_dim}xi8>" in text) == (heads * head_dim % 128 == 64 and heads > 1)
    moves = [line for line in text.splitlines() if "xi8>" in line.rpartition("->")[2] and "stablehlo" in line]
    assert all("stablehlo.reshape" in line for line in moves)
    operations = collections.Counter(re.findall(r"stablehlo\.(\w+)", text))
    del operations["reshape"]
    # Three arrays get an axis of tokens, and the lse is brought into the order of heads. A query of 320 dimensions gets zeros.
    zeros = {"pad": 1, "constant": 1, "convert": 1} if head_dim == 320 else {}
    assert operations == {"broadcast_in_dim": 3, "custom_call": 2, "transpose": 1} | zeros


@has_mosaic_gpu
@pytest.mark.parametrize(("head_dim", "heads"), [(64, 2), (112, 4), (128, 1)])
def test_columns_of_other_kv_heads_are_not_stored(joins_always, head_dim, heads):
    """A thread stores four sums at once, if they are of the query row's own kv head. Kv heads that are apart have no others. In all
    kernels, numbers have signs."""
    shape = jax.ShapeDtypeStruct
    cache, scale = shape((4, 1024, 8, head_dim), "int8"), shape((4, 8, 1024), "float32")
    first, second = kernels_of(lowered(shape((4, 32, head_dim), "bfloat16"), cache, cache, key_scale=scale, value_scale=scale))
    assert ("st.global.v4.f32" in first) == (heads > 1)
    assert unsigned_lines(first) == unsigned_lines(second) == []
