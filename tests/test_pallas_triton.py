"""What only the Pallas-Triton backend has: its tiles, its lowering for cuda on any machine, its hints and its refusals. The
shared suite tests its results, in the interpreter here and compiled where there is a GPU."""

import dataclasses
import functools
import importlib.util
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import array, assert_close, assert_right, combinations, HAS_MOSAIC_GPU, pallas_triton

import ejk_ragged_pallas_triton
from ejk_ragged import Cache, explain, FwdParams, Problem, Queries, ragged_decode_attention, Target
from ejk_ragged._problem import Settings
from ejk_ragged._registry import registry
from ejk_ragged.testing import Case
from ejk_ragged_pallas_triton import PallasTritonBackend
from ejk_ragged_pallas_triton._parts import Part
from ejk_ragged_pallas_triton._tuning import backward_tiles, forward_tiles, parts_of, resolve, shared_bytes, tile_keys


CUSTOM_CALL = "__gpu$xla.gpu.triton"


SIZES = {"batch": 4, "num_tokens": 1, "seq_len": 1000, "num_q_heads": 28, "num_kv_heads": 4, "head_dim": 128}


def problem(dtype="bfloat16", cache_dtype=None, **changes):
    dtypes = {"dtype": np.dtype(dtype), "cache_dtype": np.dtype(cache_dtype or dtype)}
    given: dict[str, Any] = SIZES | dtypes | {"softmax_scale": 1.0} | changes
    return Problem(**given)


def arrays(dtype="bfloat16", head_dim=128, group=7, tokens=()):
    shape = jax.ShapeDtypeStruct
    cache = shape((4, 1000, 4, head_dim), dtype)
    return shape((4, *tokens, 4 * group, head_dim), dtype), cache, cache, shape((4,), "int32"), shape((4,), "int32")


# ---------------------------------------------------------------------------------------------------------------------------
# Tiles, stretches, blocks


@pytest.mark.parametrize(
    ("batch", "kv_heads", "splits", "workers", "deal"),
    [(8, 8, None, 16, 2), (8, 4, None, 32, 4), (1, 8, None, 16, 4), (32, 8, None, 16, 1), (64, 1, None, 132, 2), (1, 8, 6, 6, 1)],
)
def test_few_sequences_share_stretches(batch, kv_heads, splits, workers, deal):
    """The device has 132 multiprocessors. With splits given no stretch is shared, because results must not depend on the batch."""
    hints = FwdParams(num_key_splits=splits)
    one = problem(batch=batch, num_q_heads=4 * kv_heads, num_kv_heads=kv_heads, fwd_params=hints)
    target = Target("cuda", None)
    schedule = forward_tiles(dataclasses.replace(one, fwd_params=resolve(one, target)), target).schedule
    assert (schedule.workers, schedule.deal) == (workers, deal)


@pytest.mark.pallas_triton
def test_a_last_round_of_which_some_have_no_keys():
    """Four programs share a stretch. Its second round is the sixth of the sequence, and ends within the first program's tile."""
    case = Case("", 1, 1320, 8, 8, 64, lengths=("ranges", (3, 3 + 5 * 4 * 64 + 30)))
    assert_right(functools.partial(ragged_decode_attention, backend=pallas_triton()), case.draw(poison=True))


@pytest.mark.pallas_triton
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_rows_beyond_one_block(cache_dtype):
    """Tokens and heads are two blocks. d_query has a kernel of its own, and one range ends within the first tokens."""
    ranges = ("ranges", (0, 90), (3, 17))
    case = Case("", 2, 90, 14, 2, 16, lengths=ranges, num_tokens=12, cache_dtype=cache_dtype, scales=cache_dtype and "row")
    assert_right(functools.partial(ragged_decode_attention, backend=pallas_triton()), case.draw(poison=True))


@pytest.mark.pallas_triton
@pytest.mark.parametrize("cache_dtype", [None, "float8_e4m3fn"])
def test_rows_between_the_tokens_ranges(cache_dtype):
    """Mapped lengths on a shared cache become tokens with ranges of their own. The rows between the ranges may be NaN, and their
    scales too."""
    case = Case("", 1, 80, 4, 2, 16, cache_dtype=cache_dtype, scales=cache_dtype and "row")
    arguments = case.draw()
    seen = np.zeros(80, bool)
    start, end = np.array([[2], [60]], np.int32), np.array([[7], [80]], np.int32)
    for low, high in zip(start[:, 0], end[:, 0], strict=True):
        seen[low:high] = True
    for name, x in arguments.items():
        if name in ("key", "value"):
            x[:, ~seen] = np.nan
        elif name.endswith("scale"):
            x[:, :, ~seen] = np.nan
    call = functools.partial(ragged_decode_attention, backend=pallas_triton())
    query = arguments.pop("query")
    arrays: dict[str, Any] = {name: array(x) for name, x in arguments.items()}
    function = lambda query, start, end: call(query, **arrays, sequence_start=start, sequence_end=end)
    mapped = jax.vmap(jax.value_and_grad(lambda *args: jnp.sum(function(*args))), (None, 0, 0))(query, start, end)
    for i in range(2):
        want = jax.value_and_grad(lambda query, i=i: jnp.sum(function(query, start[i], end[i])))(query)
        assert_close(jax.tree.map(lambda x, i=i: x[i], mapped), want)


