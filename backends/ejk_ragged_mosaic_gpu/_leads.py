"""For which calls the backend is asked before `pallas_triton`, as measured. docs/developers has the log."""

from ejk_ragged import Problem, Target
from ejk_ragged_schedule.devices import has_fast_memory
from ejk_ragged_schedule.sizes import most_bytes, most_keys

from ._tuning import (
    copied_dims,
    FEW_OF_16_BITS,
    is_direct,
    is_wide,
    joined_heads,
    MOST_FEW,
    MUCH_WIDE,
    OPERAND_DIM,
    takes_many,
    tile_dim,
    WIDE,
    WIDE_FEW,
    wide_few,
    widens_in_registers,
)


# Who is asked first: these kernels are faster than those of pallas_triton from LEADING_ROWS query rows per kv head on, unless no
# more than SHORT rows of a sequence are seen, or a full cache has fewer than MUCH bytes: they take some microseconds longer to
# begin and end. For twice the query rows half as many bytes are much, because pallas_triton reads them once for each 64 query
# rows. In 8 bits they are faster from LEADING_ROWS_OF_8_BITS query rows on. Where tiles are widened in registers, as measured on
# an H200, they are also faster for fewer query rows: up to LEAST_ROWS of any cache, and others of a large cache. Where the value
# lies in wide rows of the key, they are faster above FEW or WIDE_FEW query rows, for pages of a cache that has MUCH_WIDE bytes,
# for up to MOST_ALONE sequences with few query rows, and always in 8 bits.
LEADING_ROWS, LEADING_ROWS_OF_8_BITS, SHORT, MUCH, MOST_ALONE = 64, 20, 256, 128 << 20, 2
LEAST_ROWS = 8
# In 8 bits, where HALF_LINE of what is multiplied is zeros, few query rows are faster for a large cache with LONG_IN_HALF rows per
# sequence. Where more of a line is filled, pallas_triton is slow, and MUCH_IN_PART bytes are much. Where the memory is fast, they
# are also faster wherever kv heads of HALF_LINE are joined, and for up to WIDE_FEW query rows of head dimensions above WIDE in a
# cache that has MUCH_IN_PART bytes.
HALF_LINE, LONG_IN_HALF, MUCH_IN_PART = 64, 4096, 24 << 20
# Where 8 divides only the rows of all sequences, an H100 timed 8-bit caches that have MUCH bytes. On an H200 others are faster too:
# one token with head dimensions of up to WIDE, one token with values in wide rows of the key of at least MANY_END_TO_END sequences
# and MUCH_END_TO_END bytes, and joined kv heads with head dimensions above HALF_LINE.
MANY_END_TO_END, MUCH_END_TO_END = 16, 16 << 20
# As measured on an H200, pallas_triton is faster for one token with values in wide rows of a padded key of 8 bits if a full cache
# has fewer than LITTLE_WIDE bytes for WIDE_FEW query rows, half as many for twice the query rows, and so on.
LITTLE_WIDE = 8 << 20
# Where the memory is fast, as measured on an H200, they are faster for padded caches that have MUCH_WIDE bytes, and from
# FAST_LEADING_ROWS query rows on, which both backends multiply as 64. Several tokens with more than FEW_OF_16_BITS query rows are
# also faster with head dimensions of HALF_LINE, and in pages with those of OPERAND_DIM. Without a window, and with head dimensions
# in FAST_DIMS, they are faster for up to FAST_ROWS query rows of a full cache that has LONG rows per sequence and MUCH_LONG bytes,
# and for one token of a single sequence.
LONG, MUCH_LONG, FAST_LEADING_ROWS, FAST_ROWS, FAST_DIMS = 8192, 512 << 20, 33, 16, (128, 192)
# With one token, no window and up to LEAST_ROWS query rows of OPERAND_DIM dimensions they are also faster in pages of SMALL_PAGE
# rows, and in pages of which SMALL_PAGE divides the rows if the cache has no more than LITTLE bytes.
SMALL_PAGE, LITTLE = 16, 64 << 20
# The same for up to MOST_FEW query rows where 64 does not divide the head dimension: by head dimension, from how many on.
FAST_LEADING_ROWS_OF = {80: 33, 96: 17, 112: 33}


