"""Two JAX processes, each with half of one cache's sequence axis, give the answer and the gradients of one process.

Run as a program, this file is one of the two: `test_multiprocess.py RANK PORT FILE`.
"""

import functools
import pathlib
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ejk_ragged import ragged_decode_attention
from ejk_ragged.testing import Case


SECONDS = 180  # for everything, on a busy machine
CASE = Case("two processes", 2, 32, 4, 2, 8, lengths=("ranges", (0, 32), (10, 19)), sinks=("query", 1))
SPLIT = P(None, "sequence")


def loss(query, key, value, rest):
    out, lse = ragged_decode_attention(query, key, value, **rest, return_lse=True)
    return jnp.sum(jnp.cos(out)) + jnp.sum(lse), (out, lse)


@jax.jit
def evaluate(query, key, value, rest):
    (_, results), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value, rest)
    return dict(zip(("out", "lse", "d_query", "d_key", "d_value"), (*results, *gradients), strict=True))


def one_of_two(rank, port, file):
    """Joins the other process, holds its half, and writes what it has of the results."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=SECONDS)
    assert jax.process_count() == jax.device_count() == 2
    assert jax.local_device_count() == 1

    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    arguments = CASE.draw()
    half = slice(16 * rank, 16 * rank + 16)
    shape = arguments["key"].shape
    place = functools.partial(jax.make_array_from_process_local_data, NamedSharding(mesh, SPLIT), global_shape=shape)
    key, value = (place(arguments.pop(name)[:, half]) for name in ("key", "value"))
    results = evaluate(arguments.pop("query"), key, value, arguments)
    assert results["d_key"].sharding.is_equivalent_to(key.sharding, 4)
    np.savez(file, **{name: x.addressable_shards[0].data for name, x in results.items()})
    jax.distributed.shutdown()


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [tmp_path / f"{rank}.npz" for rank in range(2)]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank in range(2):
            command = [sys.executable, __file__, str(rank), str(port), files[rank]]
            with logs[rank].open("w") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(log.read_text() for log in logs)

    arguments = CASE.draw()
    alone = evaluate(*(arguments.pop(name) for name in ("query", "key", "value")), arguments)
    halves = [np.load(file) for file in files]
    for name, want in alone.items():
        for rank, half in enumerate(halves):
            share = want[:, 16 * rank : 16 * rank + 16] if name in ("d_key", "d_value") else want
            np.testing.assert_allclose(half[name], share, rtol=1e-5, atol=1e-5, err_msg=f"{name} in process {rank}")


def wait(processes):
    """Until all have ended, or one has failed, or the time is over."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.1)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
