"""What the XLA backend promises beyond the shared suite: its two forms, its chunks and its memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import array, assert_batch_invariant, assert_repeatable, assert_right, planned

from ejk_ragged import Cache, FwdParams, Problem, Queries, ragged_decode_attention, Target, Wanted
from ejk_ragged._problem import Settings
from ejk_ragged.testing import Case, CHECKS
from ejk_ragged_xla import _bits, XlaBackend
from ejk_ragged_xla._chunks import walk


pytestmark = pytest.mark.xla
optimised = pytest.mark.optimised


class Accelerator(XlaBackend):
    """The form for accelerators, on any device that runs the tests."""

    name = "xla-accelerator"

    def fwd_params(self, problem, target):
        return super().fwd_params(problem, TARGETS["accelerator"])

    def forward(self, problem, target, queries, cache):
        return super().forward(problem, TARGETS["accelerator"], queries, cache)

    def backward(self, problem, target, *args, **kwargs):
        return super().backward(problem, TARGETS["accelerator"], *args, **kwargs)


TARGETS = {"cpu": Target("cpu"), "accelerator": Target("tpu")}
FORMS = {"cpu": XlaBackend(), "accelerator": Accelerator()}


@pytest.fixture(autouse=True)
def _on_a_cpu():
    """Runs the tests on a CPU, also where there is a GPU. One form is for CPUs only, and the compiler's figures are compared
    with those for a CPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture(params=list(FORMS))
def form(request):
    return request.param


def call(form, **hints) -> Callable:
    return functools.partial(ragged_decode_attention, backend=FORMS[form], fwd_params=FwdParams(**hints))


def problem_of(batch, seq_len, num_q_heads, num_kv_heads, head_dim, dtype="float32", cache_dtype=None, **facts):
    dtypes = {"dtype": np.dtype(dtype), "cache_dtype": np.dtype(cache_dtype or dtype)}
    sizes = {"batch": batch, "seq_len": seq_len, "num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    given: dict[str, Any] = sizes | dtypes | {"num_tokens": 1, "softmax_scale": 0.25} | facts
    return Problem(**given)


def operands_of(problem, make, per_token=True):
    """Operands of both directions, each made by `make(shape, dtype)`. There is a scale per row if the cache is quantised."""
    batch, num_tokens, heads, accum = problem.batch, problem.num_tokens, problem.num_q_heads, problem.accum_dtype
    query = lambda: make((batch, num_tokens, heads, problem.head_dim), problem.dtype)
    cache = lambda: make((batch, problem.seq_len, problem.num_kv_heads, problem.head_dim), problem.cache_dtype)
    scale = lambda: make((batch, problem.num_kv_heads, problem.seq_len), accum) if problem.quantised else None
    bounds = lambda: make((batch, num_tokens), np.dtype("int32"))
    per_head = lambda: make((batch, num_tokens, heads), accum)
    queries = Queries(query(), bounds(), bounds(), per_head())
    return queries, Cache(cache(), cache(), scale(), scale()), *((per_head(), query(), per_head()) if per_token else ())


def operation(target, problem, direction="forward", **params):
    """One direction of the backend, jitted, and the shapes of its operands."""
    function = functools.partial(getattr(XlaBackend(), direction), problem, target, **params)
    return jax.jit(function), operands_of(problem, jax.ShapeDtypeStruct, per_token=direction == "backward")


# ---------------------------------------------------------------------------------------------------------------------------
# Both forms are right


@pytest.mark.parametrize(
    "case", [case for case in CHECKS if case.name in ("edges", "cap", "sinks-kv", "all")], ids=lambda c: c.name
)
def test_accelerator_form(case):
    assert_right(call("accelerator"), case.draw(poison=True))


def test_heads_of_any_width(form):
    """The backend that does what the kernels refuse has no largest head dimension."""
    case = Case("", 3, 37, 8, 2, 1024, lengths=("ranges", (0, 37), (5, 9), (4, 4)), num_tokens=2, value_dim=768)
    assert_right(call(form), case.draw(poison=True))


@optimised
@pytest.mark.parametrize("name", ["edges", "cap", "bfloat16", "float16", "tokens-padded", "int8", "e4m3", "all", "all-int8"])
def test_as_users_have_it(name):
    """With XLA's optimisations. The shared suite tests all cases without them."""
    (case,) = (case for case in CHECKS if case.name == name)
    assert_right(call("cpu"), case.draw(poison=True))


# Chunks of 8 rows in a cache of 37. Ranges begin and end next to, on and across the boundaries of chunks, and at the cache's end.
BOUNDARIES = ("ranges", (0, 8), (0, 9), (0, 7), (7, 8), (8, 16), (3, 19), (29, 37), (30, 37), (31, 37), (0, 37), (36, 37), (5, 5))


@pytest.mark.parametrize("rows", [1, 8, 36, 37, 1000])
def test_chunk_boundaries(form, rows):
    case = Case("boundaries", 12, 37, 4, 2, 16, lengths=BOUNDARIES, sinks=("query", 1))
    assert_right(call(form, block_size_keys=rows), case.draw(poison=True))


# Large chunks of 512 rows and small ones of 256 in a cache of 1100, with products in blocks of rows and without.
LARGE_AND_SMALL = (
    "ranges",
    (0, 511),
    (0, 512),
    (0, 513),
    (0, 640),
    (3, 644),
    (5, 1029),
    (587, 1100),
    (589, 1100),
    (1, 1100),
    (9, 9),
)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (4, 2), (40, 8)])
def test_large_and_small_chunks(form, heads, kv_heads):
    case = Case("large and small", 10, 1100, heads, kv_heads, 8, lengths=LARGE_AND_SMALL, sinks=("query", 1))
    assert_right(call(form, block_size_keys=512), case.draw(poison=True))


