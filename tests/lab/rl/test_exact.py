"""Policy-gradient learning with balanced experts in bitwise mode: two ranks have the bits that one has alone."""

from pathlib import Path

from started import run_ranks

SCRIPT = Path(__file__).with_name("exact_ranks.py")


def test_two_ranks_learn_the_bits_of_one(tmp_path: Path) -> None:
    """Whole model: experts, routers, embedding, attention, norms, head; weights, gradients and rollouts."""
    said = run_ranks(tmp_path, SCRIPT, 2)
    assert "0 bits apart" in said[0]
