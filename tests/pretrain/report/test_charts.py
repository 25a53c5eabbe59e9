"""Charts and the words beside them: round ticks, honest smoothing, numbers as said, secrets hidden."""

from __future__ import annotations

import math
import re

import pytest

from ringweave.pretrain.report.line_charts import loss_chart
from ringweave.pretrain.report.plot import Series
from ringweave.pretrain.report.safe_text import redact
from ringweave.pretrain.report.scales import nice_ticks, smooth
from ringweave.pretrain.report.words import context_name, number, short


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1.11e6), (1.4, 7.2), (0, 3.3e-4), (-2, 7), (0, 17)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= t <= high * (1 + 1e-9) for t in ticks)
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6


def test_first_steps_do_not_squash_the_loss_chart() -> None:
    xs = [float(i) for i in range(1, 201)]
    ys = [9.0 * math.exp(-i / 2) + 2.0 + 0.5 * math.exp(-i / 60) for i in range(200)]
    chart = loss_chart([Series("text", xs, ys)], [], [])
    ticks = [float(v) for v in re.findall(r'text-anchor="end">([\d.]+)</text>', chart)]
    assert max(ticks) < 4
    assert "first step: up to 11.5" in chart


def test_long_runs_are_drawn_with_few_points() -> None:
    n = 50_000
    chart = loss_chart([Series("text", range(1, n + 1), [3.0 + i % 7 for i in range(n)])], [], [])
    assert len(chart) < 30_000


def test_smoothing_keeps_a_constant_and_the_first_value() -> None:
    assert smooth([2.0] * 30, [1.0] * 30, 4) == pytest.approx([2.0] * 30)
    falling = [10.0 - i for i in range(10)]
    assert smooth(falling, [1.0] * 10, 3)[0] == 10.0


@pytest.mark.parametrize(
    ("value", "want"),
    [(0, "0"), (3.1e-6, "3.1e-6"), (1e-6, "1e-6"), (4.3561, "4.356"), (None, "–"), (-2.5, "-2.500")],
)
def test_number(value: float | None, want: str) -> None:
    assert number(value) == want


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (950, "950"),
        (1000, "1 K"),
        (999_900, "1 M"),
        (1_105_860, "1.11 M"),
        (4_812_544, "4.81 M"),
        (12.34, "12.3"),
    ],
)
def test_short(value: float, want: str) -> None:
    assert short(value) == want


def test_context_names() -> None:
    assert [context_name(n) for n in (512, 4096, 1 << 20, 1000, None)] == [
        "512",
        "4K",
        "1M",
        "1000",
        "?",
    ]


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("s3 https://u:p@h/x?sig=AA&v=1", "s3 https://[redacted]@h/x?sig=[redacted]&v=1"),
        ("?X-Amz-Credential=k/20260101&X-Amz-Date=1", "?X-Amz-Credential=[redacted]&X-Amz-Date=[redacted]"),
        ("https://h/x?token=abc", "https://h/x?token=[redacted]"),
        ("password: 12345678", "password: [redacted]"),
        ("{api_key: 'a b', lr: 3e-4}", "{api_key: [redacted], lr: 3e-4}"),
        ("Authorization: Bearer abc.def", "Authorization: [redacted]"),
        ("tokens: 400K", "tokens: 400K"),
        ("token: null", "token: null"),
        ("bos_token: <s>", "bos_token: <s>"),
    ],
)
def test_redact(line: str, want: str) -> None:
    assert redact(line) == want


def test_redacting_a_long_word_is_quick() -> None:
    assert redact("a" * 200_000) == "a" * 200_000