def test_one_row(form):
    assert_right(call(form), Case("one row", 2, 1, 4, 2, 8).draw())


@optimised
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_thousands_of_keys(form, dtype):
    assert_right(call(form), Case("long", 1, 5001, 4, 2, 64, dtype, softmax_scale=0.5).draw())


@pytest.mark.usefixtures("x64")
def test_float64(form):
    case = Case("float64", 3, 67, 6, 2, 24, "float64", ("ranges", (0, 67), (9, 40), (3, 3)), logits_soft_cap=3.0, sinks=("kv", 2))
    assert_right(call(form, block_size_keys=16), case.draw(poison=True))


@pytest.mark.parametrize("precision", list(jax.lax.Precision), ids=lambda precision: precision.name)
def test_matmul_precision(form, precision):
    """A CPU computes in full precision, whatever precision is allowed."""
    with jax.default_matmul_precision(precision.name.lower()):
        assert_right(call(form), Case("precision", 2, 67, 4, 2, 16).draw())


@pytest.mark.parametrize("name", ["tokens-padded", "tokens-window", "int8", "e4m3", "all-int8"])
def test_tokens_and_quantised_caches(form, name):
    """Chunks cut the tokens' ranges."""
    (case,) = (case for case in CHECKS if case.name == name)
    assert_right(call(form, block_size_keys=16), case.draw(poison=True))


@optimised
def test_repeatable(form):
    assert_repeatable(call(form, block_size_keys=16), Case("repeat", 4, 67, 4, 2, 32, lengths=("uniform", 1, 67)).draw())


@optimised
def test_batch_invariant():
    assert_batch_invariant(call("cpu"), Case("batch", 4, 900, 4, 2, 32, lengths=("uniform", 500, 900)).draw())


@optimised
def test_neighbours_change_no_bit(form):
    """The lengths of other sequences change no bit. On an accelerator a batch of another size may be another program."""
    arguments = Case("batch", 3, 900, 4, 2, 32, lengths=("ranges", (13, 700), (0, 900), (50, 60))).draw()
    others = arguments | {"sequence_end": np.array([700, 51, 600], np.int32)}
    others["value"] = np.concatenate([arguments["value"][:1], -3 * arguments["value"][1:]])
    results = [call(form, num_key_splits=3)(**a, return_lse=True) for a in (arguments, others)]
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x[0], y[0])
        assert not np.array_equal(x[1], y[1])


@optimised
def test_cache_size_changes_no_bit(form):
    """If no chunk is moved back from the cache's end, the rows beyond the range are never read."""
    arguments = Case("small", 3, 64, 4, 2, 16, lengths=("ranges", (0, 48), (5, 30), (17, 49))).draw()
    longer = {
        name: np.pad(arguments[name], ((0, 0), (0, 150), (0, 0), (0, 0)), constant_values=np.nan) for name in ("key", "value")
    }
    for x, y in zip(*(call(form, block_size_keys=16)(**a, return_lse=True) for a in (arguments, arguments | longer)), strict=True):
        np.testing.assert_array_equal(x, y)


