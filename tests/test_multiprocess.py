"""Two JAX processes, each with half of a cache's rows, or of a pool's heads, give the answer and the gradients of one process.

Run as a program, this file is one of the two: `test_multiprocess.py RANK PORT FILE...`.
"""

import dataclasses
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import floats_of

from ejk_ragged import ragged_decode_attention
from ejk_ragged.testing import Case


SECONDS = 180  # for everything, on a busy machine
PLAIN = Case("plain", 2, 32, 4, 2, 8, lengths=("ranges", (0, 32), (10, 19)), sinks=("query", 1))
TOKENS = dataclasses.replace(PLAIN, name="tokens", num_tokens=3, query_lengths=(3, 2), cache_dtype="int8", scales="row")
PAGES = dataclasses.replace(TOKENS, name="pages", page_size=8, value_dim=12)
LATENT = dataclasses.replace(PLAIN, name="latent", num_kv_heads=1, page_size=8, softmax_scale=0.3, value_columns=(0, 6))
ROWS = {
    **dict.fromkeys(("key", "value", "d_key", "d_value"), P(None, "both")),
    **dict.fromkeys(("key_scale", "value_scale"), P(None, None, "both")),
}
HEADS = {
    **dict.fromkeys(("key", "value"), P(None, None, "both")),
    **dict.fromkeys(("key_scale", "value_scale"), P(None, "both")),
    **dict.fromkeys(("out", "lse", "d_query"), P(None, None, "both")),
}
CASES = {PLAIN: ROWS, TOKENS: ROWS, PAGES: HEADS, LATENT: dict.fromkeys(("query", "out", "lse", "d_query"), P(None, "both"))}


def evaluate(arguments):
    """Output, lse, and the gradients that exist, by name."""
    arrays = {name: x for name, x in arguments.items() if hasattr(x, "shape")}
    static = {name: x for name, x in arguments.items() if name not in arrays}
    return jax.jit(lambda arrays: _evaluate(arrays | static))(arrays)


def _evaluate(arguments):
    floats = {name: arguments[name] for name in floats_of(arguments)}

    def loss(floats):
        out, lse = ragged_decode_attention(**arguments | floats, return_lse=True)
        return jnp.sum(jnp.cos(out)) + jnp.sum(lse), {"out": out, "lse": lse}

    gradients, results = jax.grad(loss, has_aux=True)(floats)
    return results | {f"d_{name}": x for name, x in gradients.items()}


def half(split, x, rank):
    """The part of an argument or a result that process `rank` has. Most arrays are whole in both processes."""
    axis = next((axis for axis, name in enumerate(split) if name), None)
    return x if axis is None else np.split(np.asarray(x), 2, axis)[rank]


def one_of_two(rank, port, files):
    """Joins the other process, holds this process's half of each case's cache, and writes its part of the results."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=SECONDS)
    assert jax.process_count() == jax.device_count() == 2
    assert jax.local_device_count() == 1

    mesh = jax.make_mesh((2,), ("both",), axis_types=(jax.sharding.AxisType.Auto,))
    for (case, splits), file in zip(CASES.items(), files, strict=True):
        placing = {name: NamedSharding(mesh, split) for name, split in splits.items()}
        arguments = case.draw()
        for name in placing.keys() & arguments.keys():
            x = arguments[name]
            arguments[name] = jax.make_array_from_process_local_data(
                placing[name], half(splits[name], x, rank), global_shape=x.shape
            )
        results = evaluate(arguments)
        for name in placing.keys() & results.keys():
            assert results[name].sharding.is_equivalent_to(placing[name], results[name].ndim)
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))  # the partitioner may have split the other results too
        results = {name: x if name in placing else whole(x) for name, x in results.items()}
        np.savez(file, **{name: x.addressable_shards[0].data for name, x in results.items()})
    jax.distributed.shutdown()


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [[tmp_path / f"{case.name}-{rank}.npz" for case in CASES] for rank in range(2)]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank in range(2):
            command = [sys.executable, __file__, str(rank), str(port), *files[rank]]
            with logs[rank].open("w") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(log.read_text() for log in logs)

    for i, (case, splits) in enumerate(CASES.items()):
        alone = evaluate(case.draw())
        for rank in range(2):
            got = np.load(files[rank][i])
            assert set(got) == set(alone)
            for name, want in alone.items():
                where = f"{name} of {case.name} in process {rank}"
                np.testing.assert_allclose(got[name], half(splits.get(name, ()), want, rank), rtol=1e-5, atol=1e-5, err_msg=where)


def wait(processes):
    """Waits until all processes have ended, one has failed, or the time is over."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.1)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
