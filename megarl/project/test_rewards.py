"""What the reward function must get right; `make test` runs this."""

import unittest

from rewards import score


class Score(unittest.TestCase):
    """The score of single responses."""

    def test_the_letter_alone_scores_1_and_others_0(self) -> None:
        """The best response and the worst."""
        self.assertEqual(score(outputs=["cccc", "abde"], letter=["c", "c"], prompts=["c?", "c?"]), [1.0, 0.0])

    def test_half_of_the_letters_scores_a_half(self) -> None:
        """Between them, more is better: without steps between, there is little to learn from."""
        self.assertEqual(score(outputs=["acac"], letter=["c"]), [0.5])

    def test_a_response_without_a_character_scores_0(self) -> None:
        """It must be a number: NaN would end the run."""
        self.assertEqual(score(outputs=[""], letter=["c"]), [0.0])


if __name__ == "__main__":
    unittest.main()
