from __future__ import annotations

import pytest

from bridge.pool.meter import INTERVAL, Meter, Reading
from bridge.pool.programs import Progress


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Course:
    """A meter on a clock of its own."""

    def __init__(self, total: int | None = 1000, phase: str = "download") -> None:
        self.clock = Clock()
        self.meter = Meter(self.clock)
        self.total = total
        self.phase = phase

    def at(self, seconds: float, done: int) -> Reading | None:
        self.clock.now = 1000.0 + seconds
        return self.meter.read(Progress(self.phase, done, self.total, "bytes"))


def test_the_rate_and_what_is_left() -> None:
    course = Course()
    first = course.at(0, 100)
    assert first == Reading(None, None)
    assert course.at(1, 300) == Reading(200.0, 3.5)


def test_what_was_there_before_is_no_speed() -> None:
    course = Course(total=10**10)
    course.at(0, 9 * 10**9)
    reading = course.at(1, 9 * 10**9 + 1000)
    assert reading is not None
    assert reading.rate == 1000.0


def test_between_two_readings_there_is_time() -> None:
    course = Course(total=10_000)
    given = [course.at(step / 100, step) for step in range(101)]
    assert 1 < sum(reading is not None for reading in given) <= 1 + 1 / INTERVAL


def test_the_last_one_of_a_phase_is_always_given() -> None:
    course = Course()
    course.at(0, 0)
    assert course.at(0.001, 999) is None
    reading = course.at(0.002, 1000)
    assert reading is not None
    assert reading.seconds_left == 0.0


def test_another_phase_is_given_at_once_and_measured_anew() -> None:
    course = Course()
    course.at(0, 0)
    course.at(1, 900)
    course.phase = "check"
    assert course.at(1.001, 950) == Reading(None, None)


def test_beginning_anew_is_no_negative_speed() -> None:
    course = Course()
    course.at(0, 0)
    course.at(1, 500)
    reading = course.at(1.01, 0)
    assert reading is not None
    assert reading.rate is None


def test_bursts_are_smoothed() -> None:
    course = Course(total=None)
    readings = [course.at(second, second // 2 * 200) for second in range(60)]  # 200 in every other second
    rates = [reading.rate for reading in readings[30:] if reading and reading.rate is not None]
    assert len(rates) == 30
    assert max(rates) - min(rates) < 50
    assert sum(rates) / len(rates) == pytest.approx(100, rel=0.05)


def test_without_a_total_or_at_a_standstill_nobody_knows_how_long() -> None:
    course = Course(total=None)
    course.at(0, 0)
    reading = course.at(1, 100)
    assert reading is not None
    assert (reading.rate, reading.seconds_left) == (100.0, None)
    course = Course()
    course.at(0, 0)
    reading = course.at(1, 0)
    assert reading is not None
    assert (reading.rate, reading.seconds_left) == (0.0, None)


def test_a_clock_that_stands_still_divides_nothing() -> None:
    course = Course()
    course.at(0, 0)
    assert course.at(0, 1000) == Reading(None, None)
