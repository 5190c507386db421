"""A stock model trained with AdamW, balanced in every way there is, against the same model alone."""

from pathlib import Path

import pytest
from started import run_ranks

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def test_every_way_trains_as_the_stock_model_does(tmp_path: Path) -> None:
    """Plans, new homes, live gate, 1F1B on rings of all sizes, both paths; bf16; checkpoints; bits in bitwise mode."""
    said = run_ranks(tmp_path, HERE / "precision_ranks.py", 2)
    assert all("gradients' error in bf16" in words for words in said)


def test_what_would_train_wrongly_is_right_or_refused(tmp_path: Path) -> None:
    """Frozen experts, accumulated gradients, evaluation anywhere; and every mistake has a sentence."""
    said = run_ranks(tmp_path, HERE / "usage_ranks.py", 2)
    assert all("all held" in words for words in said)