# ---------------------------------------------------------------------------------------------------------------------------
# What is read, and what is written


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_widened_by_bits(dtype, wide, x64):
    """Every number of 8 bits, NaN and infinities included."""
    x = np.arange(256).astype(np.uint8).view(jnp.dtype(dtype))
    got = jax.jit(lambda x: _bits.widen(x, jnp.dtype(wide)))(x)
    assert got.dtype == wide
    np.testing.assert_array_equal(got, x.astype(wide))


HEADS = 4


def count(form, seq_len, start, end, rows=16):
    """The number of chunks done for each sequence, and the sum of the indices of the new rows in each. Both are the same for
    every head."""
    batch = len(start)
    rows_of_heads = np.outer(np.arange(seq_len), np.arange(1, HEADS + 1)).astype(np.float32)
    numbers = jnp.broadcast_to(rows_of_heads[None, ..., None], (batch, seq_len, HEADS, 1))
    problem = problem_of(batch, seq_len, HEADS, HEADS, 1, fwd_params=FwdParams(block_size_keys=rows))

    def step(arrays, state, chunk):
        return (state[0] + 1, state[1] + jnp.sum(jnp.where(chunk.new[0], chunk.k[:, :, 0], 0), axis=1)), []

    begin = lambda heads: (jnp.zeros_like(heads, jnp.int32), jnp.zeros_like(heads, jnp.float32))
    start, end, heads = (array(x, jnp.int32) for x in (start, end, np.zeros((batch, HEADS))))
    queries = Queries(heads, start[:, None], end[:, None], heads)
    (chunks, rows), _ = walk(problem, TARGETS[form], queries, Cache(numbers, numbers), begin, step, (heads,))
    np.testing.assert_array_equal(chunks, chunks[:, :1].repeat(HEADS, 1))
    np.testing.assert_array_equal(rows, rows[:, :1] * np.arange(1, HEADS + 1, dtype=np.float32)[None])
    return chunks[:, 0].tolist(), rows[:, 0].tolist()


RANGES = [0, 20, 90, 7, 50], [0, 52, 99, 99, 40]


@pytest.mark.parametrize("seq_len", [99, 1000])
def test_chunks_follow_the_live_tokens(seq_len):
    lengths = [max(0, end - start) for start, end in zip(*RANGES, strict=True)]
    want = [-(-length // 16) for length in lengths]
    assert count("cpu", seq_len, *RANGES)[0] == want
    assert count("accelerator", seq_len, *RANGES)[0] == [max(want)] * len(want)


@pytest.mark.parametrize("rows", [1, 16, 98, 99])
def test_every_row_is_new_once(form, rows):
    assert count(form, 99, *RANGES, rows)[1] == [sum(range(start, end)) for start, end in zip(*RANGES, strict=True)]


def test_what_a_large_chunk_would_leave_empty_is_done_in_small_ones():
    ranges = [0, 3, 70, 4000, 5], [512, 815, 1094, 4100, 5]
    want = [1, 1 + 2, 2, 1, 0]
    assert count("cpu", 4100, *ranges, 512)[0] == want
    assert count("accelerator", 4100, *ranges, 512)[0] == [2] * 5
    for form in TARGETS:
        assert count(form, 1100, [0, 3, 587], [512, 700, 1100], 512)[1] == [
            sum(range(start, end)) for start, end in ((0, 512), (3, 700), (587, 1100))
        ]


def drawn(problem, start, end, per_token=True):
    """Operands of random numbers."""
    rng = np.random.default_rng(0)
    queries, *rest = operands_of(problem, lambda shape, dtype: rng.standard_normal(shape).astype(dtype), per_token)
    return dataclasses.replace(queries, start=np.array(start, np.int32), end=np.array(end, np.int32)), *rest


def test_only_what_is_wanted(form):
    problem = problem_of(2, 40, 4, 2, 16)
    every, _ = operation(TARGETS[form], problem, "backward", wanted=Wanted())
    arguments = drawn(problem, [[0], [3]], [[17], [40]])
    d_query, d_key, d_value = every(*arguments)
    for wanted, want in ((Wanted(True, False), [d_query]), (Wanted(False, True), [d_key, d_value]), (Wanted(False, False), [])):
        got = operation(TARGETS[form], problem, "backward", wanted=wanted)[0](*arguments)
        assert len(got) == len(want)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------------
# Memory, by the compiler's figures

LARGE = problem_of(8, 32768, 32, 8, 128)


def temporary(target, dtype, direction, cache_dtype=None, **params):
    """Temporary bytes of the large problem, relative to the bytes of its cache."""
    dtypes = {"dtype": np.dtype(dtype), "cache_dtype": np.dtype(cache_dtype or dtype)}
    function, operands = operation(target, dataclasses.replace(LARGE, **dtypes), direction, **params)
    memory = planned(function.lower(*operands)).memory_analysis()
    key = operands[1].key
    return memory.temp_size_in_bytes / (2 * key.size * key.dtype.itemsize)


@optimised
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_memory_forward(dtype):
    assert temporary(TARGETS["cpu"], dtype, "forward") < 0.02


@optimised
@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_quantised_caches(dtype, cache_dtype):
    """Only one chunk is widened at a time."""
    assert temporary(TARGETS["cpu"], dtype, "forward", cache_dtype) < 0.02
    assert temporary(TARGETS["cpu"], dtype, "backward", cache_dtype, wanted=Wanted(True, False)) < 0.02


@optimised
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(True, False)], ids=["all", "query"])
def test_memory_backward(dtype, wanted):
    """Memory beyond the gradients themselves, which are results. See also `_bits`."""
    copied = 0.5 if dtype == "bfloat16" and _bits.NEEDED and wanted.key_value else 0
    assert temporary(TARGETS["cpu"], dtype, "backward", wanted=wanted) < 0.02 + copied