IN_ROWS = Case("", 2, 64, 4, 2, 40, "float32", ("ranges", (3, 60), (0, 20)), softmax_scale=0.2)


@pytest.mark.pallas_triton
@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        ((0, 32), {"row_dim": 64}),  # a part of the key
        ((3, 36), {"dtype": "float16"}),  # inside the key, with padding on all sides
        ((17, 47), {"dtype": "bfloat16", "row_dim": 50, "logits_soft_cap": 3.0, "sinks": ("query", 2)}),  # beyond the key
        ((43, 60), {"row_dim": 60, "num_tokens": 3, "sliding_window": (9, 0)}),  # apart from the key
        ((5, 40), {"num_tokens": 30}),  # as many query rows as a block has
        ((0, 512), {"head_dim": 576, "dtype": "bfloat16", "num_kv_heads": 1}),
    ],
    ids=str,
)
def test_gradients_of_rows_that_are_key_and_value(columns, facts):
    """A column that neither uses may hold NaN, and has a gradient of 0."""
    arguments = dataclasses.replace(IN_ROWS, value_columns=columns, **facts).draw(poison=True)
    key, head_dim = arguments["key"], arguments["query"].shape[-1]
    key[..., [i for i in range(head_dim, key.shape[-1]) if not columns[0] <= i < columns[1]]] = np.nan
    assert_right(functools.partial(ragged_decode_attention, backend=pallas_triton()), arguments)


# ---------------------------------------------------------------------------------------------------------------------------
# Lowering


def lowered(function, args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


FEATURES = {
    "plain": {},
    "window": {"sliding_window": (100, 0)},
    "cap": {"logits_soft_cap": 30.0},
    "sinks": {"softmax_aux": np.zeros((28, 2), np.float32)},
    "splits": {"fwd_params": FwdParams(num_key_splits=4)},
    "hints": {"fwd_params": FwdParams(block_size_heads=8, block_size_keys=32, num_warps=8, num_stages=2)},
}


@pytest.mark.parametrize(("dtype", "feature"), combinations(["float32", "bfloat16", "float16"], [*FEATURES]))
def test_lowers_for_cuda_anywhere(dtype, feature):
    """The backend is chosen for cuda. There are two kernels forward and two more backward, and the user sees no warning of
    JAX's."""

    def loss(query, key, value, start, end):
        out = ragged_decode_attention(query, key, value, start, end, **FEATURES[feature])
        return out.astype(jnp.float32).sum()

    assert lowered(loss, arrays(dtype)).count(CUSTOM_CALL) == 2
    assert lowered(jax.grad(loss, (0, 1, 2)), arrays(dtype)).count(CUSTOM_CALL) == 4


def test_nothing_is_made_around_the_kernels():
    """A short call would wait for any other kernel. So the kernels clip lengths, arguments that the caller left out are not
    filled in, and one sink per head is used as it is, as a logit."""

    def call(query, key, value, end, sinks=None):
        return ragged_decode_attention(query, key, value, None, end, softmax_aux=sinks)

    for sinks in ([], [jax.ShapeDtypeStruct((28, 1), "float32")]):
        compiled = lowered(call, [*arrays()[:4], *sinks])
        entry = [line for line in compiled.splitlines() if CUSTOM_CALL in line]
        assert len(entry) == 2
        assert not any(f"stablehlo.{name}" in compiled for name in ("clamp", "exponential", "select"))
        split, combine = (line.split("(", 1)[1].split(")", 1)[0].split(",") for line in entry)
        # query, key, value, end; and partial results, their lse, their places
        assert (len(split), len(combine)) == (4, 3 + len(sinks))


@pytest.mark.parametrize(("shape", "held"), [((), "1x1x1"), ((4,), "1x4x1"), ((4, 4), "4x4x1"), ((4, 4, 1000), "4x4x1000")])
def test_scales_are_given_to_the_kernels_as_they_are(shape, held):
    """Spreading a number over the heads would need one more kernel for keys, and one for values."""
    query, key, value, *_ = arrays()
    key, value = (jax.ShapeDtypeStruct(x.shape, "int8") for x in (key, value))
    scale = jax.ShapeDtypeStruct(shape, "float32")
    call = lambda query, key, value, *scales: ragged_decode_attention(query, key, value, key_scale=scales[0], value_scale=scales[1])
    split, _ = (line for line in lowered(call, (query, key, value, scale, scale)).splitlines() if CUSTOM_CALL in line)
    operands = split.rsplit(":", 1)[1].split("->")[0]
    assert operands.count(f"tensor<{held}xf32>") == 2
    assert operands.count("tensor<") == 5


@pytest.mark.parametrize(("head_dim", "group"), combinations([8, 80, 112, 256], [1, 5, 16, 64]))
def test_lowers_for_cuda_in_any_shape(head_dim, group):
    assert lowered(ragged_decode_attention, arrays(head_dim=head_dim, group=group)).count(CUSTOM_CALL) == 2


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), combinations(["float32", "bfloat16", "float16"], ["int8", "float8_e4m3fn", "float8_e5m2"])
)
def test_lowers_with_quantised_caches(dtype, cache_dtype):
    """With several tokens and a scale per row: two kernels forward, and two more for d_query."""
    query, key, value, *lengths = arrays(dtype, tokens=(3,))
    key, value = (jax.ShapeDtypeStruct(x.shape, cache_dtype) for x in (key, value))
    scales = [jax.ShapeDtypeStruct((4, 4, 1000), "float32")] * 2

    def loss(query, key, value, start, end, key_scale, value_scale):
        out = ragged_decode_attention(query, key, value, start, end, key_scale=key_scale, value_scale=value_scale)
        return out.astype(jnp.float32).sum()

    arguments = (query, key, value, *lengths, *scales)
    assert lowered(loss, arguments).count(CUSTOM_CALL) == 2
    text = lowered(jax.grad(loss), arguments)
    assert text.count(CUSTOM_CALL) == 4
    assert not re.search(r"tensor<4x1000x4x128x(f32|bf16|f16)>", text)  # only the kernels widen the cache


