"""How much of a cache a call may read, from its static facts."""

from ejk_ragged import Problem


def most_keys(problem: Problem) -> int:
    """Rows of a sequence that are seen, at most."""
    return problem.seq_len if problem.most_keys is None else min(problem.seq_len, problem.most_keys)


def most_bytes(problem: Problem) -> int:
    """Bytes of the cache that are seen, at most."""
    dims = problem.row_dim + (problem.value_dim if problem.value_columns is None else 0)
    return problem.batch * most_keys(problem) * dims * problem.num_kv_heads * problem.cache_dtype.itemsize
