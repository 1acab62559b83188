"""Where the result of a piece goes, if query rows are the rows of the products: into the output, or among the partial results."""

from ._jax import store, when
from ._merge import finished, write_out
from ._program import sinks_at
from ._softmax import Softmax


def write_result(softmax: Softmax, compute, staging, columns, with_stats=True, nothing=None):
    """Writes the result of a piece, for one warpgroup: the output, if the sequence has no other piece, or partial results.

    Args:
        softmax: the softmax of the warpgroup's query rows.
        compute: returns the sums of the output [query rows, columns], the reference of the weights without its factor, and the sum
            of the weights.
        staging: returns a ref [query rows, columns] in shared memory that nobody reads any more. The output passes through it.
        columns: the columns of the output, a slice.
        with_stats: whether this warpgroup writes what belongs to all columns too.
        nothing: what `compute` would return for no tile, if `compute` needs one.
    """
    program, piece, query_rows = softmax.program, softmax.piece, softmax.query_rows
    plan, results, head = program.plan, program.results, program.head

    def keep(acc, reference, total):
        slot = plan.schedule.slot(program.number, piece.sequence)
        store(results.parts.at[slot, head, query_rows, columns], acc)
        for i, values in enumerate((softmax.natural(reference), total) if with_stats else ()):
            store(results.stats.at[slot, head, i, query_rows], values)

    def write(acc, reference, total):
        sink = sinks_at(program.sink, piece.sequence, head, query_rows)
        out, lse = finished(acc, softmax.natural(reference), total, sink)
        if with_stats:
            store(results.lse.at[piece.sequence, head, query_rows], lse)
        write_out(plan, results.out, staging(), out, piece.sequence, head, query_rows, columns)

    def work():
        result = compute()
        pieces = piece.siblings if plan.writes_out else 0
        when(pieces == 1)(lambda: write(*result))
        when(pieces != 1)(lambda: keep(*result))

    if nothing is None:
        work()
    else:
        when(piece.num_tiles > 0)(work)
        when(piece.num_tiles == 0)(lambda: keep(*nothing))
