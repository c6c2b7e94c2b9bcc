"""What a terminal shows and what goes to the log file."""

import fcntl
import io
import json
import logging
import os
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from pathlib import Path

import pytest

from orpo_megatron import console
from orpo_megatron.console import ByteProgress, Progress, logged_to, rank, report_error, say

FIGURES = {"loss": 1.23456, "logps/margins": -0.25, "rewards/accuracies": 0.5, "tokens": 6000, "seconds": 2.0}
IN_WORDS = "loss 1.235  margin -0.250  accuracy 0.50  3,000 tok/s"


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


def test_bytes_are_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), iter(range(0, 25, 3))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with ByteProgress("Writing", 8 * 10**9, stream) as progress:
        for _ in range(8):
            progress.add(10**9)
    # Seconds 3, 6, 9, 12, 15, 18, 21, 24: lines at 12 and 24.
    assert stream.getvalue() == "Writing 4.0 of 8.0 GB\nWriting 8.0 of 8.0 GB\n"


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


def test_a_terminal_without_a_width_gets_plain_lines() -> None:
    leader, follower = os.openpty()  # 0 columns
    with os.fdopen(follower, "w") as terminal:
        progress = Progress("auto", 0, 4, terminal)
        progress.step(1, FIGURES)
        terminal.flush()
        assert os.read(leader, 4096).decode().startswith(f"step 1/4  {IN_WORDS}")
    os.close(leader)


def test_a_terminal_shows_one_bar_with_the_figures_and_the_time_left() -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # 24 lines of 80 columns
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
    states = re.split(r"[\r\n]+", text)
    for count in (2, 3, 4):
        drawn = [state for state in states if state.startswith(f"{count}/4 |")]
        assert drawn and all(state.endswith(f"| 00:00 left, {IN_WORDS}") for state in drawn)
    assert text.count("evaluation at step 3: loss 1.2346  margin -0.250  accuracy 0.500") == 1
    assert "step 2/4" not in text  # no plain lines beside the bar


LOGGED = """
    import logging, pathlib, sys, warnings
    from orpo_megatron.console import logged_to, say

    old, new = logging.getLogger("old"), logging.getLogger("new")
    old.addHandler(logging.StreamHandler(sys.__stderr__))  # as a library that takes hold of the stream at import
    print("before")
    with logged_to(pathlib.Path(sys.argv[1])):
        print("a print")
        old.warning("an old handler")
        new.addHandler(logging.StreamHandler())
        warnings.warn("a warning")
        say("for the terminal")
    print("after")
    old.warning("an old handler, after")
    new.warning("a new handler, after")
    sys.exit("at the end")
"""


def test_logged_to_moves_prints_warnings_and_old_and_new_log_handlers(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rank_0.txt"
    command = [sys.executable, "-c", textwrap.dedent(LOGGED), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "before\nafter\n"
    assert done.stderr == "for the terminal\nan old handler, after\nat the end\n"
    lines = path.read_text().splitlines()
    assert ["UserWarning: a warning" in line for line in lines].count(True) == 1
    assert [line for line in lines if "UserWarning" not in line] == [
        "a print",
        "an old handler",
        "a new handler, after",
    ]


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
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    before = int(time.time())
    report_error("orpo.bta is not a setting — \"β\".\nDid you mean 'beta'?")
    message = json.loads(path.read_text())["message"]
    assert message["message"] == "orpo.bta is not a setting — \"β\".\nDid you mean 'beta'?"
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    assert message["message"] in str(ChildFailedError("train", {0: failure})).replace("\n  ", "\n")
    assert before <= failure.timestamp <= time.time()


def test_without_torchrun_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    report_error("nothing")
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_let_rank_0_speak_first(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(console.time, "sleep", waited.append)
    for number, expected in ((0, []), (1, [console.GRACE_SECONDS])):
        monkeypatch.setenv("RANK", str(number))
        report_error("orpo.bta is not a setting.")
        assert waited == expected
    assert capfd.readouterr().err == "error: orpo.bta is not a setting.\n"


@pytest.mark.parametrize("each_node", [False, True])
def test_of_several_nodes_the_first_leaves_last(
    each_node: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(console.time, "sleep", waited.append)
    for number in range(4):
        for name, value in {"RANK": number, "LOCAL_RANK": number % 2, "GROUP_RANK": number // 2}.items():
            monkeypatch.setenv(name, str(value))
        report_error(f"said by {number}", each_node=each_node)
    assert waited == [console.GRACE_SECONDS] * 2 + [console.OTHER_NODE_SECONDS] * 2
    # Where rank 0 may be gone, the first rank of each node speaks.
    assert capfd.readouterr().err == "error: said by 0\n" + ("error: said by 2\n" if each_node else "")
