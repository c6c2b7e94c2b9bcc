"""The report's page: what stands where. Everything from outside is escaped."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from orpo_megatron.report.charts import Point, Series, chart, number, percent, steps_per_point
from orpo_megatron.report.run import EVAL_PREFIX, RunRecord

STYLE = Path(__file__).with_name("style.css")
BAD_ROWS_SHOWN = 20

#: What routers add to the loss, by the names of metrics.py, which would load PyTorch for a page of text.
AUXILIARY_LOSSES = {
    "load_balancing_loss": "load balancing",
    "seq_load_balancing_loss": "load balancing of sequences",
    "global_load_balancing_loss": "global load balancing",
    "z_loss": "z-loss",
}


def page(run: RunRecord) -> str:
    """Returns the whole report as one HTML document that needs nothing else."""
    figures = [_header(run), _warnings(run), _cards(run), _charts(run), _lengths(run)]
    sections = [*figures, _samples(run), _data(run), _recipe(run)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(run.name)} · ORPO run</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n"
        "</head>\n<body>\n<main>\n" + "\n".join(part for part in sections if part) + "\n</main>\n</body>\n</html>\n"
    )


def _header(run: RunRecord) -> str:
    """Names the run and says in one line what was trained."""
    steps = [x for x, _ in run.points("loss")]
    pairs = sum(y for _, y in run.points("pairs") if math.isfinite(y))
    facts = [
        run.recipe.get("model", {}).get("hf"),
        f"β = {run.beta:g}",
        f"{len(steps):,} {'step' if len(steps) == 1 else 'steps'}",
        f"{pairs:,.0f} pairs seen" if pairs else None,
    ]
    line = " · ".join(html.escape(str(fact)) for fact in facts if fact)
    return f"<header><p class='kind'>ORPO run</p><h1>{html.escape(run.name)}</h1><p>{line}</p></header>"


def _warnings(run: RunRecord) -> str:
    """Names what a reader must not overlook: skipped steps, values that are not finite, log-probs that were capped."""
    notes = []
    skipped = run.points("skipped")
    if skipped:
        steps = "1 step" if len(skipped) == 1 else f"{len(skipped):,} steps"
        notes.append(f"The optimizer skipped {steps} without finite gradients, the first at step {skipped[0][0]:g}.")
    broken = [(x, name) for name, points in run.metrics.items() for x, y in points if not math.isfinite(y)]
    if broken:
        step, name = min(broken)
        values = "1 value is" if len(broken) == 1 else f"{len(broken):,} values are"
        notes.append(f"{values} not finite, the first at step {step:g} ({name}). The curves have gaps there.")
    capped = max((y for _, y in run.points("capped_pairs")), default=0.0)
    if capped > 0:
        notes.append(f"Up to {percent(capped)} of a step's pairs had a side so probable that its odds were capped.")
    return "".join(f'<p class="warning">{html.escape(note)}</p>' for note in notes)


def _cards(run: RunRecord) -> str:
    """Shows the closing figures: held-out ones where there are any, with where they started."""
    rows = [
        ("Accuracy", "rewards/accuracies", percent),
        ("Margin", "logps/margins", number),
        ("Loss", "loss", number),
        ("NLL", "nll_loss", number),
        ("Odds-ratio loss", "odds_ratio_loss", number),
    ]
    cards: list[tuple[str, str, list[str]]] = []
    for title, name, show in rows:
        train, held_out = _finite(run.points(name)), _finite(run.points(EVAL_PREFIX + name))
        points = held_out or train
        if not points:
            cards.append((title, "–", ["not recorded"]))
            continue
        notes = [f"{'held out' if held_out else 'training'}, step {points[-1][0]:g}"]
        if len(points) > 1:
            notes.append(f"from {show(points[0][1])} at step {points[0][0]:g}")
        cards.append((title, show(points[-1][1]), notes))
    speeds = _speeds(run)
    if speeds:
        tokens, seconds = (sum(y for _, y in _finite(run.points(name))) for name in ("tokens", "seconds"))
        notes = ["median over steps", f"{number(tokens)} in {_duration(seconds)}"]
        cards.append(("Tokens per second", number(statistics.median(y for _, y in speeds)), notes))
    body = "".join(
        f"<div><dt>{html.escape(title)}</dt><dd>{value}</dd><p>{'<br>'.join(map(html.escape, notes))}</p></div>"
        for title, value, notes in cards
    )
    return f'<dl class="cards">{body}</dl>'


def _charts(run: RunRecord) -> str:
    """Draws every curve."""
    weighted = [(x, run.beta * y) for x, y in run.points("odds_ratio_loss")]
    figures = [
        chart(
            "Loss",
            "nats",
            [
                *_both(run, "loss", "loss", 0),
                Series("NLL", run.points("nll_loss"), 1),
                Series("β · odds-ratio loss", weighted, 2),
            ],
            bounds=(0, None),
        ),
        chart(
            "Log-probability of the responses",
            "nats per token",
            [*_both(run, "logps/chosen", "chosen", 0), *_both(run, "logps/rejected", "rejected", 1)],
        ),
        chart("Margin", "chosen − rejected, nats per token", _both(run, "logps/margins", "margin", 0)),
        chart("Accuracy", "pairs with chosen above rejected", _both(run, "rewards/accuracies", "accuracy", 0), percent,
              (0, 1)),
        chart("Odds-ratio loss", "−log σ(log odds ratio), nats", _both(run, "odds_ratio_loss", "odds-ratio loss", 2)),
        chart("Gradient norm", "before clipping", [Series("gradient norm", run.points("grad_norm"), 3)],
              bounds=(0, None)),
        chart("Learning rate", "", [Series("learning rate", run.points("learning_rate"), 3)], bounds=(0, None)),
        chart("Speed", "tokens per second", [Series("tokens per second", _speeds(run), 3)], bounds=(0, None)),
    ]  # fmt: skip
    routers = [Series(title, run.points(name), color) for color, (name, title) in enumerate(AUXILIARY_LOSSES.items())]
    recorded = [series for series in routers if series.points]
    if recorded:
        figures.append(chart("Routers of the experts", "losses without their coefficients", recorded))
    size = steps_per_point(run.points("loss"))
    note = f"<p>Each point of a training curve is the mean of {size:,} steps.</p>" if size > 1 else ""
    return f'<section><h2>Curves</h2>{note}<div class="charts">{"".join(figures)}</div></section>'


def _lengths(run: RunRecord) -> str:
    """Sets held-out pairs of each length side by side: how the last evaluation found them, and where they started."""
    counts = f"{EVAL_PREFIX}pairs/"
    buckets = [name.removeprefix(counts) for name in run.metrics if name.startswith(counts)]
    if not buckets:
        return ""
    columns = [
        ("Accuracy", "rewards/accuracies", percent),
        ("Margin", "logps/margins", number),
        ("Log odds ratio", "log_odds_chosen", number),
    ]
    rows = []
    for bucket in buckets:
        cells = [bucket, f"{run.points(counts + bucket)[-1][1]:,.0f}"]
        for _, name, show in columns:
            values = [show(y) for _, y in _finite(run.points(f"{EVAL_PREFIX}{name}/{bucket}"))]
            cells.append((f"{values[-1]} (from {values[0]})" if len(values) > 1 else values[0]) if values else "–")
        rows.append(cells)
    table = _table(["Tokens of the longer response", "Pairs", *(title for title, *_ in columns)], rows)
    return f"<section><h2>Held-out pairs by length</h2>{table}</section>"


def _samples(run: RunRecord) -> str:
    """Sets answers before and after training side by side."""
    if not run.samples:
        return ""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(sample[name])}</td>" for name in ("prompt", "before", "after")) + "</tr>"
        for sample in run.samples
    )
    return (
        '<section><h2>Samples</h2><table class="samples"><thead><tr><th>Prompt</th><th>Before</th><th>After</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></section>"
    )


def _data(run: RunRecord) -> str:
    """Counts rows and tokens, and names unusable rows by place and reason, never by content."""
    reports: dict[str, dict[str, Any]] = {role: run.data[role] for role in ("train", "eval") if role in run.data}
    lines = [
        ("Pairs", [f"{report['num_pairs']:,}" for report in reports.values()]),
        ("Rows read", [f"{report['rows_read']:,}" for report in reports.values()]),
        ("Truncated pairs", [f"{report['num_truncated']:,}" for report in reports.values()]),
        ("Unusable rows", [f"{len(report['bad_rows']):,}" for report in reports.values()]),
    ]
    for part in ("prompt", "chosen", "rejected"):
        lengths = [report["tokens"][part] for report in reports.values()]
        lines.append((f"Tokens of {part}", [f"{length['mean']:g} (longest {length['max']:,})" for length in lengths]))
    lines.append(("Files", [", ".join(report["files"]) for report in reports.values()]))
    titles = {"train": "Training", "eval": "Held out"}
    table = _table(["", *(titles[role] for role in reports)], [[name, *values] for name, values in lines])
    return f"<section><h2>Data</h2>{table}{_plan(run.data.get('plan'))}{''.join(_bad_rows(reports))}</section>"


def _plan(plan: dict[str, Any] | None) -> str:
    """Says in a sentence how pairs became packed rows."""
    if plan is None:
        return ""
    return (
        f"<p>{plan['num_steps']:,} steps of {plan['pairs_per_step']:,} pairs, {plan['epochs']:.2f} epochs; each step "
        f"is packed into {plan['rows_per_step']:,} rows, {percent(plan['fill'])} full, the longest "
        f"{plan['longest_row']:,} of {plan['max_tokens_per_row']:,} tokens.</p>"
    )


def _bad_rows(reports: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lists the first unusable rows of each file set."""
    for role, report in reports.items():
        bad = report["bad_rows"]
        if not bad:
            continue
        counts = ", ".join(f"{count:,} {reason}" for reason, count in report["bad_row_counts"].items())
        table = _table(
            ["File", "Line", "Reason"],
            [[row["file"], f"{row['line']:,}", row["reason"]] for row in bad[:BAD_ROWS_SHOWN]],
        )
        more = (
            f"<p>and {len(bad) - BAD_ROWS_SHOWN:,} more in data_report.json</p>" if len(bad) > BAD_ROWS_SHOWN else ""
        )
        summary = html.escape(f"Unusable rows of {role}: {counts}")
        yield f"<details><summary>{summary}</summary>{table}{more}</details>"


def _recipe(run: RunRecord) -> str:
    """Prints the resolved recipe and what the run recorded."""
    blocks = [f"<pre>{html.escape(_yaml(run.recipe))}</pre>"]
    if run.record:
        recorded = html.escape(_yaml(run.record))
        blocks.append(f"<details><summary>Versions and other records</summary><pre>{recorded}</pre></details>")
    return f"<section><h2>Recipe</h2>{''.join(blocks)}</section>"


def _both(run: RunRecord, name: str, label: str, color: int) -> list[Series]:
    """Returns a metric's training curve and its held-out one."""
    return [
        Series(label, run.points(name), color),
        Series(f"{label}, held out", run.points(EVAL_PREFIX + name), color, held_out=True),
    ]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _speeds(run: RunRecord) -> list[Point]:
    """Returns tokens per second of each step."""
    seconds = dict(_finite(run.points("seconds")))
    return [(x, tokens / seconds[x]) for x, tokens in _finite(run.points("tokens")) if seconds.get(x)]


def _duration(seconds: float) -> str:
    """Writes a time as ``1 h 02 min`` or ``3 min 04 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