@optimised
def test_memory_of_the_accelerator_form():
    """By the compiler for CPUs, which widens and transposes more than the compiler for GPUs."""
    assert temporary(TARGETS["accelerator"], "float32", "forward") < 0.02
    # The compilers of JAX 0.11 and later keep a fourth array of the size of a chunk.
    bound = 0.03 if jax.__version_info__ < (0, 11) else 0.032
    assert temporary(TARGETS["accelerator"], "float32", "backward", wanted=Wanted()) < bound


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_program_does_not_grow_with_the_batch(form, direction):
    params = {"wanted": Wanted()} if direction == "backward" else {}
    sizes = []
    for batch in (2, 64):
        function, shapes = operation(TARGETS[form], problem_of(batch, 512, 4, 2, 16), direction, **params)
        sizes.append(function.lower(*shapes).as_text().count("\n"))
    assert sizes[0] == sizes[1]


def test_hints():
    """`block_size_keys` is the number of rows of a chunk. Hints without a meaning here stay as they came."""
    backend = XlaBackend()
    given = FwdParams(block_size_keys=7, num_warps=8, num_key_splits=3)
    problem = problem_of(2, 40, 4, 2, 16, fwd_params=given)
    for target in TARGETS.values():
        assert backend.fwd_params(problem, target) == given
        assert backend.fwd_params(LARGE, target).block_size_keys is not None


# ---------------------------------------------------------------------------------------------------------------------------
# Symbolic sizes

BOTH = problem_of(3, 50, 4, 2, 16, fwd_params=FwdParams(block_size_keys=16))
ACTUAL = (3, 2, 50), (3, 1, 7), (5, 2, 50)  # batch, tokens and rows: caches that are shorter and longer than a chunk


@functools.cache
def both_of(form):
    """Both directions, jitted."""

    @jax.jit
    def both(queries, cache):
        sized = Problem.of(queries, cache, Settings(softmax_scale=0.25, fwd_params=BOTH.fwd_params))
        out, lse = XlaBackend().forward(sized, TARGETS[form], queries, cache)
        return XlaBackend().backward(sized, TARGETS[form], queries, cache, lse, out, jnp.zeros_like(lse), wanted=Wanted())

    return both


def sized(sizes):
    return dataclasses.replace(BOTH, **dict(zip(("batch", "num_tokens", "seq_len"), sizes, strict=True)))


@pytest.mark.parametrize("sizes", ["b, t, s", "3, t, s", "b, 2, 50"])
def test_symbolic_sizes(form, sizes):
    """The call is exported once, and called with every size that the artifact is for."""
    symbolic = sized(jax.export.symbolic_shape(sizes))
    leaves, tree = jax.tree.flatten(operands_of(symbolic, jax.ShapeDtypeStruct, per_token=False))
    flat = jax.jit(lambda *leaves: both_of(form)(*tree.unflatten(leaves)))
    exported = jax.export.export(flat, platforms=("cpu",))(*leaves)
    for actual in ACTUAL:
        if any(isinstance(size, int) and size != here for size, here in zip(symbolic.sizes, actual, strict=True)):
            continue
        batch, num_tokens, seq_len = actual
        ends = np.broadcast_to(seq_len - 1 + np.arange(num_tokens), (batch, num_tokens))
        arguments = drawn(sized(actual), np.zeros_like(ends), ends, per_token=False)
        for x, y in zip(exported.call(*jax.tree.leaves(arguments)), both_of(form)(*arguments), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
