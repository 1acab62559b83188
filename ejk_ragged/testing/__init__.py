"""Tools to test a backend: the oracle, named cases that together use every feature, and comparisons of a call with the oracle.

`verify(call, case.draw(poison=True))` compares a call with the oracle on one case, gradients included. `verify_backend(backend)`
runs a backend on all cases, and makes one more check with `vmap`.
"""

from ._cases import Case as Case
from ._cases import CHECKS as CHECKS
from ._oracle import Gradients as Gradients
from ._oracle import live_rows as live_rows
from ._oracle import oracle as oracle
from ._oracle import oracle_gradients as oracle_gradients
from ._oracle import relative_error as relative_error
from ._oracle import seen_rows as seen_rows
from ._oracle import tolerance as tolerance
from ._textbook import TextbookBackend as TextbookBackend
from ._verify import Verdict as Verdict
from ._verify import verify as verify
from ._verify import verify_backend as verify_backend
