"""Two JAX processes, each with half of a cache's sequence axis, give the answer and the gradients of one process.

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
CASES = (PLAIN, TOKENS)
SPLITS = {
    **dict.fromkeys(("key", "value", "d_key", "d_value"), P(None, "sequence")),
    **dict.fromkeys(("key_scale", "value_scale"), P(None, None, "sequence")),
}


@jax.jit
def evaluate(arguments):
    """Output, lse, and the gradients that there are, by name."""
    floats = {name: arguments[name] for name in floats_of(arguments)}

    def loss(floats):
        out, lse = ragged_decode_attention(**arguments | floats, return_lse=True)
        return jnp.sum(jnp.cos(out)) + jnp.sum(lse), {"out": out, "lse": lse}

    gradients, results = jax.grad(loss, has_aux=True)(floats)
    return results | {f"d_{name}": x for name, x in gradients.items()}


def half(name, x, rank):
    """What process `rank` has of an argument or a result; of most all."""
    axis = next((axis for axis, split in enumerate(SPLITS.get(name, ())) if split), None)
    return x if axis is None else np.split(np.asarray(x), 2, axis)[rank]


def one_of_two(rank, port, files):
    """Joins the other process, holds its half of each case's cache, and writes what it has of the results."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=SECONDS)
    assert jax.process_count() == jax.device_count() == 2
    assert jax.local_device_count() == 1

    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    placing = {name: NamedSharding(mesh, split) for name, split in SPLITS.items()}
    for case, file in zip(CASES, files, strict=True):
        arguments = case.draw()
        for name in placing.keys() & arguments.keys():
            x = arguments[name]
            arguments[name] = jax.make_array_from_process_local_data(placing[name], half(name, x, rank), global_shape=x.shape)
        results = evaluate(arguments)
        for name in placing.keys() & results.keys():
            assert results[name].sharding.is_equivalent_to(placing[name], 4)
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

    for i, case in enumerate(CASES):
        alone = evaluate(case.draw())
        for rank in range(2):
            got = np.load(files[rank][i])
            assert set(got) == set(alone)
            for name, want in alone.items():
                where = f"{name} of {case.name} in process {rank}"
                np.testing.assert_allclose(got[name], half(name, want, rank), rtol=1e-5, atol=1e-5, err_msg=where)


def wait(processes):
    """Until all have ended, or one has failed, or the time is over."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.1)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
