import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemify.paper.objectives import Schedule


def test_jump_and_ramp() -> None:
    jump = Schedule(max_steps=10, ntp_steps=3)
    assert [jump.alpha(s) for s in range(6)] == [0, 0, 0, 1, 1, 1]
    ramp = dataclasses.replace(jump, ramp_steps=4, alpha_final=0.8)
    assert [round(ramp.alpha(s), 6) for s in range(9)] == [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8]


def test_the_two_learning_rates_of_the_paper() -> None:
    paper = Schedule(max_steps=1000)
    assert paper.learning_rate(0) == pytest.approx(1e-4)
    assert paper.learning_rate(100) / paper.learning_rate(99) == pytest.approx(0.1, rel=1e-2)
    assert paper.learning_rate(500) == pytest.approx(0.5e-5)
    assert paper.learning_rate(1000) == pytest.approx(0.0, abs=1e-12)


def test_warm_up_is_linear() -> None:
    warm = Schedule(max_steps=10**6, warmup_steps=4, lr=1.0)
    assert [round(warm.learning_rate(s), 3) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@given(st.integers(1, 500), st.integers(0, 100), st.integers(0, 50), st.integers(0, 600))
def test_pure_and_bounded(max_steps: int, ntp: int, ramp: int, step: int) -> None:
    schedule = Schedule(max_steps=max_steps, ntp_steps=ntp, ramp_steps=ramp)
    assert schedule.alpha(step) == Schedule(max_steps=max_steps, ntp_steps=ntp, ramp_steps=ramp).alpha(step)
    assert 0.0 <= schedule.alpha(step) <= 1.0
    assert schedule.alpha(step) <= schedule.alpha(step + 1)
    assert 0.0 <= schedule.learning_rate(step) <= 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_steps": 0},
        {"ntp_steps": -1},
        {"alpha_final": 2.0},
        {"lr": 0.0},
        {"contrastive_lr": float("nan")},
        {"ramp_steps": -2},
    ],
)
def test_bad_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(**{"max_steps": 10, **wrong})  # type: ignore[arg-type]
