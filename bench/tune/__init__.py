"""Which method at which setting: all of them in one pass, chosen on validation prompts, confirmed on test prompts."""

from safeshard.bench.tune.run import tune

__all__ = ["tune"]
