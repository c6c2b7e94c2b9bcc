"""What a terminal shows and what goes to the log file."""

import io
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from orpo_megatron import console
from orpo_megatron.console import Progress, logged_to, rank, say, tell_torchrun

FIGURES = {"loss": 1.23456, "logps/margins": -0.25, "rewards/accuracies": 0.5, "tokens": 6000, "seconds": 2.0}
IN_WORDS = "loss 1.2346  margin -0.250  accuracy 0.50  3,000 tok/s"


def run_steps(progress: Progress, monkeypatch: pytest.MonkeyPatch, seconds_per_step: float, last: int) -> None:
    """Takes steps up to ``last`` by a clock that advances by so many seconds a step."""
    now = progress.started
    for step in range(progress.first_step + 1, last + 1):
        now += seconds_per_step
        monkeypatch.setattr(console.time, "monotonic", lambda now=now: now)
        progress.step(step, FIGURES)


def test_a_plain_line_has_every_figure_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    run_steps(Progress("auto", 4, 10, stream), monkeypatch, 90.0, last=5)
    # One step took 90 s, five are left: 450 s.
    assert stream.getvalue() == f"step 5/10  {IN_WORDS}  07:30 left\n"


def test_plain_lines_come_at_the_first_and_last_step_and_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    run_steps(Progress("plain", 0, 14, stream), monkeypatch, 3.0, last=14)
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in stream.getvalue().splitlines()]
    # Seconds 3, then 15 (12 later), 27, 39, and the last step at 42.
    assert steps == [1, 5, 9, 13, 14]
    assert stream.getvalue().splitlines()[-1].endswith("00:00 left")


def test_an_evaluation_is_one_line() -> None:
    stream = io.StringIO()
    Progress("plain", 0, 5, stream).evaluation(3, FIGURES)
    assert stream.getvalue() == "evaluation at step 3: loss 1.2346  margin -0.250  accuracy 0.500\n"


def test_none_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    progress = Progress("none", 0, 3, stream)
    run_steps(progress, monkeypatch, 20.0, last=3)
    progress.evaluation(3, FIGURES)
    progress.close()
    assert stream.getvalue() == ""


def test_a_terminal_shows_one_bar_with_the_figures_and_the_time_left() -> None:
    leader, follower = os.openpty()
    seen = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(leader, 4096):
                seen.extend(chunk)
        except OSError:  # the other end was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as terminal:
        progress = Progress("auto", 1, 4, terminal)
        for step in (2, 3):
            time.sleep(0.11)  # tqdm draws ten times a second at most
            progress.step(step, FIGURES)
        progress.evaluation(3, FIGURES)
        progress.step(4, FIGURES)
        progress.close()
    reader.join(timeout=5)
    os.close(leader)
    text = seen.decode()
    states = [part.strip() for part in re.split(r"[\r\n]+", text) if "%|" in part]
    for count, share in ((2, "50%"), (3, "75%"), (4, "100%")):
        drawn = [state for state in states if f" {count}/4 [" in state and IN_WORDS in state]
        assert drawn and all(state.startswith(share) and re.search(r"\[00:00<00:00\b", state) for state in drawn)
    assert text.count("evaluation at step 3: loss 1.2346  margin -0.250  accuracy 0.500") == 1
    assert "step 2/4" not in text  # no plain lines beside the bar


def test_logged_to_moves_prints_warnings_and_old_and_new_log_handlers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", terminal)
    logger = logging.getLogger("test_console.old")
    logger.propagate = False
    old = logging.StreamHandler(terminal)  # as a library that took hold of the real stream at import
    logger.addHandler(old)
    new_logger = logging.getLogger("test_console.new")
    new_logger.propagate = False
    path = tmp_path / "logs" / "rank_0.txt"
    stdout, stderr = sys.stdout, sys.stderr
    try:
        with logged_to(path):
            print("a print")
            logger.warning("an old handler")
            new = logging.StreamHandler()
            new_logger.addHandler(new)
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = warnings._showwarning_orig  # type: ignore[attr-defined]  # not pytest's
                warnings.warn("a warning", stacklevel=1)
            say("for the terminal")
        logger.warning("after")
        new_logger.warning("a handler made inside goes on")
    finally:
        logger.removeHandler(old)
        new_logger.handlers.clear()
    assert (sys.stdout, sys.stderr, old.stream) == (stdout, stderr, terminal)
    assert terminal.getvalue() == "for the terminal\nafter\n"
    text = path.read_text()
    for part in ("a print\n", "an old handler\n", "UserWarning: a warning\n", "a handler made inside goes on\n"):
        assert part in text
    new.stream.close()


def test_logged_to_restores_everything_after_an_error_and_appends(tmp_path: Path) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    path = tmp_path / "log.txt"
    stdout, stderr = sys.stdout, sys.stderr
    try:
        for number in (1, 2):
            with pytest.raises(KeyError), logged_to(path):
                print(f"run {number}")
                assert handler.stream is sys.stderr is not stderr
                raise KeyError
            assert (sys.stdout, sys.stderr, handler.stream) == (stdout, stderr, stderr)
    finally:
        logging.getLogger().removeHandler(handler)
    assert path.read_text() == "run 1\nrun 2\n"


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", terminal)
    monkeypatch.delenv("RANK", raising=False)
    assert rank() == 0
    say("alone")
    monkeypatch.setenv("RANK", "3")
    assert rank() == 3
    say("from rank 3")
    assert terminal.getvalue() == "alone\n"


def test_torchrun_finds_the_message_where_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.api import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    before = int(time.time())
    tell_torchrun("orpo.bta is not a setting — \"β\".\nDid you mean 'beta'?")
    message = json.loads(path.read_text())["message"]
    assert message["message"] == "orpo.bta is not a setting — \"β\".\nDid you mean 'beta'?"
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    assert failure.message == message["message"]
    assert before <= failure.timestamp <= time.time()


def test_without_torchrun_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    tell_torchrun("nothing")
    assert list(tmp_path.iterdir()) == []
