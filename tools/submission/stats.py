"""The little statistics that seeds and records need: mean, sample deviation, and Welch's t-test without scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def sample_std(values: Sequence[float]) -> float:
    """With n - 1 below the line; one value has none, which is nan."""
    if len(values) < 2:
        return math.nan
    center = mean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # beyond here the fraction converges slowly, that of the mirror image fast
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300  # stands in for zero where the recurrence divides
    upper, lower = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    value = lower
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            upper = (1 + term / upper) or tiny
            lower = 1 / ((1 + term * lower) or tiny)
            value *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    return math.exp(log_front) / a * value


def student_tail(t: float, freedom: float) -> float:
    """P(T > t) for Student's t with `freedom` degrees, which need not be a whole number."""
    if math.isinf(t):
        return float(t < 0)
    share = t * t / (freedom + t * t)
    if share < 0.5:  # from the middle, where 1 - share would round away
        half = 0.5 - 0.5 * incomplete_beta(0.5, freedom / 2, share)
    else:
        half = 0.5 * incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return half if t >= 0 else 1 - half


@dataclass(frozen=True)
class Welch:
    """One-sided: p is the chance of so large a t if mean(larger) - mean(smaller) were `margin` or less."""

    difference: float
    t: float
    freedom: float
    p: float


def welch(larger: Sequence[float], smaller: Sequence[float], margin: float = 0.0) -> Welch:
    if min(len(larger), len(smaller)) < 2:
        raise ValueError("a t-test needs at least two scores on either side")
    difference = mean(larger) - mean(smaller)
    parts = [sample_std(side) ** 2 / len(side) for side in (larger, smaller)]
    variance = sum(parts)
    if variance == 0:  # all scores of a side are equal: no doubt left, unless the difference is the margin itself
        t = math.copysign(math.inf, difference - margin) if difference != margin else 0.0
        return Welch(difference, t, math.inf, {0.0: 0.5}.get(t, float(t < 0)))
    t = (difference - margin) / math.sqrt(variance)
    freedom = variance**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (larger, smaller)))
    return Welch(difference, t, freedom, student_tail(t, freedom))