def test_gradients_of_rows_beyond_one_block_are_done_apart():
    """d_query needs its sums in registers. d_key and d_value need all query rows of a tile. So there are two kernels."""
    loss = lambda *args: ragged_decode_attention(*args).astype(jnp.float32).sum()
    for tokens, kernels in (((9,), 4), ((10,), 5)):  # 63 and 70 rows
        assert lowered(jax.grad(loss, (0, 1, 2)), arrays(tokens=tokens)).count(CUSTOM_CALL) == kernels


def test_lowers_with_64_bit_types(x64):
    assert (
        lowered(jax.grad(lambda *args: ragged_decode_attention(*args).astype(jnp.float32).sum()), arrays()).count(CUSTOM_CALL) == 4
    )


def test_unwanted_gradients_are_not_computed():
    """Without d_key and d_value nothing of the cache's size is written. The sinks' gradient needs no kernel."""
    query, *rest = arrays()
    cache = "tensor<4x1000x4x128xbf16>"
    loss = lambda *args, **more: ragged_decode_attention(*args, **more).astype(jnp.float32).sum()
    text = lowered(jax.grad(loss), (query, *rest))
    assert not [line for line in text.splitlines() if CUSTOM_CALL in line and cache in line.split("->")[-1]]
    sinks = jax.ShapeDtypeStruct((28, 1), jnp.float32)
    text = lowered(jax.grad(lambda sinks, *args: loss(*args, softmax_aux=sinks)), (sinks, query, *rest))
    assert text.count(CUSTOM_CALL) == 2  # the kernels of the forward operation


def test_one_artifact_for_cpu_and_cuda():
    shapes = arrays("float32", 16)
    safe = [jax.export.DisabledSafetyCheck.custom_call(CUSTOM_CALL)]
    exported = jax.export.export(jax.jit(ragged_decode_attention), platforms=("cpu", "cuda"), disabled_checks=safe)(*shapes)
    assert CUSTOM_CALL in exported.mlir_module()
    keys = jax.random.split(jax.random.key(0), 3)
    args: list[Any] = [jax.random.normal(key, shape.shape, shape.dtype) for key, shape in zip(keys, shapes, strict=False)]
    args += [jnp.array([0, 5, 900, 20]), jnp.array([1000, 6, 950, 10])]
    artifact = jax.export.deserialize(exported.serialize())
    if jax.default_backend() in ("cpu", "gpu"):
        np.testing.assert_allclose(artifact.call(*args), ragged_decode_attention(*args), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------------
# Hints and refusals


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (FwdParams(block_size_heads=12), "FwdParams.block_size_heads must be a power of two"),
        (FwdParams(block_size_keys=8), "FwdParams.block_size_keys must be a power of two and at least 16"),
        (FwdParams(num_warps=6), "FwdParams.num_warps must be a power of two"),
        (FwdParams(num_warps=64), "FwdParams.num_warps must be at most 32"),
        (FwdParams(num_stages=9), "num_stages 9 need .* bytes of shared memory"),
    ],
)
def test_hints_that_cannot_work(hints, message):
    with pytest.raises(ValueError, match=message):
        PallasTritonBackend().fwd_params(problem(fwd_params=hints), Target("cuda"))


