"""What only the Mosaic GPU backend has: how its kernels read the cache, in the interpreter, which also looks for races; lowering
for cuda on any machine; export, hints and refusals. The shared suite tests the rest, in the dtypes that the backend takes.
Before JAX 0.11 the backend only says that it cannot run."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import types
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import array, assert_right, has_mosaic_gpu, kernels_of, unsigned_lines

import ejk_ragged_mosaic_gpu
from ejk_ragged import explain, FwdParams, Problem, ragged_decode_attention, Target
from ejk_ragged._registry import registry
from ejk_ragged.testing import Case, oracle, relative_error
from ejk_ragged_mosaic_gpu import _tuning, MosaicGpuBackend
from ejk_ragged_mosaic_gpu._tuning import merging, resolve, tiles
from ejk_ragged_pallas_triton import PallasTritonBackend


CUSTOM_CALL = "mosaic_gpu_v2"
SIZES = {"batch": 4, "num_tokens": 1, "seq_len": 1000, "num_q_heads": 28, "num_kv_heads": 4, "head_dim": 128}


def problem(**changes):
    dtypes = {"dtype": np.dtype(jnp.bfloat16), "cache_dtype": np.dtype(jnp.bfloat16)}
    given: dict[str, Any] = SIZES | dtypes | {"softmax_scale": 1.0} | changes
    return Problem(**given)


# ---------------------------------------------------------------------------------------------------------------------------
# In the interpreter


@has_mosaic_gpu
def test_tiles_as_they_are_multiplied(interpreted):
    """Ranges begin and end within tiles, and one program has more tiles than stages. Copies can lay out the rows and dimensions
    of this case."""
    ranges = ("ranges", (3, 256), (7, 7), (60, 70))
    case = Case("", 3, 256, 4, 1, 128, "float16", ranges, 0.2, (250, 0), 1.5, ("query", 1))
    assert_right(interpreted(FwdParams(num_stages=2), programs=1), case.draw(poison=True), gradients=False)


@has_mosaic_gpu
def test_rows_with_bounds_of_their_own_in_two_blocks(interpreted):
    """15 query rows per kv head are two blocks of 8. The second block has one row that does not exist."""
    case = Case("", 2, 128, 6, 2, 64, "bfloat16", ("ranges", (2, 100), (0, 3)), num_tokens=5, query_lengths=(5, 4))
    assert_right(interpreted(FwdParams(block_size_heads=8)), case.draw(poison=True), gradients=False)


IN_ROWS = Case("", 2, 128, 8, 1, 576, "bfloat16", softmax_scale=0.1, cache_dtype="int8", scales="row", value_columns=(64, 576))


@has_mosaic_gpu
@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        # Parts of 192 columns; the value begins within the first part. Two tokens with bounds of their own, in pages.
        ({"num_tokens": 2, "page_size": 32, "sliding_window": (50, 0)}, 2),
        # Parts of 64 columns, in the first of which there is no value. Two blocks of query rows, and a key narrower than its rows.
        (
            {
                "num_q_heads": 20,
                "num_tokens": 2,
                "head_dim": 256,
                "row_dim": 320,
                "value_columns": (64, 320),
                "logits_soft_cap": 9.0,
            },
            3,
        ),
        # One part, and scales that all rows of a head share.
        ({"num_kv_heads": 2, "head_dim": 128, "value_columns": (0, 64), "scales": "head", "cache_dtype": "float8_e4m3fn"}, 1),
    ],
    ids=["576", "320", "128"],
)
def test_tiles_of_8_bits_that_are_widened_part_by_part(changes, programs, interpreted):
    """Rows outside the ranges have scales of NaN, and one program has more parts than places."""
    case = dataclasses.replace(IN_ROWS, lengths=("ranges", (3, 123), (60, 70)), **changes)
    assert_right(interpreted(programs=programs), case.draw(poison=True), gradients=False)


@has_mosaic_gpu
def test_the_weight_of_a_single_row_is_exact(interpreted):
    """A weight of 1 times a scale is rounded. The output is not off by this rounding, but by its own only."""
    lengths = ("ranges", *[(i, i + 1) for i in range(4)])
    arguments = dataclasses.replace(IN_ROWS, batch=4, seq_len=64, head_dim=64, value_columns=(0, 64), lengths=lengths).draw()
    got, want = interpreted()(**arguments), oracle(**arguments)[0]
    same = np.asarray(got) == want.astype(got.dtype)
    assert same.mean() > 0.99  # a number between two of 16 bits may be rounded to either of them


@has_mosaic_gpu
def test_gaps_between_tokens(interpreted):
    """Three maps of one cache see ranges far from each other. The rows between the ranges are junk."""
    rows = np.arange(208)
    arguments = Case("", 1, len(rows), 2, 1, 64, "bfloat16").draw()
    starts, ends = np.array([[0], [100], [150]], np.int32), np.array([[9], [101], [208]], np.int32)
    seen = (rows >= starts) & (rows < ends)
    for name in ("key", "value"):
        arguments[name][:, ~seen.any(axis=0)] = np.nan
    query, key, value = (array(arguments[name]) for name in ("query", "key", "value"))
    call = lambda start, end: interpreted()(query, key, value, start, end, return_lse=True)
    out, lse = jax.vmap(call)(array(starts), array(ends))
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        want, want_lse = oracle(query, key, value, start, end)
        assert relative_error(out[i], want) < 4e-3
        np.testing.assert_allclose(lse[i], want_lse, rtol=1e-5)


@has_mosaic_gpu
def test_a_last_round_of_which_some_have_no_keys(interpreted):
    """Two programs share each of four stretches. The last round ends within the tile of the first program."""
    case = Case("", 1, 640, 2, 1, 64, "bfloat16", ("ranges", (5, 5 * 128 - 100)))
    assert_right(interpreted(programs=8), case.draw(poison=True), gradients=False)


@has_mosaic_gpu
def test_more_sequences_than_are_summed_up_at_once(interpreted):
    """Sums are over 64, 8 and 2 sequences. Five of the sequences have keys, the last one among them."""
    lengths = [(0, 0)] * 74
    lengths[3], lengths[40], lengths[64], lengths[70], lengths[73] = (1, 30), (0, 64), (60, 64), (2, 7), (0, 9)
    case = Case("", len(lengths), 64, 1, 1, 64, "bfloat16", ("ranges", *lengths))
    assert_right(interpreted(programs=2), case.draw(poison=True), gradients=False)


# ---------------------------------------------------------------------------------------------------------------------------
# Lowering


def arrays(dtype="bfloat16", head_dim=128, group=7, seq_len=1000, tokens=(), value_dim=None, held=None, rows=None):
    """A query, key and value, and lengths. The cache has the dtype `held`. Its shape is [4, seq_len], unless `rows` is given."""
    shape = jax.ShapeDtypeStruct
    key, value = (shape((*(rows or (4, seq_len)), 4, dim), held or dtype) for dim in (head_dim, value_dim or head_dim))
    return shape((4, *tokens, 4 * group, head_dim), dtype), key, value, shape((4,), "int32"), shape((4,), "int32")


def paged(page_size, scales=(), **options):
    """Like `arrays`, but in pages. Also returns keyword arguments."""
    shape = jax.ShapeDtypeStruct
    named = {"page_table": shape((4, 70), "int32")} | {
        f"{name}_scale": shape(scales, "float32") for name in ("key", "value") if scales
    }
    return arrays(rows=(300, page_size), **options), named


def latent(group, page_size=None, tokens=(), held=None):
    """Like `arrays`, for MLA: values in the first 512 columns of the key's rows. A cache of 8 bits has scales by row. Also returns
    keyword arguments."""
    sizes = {"head_dim": 576, "group": group, "tokens": tokens, "held": held}
    (query, key, _, *lengths), named = paged(page_size, **sizes) if page_size else (arrays(**sizes), {})
    if held:
        named |= {"key_scale": jax.ShapeDtypeStruct((300, 4, page_size) if page_size else (4, 4, 1000), "float32")}
    return (query, key, None, *lengths), named | {"value_columns": (0, 512), "softmax_scale": 0.1}


def lowering(args, options):
    traced = {name: x for name, x in options.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in options.items() if name not in traced}
    call = functools.partial(ragged_decode_attention, backend="mosaic_gpu", **static)
    return jax.jit(call).trace(*args, **traced).lower(lowering_platforms=("cuda",))


def lowered(args, **options):
    return lowering(args, options).as_text()


def kernels(args, options):
    return kernels_of(lowering(args, options))


CALLS = {
    "plain": (arrays(), {}),
    "no lengths": (arrays()[:3], {}),
    "everything": (
        arrays("float16", tokens=(3,)),
        {"sliding_window": (100, 0), "logits_soft_cap": 30.0, "softmax_aux": np.zeros((28, 2), np.float32)},
    ),
    "splits": (arrays(), {"fwd_params": FwdParams(num_key_splits=4)}),
    "hints": (arrays(), {"fwd_params": FwdParams(block_size_keys=128, block_size_heads=64, num_stages=2)}),
    "head_dim 80": (arrays(head_dim=80), {}),
    "head_dim 256, many rows": (arrays(head_dim=256, group=100), {}),
    "an odd number of rows": (arrays(head_dim=64, group=1, seq_len=1001), {}),
    "many rows": (arrays(group=40), {}),
    "many rows, everything": (
        arrays("float16", group=17, tokens=(8,)),
        {"sliding_window": (100, 0), "logits_soft_cap": 30.0, "softmax_aux": np.zeros((68, 2), np.float32)},
    ),
    "many rows, several blocks": (arrays(group=16, tokens=(20,)), {"fwd_params": FwdParams(num_key_splits=4)}),
    "many rows of one sequence": (tuple(jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in arrays(group=64)), {}),
    "pages": paged(16),
    "pages, many rows and tokens": paged(24, group=16, tokens=(8,)),
    "192 and 128": (arrays(head_dim=192, value_dim=128), {}),
    "192 and 128, many rows, in pages": paged(64, head_dim=192, value_dim=128, group=64),
    "64 and 128, many rows": (arrays(head_dim=64, value_dim=128, group=64), {}),
    "head_dim 512, many rows": (arrays(head_dim=512, group=64), {}),
    "MLA, 16 heads": latent(16),
    "MLA, 128 heads": latent(128),
    "MLA, 16 heads and 4 tokens, in pages": latent(16, page_size=8, tokens=(4,)),
    "MLA in int8, 16 heads": latent(16, held="int8"),
    "MLA in float8_e4m3fn, 128 heads and 2 tokens, in pages": latent(128, page_size=64, tokens=(2,), held="float8_e4m3fn"),
    "int8": (
        arrays(held="int8", tokens=(3,)),
        {"key_scale": 1.0, "value_scale": 1.0, "softmax_aux": np.zeros((28, 2), np.float32)},
    ),
    "int8, a scale per row, few query rows": (
        arrays(held="int8", group=5, tokens=(4,)),
        dict.fromkeys(("key_scale", "value_scale"), jax.ShapeDtypeStruct((4, 4, 1000), "float32")),
    ),
    "float8_e5m2, a scale per row, 8 query rows per token": paged(32, (300, 4, 32), held="float8_e5m2", group=8, tokens=(4,)),
    "int8, a scale per row, padded": (
        arrays(held="int8", group=40),
        dict.fromkeys(("key_scale", "value_scale"), jax.ShapeDtypeStruct((4, 4, 1000), "float32")),
    ),
    "int8, a scale per row, tiles of 128 keys": (
        arrays(held="int8", head_dim=64, group=40),
        dict.fromkeys(("key_scale", "value_scale"), jax.ShapeDtypeStruct((4, 4, 1000), "float32"))
        | {"fwd_params": FwdParams(block_size_keys=128)},
    ),
    "int8, a scale per row": paged(32, (300, 4, 32), held="int8", group=17, tokens=(8,)),
    "float8_e4m3fn, a scale per row": paged(96, (300, 4, 96), held="float8_e4m3fn"),
    "float8_e5m2, a scale per head": paged(64, (4,), held="float8_e5m2", group=64),
    "int8, a scale per row, lines filled in part, end to end": (
        arrays(held="int8", head_dim=80, value_dim=112, seq_len=1002, group=5),
        dict.fromkeys(("key_scale", "value_scale"), jax.ShapeDtypeStruct((4, 4, 1002), "float32")),
    ),
    "float8_e4m3fn, a scale per row, lines filled in part, many rows": paged(
        32, (300, 4, 32), held="float8_e4m3fn", head_dim=96, group=40
    ),
}


@has_mosaic_gpu
@pytest.mark.parametrize("name", CALLS)
def test_lowers_for_cuda_anywhere(name):
    """There are two kernels, and their numbers have signs. Lengths may be negative. If JAX selects a single number, it compares the
    number as if it had no sign. The interpreter does not show this mistake."""
    text = kernels(*CALLS[name])
    assert len(text) == 2
    assert [line for kernel in text for line in unsigned_lines(kernel)] == []


@has_mosaic_gpu
@pytest.mark.parametrize("name", ["plain", "head_dim 256, many rows", "head_dim 512, many rows", "MLA in int8, 16 heads", "int8"])
def test_lowers_where_gradients_are_asked_for(name):
    """With gradients the output is not rounded, and weights have two terms. There is room for both."""
    (query, *rest), options = CALLS[name]
    traced = {name: x for name, x in options.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in options.items() if name not in traced}
    call = functools.partial(ragged_decode_attention, backend="mosaic_gpu", **static)

    def grad(query, *rest, **named):
        out, vjp = jax.vjp(lambda query: call(query, *rest, **named), query)
        return vjp(out)

    text = jax.jit(grad).trace(query, *rest, **traced).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(CUSTOM_CALL) == 2


@has_mosaic_gpu
@hypothesis.settings(max_examples=hypothesis.settings().max_examples // 2)
@hypothesis.given(
    head_dim=st.sampled_from([64, 128, 192, 320, 576]),
    more=st.sampled_from([0, 8, 16, 64, 128, 192]),
    first=st.sampled_from([0, 0, 8, 64]),
    held=st.sampled_from([None, "int8", "float8_e4m3fn"]),
    group=st.sampled_from([4, 40]),
)
@hypothesis.example(head_dim=128, more=64, first=0, held="int8", group=4)  # lines of 128 columns do not fit
def test_rows_of_the_cache_are_copied_or_refused(head_dim, more, first, held, group):
    """Rows may have more columns than the key and the value. Copies take lines of a row, and cannot begin anywhere. The
    interpreter copies from anywhere."""
    query, key, _, *lengths = arrays(head_dim=head_dim, group=group, held=held)
    key = jax.ShapeDtypeStruct((*key.shape[:-1], head_dim + more), key.dtype)
    scale = {"key_scale": jax.ShapeDtypeStruct((4, 4, 1000), "float32")} if held else {}
    options = {"value_columns": (first, head_dim), "softmax_scale": 0.1} | scale
    value_dim = head_dim - first
    if value_dim == 0:
        refused = "0 <= first < end"
    elif value_dim > 512:
        refused = "value_dim of up to 512"
    else:
        refused = "64 divides" if first % 64 or more % 64 else None
    with pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext():
        assert lowered((query, key, None, *lengths), **options).count(CUSTOM_CALL) == 2


@has_mosaic_gpu
def test_lowers_with_64_bit_types(x64):
    assert lowered(arrays()).count(CUSTOM_CALL) == 2


@has_mosaic_gpu
def test_nothing_is_made_around_the_kernels():
    """A short call would wait for any other kernel. So the kernel clips lengths, and arguments that the caller left out are not
    filled in."""
    query, key, value, _, end = arrays()
    call = lambda query, key, value, end: ragged_decode_attention(query, key, value, None, end, backend="mosaic_gpu")
    text = jax.jit(call).trace(query, key, value, end).lower(lowering_platforms=("cuda",)).as_text()
    entry = [line for line in text.splitlines() if CUSTOM_CALL in line]
    split, combine = (line.split("(", 1)[1].split(")", 1)[0].split(",") for line in entry)
    assert (len(split), len(combine)) == (4, 3)  # query, key, value, end; and partial results, their lse, where sequences stop
    assert "clamp" not in text
    assert "stablehlo.pad" not in text


@has_mosaic_gpu
@pytest.mark.parametrize(("batch", "heads"), [(1001, 16), (270, 128), (2000, 128)])
def test_tables_of_many_sequences_are_handed_on(batch, heads):
    """The first kernel copies its table, with an entry for 1, 2 or 8 sequences, to the second kernel. A copy takes 16 bytes at
    least."""
    shape = jax.ShapeDtypeStruct
    operands = shape((batch, heads, 576), "bfloat16"), shape((batch, 128, 1, 576), "bfloat16"), None
    options = {"value_columns": (0, 512), "softmax_scale": 0.1}
    assert lowered((*operands, None, shape((batch,), "int32")), **options).count(CUSTOM_CALL) == 2


@has_mosaic_gpu
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (256, 64), (80, 64), (512, 64)])
def test_what_fits_by_our_count_fits(head_dim, group):
    """With as many stages as our count of shared memory allows, JAX accepts the kernel. With one more stage our count refuses
    it."""
    one = problem(head_dim=head_dim, num_q_heads=4 * group)

    def fits(stages):
        hints = FwdParams(num_stages=stages, block_size_heads=resolve(one, Target("cuda")).block_size_heads)
        try:
            return resolve(dataclasses.replace(one, fwd_params=hints), Target("cuda"))
        except ValueError:
            return None

    most = max(stages for stages in range(1, 20) if fits(stages))
    assert lowered(arrays(head_dim=head_dim, group=group), fwd_params=fits(most))


@has_mosaic_gpu
def test_export_needs_no_disabled_checks():
    call = functools.partial(ragged_decode_attention, backend="mosaic_gpu")
    exported = jax.export.export(jax.jit(call), platforms=("cuda",))(*arrays())
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    assert again.mlir_module().count(CUSTOM_CALL) == 2


# Runs in a new process, because a module that JAX has imported cannot be taken away.
WITHOUT_TRITON = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import jax, jax.numpy as jnp, numpy as np
from ejk_ragged import backends, explain, ragged_decode_attention

broken = {info.name: info.broken for info in backends()}
assert "no jax.experimental.pallas.triton" in broken["pallas_triton"], broken
assert broken["xla"] is broken["mosaic_gpu"] is None, broken

keys = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(keys[0], (2, 4, 64), jnp.bfloat16)
key, value = (jax.random.normal(key, (2, 40, 2, 64), jnp.bfloat16) for key in keys[1:])
end = jnp.array([7, 40])
choice = explain(query, key, value, None, end)
assert (choice["cuda"].forward, choice["cuda"].backward, choice["cpu"].forward) == ("mosaic_gpu", "xla", "xla"), choice

call = jax.jit(lambda query, key, value, end: ragged_decode_attention(query, key, value, None, end))
exported = jax.export.export(call, platforms=("cpu", "cuda"))(query, key, value, end)
assert exported.mlir_module().count("mosaic_gpu_v2") == 2
again = jax.export.deserialize(exported.serialize())
if jax.default_backend() == "cpu":
    np.testing.assert_array_equal(again.call(query, key, value, end), call(query, key, value, end))
"""


