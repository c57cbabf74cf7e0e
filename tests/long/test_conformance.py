"""The cases of every back end, for a real llama.cpp server with real weights."""

from __future__ import annotations

import pytest

from tests.signals.test_conformance import (  # noqa: F401 (collected here, with the back end below)
    REAL,
    case,
    model_of,
    test_a_shift_of_the_students_logits_changes_nothing,
    test_a_student_that_is_the_teacher_has_no_loss,
    test_gradients_are_of_these_values,
    test_texts_alone_and_together_have_the_same_values,
    test_values_are_the_oracles,
)

pytestmark = pytest.mark.parametrize("case", [REAL], indirect=True)
