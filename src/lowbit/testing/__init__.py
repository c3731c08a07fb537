"""The laws that every method keeps, to be held by the tests of any package that brings one.

import pytest
from lowbit.testing import TRAINING_LAWS

@pytest.mark.parametrize("law", TRAINING_LAWS, ids=lambda law: law.__name__)
def test_keeps_the_law(law, tmp_path):
law("my_method", tmp_path)
"""

from lowbit.testing.laws import POST_TRAINING_LAWS, TRAINING_LAWS

__all__ = ["POST_TRAINING_LAWS", "TRAINING_LAWS"]
