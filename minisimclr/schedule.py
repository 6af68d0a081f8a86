"""Learning rates as pure functions of the step (google-research/simclr, learning_rate_schedule)."""

from math import cos, pi, sqrt


def scaled_rate(base: float, batch_size: int, scaling: str) -> float:
    """Peak rate for a batch: "none" base, "linear" base * B / 256, "sqrt" base * sqrt(B).

    The paper's bases are 0.3 (linear) and 0.075 (square root); they meet at B = 4096.
    """
    return base * {"none": 1.0, "linear": batch_size / 256, "sqrt": sqrt(batch_size)}[scaling]


def warmup_cosine(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of step 0, 1, ...: a line from 0, which moves nothing, to `peak`, then half a cosine."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + cos(pi * min(1.0, progress)))
