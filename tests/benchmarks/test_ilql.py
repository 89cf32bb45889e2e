"""The floor that benchmarks/ilql.py states: operations of the heads, counted by hand."""

from benchmarks.ilql import head_flops


def test_operations_of_the_heads_by_hand() -> None:
    # hidden 4, vocabulary 10. A first layer: 2 * 4 * 8 = 64; a Q's second: 2 * 8 * 10 = 160; V's, or of one token: 16.
    trained = (64 + 16) + 2 * (64 + 160)
    targets = 2 * (64 + 16)
    assert head_flops(4, 10, q_heads=2) == 3 * trained + targets
