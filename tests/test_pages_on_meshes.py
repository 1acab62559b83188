"""Pages, values of another width and values in the key's rows on many devices. The answer is that of one device, and no pool is
moved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import call, gradients, make_mesh, put
from support import array, assert_close, assert_right, draw, floats_of, stack
from test_traffic import assert_split, collectives

from ejk_ragged import merge
from ejk_ragged.testing import Case


RANGES = ("ranges", (0, 64), (-5, 1000), (9, 9), (20, 37))
PAGES = Case("pages", 4, 64, 8, 4, 16, lengths=RANGES, sinks=("query", 2), page_size=8, value_dim=24)
TOKENS = dataclasses.replace(PAGES, name="tokens", num_tokens=3, query_lengths=(3, 2, 3, 1), cache_dtype="int8", scales="row")
LATENT = Case("latent", 4, 64, 8, 1, 16, lengths=RANGES, softmax_scale=0.3, sinks=("query", 1), value_columns=(0, 12), row_dim=20)
LATENT_PAGES = dataclasses.replace(LATENT, name="latent pages", page_size=8)
LATENT_TOKENS = dataclasses.replace(
    LATENT_PAGES, name="latent tokens", num_tokens=2, cache_dtype="float8_e4m3fn", scales="row", sliding_window=(20, 0)
)
WIDE = dataclasses.replace(PAGES, name="dense", page_size=None)
named = functools.partial(pytest.mark.parametrize, ids=lambda case: case.name)

HEADS = P(None, None, "x")
SPLITS = {  # splits of a pool of several kv heads, and of a pool of one kv head
    "heads": {"key": HEADS, "value": HEADS, "key_scale": P(None, "x"), "value_scale": P(None, "x")},
    "batch": {"query": P("y"), "page_table": P("y"), "sequence_end": P("y")},
    "table alone": {"page_table": P("y")},
}
SPLITS["heads and batch"] = SPLITS["heads"] | SPLITS["batch"]
LATENT_SPLITS = {
    "query heads": {"query": "heads"},
    "batch": SPLITS["batch"],
    "table alone": SPLITS["table alone"],
    "query heads and batch": SPLITS["batch"] | {"query": "both"},
}


def spread(mesh, splits, arrays):
    """The arrays. Those that `splits` names are split so, and the others are whole on every device."""
    token = [None] * (arrays["query"].ndim == 4 or 0)
    query = {"heads": P(None, *token, "x"), "both": P("y", *token, "x")}
    specs = {name: query.get(spec, spec) if isinstance(spec, str) else spec for name, spec in splits.items()}
    return {name: put(mesh, specs.get(name, P()), x) if hasattr(x, "shape") else x for name, x in arrays.items()}


def jitted(call):
    """A call with arrays and settings, jitted over the arrays."""

    def function(**arguments):
        traced = {name: x for name, x in arguments.items() if hasattr(x, "shape")}
        static = {name: x for name, x in arguments.items() if name not in traced}
        return jax.jit(lambda traced: call(**traced, **static))(traced)

    return function


CASES = [(case, name) for case in (PAGES, TOKENS) for name in SPLITS]
CASES += [(case, name) for case in (LATENT_PAGES, LATENT_TOKENS) for name in LATENT_SPLITS]


def as_arrays(case):
    return {name: array(x) if isinstance(x, np.ndarray) else x for name, x in case.draw(poison=True).items()}


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(None, ("y", "x")), P("x", "y")], ids=str)
@named("case", [LATENT, WIDE])
def test_dense_rows_and_widths(mesh, case, spec):
    """Such a cache is split by batch and rows like any padded cache. The query heads that share one kv head may be split too."""
    splits = {"key": spec, "value": spec} | ({"query": P(None, "z")} if case is LATENT and spec != P("x") else {})
    assert_right(jitted(lambda **arrays: call(**arrays)), spread(mesh, splits, as_arrays(case)))


# ---------------------------------------------------------------------------------------------------------------------------
# What moves


@pytest.mark.parametrize(("case", "name"), CASES, ids=[f"{case.name}, {name}" for case, name in CASES])
def test_right_and_no_pool_is_moved(mesh, case, name):
    """Output, lse and gradients are the oracle's, whatever dead rows and dead pages hold. Forward, only a split table moves.
    Backward, only queries move, and sums over heads or batch."""
    splits = (LATENT_SPLITS if case.num_kv_heads == 1 else SPLITS)[name]
    arguments = spread(mesh, splits, as_arrays(dataclasses.replace(case, seq_len=512)))
    arrays = {name: x for name, x in arguments.items() if hasattr(x, "shape")}
    floats = {name: arrays[name] for name in floats_of(arrays)}
    function = lambda arrays: call(**arguments | arrays, return_lse=True)
    moved, forward = collectives(function, arrays)
    small = max(arrays["page_table"].size, arrays["query"].size)
    assert sum(size for _, size in moved) <= (small if name == "table alone" else 0), moved

    results = forward(arrays)
    batch, heads = "y" if "batch" in name else None, "x" if "heads" in name else None
    tokens = [None] * (case.num_tokens is not None)
    if name != "table alone":
        for x in results:
            assert_split(x, mesh, P(batch, *tokens, heads))

    like_results = lambda xs: tuple(jax.device_put(np.asarray(x), y.sharding) for x, y in zip(xs, results, strict=True))
    pullback = lambda arrays, cotangents: jax.vjp(lambda floats: function(arrays | floats), floats)[1](cotangents)
    moved, backward = collectives(pullback, arrays, like_results(results))
    assert all(size <= 2 * small for _, size in moved), moved
    assert 2 * small < arrays["key"].size / 8

    # The same two programs compute what is compared.
    compiled = jax.custom_vjp(lambda floats: forward(arrays | floats))
    compiled.defvjp(lambda floats: (forward(arrays | floats), None), lambda _, d: backward(arrays, like_results(d)))
    assert_right(lambda return_lse, **given: compiled({name: given[name] for name in floats}), arguments)


@pytest.mark.parametrize("spec", [P(), P("y"), P(None, "y")], ids=str)
def test_dense_rows_are_not_moved(mesh, spec):
    """If query heads are split and the key's gradient is asked for, each device gets all query heads, so that no gradient of the
    cache is summed."""
    arrays, settings = draw(dataclasses.replace(LATENT, seq_len=512))
    arrays = spread(mesh, {"key": spec, "query": P(None, "x")}, arrays)
    moved, _ = collectives(functools.partial(gradients, call=functools.partial(call, **settings)), arrays)
    assert all(size <= 3 * arrays["query"].size < arrays["key"].size / 8 for _, size in moved), moved


def test_it_would_be_seen(mesh):
    """The check finds a pool that is gathered on purpose."""
    arrays = spread(mesh, SPLITS["heads"], draw(PAGES)[0])

    explicit = mesh.axis_types[0] == AxisType.Explicit

    def whole(x):
        to = NamedSharding(mesh, P())
        return 2 * (jax.sharding.reshard(x, to) if explicit else jax.lax.with_sharding_constraint(x, to))

    gathered = lambda arrays: call(**arrays | {name: whole(arrays[name]) for name in ("key", "value")})
    moved, _ = collectives(gathered, arrays)
    assert max(size for _, size in moved) >= arrays["key"].size


@pytest.mark.parametrize("mapped", [("page_table",), ("query",), ("query", "page_table"), ("key", "value")], ids=str)
def test_vmap(mesh, mapped):
    """Maps join a batch that is split, the tokens, or the pages. Each device has its own part, and nothing is moved."""
    case = dataclasses.replace(PAGES, seq_len=512)
    arrays, _ = draw(case)
    arrays |= {name: stack(arrays[name], np.asarray(arrays[name])[::-1], arrays[name]) for name in mapped}
    splits = {name: P(None, *spec) if name in mapped else spec for name, spec in SPLITS["heads and batch"].items()}

    def by_name(arrays):
        axes = ({name: 0 if name in mapped else None for name in arrays},)
        return jax.vmap(lambda arrays: call(**arrays, return_lse=True), axes)(arrays)

    split = spread(mesh, splits, arrays)
    moved, compiled = collectives(by_name, split)
    assert_close(compiled(split), by_name(arrays))
    assert all(size <= 3 * arrays["query"].size for _, size in moved), moved
    assert all(size < arrays["key"].size / 8 for _, size in moved), moved


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_mapped_tables_that_are_split(kind):
    """The tables are split by maps: each device has some of them, and the whole pool."""
    mesh = make_mesh(kind, kind, kind)
    arrays, _ = draw(PAGES)
    mapped = ("query", "page_table", "sequence_start", "sequence_end")
    arrays |= {name: stack(arrays[name], np.asarray(arrays[name])[::-1]) for name in mapped}
    axes = ({name: 0 if name in mapped else None for name in arrays},)
    function = jax.vmap(lambda arrays: call(**arrays, return_lse=True), axes)
    split = spread(mesh, dict.fromkeys(mapped, P("x")), arrays)
    assert_close(jax.jit(function)(split), function(arrays))


# ---------------------------------------------------------------------------------------------------------------------------
# Split by pages


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(("x", "y"))], ids=str)
@named("case", [PAGES, LATENT_PAGES])
def test_split_by_pages_is_an_error(mesh, case, spec):
    case = dataclasses.replace(case, batch=1, seq_len=40)  # a pool of 8 pages
    arrays, settings = draw(case)
    arrays = spread(mesh, {"key": spec, "value": spec}, arrays)
    error = ValueError if mesh.axis_types[0] == AxisType.Explicit else jax.errors.JaxRuntimeError
    with pytest.raises(error, match=r"pools of pages, must be split along num_kv_heads or not at all.*call inside jax.shard_map"):
        jax.jit(functools.partial(call, **settings))(**arrays)


@named("case", [PAGES, TOKENS, LATENT_PAGES, LATENT_TOKENS])
def test_local_tables_inside_shard_map(mesh, case):
    """Each device has half of the pool, and a table of its own pages. Each of its pages becomes a sequence of one page."""
    arrays, settings = draw(dataclasses.replace(case, sinks=None, sliding_window=None, num_tokens=None, query_lengths=None))
    table, page_size = np.asarray(arrays["page_table"]), case.page_size
    own = arrays["key"].shape[0] // 2
    pool = [name for name in ("key", "value", "key_scale", "value_scale") if name in arrays]
    start, end = (np.clip(arrays[name], 0, table.shape[1] * page_size) for name in ("sequence_start", "sequence_end"))

    # A device's pages of a sequence need not follow each other, so one range of rows cannot describe them. So each page becomes a
    # sequence of one page, with its own part of the range.
    first = np.arange(table.shape[1]) * page_size
    starts, ends = (np.clip(x[:, None] - first, 0, page_size).astype(np.int32) for x in (start, end))

    def local(query, starts, ends, table, pool):
        device = jax.lax.axis_index("x")
        here = (table >= device * own) & (table < (device + 1) * own)
        pages = table.shape[1]
        repeat = lambda x: jnp.repeat(x, pages, axis=0)
        out, lse = call(
            repeat(query),
            **{"value": None} | pool,
            **settings_of(settings),
            sequence_start=starts.reshape(-1),
            sequence_end=jnp.where(here, ends, 0).reshape(-1),
            page_table=(table - device * own).reshape(-1, 1),
            return_lse=True,
        )
        parts = [x.reshape(-1, pages, *x.shape[1:]).swapaxes(0, 1) for x in (out, lse)]
        parts = [jax.lax.all_gather(x, "x").reshape(-1, *x.shape[1:]) for x in parts]
        return [x[None] for x in merge(zip(*parts, strict=True))]

    specs = (P(), P(), P(), P(), dict.fromkeys(pool, P("x")))
    args = (arrays["query"], array(starts), array(ends), array(table), {name: arrays[name] for name in pool})
    args = [put(mesh, spec, x) for spec, x in zip(specs[:4], args[:4], strict=True)] + [
        {name: put(mesh, P("x"), x) for name, x in args[4].items()}
    ]
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("x")))(*args)
    want = call(**{"value": None} | arrays, **settings_of(settings), return_lse=True)
    for i in range(2):
        assert_close([np.asarray(x)[i] for x in got], [np.asarray(x) for x in want])


def settings_of(settings):
    return {name: x for name, x in settings.items() if name != "value"}