# Bytes of shared memory of the split kernels on an H100, as the compiler of JAX 0.11.2 reported them.
TAKEN = [
    ("float32", 8, 64, 3, 0, 280576),
    ("bfloat16", 64, 4, 3, 73728, 86528),
    ("bfloat16", 64, 64, 3, 139264, 165888),
    ("bfloat16", 128, 4, 2, 45056, 51456),
    ("bfloat16", 128, 4, 3, 81920, 92672),
    ("bfloat16", 128, 32, 3, 90112, 111616),
    ("bfloat16", 128, 64, 2, 131072, 164864),
    ("bfloat16", 256, 4, 3, 98304, 115200),
    ("bfloat16", 256, 32, 3, 114688, 148480),
    ("bfloat16", 256, 64, 2, 196608, 197632),
    ("float32", 64, 64, 2, 65536, 115712),
    ("float32", 128, 4, 3, 90112, 111104),
    ("float32", 256, 4, 3, 102400, 137728),
    ("float32", 256, 32, 2, 69632, 107008),
]


@pytest.mark.parametrize(("dtype", "head_dim", "group", "stages", "forward", "backward"), TAKEN)
def test_estimates_of_shared_memory_cover_what_is_taken(dtype, head_dim, group, stages, forward, backward):
    one = problem(dtype, head_dim=head_dim, num_q_heads=group, num_kv_heads=1)
    shape = (one, tile_keys(one), group, stages)
    assert shared_bytes(*shape, backward=False) >= forward
    assert shared_bytes(*shape, backward=True) >= backward


@pytest.mark.parametrize(
    ("facts", "group", "shape", "taken"),
    [
        ({"head_dim": 512}, 16, (16, 16, 3), 164352),
        ({"head_dim": 576, "value_dim": 512}, 16, (16, 16, 3), 172544),
        ({"head_dim": 576, "value_dim": 512, "value_columns": (0, 512)}, 16, (16, 16, 3), 139776),
        ({"head_dim": 576, "value_dim": 512, "value_columns": (0, 512)}, 64, (16, 32, 2), 166656),
        ({"head_dim": 512}, 16, (32, 16, 3), 229888),
        ({"head_dim": 576, "value_dim": 512}, 16, (32, 16, 2), 137472),
        ({"head_dim": 576, "value_dim": 512, "value_columns": (0, 512)}, 16, (32, 16, 3), 176640),
        ({"head_dim": 576, "value_dim": 512, "value_columns": (0, 512)}, 32, (32, 32, 2), 139776),
        ({"head_dim": 576, "value_dim": 512, "value_columns": (0, 512)}, 64, (16, 32, 3), 325120),
        ({"head_dim": 320}, 64, (32, 32, 3), 251392),
        ({"head_dim": 192, "value_dim": 128, "value_columns": (0, 128)}, 80, (64, 64, 2), 230912),
    ],
    ids=str,
)
def test_estimates_of_gradients(facts, group, shape, taken):
    """A wide part needs shared memory to change its layout. Two blocks of query rows are both loaded with a tile of keys."""
    one = problem(num_q_heads=group, num_kv_heads=1, **facts)
    assert taken <= shared_bytes(one, *shape, backward=True) <= 1.15 * taken
    tiles = backward_tiles(one, Target("cuda"))
    # Tiles of 16 keys are those of GPUs with less shared memory.
    chosen = taken <= 227 * 1024 and shape[0] >= 32
    assert ((tiles.schedule.block_keys, tiles.block_rows, tiles.num_stages) == shape) == chosen


@pytest.mark.parametrize(
    ("changes", "capability", "expected"),
    [
        ({}, "9.0", (32, 8)),
        ({}, "8.6", (16, 4)),  # two stages of 32 keys do not fit
        ({"dtype": "float32"}, "9.0", (16, 4)),
        ({"value_dim": 128, "value_columns": None}, "9.0", (32, 4)),  # which has 32 keys by itself
    ],
)
def test_gradients_of_rows_with_many_columns(changes, capability, expected):
    """Four warps with tiles of 16 keys were slower, as the log says."""
    latent = {"head_dim": 576, "value_dim": 512, "value_columns": (0, 512), "num_q_heads": 16, "num_kv_heads": 1}
    target = Target("cuda", types.SimpleNamespace(compute_capability=capability, core_count=132))
    tiles = backward_tiles(problem(**latent | changes), target)
    assert (tiles.schedule.block_keys, tiles.num_warps) == expected