def leads(problem: Problem, target: Target) -> str:
    """Why these kernels are faster than those of `pallas_triton`, as measured on an H100 and an H200, or ""."""
    capability = getattr(target.device, "compute_capability", None)
    if capability is None or not all(isinstance(n, int) for n in problem.sizes) or problem.keeps_accum_dtype:
        return ""
    rows, laid_out = problem.num_tokens * problem.group, takes_many(problem)
    keys, fast = most_keys(problem), has_fast_memory(target)
    where = "in pages" if problem.paged else "in fast memory" if fast else ""
    much = keys > SHORT and most_bytes(problem) * max(rows, LEADING_ROWS) >= MUCH * LEADING_ROWS
    if is_wide(problem):
        if problem.value_columns is None or tile_dim(problem) <= WIDE or not laid_out:
            return ""
        if problem.quantised:
            many = problem.batch >= MANY_END_TO_END and most_bytes(problem) >= MUCH_END_TO_END
            timed = problem.seq_len % 8 == 0 or much or (fast and problem.num_tokens == 1 and many)
            padded = fast and problem.num_tokens == 1 and not problem.paged and rows >= WIDE_FEW
            little = padded and most_bytes(problem) * rows < LITTLE_WIDE * WIDE_FEW
            return "values in wide rows of the key, in 8 bits" if keys > SHORT and timed and not little else ""
        few = wide_few(problem)
        if rows > few:
            return f"more than {few} query rows, and values in wide rows of the key"
        if where and most_bytes(problem) >= MUCH_WIDE:
            return f"values in wide rows of the key of a large cache {where}"
        alone = problem.batch <= MOST_ALONE and keys > SHORT and rows <= WIDE_FEW
        return f"values in wide rows of the key of up to {MOST_ALONE} sequences" if alone else ""
    if problem.quantised:
        return _leads_in_8_bits(problem, target, rows, much) if laid_out and keys > SHORT else ""
    if rows >= LEADING_ROWS and laid_out and much:
        return f"{LEADING_ROWS} or more query rows per kv head"
    if rows >= FAST_LEADING_ROWS and laid_out and much and fast:
        return f"{FAST_LEADING_ROWS} or more query rows per kv head {where}"
    several, dims = problem.num_tokens > 1 and rows > FEW_OF_16_BITS, {problem.head_dim, problem.value_dim}
    if several and laid_out and much and fast and (dims == {HALF_LINE} or (problem.paged and dims == {OPERAND_DIM})):
        return f"several tokens with more than {FEW_OF_16_BITS} query rows per kv head {where}"
    least = FAST_LEADING_ROWS_OF.get(problem.head_dim) if dims == {problem.head_dim} else None
    if least and least <= rows <= MOST_FEW and is_direct(problem) and not problem.junk_between_tokens and much and fast:
        return f"{least} to {MOST_FEW} query rows per kv head of {problem.head_dim} dimensions {where}"
    plain = fast and rows <= FAST_ROWS and problem.head_dim in FAST_DIMS and problem.most_keys is None and laid_out
    if (problem.paged or plain) and problem.batch == problem.num_tokens == 1:
        return f"a single sequence {where}"
    page_size = problem.page_size
    if plain and page_size and problem.num_tokens == 1 and rows <= LEAST_ROWS and dims == {OPERAND_DIM} and keys > SHORT:
        if page_size == SMALL_PAGE:
            return f"one token with up to {LEAST_ROWS} query rows per kv head in pages of {SMALL_PAGE} rows"
        if most_bytes(problem) <= LITTLE and page_size % SMALL_PAGE == 0:
            return f"one token with up to {LEAST_ROWS} query rows per kv head of a small cache in pages"
    long = problem.seq_len >= LONG and most_bytes(problem) >= MUCH_LONG
    return "long sequences of a large cache in fast memory" if plain and long else ""


def _leads_in_8_bits(problem: Problem, target: Target, rows: int, much: bool) -> str:
    """The same for 8-bit caches that are not wide. `much` says whether a full cache has many bytes."""
    dims, are_joined = (problem.head_dim, problem.value_dim), joined_heads(problem, target)[1] > 1
    fast = has_fast_memory(target)
    end_to_end = much or (are_joined and dims[0] > HALF_LINE) or (fast and problem.num_tokens == 1 and max(dims) <= WIDE)
    if problem.seq_len % 8 and not end_to_end:
        return ""
    narrow = copied_dims(problem) == (OPERAND_DIM, OPERAND_DIM) and min(dims) > HALF_LINE
    if narrow and min(dims) < OPERAND_DIM:
        much = most_bytes(problem) >= MUCH_IN_PART
    in_registers = widens_in_registers(problem, rows)
    if max(dims) > WIDE:
        timed = fast and min(dims) > WIDE and most_bytes(problem) >= MUCH_IN_PART
        few = timed and in_registers and rows <= WIDE_FEW
        return f"up to {WIDE_FEW} query rows per kv head of more than {WIDE} dimensions of an 8-bit cache" if few else ""
    if in_registers and rows <= LEAST_ROWS and min(dims) > HALF_LINE and (narrow or problem.num_tokens == 1):
        return f"up to {LEAST_ROWS} query rows per kv head of an 8-bit cache"
    if much and rows >= LEADING_ROWS_OF_8_BITS and dims[0] > HALF_LINE and copied_dims(problem)[0] == OPERAND_DIM:
        return f"{LEADING_ROWS_OF_8_BITS} or more query rows per kv head of an 8-bit cache"
    if are_joined and dims[0] == HALF_LINE:
        return "few query rows of an 8-bit cache whose kv heads are joined"
    long = dims == (HALF_LINE, HALF_LINE) and problem.seq_len >= LONG_IN_HALF
    return "few query rows of a large 8-bit cache" if in_registers and much and (narrow or long) else ""
