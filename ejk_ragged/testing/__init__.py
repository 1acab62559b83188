"""For people who write backends: the oracle, named cases that between them meet every feature, and a comparison of the two.

`verify(call, case.draw(poison=True))` says whether a call is right on a case, gradients included. `verify_backend(backend)` tries a
backend on all cases, and on what no shape of a call shows.
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