def test_a_value_across_parts_of_the_key_is_loaded_apart():
    """With three stages the forward kernel asked for 348160 bytes of shared memory."""
    one = problem(num_pages=300, page_size=64, num_q_heads=16, num_kv_heads=1, head_dim=576, value_dim=512, value_columns=(0, 512))
    stages = [resolve(dataclasses.replace(one, value_columns=x), Target("cuda")).num_stages for x in ((0, 512), (64, 576))]
    assert stages == [3, 2]


def test_gradients_that_shared_memory_does_not_hold():
    """Another backend does them. The compiler takes as many bytes as the message says."""
    one = problem("float32", head_dim=512)
    small, large = (Target("cuda", types.SimpleNamespace(compute_capability=x, core_count=84)) for x in ("8.6", "9.0"))
    assert "gradients need about 131072 bytes" in str(PallasTritonBackend().supports_backward(one, small))
    assert PallasTritonBackend().supports_backward(one, large) is None


def test_gradients_that_xla_is_faster_at():
    """A row that is key and value, more query rows than one block has, and a cache that has a gradient."""
    latent = {"head_dim": 576, "value_dim": 512, "num_kv_heads": 1}
    in_rows = latent | {"value_columns": (0, 512)}
    pages = {"num_pages": 300, "page_size": 64}
    calls = [
        in_rows | {"num_q_heads": 32},
        in_rows | {"num_q_heads": 33},
        in_rows | {"num_q_heads": 33} | pages,
        latent | {"num_q_heads": 33},
    ]
    reasons = [PallasTritonBackend().supports_backward(problem(**x), Target("cuda")) for x in calls]
    assert [reason is None for reason in reasons] == [True, False, True, True]
    assert "for more than 32 query rows" in str(reasons[1])


@pytest.mark.parametrize(
    ("capability", "head_dim", "group", "stages"),
    [("9.0", 128, 4, (3, 3)), ("9.0", 256, 2, (3, 3)), ("9.0", 256, 64, (2, 1)), ("8.6", 128, 4, (3, 3)), ("8.6", 256, 64, (1, 1))],
)
def test_as_many_stages_as_fit(capability, head_dim, group, stages):
    """Forward and backward. One stage waits for every tile. So a device with little shared memory still has more stages where
    they fit."""
    target = Target("cuda", types.SimpleNamespace(compute_capability=capability, core_count=84))
    shape = problem(head_dim=head_dim, num_q_heads=group, num_kv_heads=1)
    shape = dataclasses.replace(shape, fwd_params=resolve(shape, target))
    assert (forward_tiles(shape, target).num_stages, backward_tiles(shape, target).num_stages) == stages


def test_small_heads_of_large_groups_have_smaller_tiles():
    """With 256 keys for 64 query heads the backward kernel would need more shared memory than there is."""
    one = problem("float32", head_dim=8, num_q_heads=64, num_kv_heads=1)
    tiles = backward_tiles(one, Target("cuda"))
    assert (tiles.schedule.block_keys, tiles.num_stages) == (64, 3)


def test_the_device_says_what_memory_it_has():
    shape = problem(head_dim=256, num_q_heads=64, num_kv_heads=1)
    device = types.SimpleNamespace(compute_capability="8.6", core_count=84, shared_memory_per_block_optin=227 * 1024)
    assert resolve(shape, Target("cuda", device)).num_stages == 2


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, 2),
        ({"num_tokens": 8}, 2),  # 32 query rows
        ({"num_tokens": 9}, 1),  # a block of 64
        ({"head_dim": 256}, 2),
        ({"head_dim": 64}, 1),
        ({"cache_dtype": "int8"}, 1),
        ({"fwd_params": FwdParams(num_key_splits=7)}, 1),
        ({"num_pages": 300, "page_size": 16}, 1),  # large everywhere
        ({"head_dim": 192}, 2),  # 72 KB at most
        ({"head_dim": 160}, 1),
        ({"head_dim": 576, "value_dim": 512, "row_dim": 576, "value_columns": (0, 512)}, 2),
    ],
    ids=str,
)
def test_tiles_are_larger_where_the_memory_is_fast(changes, times):
    usual, fast = (types.SimpleNamespace(compute_capability="9.0", device_kind=name) for name in ("NVIDIA H100", "NVIDIA H200"))
    shape = problem(**{"num_q_heads": 8, "num_kv_heads": 2} | changes)
    keys = [resolve(shape, Target("cuda", device)).block_size_keys for device in (usual, fast)]
    assert keys[1] == times * keys[0]
    assert backward_tiles(shape, Target("cuda", usual)) == backward_tiles(shape, Target("cuda", fast))


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, 128),
        ({"num_tokens": 8}, 128),  # 32 query rows
        ({"num_tokens": 9}, 64),  # a block of 64
        ({"head_dim": 160}, 128),
        ({"head_dim": 80, "batch": 64, "num_q_heads": 8, "num_kv_heads": 8}, 64),  # four kv heads are one of 320 dimensions
        ({"fwd_params": FwdParams(num_key_splits=7)}, 64),
    ],
    ids=str,
)
def test_tiles_of_pages_are_larger(changes, keys):
    pool = {"num_q_heads": 8, "num_kv_heads": 2, "num_pages": 300, "page_size": 16, "seq_len": 1008}
    device = types.SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H100")
    assert resolve(problem(**pool | changes), Target("cuda", device)).block_size_keys == keys


