"""Schedules are functions of the fraction of the budget: they hit their end points at any speed, and the clock, here a
simulated one with drawn step times, is never passed. CPU: pytest tests/test_schedule.py
"""

import pytest
from helpers import tiny_config
from hypothesis import assume, given
from hypothesis import strategies as st

from loopgolf.plan import ONCE, Depth
from train_gpt import Budget, settings_at

fractions = st.floats(0.0, 1.0)


@given(fractions, fractions)
def test_the_learning_rate_ends_at_its_end_value(warmdown, final_lr):
    config = tiny_config(warmdown=warmdown, final_lr=final_lr)
    assert settings_at(config, 0.0, 0).lr_scale == 1.0
    assert settings_at(config, 1.0, 0).lr_scale == pytest.approx(final_lr if warmdown else 1.0)


@given(st.floats(0.01, 1.0), st.floats(0.0, 0.9), fractions, fractions)
def test_the_learning_rate_falls_over_the_warmdown_only(warmdown, final_lr, a, b):
    config, (a, b) = tiny_config(warmdown=warmdown, final_lr=final_lr), sorted((a, b))
    first, second = settings_at(config, a, 0).lr_scale, settings_at(config, b, 0).lr_scale
    assert 1.0 >= first >= second >= final_lr - 1e-9
    if b <= 1 - warmdown - 1e-9:
        assert second == 1.0
    middle = settings_at(config, 1 - warmdown / 2, 0).lr_scale
    assert middle == pytest.approx((1 + final_lr) / 2)


@given(st.floats(0.01, 1.0), fractions)
def test_the_momentum_rises_and_stays(rise, progress):
    config = tiny_config(momentum_start=0.8, momentum=0.95, momentum_warmup=rise)
    found = settings_at(config, progress, 0).momentum
    assert settings_at(config, 0.0, 0).momentum == 0.8 and settings_at(config, 1.0, 0).momentum == pytest.approx(0.95)
    assert found == pytest.approx(0.8 + 0.15 * min(1.0, progress / rise))
    assert settings_at(tiny_config(momentum=0.95, momentum_warmup=0.0), 0.0, 0).momentum == 0.95


@given(fractions, fractions)
def test_the_whole_plan_runs_from_loop_start_on(start, progress):
    config = tiny_config(loop_start=start, depth=3)
    assert settings_at(config, progress, 0).depth == (ONCE if progress < start else Depth(3))
    assert settings_at(tiny_config(depth=3), 0.0, 0).depth == Depth(3)


def simulate(seconds: float, times: list[float], used_s: float = 0.0) -> tuple[float, list[float | None], list[float]]:
    """Steps take the drawn times again and again, but never more than the slowest of the last eight."""
    budget, step, taken, seen = Budget(tiny_config(iterations=0, max_wallclock_seconds=seconds)), 0, [], []
    while (progress := budget.progress(step, used_s)) is not None:
        seen.append(progress)
        wanted = times[step % len(times)]
        taken.append(min(wanted, max(taken[-8:])) if taken else wanted)
        used_s += taken[-1]
        budget.add_step(taken[-1])
        step += 1
        assert step < 20_000
    return used_s, seen, taken


speeds = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=20)


@given(st.floats(3.5, 60.0), speeds)
def test_a_timed_run_uses_its_budget_and_never_passes_it(seconds, times):
    used, seen, taken = simulate(seconds, times)
    assert used <= seconds + 1e-9
    assert used + max(taken[-8:]) > seconds - 1e-9, "it stops only when the slowest recent step would pass the budget"
    assert seen[-1] == 1.0, "the last step ends every schedule"
    assert all(0.0 <= p <= 1.0 for p in seen)


@given(st.floats(10.0, 60.0), st.floats(0.01, 0.5))
def test_even_steps_make_even_progress(seconds, step_s):
    used, seen, _taken = simulate(seconds, [step_s])
    assert used >= seconds - 1.01 * step_s and seen == sorted(seen)
    for i, progress in enumerate(seen[1:-2], 1):
        assert progress == pytest.approx((i + 1) * step_s / seconds)


@given(st.floats(5.0, 60.0), speeds, st.floats(0.0, 0.8))
def test_a_resumed_clock_counts_what_was_used(seconds, times, share):
    assume(seconds * (1 - share) > 2)
    used, seen, _ = simulate(seconds, times, share * seconds)
    assert used <= seconds + 1e-9 and seen[-1] == 1.0


@given(st.integers(1, 200))
def test_a_counted_run_makes_its_steps_whatever_the_clock_says(n):
    budget = Budget(tiny_config(iterations=n, max_wallclock_seconds=0.1))
    for step in range(n):
        assert budget.progress(step, 1e6) == pytest.approx((step + 1) / n)
        budget.add_step(100.0)
    assert budget.progress(n - 1, 0.0) == 1.0 and budget.progress(n, 0.0) is None
