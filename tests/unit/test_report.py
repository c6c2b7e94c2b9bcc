from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from orpo_megatron.config import ConfigError
from orpo_megatron.report import write_report
from orpo_megatron.report.charts import Series, chart, number, percent, thin, ticks
from orpo_megatron.report.page import AUXILIARY_LOSSES
from orpo_megatron.report.run import read_metrics

REPORT = {
    "num_pairs": 8,
    "rows_read": 30,
    "num_truncated": 1,
    "files": ["<pairs>.jsonl"],
    "tokens": {part: {"mean": 12.5, "max": 1234, "total": 100} for part in ("prompt", "chosen", "rejected")},
    "bad_rows": [{"file": "<pairs>.jsonl", "line": i, "reason": "empty", "detail": "TEXT"} for i in range(1, 23)],
    "bad_row_counts": {"empty": 22},
}
PLAN = {"num_steps": 2, "pairs_per_step": 4, "epochs": 1.0, "rows_per_step": 3, "fill": 0.5, "longest_row": 10,
        "max_tokens_per_row": 64}  # fmt: skip
STEPS = [
    {"step": 0, "eval_loss": 3.5, "eval_rewards/accuracies": 0.25},
    {"step": 1, "loss": 3.0, "odds_ratio_loss": 0.5, "pairs": 4, "tokens": 1000, "seconds": 4.0},
    {"step": 2, "loss": 2.0, "odds_ratio_loss": 0.25, "pairs": 4, "tokens": 1500, "seconds": 2.0},
    {"step": 2, "eval_loss": 2.5, "eval_rewards/accuracies": 0.875},
]


def make_run(folder: Path, steps: list[dict[str, Any]] = STEPS, samples: Any = None, name: str = "a<b") -> Path:
    run = folder / name
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "recipe.yaml").write_text("orpo:\n  beta: 0.2\nmodel:\n  hf: owner/<model>\nrecord:\n  torch: '2.13'\n")
    (run / "data_report.json").write_text(json.dumps({"train": REPORT, "plan": PLAN}))
    if samples is not None:
        (run / "samples.json").write_text(json.dumps(samples))
    return run