@pytest.mark.parametrize("tiles", [forward_tiles, backward_tiles])
def test_with_splits_nothing_but_the_schedule_knows_the_batch(tiles):
    """The merging of pieces does not know the batch either, because another shape of the merging is another order of sums."""

    def shape(batch):
        given = problem(batch=batch, fwd_params=FwdParams(num_key_splits=7))
        hints = PallasTritonBackend().fwd_params(given, Target("cuda"))
        found = tiles(dataclasses.replace(given, fwd_params=hints), Target("cuda"))
        return dataclasses.replace(found, schedule=dataclasses.replace(found.schedule, batch=0))

    assert shape(1) == shape(64) == shape(4096)


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({"dtype": "float64"}, None, "no float64"),
        ({"head_dim": 648}, None, "a head_dim of up to 640 and a value's of up to 512, not 648 and 648"),
        ({}, types.SimpleNamespace(compute_capability="7.5"), "compute capability 8.0 or newer, not 7.5"),
        ({"batch": jax.export.symbolic_shape("b")[0]}, None, "not symbolic"),
        ({"num_tokens": jax.export.symbolic_shape("t")[0]}, None, "not symbolic"),
        (
            {"cache_dtype": "float8_e4m3fn"},
            types.SimpleNamespace(compute_capability="8.6"),
            "8.9 or newer for float8_e4m3fn, not 8.6",
        ),
        # JAX decides by the number of bytes, where the number of elements matters.
        ({"cache_dtype": "int8", "batch": 5, "seq_len": 2**20}, None, "with 32 bits"),
    ],
)
def test_says_what_it_cannot_do(changes, device, reason):
    assert reason in str(PallasTritonBackend().supports(problem(**changes), Target("cuda", device)))
    assert PallasTritonBackend().supports(problem(), Target("cuda")) is None


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [2**20, 2**21, 2**22])
def test_addresses_have_room(cache_dtype, rows):
    """The cache has 2**30, 2**31 and 2**32 times 1.25 elements. Offsets beyond 31 bits are refused or have 64 bits."""
    large = problem(batch=5, seq_len=rows // 4, num_kv_heads=8, head_dim=128, cache_dtype=cache_dtype, dtype="bfloat16")
    reason = PallasTritonBackend().supports(large, Target("cuda"))
    elements = large.batch * large.seq_len * large.num_kv_heads * large.head_dim
    wide = elements * large.cache_dtype.itemsize > 2**32  # JAX then takes 64 bits
    assert (reason is None) == (wide or elements <= 2**31)


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [("bfloat16", None), ("float32", None), ("bfloat16", "int8"), ("float32", "int8")]
)
@pytest.mark.parametrize("capability", ["9.0", "8.0", "8.6"])
def test_defaults_fit(capability, dtype, cache_dtype, head_dim):
    """For any number of query rows, forward and backward, by the estimate. A call that is not refused must compile."""
    target = Target("cuda", types.SimpleNamespace(compute_capability=capability, core_count=84))
    room = {"9.0": 227, "8.0": 163, "8.6": 99}[capability] * 1024
    for rows in (1, 17, 33, 64, 200):
        one = problem(dtype, cache_dtype, head_dim=head_dim, num_tokens=rows, num_q_heads=4)
        one = dataclasses.replace(one, fwd_params=resolve(one, target))
        for backward, tiles in ((False, forward_tiles(one, target)), (True, backward_tiles(one, target))):
            needs = shared_bytes(one, tiles.schedule.block_keys, tiles.block_rows, tiles.num_stages, backward=backward)
            assert needs <= room


