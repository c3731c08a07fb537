from __future__ import annotations

import gc

import pytest

from lowbit.lazy import without_collection


def test_garbage_is_not_collected_within_the_context_and_as_before_after_it() -> None:
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(ImportError), without_collection():
        raise ImportError
    assert gc.isenabled()