def page_of(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def figure(page: str, title: str) -> str:
    return next(part for part in page.split("<figure>") if part.startswith(f"<h3>{title} "))


def tips(part: str) -> list[str]:
    return re.findall(r"<title>(.*?)</title>", part)


class Balance(html.parser.HTMLParser):
    """Checks that every element is closed, and collects what would be fetched."""

    EMPTY = {"meta", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [(tag, value) for key, value in attrs if key in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, samples=[{"prompt": "<p>", "before": "<b>&", "after": "\"'"}]))
    parser = Balance()
    parser.feed(page)
    assert parser.open == [] and parser.links == []
    assert "url(" not in page and "@import" not in page and "<script" not in page


def test_values_of_the_curves(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert tips(figure(page, "Loss")) == [
        "loss, step 1: 3", "loss, step 2: 2", "loss, held out, step 0: 3.5", "loss, held out, step 2: 2.5",
        "β · odds-ratio loss, step 1: 0.1", "β · odds-ratio loss, step 2: 0.05",
    ]  # fmt: skip
    assert tips(figure(page, "Odds-ratio loss"))[0] == "odds-ratio loss, step 1: 0.5"
    assert tips(figure(page, "Accuracy"))[-1] == "accuracy, held out, step 2: 87.5%"
    assert tips(figure(page, "Speed")) == ["tokens per second, step 1: 250", "tokens per second, step 2: 750"]
    assert "Not recorded in this run." in figure(page, "Margin")


def test_cards_prefer_held_out_figures(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert "<dt>Accuracy</dt><dd>87.5%</dd><p>held out, step 2<br>from 25% at step 0</p>" in page
    assert "<dt>Loss</dt><dd>2.5</dd><p>held out, step 2<br>from 3.5 at step 0</p>" in page
    assert "<dt>Odds-ratio loss</dt><dd>0.25</dd><p>training, step 2<br>from 0.5 at step 1</p>" in page
    assert "<dt>Margin</dt><dd>–</dd><p>not recorded</p>" in page
    assert "<dt>Tokens per second</dt><dd>500</dd><p>median over steps<br>2500 in 6.0 s</p>" in page
    assert "owner/&lt;model&gt; · β = 0.2 · 2 steps · 8 pairs seen" in page


def test_held_out_pairs_by_length(tmp_path: Path) -> None:
    """Buckets stand in the order of the file; the second knows no margin."""
    first = {"eval_rewards/accuracies/1-63": 0.5, "eval_logps/margins/1-63": -0.25, "eval_log_odds_chosen/1-63": 0.125,
             "eval_rewards/accuracies/1024-up": 0.75, "eval_pairs": 1500, "eval_pairs/1-63": 4,
             "eval_pairs/1024-up": 1496}  # fmt: skip
    second = first | {"eval_rewards/accuracies/1-63": 1.0, "eval_logps/margins/1-63": 0.5}
    page = page_of(make_run(tmp_path, [{"step": 0, **first}, {"step": 2, **second}]))
    rows = re.findall("<tr>(.*?)</tr>", page.split("<h2>Held-out pairs by length</h2>")[1].split("</table>")[0])
    cells = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in rows]
    assert cells == [
        ["Tokens of the longer response", "Pairs", "Accuracy", "Margin", "Log odds ratio"],
        ["1-63", "4", "100% (from 50%)", "0.5 (from −0.25)", "0.125 (from 0.125)"],
        ["1024-up", "1,496", "75% (from 75%)", "–", "–"],
    ]


def test_routers_and_skipped_steps_are_shown_where_there_are_any(tmp_path: Path) -> None:
    routed = [{"step": 1, "loss": 1.0, "z_loss": 0.5}, {"step": 2, "loss": 1.0, "z_loss": 0.25, "skipped": True}]
    page = page_of(make_run(tmp_path, routed))
    assert tips(figure(page, "Routers of the experts")) == ["z-loss, step 1: 0.5", "z-loss, step 2: 0.25"]
    assert "The optimizer skipped 1 step without finite gradients, the first at step 2." in page
    plain = page_of(make_run(tmp_path, name="plain"))
    assert "Routers" not in plain and "skipped" not in plain and "by length" not in plain


def test_routers_are_shown_under_the_names_of_metrics() -> None:
    from orpo_megatron import metrics

    assert set(AUXILIARY_LOSSES) == set(metrics.AUXILIARY_LOSSES)


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    page = page_of(make_run(tmp_path, samples=[{"prompt": evil, "before": evil, "after": evil}]))
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    assert "<pairs>" not in page and "<h1>a&lt;b</h1>" in page


def test_unusable_rows_are_named_and_not_shown(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert "Unusable rows of train: 22 empty" in page and "and 2 more in data_report.json" in page
    assert "<td>20</td><td>empty</td>" in page and "<td>21</td>" not in page
    assert "TEXT" not in page


def test_data_plan_and_recipe(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert "<td>Pairs</td><td>8</td>" in page and "<td>12.5 (longest 1,234)</td>" in page
    assert "2 steps of 4 pairs, 1.00 epochs" in page and "3 rows, 50% full, the longest 10 of 64 tokens" in page
    recipe, record = page.split("<h2>Recipe</h2>")[1].split("<details>")
    assert "beta: 0.2" in recipe and "torch" not in recipe and "torch: &#x27;2.13&#x27;" in record


def test_one_step_is_a_dot(tmp_path: Path) -> None:
    part = figure(page_of(make_run(tmp_path, STEPS[1:2])), "Loss")
    assert tips(part) == ["loss, step 1: 3", "β · odds-ratio loss, step 1: 0.1"]
    assert part.count('class="mark ') == 2


def test_values_that_are_not_finite_leave_a_gap_and_a_warning(tmp_path: Path) -> None:
    losses = [3.0, 2.0, math.nan, None, 1.0, 0.5]
    page = page_of(make_run(tmp_path, [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]))
    assert "2 values are not finite, the first at step 3 (loss)." in page
    part = figure(page, "Loss")
    assert len(tips(part)) == 4 and "nan" not in part
    path = re.search(r'class="line c0" d="(.*?)"', part)
    assert path is not None and re.findall("[ML]", path.group(1)) == ["M", "L", "M", "L"]


def test_nothing_but_broken_values(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, [{"step": 1, "loss": math.inf}]))
    assert "1 value is not finite" in page and "Not recorded in this run." in figure(page, "Loss")


def test_capped_pairs_are_pointed_out(tmp_path: Path) -> None:
    steps = [{"step": i, "loss": 1.0, "capped_pairs": share} for i, share in enumerate([0.0, 0.0625, 0.0])]
    assert "Up to 6.25% of a step&#x27;s pairs" in page_of(make_run(tmp_path, steps))


def test_long_curves_are_averaged_and_say_so(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, [{"step": i, "loss": float(i % 2)} for i in range(1, 601)]))
    assert "the mean of 2 steps" in page
    assert tips(figure(page, "Loss"))[:2] == ["loss, step 2: 0.5", "loss, step 4: 0.5"]
    assert "<b>0</b>" in figure(page, "Loss")


def test_thin() -> None:
    few = [(1.0, 2.0), (2.0, 3.0)]
    assert thin(Series("x", few)) == few
    broken = [(float(i), math.nan if i % 2 else 4.0) for i in range(600)]
    assert thin(Series("x", broken))[:2] == [(0.0, 4.0), (2.0, 4.0)]
    evaluations = [(float(i), float(i)) for i in range(100)]
    kept = thin(Series("x", evaluations, held_out=True))
    assert kept[:2] == [(0.0, 0.0), (3.0, 3.0)] and kept[-1] == (99.0, 99.0) and len(kept) == 34


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 5}\n{"step": 1, "loss": 4}\n{"step": 2, "loss": 3}\n')
    assert read_metrics(path) == {"loss": [(1, 4.0), (2, 3.0)]}


@pytest.mark.parametrize("line", ['{"loss": 1}', "[1]", '{"step": 2, "lo'])
def test_broken_metrics_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 4}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2, "):
        read_metrics(path)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 4}\n{"step": 2, "lo')
    assert read_metrics(path) == {"loss": [(1, 4.0)]}


def test_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe.yaml does not exist"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "count", "whole", "expected"),
    [
        (0.0, 3.0, 5, False, [0, 1, 2, 3]),
        (0.1, 0.9, 4, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.13, 1.16, 5, False, [-0.5, 0, 0.5, 1.0, 1.5]),
        (1, 3, 6, True, [1, 2, 3]),
        (1, 40, 6, True, [0, 10, 20, 30, 40]),
        (0.0, 2e-5, 4, False, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
    ],
)
def test_ticks(low: float, high: float, count: int, whole: bool, expected: list[float]) -> None:
    assert ticks(low, high, count, whole) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05213, "0.05213"), (-1.5, "−1.5"), (5e-6, "5e−6"), (4.25e-6, "4.25e−6"), (9999, "9999"),
     (12345, "12.3k"), (2_500_000, "2.5M"), (-3e9, "−3G"), (math.inf, "∞"), (math.nan, "not a number")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_percent() -> None:
    assert percent(0.875) == "87.5%" and percent(1.0) == "100%"


def test_chart_positions_by_hand() -> None:
    # Plot area: x 58 to 540 for steps 0 to 10, y 212 to 12 for values 0 to 1.
    points = [(0.0, 0.0), (5.0, 0.5), (10.0, 1.0)]
    drawing = chart("T", "u", [Series("s", points)])
    assert 'd="M58.0 212.0L299.0 112.0L540.0 12.0"' in drawing
    ElementTree.fromstring(drawing)


def test_equal_values_lie_inside_the_chart() -> None:
    drawing = chart("T", "u", [Series("s", [(1.0, 2.0), (2.0, 2.0)]), Series("z", [(1.0, 2.0)])])
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawing)]
    assert len(heights) == 3 and all(12 <= y <= 212 for y in heights)
    assert 'd="M58.0 112.0' in chart("T", "u", [Series("s", [(1.0, 0.5), (2.0, 0.5)])], bounds=(0, 1))