def test_two_programs_a_multiprocessor_for_quantised_caches():
    """There are two programs as long as both fit."""
    target = Target("cuda")

    def workers(**changes):
        one = problem(batch=64, seq_len=16384, num_q_heads=8, num_kv_heads=2, **changes)
        return forward_tiles(dataclasses.replace(one, fwd_params=resolve(one, target)), target).schedule.workers

    assert workers() == 66
    assert workers(cache_dtype="int8") == 132
    assert workers(cache_dtype="int8", fwd_params=FwdParams(block_size_keys=256, num_warps=8)) == 66


def test_tiles_of_quantised_caches():
    """Tiles have fewer keys if there are more query rows or few tiles. float8 tiles have no more keys than dimensions. With
    splits given the batch has no influence."""
    target = Target("cuda")
    one = functools.partial(problem, cache_dtype="int8", num_q_heads=32, num_kv_heads=8)
    keys = lambda **changes: resolve(one(**changes), target).block_size_keys
    assert keys(batch=64, seq_len=16384) == 128
    assert keys(batch=64, seq_len=16384, num_tokens=8) == 64
    assert keys(batch=16, seq_len=1024) == 64
    assert keys(batch=1, seq_len=4096) == 32
    assert keys(batch=64, seq_len=8192, head_dim=64) == 128
    assert keys(batch=64, seq_len=8192, head_dim=64, most_keys=256) == 64
    float8 = functools.partial(keys, batch=64, seq_len=8192, cache_dtype="float8_e4m3fn")
    assert [float8(head_dim=head_dim) for head_dim in (32, 64, 128, 256)] == [64, 64, 128, 64]
    splits = FwdParams(num_key_splits=4)
    assert keys(batch=1, seq_len=4096, fwd_params=splits) == keys(batch=64, seq_len=4096, fwd_params=splits)


@pytest.mark.parametrize(("head_dim", "facts"), [(576, {"value_columns": (0, 512)}), (512, {}), (320, {})])
def test_tiles_of_wide_quantised_caches(head_dim, facts):
    """With the tiles of narrow heads, a program has no room in its registers: int8 took 7034 us in place of 277. The output of a
    gradient needs shared memory for the values as well: 235008 bytes were asked for with three stages of 512 dimensions."""
    target = Target("cuda")
    one = problem(cache_dtype="int8", head_dim=head_dim, value_dim=512, num_q_heads=64, num_kv_heads=1, **facts)
    hints = resolve(one, target)
    assert (hints.block_size_heads, hints.block_size_keys, hints.num_warps, hints.num_stages) == (16, 64, 8, 3)
    kept = resolve(dataclasses.replace(one, keeps_accum_dtype=True), target)
    assert kept.num_stages == (2 if head_dim == 512 else 3)


def test_rows_that_are_key_and_value_are_widened_once():
    """Registers have no room for two widened tiles."""
    shape: Any = jax.ShapeDtypeStruct
    queries = Queries(shape((2, 1, 16, 576), "bfloat16"))
    cache = Cache(shape((2, 128, 1, 576), "int8"), None, shape((2, 1, 128), "float32"), shape((2, 1, 128), "float32"))
    one = Problem.of(queries, cache, Settings(softmax_scale=0.1, value_columns=(0, 512)))
    target = Target("cuda")
    forward = functools.partial(PallasTritonBackend().forward, dataclasses.replace(one, fwd_params=resolve(one, target)), target)
    kernels = str(jax.make_jaxpr(forward)(queries, cache))
    assert re.findall(r":(\w+)\[64,512\] = convert_element_type", kernels) == ["bf16"]


def test_a_jax_without_triton(monkeypatch):
    """If JAX drops Triton, this backend says so, and the other backends work."""
    find_spec = importlib.util.find_spec
    gone = lambda name, *args: None if name == "jax.experimental.pallas.triton" else find_spec(name, *args)
    monkeypatch.setattr(ejk_ragged_pallas_triton.importlib.util, "find_spec", gone)
    info = {info.name: info for info in registry.backends()}
    assert "no jax.experimental.pallas.triton" in str(info["pallas_triton"].broken)
    assert info["xla"].broken is None
    assert explain(*arrays())["cuda"].forward == ("mosaic_gpu" if HAS_MOSAIC_GPU else "xla")


def test_instances_are_values():
    """Calls with equal instances share what JAX compiled."""
    assert PallasTritonBackend(interpret=True) == PallasTritonBackend(interpret=True)
    assert hash(dataclasses.replace(PallasTritonBackend())) == hash(PallasTritonBackend())


