"""Tests of the backend. On each named case it is right, or it refuses the case with a reason."""

import functools

import pytest
from ejk_ragged_dense import DenseBackend

from ejk_ragged import ragged_decode_attention
from ejk_ragged.testing import CHECKS, verify


call = functools.partial(ragged_decode_attention, backend=DenseBackend())


@pytest.mark.parametrize("case", CHECKS, ids=lambda case: case.name)
def test_dense(case):
    arguments = case.draw(poison=True)  # NaN in all rows that no token sees
    wide = case.value_dim is not None or case.value_columns is not None
    if case.cache_dtype is not None or case.page_size is not None or wide:
        with pytest.raises(ValueError, match=r"it takes no quantised caches|it takes a padded key and a padded value of one width"):
            call(**arguments)
        return
    wrong = [str(verdict) for verdict in verify(call, arguments) if not verdict.ok]
    assert not wrong
