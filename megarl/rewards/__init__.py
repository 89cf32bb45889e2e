"""Sequences in, scores out: reward functions, run in a process of their own that can be timed and killed."""

from megarl.rewards.answers import NoScore, Score
from megarl.rewards.client import RewardWorker
from megarl.rewards.combine import Combined, combine
from megarl.rewards.functions import RewardFunction, resolve
from megarl.rewards.scores import Scores

__all__ = ["Combined", "NoScore", "RewardFunction", "RewardWorker", "Score", "Scores", "combine", "resolve"]