def pages(page_size, held, dtype="bfloat16", tokens=(), row_dim=128):
    """A query, a pool of pages, a page table, lengths, and one scale per row if the pool is quantised."""
    shape = jax.ShapeDtypeStruct
    pool = shape((300, page_size, 4, row_dim), held)
    scale = [] if held == dtype else [shape((300, 4, page_size), "float32")] * 2
    return shape((4, *tokens, 28, 128), dtype), pool, shape((4, 70), "int32"), shape((4,), "int32"), shape((4,), "int32"), *scale


@pytest.mark.parametrize(("page_size", "held", "splits"), combinations([1, 16, 24, 64, 256], ["bfloat16", "int8"], [None, 3]))
def test_lowers_with_pages(page_size, held, splits):
    """Every kind of look-up, with starts, several tokens and one scale per row: two kernels forward, and two more for d_query."""

    def loss(query, pool, table, start, end, *scales):
        scale = dict(zip(("key_scale", "value_scale"), scales, strict=False))
        hints = FwdParams(num_key_splits=splits)
        out = ragged_decode_attention(query, pool, pool, start, end, page_table=table, fwd_params=hints, **scale)
        return jnp.sum(out.astype(jnp.float32))

    operands = pages(page_size, held, tokens=(2,))
    assert lowered(loss, operands).count(CUSTOM_CALL) == 2
    assert lowered(jax.grad(loss), operands).count(CUSTOM_CALL) == 4


@pytest.mark.parametrize(("columns", "row_dim"), [((0, 96), 128), ((128, 256), 256), ((40, 128), 192)])
def test_lowers_with_the_value_in_the_keys_rows(columns, row_dim):
    """The value is a part of the key, next to the key, or across parts of the key: in pages, with d_query, and in a padded cache,
    with the gradient of the rows, too."""

    def loss(query, cache, start, end, table=None):
        settings = {"softmax_scale": 0.1, "value_columns": columns, "page_table": table}
        return jnp.sum(ragged_decode_attention(query, cache, None, start, end, **settings).astype(jnp.float32))

    query, pool, table, *lengths = pages(64, "bfloat16", row_dim=row_dim)
    in_pages, padded = (query, pool, *lengths, table), (query, jax.ShapeDtypeStruct((4, 1000, 4, row_dim), "bfloat16"), *lengths)
    assert lowered(loss, in_pages).count(CUSTOM_CALL) == 2
    assert lowered(jax.grad(loss), in_pages).count(CUSTOM_CALL) == 4
    assert lowered(jax.grad(loss, (0, 1)), padded).count(CUSTOM_CALL) == 4


@pytest.mark.parametrize(
    ("head_dim", "columns", "row_dim", "parts"),
    [
        (576, (0, 512), 576, [[(0, 512, 512), (512, 64, 576)], [(0, 512, 512)], []]),
        (64, (64, 128), 128, [[(0, 64, 64)], [(0, 64, 64)], []]),
        (40, (3, 36), 40, [[(0, 16, 3), (3, 64, 36), (36, 16, 40)], [(0, 64, 33)], []]),
        (40, (17, 50), 60, [[(0, 32, 17), (17, 32, 40)], [(0, 32, 23), (23, 16, 33)], [(50, 16, 60)]]),
    ],
)
def test_parts_of_a_row_that_is_key_and_value(head_dim, columns, row_dim, parts):
    """No part is in the key or in the value by half, and no padding is in another part's gradient."""
    value_dim = columns[1] - columns[0]
    one = problem(head_dim=head_dim, value_dim=value_dim, row_dim=row_dim, value_columns=columns)
    assert [[dataclasses.astuple(part) for part in held] for held in parts_of(one, backward=True)] == parts


@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (576, 512), (96, 8), (80, 200)])
def test_lowers_with_values_of_another_width(head_dim, value_dim):
    """Forward and all gradients."""
    shape = jax.ShapeDtypeStruct
    operands = [shape((4, 28, head_dim), "bfloat16"), *(shape((4, 1000, 4, dim), "bfloat16") for dim in (head_dim, value_dim))]
    loss = lambda *args: jnp.sum(ragged_decode_attention(*args).astype(jnp.float32))
    assert lowered(loss, operands).count(CUSTOM_CALL) == 2
    assert lowered(jax.grad(loss, (0, 1, 2)), operands).count(CUSTOM_CALL) == 4


@pytest.mark.parametrize(
    ("dim", "parts"),
    [
        (8, [(0, 16)]),
        (64, [(0, 64)]),
        (80, [(0, 128)]),
        (96, [(0, 64), (64, 32)]),
        (112, [(0, 128)]),
        (192, [(0, 128), (128, 64)]),
        (576, [(0, 512), (512, 64)]),
        (640, [(0, 512), (512, 128)]),
    ],
)
def test_parts_of_a_head(dim, parts):
    assert [(part.first, part.size) for part in Part.of(dim)] == parts