@has_mosaic_gpu
def test_a_jax_without_triton():
    """This backend does the call, in an artifact for cpu and cuda, with all checks enabled."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------------
# Hints and refusals


INT8 = np.dtype("int8")
LATENT = {"head_dim": 576, "value_dim": 512, "row_dim": 576, "value_columns": (0, 512)}
PAGED = {"num_pages": 300, "page_size": 16, "seq_len": 1120}
LARGE_POOL = {"num_pages": 40000, "page_size": 16, "num_q_heads": 16 * 4}


def test_hints_are_rounded_up_to_what_is_multiplied():
    hints = resolve(problem(fwd_params=FwdParams(block_size_keys=16, block_size_heads=3)), Target("cuda"))
    assert (hints.block_size_keys, hints.block_size_heads) == (64, 8)
    # A pair of warpgroups waits for both halves of a tile. With one place in shared memory it would wait forever.
    pair = problem(**LATENT | {"num_q_heads": 160, "fwd_params": FwdParams(num_stages=1)})
    assert resolve(pair, Target("cuda")).num_stages == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (128, 2)),
        ({"num_q_heads": 512}, (128, 2)),  # two blocks of query rows
        ({"batch": 1000}, (128, 2)),  # the table has an entry for each eight sequences
        ({"batch": 3000}, (64, 2)),  # the table takes the room
        ({"keeps_accum_dtype": True}, (64, 2)),  # and so does a second term of weights
        ({"keeps_accum_dtype": True, "fwd_params": FwdParams(block_size_keys=128)}, (64, 2)),  # a hint of the call, for gradients
        ({"fwd_params": FwdParams(num_stages=4)}, (128, 2)),  # each half has one place, whatever the hint says
        ({"value_dim": 448, "value_columns": (64, 512)}, (128, 2)),
    ],
)
def test_the_tiles_of_a_pair(changes, expected):
    """Tiles have 128 keys where two halves of 64 fit beside the query."""
    given = problem(**LATENT | {"num_q_heads": 160} | changes)
    hints = resolve(given, Target("cuda"))
    assert (hints.block_size_keys, hints.num_stages) == expected
    plan = tiles(dataclasses.replace(given, fwd_params=hints), Target("cuda"))
    assert plan.pair
    assert plan.shared_bytes() <= 227 * 1024


@pytest.mark.parametrize(("batch", "step"), [(100, 1), (256, 1), (257, 2), (384, 2), (385, 4), (768, 4), (769, 8), (9000, 8)])
def test_the_table_of_a_pair(batch, step):
    """One entry is for several sequences where a batch has many, and only in a pair."""
    for heads, expected in ((160, step), (16, 1)):
        given = problem(**LATENT | {"num_q_heads": heads, "batch": batch})
        assert tiles(dataclasses.replace(given, fwd_params=resolve(given, Target("cuda"))), Target("cuda")).table_step == expected


@pytest.mark.parametrize("dims", [(128, 128), (256, 128), (256, 256)])
@pytest.mark.parametrize("heads", [4, 128])
def test_tiles_that_warpgroups_take_in_turn(dims, heads):
    """A place is always that of the same warpgroup, so there is an even number of places."""
    for stages in (None, 1, 3):
        changes = {"cache_dtype": INT8, "num_q_heads": heads, "head_dim": dims[0], "row_dim": dims[0], "value_dim": dims[1]}
        given = problem(**changes, fwd_params=FwdParams(num_stages=stages))
        hints = resolve(given, Target("cuda"))
        assert (hints.num_stages or 0) % 2 == 0
        plan = tiles(dataclasses.replace(given, fwd_params=hints), Target("cuda"))
        assert plan.in_registers
        assert plan.shared_bytes() <= 227 * 1024


def test_hints_that_cannot_work():
    with pytest.raises(ValueError, match=r"num_stages 9 need .* bytes of shared memory"):
        MosaicGpuBackend().fwd_params(problem(fwd_params=FwdParams(num_stages=9)), Target("cuda"))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 200, 256])
@pytest.mark.parametrize("group", [1, 7, 64, 200])
def test_something_fits_for_every_shape(head_dim, group):
    one = problem(head_dim=head_dim, num_q_heads=4 * group)
    assert MosaicGpuBackend().supports(one, Target("cuda")) is None
    hints = resolve(one, Target("cuda"))
    assert (hints.num_stages or 0) >= 2
    for given in MosaicGpuBackend().candidates(one, Target("cuda")):
        resolve(dataclasses.replace(one, fwd_params=given), Target("cuda"))


def test_with_splits_nothing_but_the_schedule_knows_the_batch():
    def shape(batch):
        given = problem(batch=batch, fwd_params=FwdParams(num_key_splits=7))
        found = tiles(dataclasses.replace(given, fwd_params=resolve(given, Target("cuda"))), Target("cuda"))
        return dataclasses.replace(found, schedule=dataclasses.replace(found.schedule, batch=0)), found.merge_slots

    assert shape(1) == shape(64) == shape(100_000)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("group", [1, 5, 6, 7, 8, 20, 40])
def test_parts_that_are_merged_at_once(tokens, group):
    """A part has query rows of one token, and a number for each thread. Parts and programs are all of the work."""
    for heads, value_dim, batch in itertools.product((1, 3, 8), (48, 64, 80, 128, 192, 256), (1, 700)):
        given = problem(batch=batch, num_tokens=tokens, num_q_heads=heads * group, num_kv_heads=heads, value_dim=value_dim)
        plan = tiles(dataclasses.replace(given, fwd_params=resolve(given, Target("cuda"))), Target("cuda"))
        (rows, dims), parts, programs = merging(given, Target("cuda"), plan)
        of_token, num_rows = (plan.token_rows, plan.num_rows) if plan.many else (group, tokens * group)
        assert of_token % rows == 0
        assert heads * num_rows % (rows * parts) == 0
        assert rows * dims >= 128
        assert value_dim % dims == 0 or dims == plan.stored_dim >= value_dim
        assert rows * dims * parts * plan.merge_slots <= 128 * 128 or parts == 1
        assert 1 <= programs <= batch * heads * num_rows // (rows * parts) * -(-value_dim // dims)


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({"dtype": np.dtype("float32"), "cache_dtype": np.dtype("float32")}, None, "of bfloat16 and float16, not float32"),
        (
            {"cache_dtype": INT8, "dtype": np.dtype("float16")},
            None,
            "whose range their scales share, not of float16",
        ),
        ({"cache_dtype": INT8, "junk_between_tokens": True}, None, "and no junk lies between tokens"),
        ({"cache_dtype": INT8, "head_dim": 72}, None, "where 64 divides the head dimensions, or 16 divides one below 128"),
        ({"cache_dtype": INT8, "value_dim": 144}, None, "where 64 divides the head dimensions, or 16 divides one below 128"),
        ({"cache_dtype": INT8, "seq_len": 1001}, None, "8 the rows"),
        ({"cache_dtype": INT8, "batch": 8, "seq_len": (1 << 26) + 1}, None, "8 the rows"),  # more scales than numbers of int32
        (PAGED | {"page_size": 20}, None, "do not divide pages of 20"),
        (PAGED | {"cache_dtype": INT8}, None, "copies 32 at once, which do not divide pages of 16"),
        (PAGED | {"cache_dtype": INT8, "page_size": 32, "head_dim": 144}, None, "or 16 divides one below 128"),
        (PAGED | {"page_size": 1}, None, "do not divide pages of 1"),
        (PAGED | {"head_dim": 88}, None, "head dimensions that 16 divides, not 88 and 88"),
        (PAGED | {"value_dim": 40}, None, "head dimensions that 16 divides, not 128 and 40"),
        ({"value_dim": 520}, None, "a value_dim of up to 512 that is a multiple of 8, not 520"),
        ({"head_dim": 648}, None, "a head_dim of up to 640 that is a multiple of 8, not 648"),
        ({"head_dim": 264}, None, "head dimensions above 256, where 64 divides the head dimensions"),
        (
            {"head_dim": 576, "value_dim": 512, "cache_dtype": INT8},
            None,
            "head dimensions above 512 where the value lies in the key's rows",
        ),
        (LATENT | {"cache_dtype": INT8, "junk_between_tokens": True}, None, "and no junk lies between tokens"),
        (LATENT | {"value_columns": (8, 136)}, None, "the number of columns of a row and the first column of the value"),
        (LATENT | {"row_dim": 584}, None, "64 divides the head dimensions, the number of columns of a row"),
        (LATENT | PAGED | {"row_dim": 584}, None, "64 divides the head dimensions, the number of columns of a row"),
        (LATENT | {"seq_len": 1001}, None, "8 divides the number of rows"),
        ({"head_dim": 100}, None, "not 100"),
        ({"batch": 100_000}, None, "table of 100000 sequences"),
        ({"batch": jax.export.symbolic_shape("b")[0]}, None, "not symbolic"),
        ({}, types.SimpleNamespace(compute_capability="8.0"), "of compute capability 9, not 8.0"),
        ({}, types.SimpleNamespace(compute_capability="10.0"), "of compute capability 9, not 10.0"),
    ],
)
def test_says_what_it_cannot_do(changes, device, reason):
    assert reason in MosaicGpuBackend().supports(problem(**changes), Target("cuda", device))
    for taken in (
        {},
        LATENT,
        PAGED,
        PAGED | LATENT,
        LATENT | {"cache_dtype": INT8},
        PAGED | LATENT | {"cache_dtype": INT8, "page_size": 32},
        {"cache_dtype": INT8},
        {"cache_dtype": INT8, "head_dim": 80, "value_dim": 16},
        {"cache_dtype": INT8, "batch": 8, "seq_len": 1001},
        {"cache_dtype": INT8, "batch": 8, "seq_len": (1 << 26) - 1},
        PAGED | {"cache_dtype": INT8, "page_size": 32, "value_dim": 64},
        PAGED | {"head_dim": 80, "value_dim": 48},
        LATENT | {"batch": 8, "seq_len": 1001},
    ):
        assert MosaicGpuBackend().supports(problem(**taken), Target("cuda")) is None


@has_mosaic_gpu
@pytest.mark.parametrize(("group", "several"), [(1, r"ldmatrix|load.*-> vector<2xf32>"), (40, "ldmatrix")])
def test_scales_end_to_end_are_loaded_one_by_one(group, several):
    """Such scales may begin within 16 bytes, or within 8. `ldmatrix` loads 16 bytes at once. Tiles are widened in registers for few
    query rows, and in shared memory for many."""
    args = arrays(held="int8", seq_len=1002, group=group)
    counts = []
    for shape in ((4, 4, 1002), ()):
        scales = dict.fromkeys(("key_scale", "value_scale"), jax.ShapeDtypeStruct(shape, "float32"))
        counts.append(len(re.findall(several, kernels(args, scales)[0])))
    assert counts[0] == counts[1]


@has_mosaic_gpu
@pytest.mark.parametrize("fast", [True, False])
def test_when_the_second_kernel_is_launched(monkeypatch, fast):
    monkeypatch.setattr(_tuning, "has_fast_memory", lambda _: fast)
    first, second = kernels(*CALLS["plain"])
    assert ("griddepcontrol.launch_dependents" in first) == (not fast)
    assert "griddepcontrol.wait" in second


HOPPER = types.SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H100 80GB HBM3")
FAST = types.SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H200")
LONG = {"num_q_heads": 16, "seq_len": 8192}
LARGE = {"batch": 64, "seq_len": 8192, "num_q_heads": 256}
OF_64 = {"cache_dtype": INT8, "num_kv_heads": 8, "num_q_heads": 64, "head_dim": 64, "value_dim": 64}
OF_80_IN_8_BITS = OF_64 | {"num_q_heads": 32, "batch": 8, "seq_len": 5001, "head_dim": 80, "value_dim": 80}
OF_512 = {"cache_dtype": INT8, "num_q_heads": 32, "batch": 4, "seq_len": 2048, "head_dim": 512, "value_dim": 512}
SMALL_LATENT = LATENT | {"cache_dtype": INT8, "num_kv_heads": 1, "num_q_heads": 16, "batch": 8, "seq_len": 1000}
OF_WIDE = "up to 16 query rows per kv head of more than 256 dimensions of an 8-bit cache"
SEVERAL = "several tokens with more than 16 query rows per kv head"
ONE_TOKEN = {"num_q_heads": 16, "seq_len": 4096}
OF_ONE_TOKEN = "one token with up to 8 query rows per kv head"
OF_80 = "query rows per kv head of 80 dimensions"


@pytest.mark.parametrize(
    ("changes", "device", "why"),
    [
        ({}, HOPPER, "64 or more query rows per kv head"),
        ({"num_q_heads": 16, "num_tokens": 16}, HOPPER, "64 or more query rows per kv head"),
        ({"most_keys": 4096}, HOPPER, "64 or more query rows per kv head"),
        ({"cache_dtype": INT8}, HOPPER, "20 or more query rows per kv head of an 8-bit cache"),
        ({"cache_dtype": INT8, "num_q_heads": 80}, HOPPER, "20 or more query rows per kv head of an 8-bit cache"),
        ({"cache_dtype": INT8, "num_q_heads": 76}, HOPPER, "few query rows of a large 8-bit cache"),
        ({"cache_dtype": INT8, "num_q_heads": 76, "most_keys": 1024}, HOPPER, ""),
        ({"cache_dtype": INT8, "num_q_heads": 76, "most_keys": 256}, HOPPER, ""),
        ({"cache_dtype": INT8, "num_q_heads": 64, "batch": 512, "seq_len": 1024}, HOPPER, "few query rows of a large 8-bit cache"),
        ({"cache_dtype": INT8, "num_q_heads": 64, "batch": 512, "seq_len": 1024, "most_keys": 256}, HOPPER, ""),
        ({"cache_dtype": INT8, "num_q_heads": 76, "head_dim": 256, "value_dim": 256}, HOPPER, ""),
        ({"cache_dtype": INT8, "num_q_heads": 32, "head_dim": 256}, HOPPER, "up to 8 query rows per kv head of an 8-bit cache"),
        ({"cache_dtype": INT8, "num_q_heads": 80, "batch": 15}, HOPPER, ""),
        ({"cache_dtype": INT8, "num_q_heads": 32, "batch": 1}, HOPPER, "up to 8 query rows per kv head of an 8-bit cache"),
        ({"cache_dtype": INT8, "num_q_heads": 32, "batch": 1, "head_dim": 64}, HOPPER, ""),
        (
            {"cache_dtype": INT8, "num_q_heads": 32, "head_dim": 64, "value_dim": 64},
            HOPPER,
            "few query rows of a large 8-bit cache",
        ),
        (
            {"cache_dtype": INT8, "num_q_heads": 32, "head_dim": 64, "value_dim": 64, "batch": 256, "seq_len": 2048},
            HOPPER,
            "",
        ),
        ({"cache_dtype": INT8, "num_q_heads": 32, "head_dim": 48, "value_dim": 48}, HOPPER, ""),
        ({"cache_dtype": INT8, "num_q_heads": 96, "head_dim": 48, "value_dim": 48}, HOPPER, ""),
        (
            {"cache_dtype": INT8, "num_q_heads": 96, "head_dim": 64, "value_dim": 64},
            HOPPER,
            "few query rows of a large 8-bit cache",
        ),
        (
            {"cache_dtype": INT8, "num_q_heads": 32, "batch": 1, "head_dim": 80, "value_dim": 80},
            HOPPER,
            "up to 8 query rows per kv head of an 8-bit cache",
        ),
        (
            {"cache_dtype": INT8, "num_q_heads": 36, "batch": 4, "head_dim": 96, "value_dim": 96},
            HOPPER,
            "few query rows of a large 8-bit cache",
        ),
        ({"cache_dtype": INT8, "num_q_heads": 36, "batch": 3, "head_dim": 96, "value_dim": 96}, HOPPER, ""),
        (
            {"cache_dtype": INT8, "num_q_heads": 256, "batch": 4, "head_dim": 112, "value_dim": 112},
            HOPPER,
            "20 or more query rows per kv head of an 8-bit cache",
        ),
        ({"cache_dtype": INT8, "num_q_heads": 8, "batch": 8, "seq_len": 501}, HOPPER, ""),
        (OF_64, FAST, "few query rows of an 8-bit cache whose kv heads are joined"),
        (OF_64, HOPPER, "few query rows of a large 8-bit cache"),
        (OF_64 | {"seq_len": 1024, "batch": 16}, FAST, "few query rows of an 8-bit cache whose kv heads are joined"),
        (
            OF_64 | {"seq_len": 1024, "batch": 16, "num_tokens": 2},
            FAST,
            "few query rows of an 8-bit cache whose kv heads are joined",
        ),
        (OF_64 | {"seq_len": 1024, "batch": 16, "num_tokens": 3}, FAST, ""),  # too many query rows
        (OF_64 | {"seq_len": 1024, "batch": 15}, FAST, ""),
        (OF_64 | {"seq_len": 1024, "batch": 16}, HOPPER, ""),
        (OF_80_IN_8_BITS, FAST, "up to 8 query rows per kv head of an 8-bit cache"),
        (OF_80_IN_8_BITS, HOPPER, ""),
        (OF_80_IN_8_BITS | {"seq_len": 4501}, FAST, "up to 8 query rows per kv head of an 8-bit cache"),
        (OF_80_IN_8_BITS | {"seq_len": 4501, "num_tokens": 2}, FAST, ""),
        (
            OF_80_IN_8_BITS | {"head_dim": 64, "value_dim": 64},
            FAST,
            "few query rows of an 8-bit cache whose kv heads are joined",
        ),
        (OF_80_IN_8_BITS | {"head_dim": 64, "value_dim": 64}, HOPPER, ""),
        (
            {"cache_dtype": INT8, "num_q_heads": 8, "batch": 8, "seq_len": 501},
            FAST,
            "up to 8 query rows per kv head of an 8-bit cache",
        ),
        ({"cache_dtype": INT8, "num_q_heads": 8, "batch": 8, "seq_len": 501, "num_tokens": 2}, FAST, ""),
        (OF_512 | {"seq_len": 2046}, FAST, ""),
        (OF_512, FAST, OF_WIDE),
        (OF_512 | {"head_dim": 320, "value_dim": 320, "batch": 8}, FAST, OF_WIDE),
        (OF_512 | {"num_tokens": 2}, FAST, OF_WIDE),
        (PAGED | OF_512 | {"page_size": 64, "num_pages": 100}, FAST, OF_WIDE),
        (OF_512 | {"num_tokens": 3}, FAST, ""),
        (OF_512 | {"batch": 1, "seq_len": 3072}, FAST, ""),
        (OF_512 | {"head_dim": 192}, FAST, ""),
        (OF_512 | {"head_dim": 272, "value_dim": 272}, FAST, ""),
        (OF_512, HOPPER, ""),
        ({"cache_dtype": INT8, "num_q_heads": 8, "seq_len": 8001}, HOPPER, "up to 8 query rows per kv head of an 8-bit cache"),
        ({"cache_dtype": INT8, "num_q_heads": 32, "batch": 1, "most_keys": 256}, HOPPER, ""),
        (
            {"cache_dtype": INT8, "num_q_heads": 16, "batch": 1, "num_tokens": 2},
            HOPPER,
            "up to 8 query rows per kv head of an 8-bit cache",
        ),
        ({"cache_dtype": INT8, "num_q_heads": 16, "batch": 1, "num_tokens": 2, "head_dim": 256, "value_dim": 256}, HOPPER, ""),
        ({"cache_dtype": INT8, "num_q_heads": 36, "batch": 1}, HOPPER, ""),
        ({"num_q_heads": 80}, HOPPER, ""),
        ({}, None, ""),
        ({"num_q_heads": 4, "num_tokens": 63}, HOPPER, ""),
        ({"keeps_accum_dtype": True}, HOPPER, ""),
        ({"most_keys": 256}, HOPPER, ""),
        ({"seq_len": 1001}, HOPPER, ""),
        ({"junk_between_tokens": True}, HOPPER, ""),
        ({"batch": jax.export.symbolic_shape("b")[0]}, HOPPER, ""),
        ({"batch": 1, "seq_len": 4096}, HOPPER, ""),
        ({"batch": 7}, HOPPER, ""),
        ({"batch": 7, "num_tokens": 2}, HOPPER, "64 or more query rows per kv head"),
        (LATENT, HOPPER, "more than 16 query rows, and values in wide rows of the key"),
        (LATENT | {"num_q_heads": 17 * 4}, HOPPER, "more than 16 query rows, and values in wide rows of the key"),
        (LATENT | {"num_q_heads": 16 * 4}, HOPPER, ""),
        (LATENT | {"batch": 7, "num_q_heads": 33 * 4}, HOPPER, "more than 32 query rows, and values in wide rows of the key"),
        (LATENT | {"batch": 7, "num_q_heads": 32 * 4}, HOPPER, ""),
        (LATENT | {"batch": 2, "num_q_heads": 16 * 4}, HOPPER, "values in wide rows of the key of up to 2 sequences"),
        (LATENT | {"batch": 2, "num_q_heads": 17 * 4}, HOPPER, ""),
        (LATENT | {"batch": 2, "num_q_heads": 16 * 4, "most_keys": 256}, HOPPER, ""),
        (LATENT | LARGE_POOL, HOPPER, "values in wide rows of the key of a large cache in pages"),
        (LATENT | LARGE_POOL | {"seq_len": 512}, HOPPER, ""),
        (LATENT | {"cache_dtype": INT8, "num_q_heads": 4}, HOPPER, "values in wide rows of the key, in 8 bits"),
        (LATENT | {"cache_dtype": INT8}, HOPPER, "values in wide rows of the key, in 8 bits"),
        (LATENT | {"cache_dtype": INT8, "most_keys": 256}, HOPPER, ""),
        (LATENT | {"cache_dtype": INT8, "batch": 8, "seq_len": 1001}, HOPPER, ""),
        (LATENT | {"cache_dtype": INT8, "batch": 16, "seq_len": 501}, FAST, "values in wide rows of the key, in 8 bits"),
        (LATENT | {"cache_dtype": INT8, "batch": 16, "seq_len": 501}, HOPPER, ""),
        (LATENT | {"cache_dtype": INT8, "batch": 16, "seq_len": 501, "num_tokens": 2, "num_q_heads": 64}, FAST, ""),
        (LATENT | {"cache_dtype": INT8, "batch": 16, "seq_len": 451}, FAST, ""),
        (LATENT | {"cache_dtype": INT8, "batch": 8, "seq_len": 1001}, FAST, ""),
        (LATENT | {"cache_dtype": INT8, "seq_len": 8001}, HOPPER, "values in wide rows of the key, in 8 bits"),
        (SMALL_LATENT, FAST, ""),
        (SMALL_LATENT, HOPPER, "values in wide rows of the key, in 8 bits"),
        (SMALL_LATENT | {"seq_len": 2000}, FAST, "values in wide rows of the key, in 8 bits"),
        (SMALL_LATENT | {"num_q_heads": 32}, FAST, "values in wide rows of the key, in 8 bits"),
        (SMALL_LATENT | {"num_q_heads": 32, "seq_len": 504}, FAST, ""),
        (SMALL_LATENT | {"num_q_heads": 128, "seq_len": 304}, FAST, "values in wide rows of the key, in 8 bits"),
        (SMALL_LATENT | {"num_q_heads": 15}, FAST, "values in wide rows of the key, in 8 bits"),
        (SMALL_LATENT | {"num_tokens": 2, "seq_len": 496}, FAST, "values in wide rows of the key, in 8 bits"),
        (SMALL_LATENT | {"num_pages": 200, "page_size": 64}, FAST, "values in wide rows of the key, in 8 bits"),
        (LATENT | {"junk_between_tokens": True}, HOPPER, ""),
        (LATENT | {"head_dim": 256, "value_dim": 128, "row_dim": 256, "value_columns": (0, 128)}, HOPPER, ""),
        ({"head_dim": 512}, HOPPER, ""),
        (PAGED | {"num_q_heads": 8}, HOPPER, ""),
        (PAGED | {"num_q_heads": 8, "batch": 1}, HOPPER, "a single sequence in pages"),
        (LATENT | {"num_q_heads": 16 * 4}, FAST, "values in wide rows of the key of a large cache in fast memory"),
        (LATENT | {"num_q_heads": 16 * 4, "batch": 6}, FAST, ""),
        ({"num_q_heads": 8, "batch": 1}, FAST, "a single sequence in fast memory"),
        ({"num_q_heads": 8, "batch": 1, "cache_dtype": INT8}, FAST, "up to 8 query rows per kv head of an 8-bit cache"),
        ({"num_q_heads": 8, "batch": 1, "seq_len": 1001}, FAST, ""),
        ({"num_q_heads": 8, "batch": 1, "head_dim": 64}, FAST, ""),
        ({"num_q_heads": 8, "batch": 1, "most_keys": 4096}, FAST, ""),
        ({"num_q_heads": 17 * 4, "batch": 1, "seq_len": 4096}, FAST, ""),
        (PAGED | {"num_q_heads": 8, "batch": 1, "head_dim": 64}, FAST, "a single sequence in pages"),
        ({"num_q_heads": 4, "num_tokens": 33}, FAST, "33 or more query rows per kv head in fast memory"),
        ({"num_q_heads": 4, "num_tokens": 63, "most_keys": 4096}, FAST, "33 or more query rows per kv head in fast memory"),
        ({"num_q_heads": 4, "num_tokens": 64}, FAST, "64 or more query rows per kv head"),
        ({"num_q_heads": 4, "num_tokens": 32}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 32, "head_dim": 64, "batch": 16}, FAST, f"{SEVERAL} in fast memory"),
        ({"num_q_heads": 4, "num_tokens": 17, "head_dim": 64, "batch": 16}, FAST, f"{SEVERAL} in fast memory"),
        ({"num_q_heads": 4, "num_tokens": 16, "head_dim": 64, "batch": 16}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 32, "head_dim": 64, "batch": 15}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 32, "head_dim": 64, "batch": 16}, HOPPER, ""),
        ({"num_q_heads": 4, "num_tokens": 32, "head_dim": 64, "value_dim": 128, "batch": 16}, FAST, ""),
        (PAGED | {"num_q_heads": 4, "num_tokens": 32}, FAST, f"{SEVERAL} in pages"),
        (PAGED | {"num_q_heads": 4, "num_tokens": 32, "head_dim": 64, "batch": 128}, FAST, f"{SEVERAL} in pages"),
        (PAGED | {"num_q_heads": 4, "num_tokens": 32, "head_dim": 192}, FAST, ""),
        (PAGED | {"num_q_heads": 4 * 32}, FAST, ""),
        (PAGED | {"num_q_heads": 4, "num_tokens": 32}, HOPPER, ""),
        (PAGED | {"num_q_heads": 4, "num_tokens": 33}, FAST, "33 or more query rows per kv head in pages"),
        (PAGED | {"num_q_heads": 4, "num_tokens": 33}, HOPPER, ""),
        ({"num_q_heads": 4, "num_tokens": 33}, HOPPER, ""),
        ({"num_q_heads": 4, "num_tokens": 63, "batch": 7}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 63, "most_keys": 256}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 33, "head_dim": 80}, FAST, f"33 to 64 {OF_80} in fast memory"),
        ({"num_q_heads": 4, "num_tokens": 64, "head_dim": 80}, FAST, f"33 to 64 {OF_80} in fast memory"),
        (PAGED | {"num_q_heads": 4, "num_tokens": 64, "head_dim": 80, "batch": 128}, FAST, f"33 to 64 {OF_80} in pages"),
        ({"num_q_heads": 4, "num_tokens": 32, "head_dim": 80}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 65, "head_dim": 80}, FAST, ""),
        (
            {"num_q_heads": 4, "num_tokens": 17, "head_dim": 96},
            FAST,
            "17 to 64 query rows per kv head of 96 dimensions in fast memory",
        ),
        ({"num_q_heads": 4, "num_tokens": 16, "head_dim": 96}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 40, "head_dim": 96, "value_dim": 64}, FAST, ""),
        (
            {"num_q_heads": 4, "num_tokens": 40, "head_dim": 112},
            FAST,
            "33 to 64 query rows per kv head of 112 dimensions in fast memory",
        ),
        ({"num_q_heads": 4, "num_tokens": 40, "head_dim": 112, "batch": 8}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 40, "head_dim": 112}, HOPPER, ""),
        ({"num_q_heads": 4, "num_tokens": 40, "head_dim": 112, "batch": 65, "seq_len": 8001}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 40, "head_dim": 112, "junk_between_tokens": True}, FAST, ""),
        ({"num_q_heads": 4, "num_tokens": 40, "head_dim": 48}, FAST, ""),
        (PAGED | {"num_q_heads": 4, "num_tokens": 63}, FAST, "33 or more query rows per kv head in pages"),
        (PAGED | {"num_q_heads": 4, "num_tokens": 63, "most_keys": 256}, FAST, ""),
        (PAGED | ONE_TOKEN, FAST, f"{OF_ONE_TOKEN} in pages of 16 rows"),
        (PAGED | ONE_TOKEN | {"num_q_heads": 4 * 8, "batch": 1000}, FAST, f"{OF_ONE_TOKEN} in pages of 16 rows"),
        (PAGED | ONE_TOKEN | {"page_size": 64, "batch": 8}, FAST, f"{OF_ONE_TOKEN} of a small cache in pages"),
        (PAGED | ONE_TOKEN | {"page_size": 64, "batch": 9}, FAST, ""),
        (PAGED | ONE_TOKEN | {"page_size": 24, "batch": 8}, FAST, ""),
        (PAGED | ONE_TOKEN | {"num_q_heads": 4 * 9}, FAST, ""),
        (PAGED | ONE_TOKEN | {"num_tokens": 2}, FAST, ""),
        (PAGED | ONE_TOKEN | {"most_keys": 4096}, FAST, ""),
        (PAGED | ONE_TOKEN | {"head_dim": 64, "value_dim": 64}, FAST, ""),
        (PAGED | ONE_TOKEN | {"value_dim": 64}, FAST, ""),
        (PAGED | ONE_TOKEN | {"seq_len": 256, "batch": 64}, FAST, ""),
        (PAGED | ONE_TOKEN, HOPPER, ""),
        (ONE_TOKEN | {"batch": 8}, FAST, ""),
        (LONG, FAST, "long sequences of a large cache in fast memory"),
        (LONG, HOPPER, ""),
        (LONG | {"num_tokens": 4}, FAST, "long sequences of a large cache in fast memory"),
        (LONG | {"num_tokens": 5}, FAST, ""),
        (LONG | {"seq_len": 8184}, FAST, ""),
        (LONG | {"most_keys": 65536}, FAST, ""),
        (LONG | {"batch": 7}, FAST, ""),
        (LONG | {"head_dim": 256}, FAST, ""),
        (LONG | {"head_dim": 64, "batch": 128}, FAST, ""),
        (LONG | {"cache_dtype": INT8}, FAST, "up to 8 query rows per kv head of an 8-bit cache"),
        (LONG | {"junk_between_tokens": True}, FAST, ""),
    ],
    ids=str,
)
def test_leads_where_it_is_the_fastest(changes, device, why):
    """By priority the backend comes before pallas_triton. For other problems it is asked after pallas_triton."""
    priority, reason = MosaicGpuBackend().priority_for(problem(**LARGE | changes), Target("cuda", device))
    assert reason == why
    assert (priority > PallasTritonBackend.priority) == bool(why)
    assert why or priority == MosaicGpuBackend.priority


@has_mosaic_gpu
def test_another_backend_has_the_gradients():
    choice = explain(*arrays(), backend="mosaic_gpu")["cuda"]
    assert choice.forward == "mosaic_gpu"
    assert choice.backward in ("pallas_triton", "xla")


def test_a_jax_without_mosaic_gpu(monkeypatch):
    find_spec = importlib.util.find_spec
    gone = lambda name, *args: None if name == "jax.experimental.pallas.mosaic_gpu" else find_spec(name, *args)
    monkeypatch.setattr(ejk_ragged_mosaic_gpu.importlib.util, "find_spec", gone)
    info = {info.name: info for info in registry.backends()}
    older = f"it needs JAX 0.11 (Python 3.12) or newer, not JAX {jax.__version__}"
    newer = "it needs the Mosaic GPU backend of JAX 0.11 or newer"
    assert (newer if jax.__version_info__ >= (0, 11) else older) in str(info["mosaic_gpu"].broken)
    assert info["xla"].broken is None


@has_mosaic_gpu
def test_an_error_in_place_of_waiting_forever(interpreted, monkeypatch):
    """The interpreter takes a thread per warpgroup. With fewer threads it might never go on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    one_device = jax.local_devices(backend="cpu")[:1]
    monkeypatch.setattr(jax, "local_devices", lambda **_: one_device)
    with pytest.raises(RuntimeError, match=r"takes 3 threads .* has 2, .*'jax_num_cpu_devices', 8"):
        interpreted()(**Case("", 1, 128, 4, 1, 128, "bfloat16", cache_dtype="int8", scales="row").draw())


def test_instances_are_values():
    """Calls with equal instances share what JAX compiled."""
    assert MosaicGpuBackend(interpret=True) == MosaicGpuBackend(interpret=True)
    assert hash(dataclasses.replace(MosaicGpuBackend())) == hash(MosaicGpuBackend())
