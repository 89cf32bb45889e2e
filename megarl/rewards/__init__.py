"""Reward functions, which turn samples into scores in a separate process that can be timed and killed."""

from megarl.functions.named import NamedFunction, resolve
from megarl.rewards.answers import NoScore, Score
from megarl.rewards.client import RewardWorker
from megarl.rewards.combine import Combined, combine
from megarl.rewards.scores import Scores

__all__ = ["Combined", "NoScore", "NamedFunction", "RewardWorker", "Score", "Scores", "combine", "resolve"]
