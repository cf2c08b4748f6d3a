"""What models answer: prompts asked, answers graded, shares with confidence intervals."""

from safeshard.bench.evaluation.run import evaluate

__all__ = ["evaluate"]
