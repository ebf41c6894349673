"""The watchdog over steps, and the logs of processes."""

import ctypes
import os
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from genlora_jax.training import host_log, pace, processes
from genlora_jax.training.pace import Watchdog


@pytest.fixture
def watchdog(monkeypatch):
    """One that has seen steps of a hundredth of a second, and waits for 0.2 s."""
    monkeypatch.setattr(pace, "SHORTEST", 0.2)
    monkeypatch.setattr(pace, "GIL_SECONDS", 0.2)
    return used_to(0.01)


def used_to(seconds):
    """A watchdog that has seen steps of so many seconds."""
    found = Watchdog()
    for step in range(pace.FEWEST):
        with found.step(step):
            time.sleep(seconds)
    return found


def hang(seconds):
    time.sleep(seconds)


def test_a_hung_step_shows_the_stacks_of_all_threads_once(watchdog, capfd):
    def read_rows():
        hang(0.8)

    with watchdog.step(77):
        reader = threading.Thread(target=read_rows)
        reader.start()
        reader.join()
    err = capfd.readouterr().err
    assert err.count("step 77 has not ended after 0 s, process 0 of 1 on") == 1
    assert "in hang" in err
    assert "in read_rows" in err
    assert "in test_a_hung_step_shows" in err
    assert "Timeout" not in err  # that is for the next
    with watchdog.step(78):
        pass
    time.sleep(0.5)
    assert capfd.readouterr().err == ""


def test_a_step_that_hangs_outside_python_shows_them_as_well(watchdog, capfd):
    with watchdog.step(78):
        ctypes.PyDLL(None).usleep(800_000)  # which keeps Python's lock
    err = capfd.readouterr().err
    assert "Timeout (0:00:00.4" in err
    assert "in test_a_step_that_hangs_outside" in err
    # The timer gets the lock at last, and may speak before it is stopped: not in the next test.
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


def test_what_hangs_before_any_step_is_usual_and_what_is_ten_times_it_are_told_apart(
    capfd, monkeypatch
):
    monkeypatch.setattr(pace, "SHORTEST", 0.0)
    watchdog = used_to(0.1)
    with watchdog.step(11):
        time.sleep(0.3)  # three times the median
    fresh = Watchdog()
    with fresh.step(1):  # compiles
        time.sleep(0.3)
    assert capfd.readouterr().err == ""
    with watchdog.step(12):
        time.sleep(1.5)
    assert "step 12 has not ended" in capfd.readouterr().err


SPEAKER = """
import os, sys
from genlora_jax.training.host_log import keep_log

keep_log({place!r}, "process 1 of 2")
print("of Python")
sys.stderr.write("cut ")
sys.stderr.flush()
os.write(2, b"in two\\n")
print("no end of line", end="", flush=True)
{last}
"""


def speak(tmp_path, last, scheme=""):
    place = tmp_path / "logs" / "process-1.log"
    code = SPEAKER.format(place=f"{scheme}{place}", last=last)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    log = place.read_text()
    return done, [line[len("2026-01-01 00:00:00 ") :] for line in log.splitlines()]


def test_a_log_has_what_a_process_said_also_when_it_is_started_again(tmp_path):
    done, lines = speak(tmp_path, "sys.exit(3)")
    assert (done.returncode, done.stdout, done.stderr) == (
        3,
        "of Python\nno end of line",
        "cut in two\n",
    )
    assert sorted(lines) == ["cut in two", "no end of line", "of Python", "process 1 of 2"]
    _, lines = speak(tmp_path, "raise ValueError('bad row')")
    assert len(lines) > 8
    assert lines[4] == "process 1 of 2"
    assert "ValueError: bad row" in lines


def test_a_log_has_the_last_words_of_a_process_that_crashes(tmp_path):
    last = "import faulthandler; faulthandler.enable(); faulthandler._sigsegv()"
    done, lines = speak(tmp_path, last)
    assert done.returncode == -11
    assert "Fatal Python error: Segmentation fault" in lines


def test_a_log_in_a_bucket_is_written_whole_at_the_end_and_taken_up_again(tmp_path):
    (tmp_path / "logs").mkdir()
    for count in (4, 8):
        _, lines = speak(tmp_path, "", scheme="file://")  # to fsspec a URL like any other
        assert len(lines) == count


@pytest.mark.parametrize(
    "place", ["/dev/full", "{here}/file/process-1.log", "file://{here}/old", "s4://bucket/log"]
)
def test_a_log_that_cannot_be_kept_does_not_end_a_run(place, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()  # an old log that cannot be read
    code = SPEAKER.format(place=place.format(here=tmp_path), last="sys.exit(3)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "of Python\nno end of line")
    assert "cut in two\n" in done.stderr
    assert done.stderr.count("is not kept, or not whole: ") == 1
    assert "Traceback" not in done.stderr


def test_a_log_in_a_bucket_is_uploaded_also_when_nothing_more_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(host_log, "REMOTE_SECONDS", 0.5)
    monkeypatch.setattr(host_log.signal, "signal", lambda *_: None)  # this process is no copier
    log, (end, into), seen = tmp_path / "log", os.pipe(), []

    def speak_and_hang():
        os.write(into, b"stacks of a hung step\n")
        last = time.monotonic() + 20
        while not seen and time.monotonic() < last:
            time.sleep(0.05)
            seen.extend(log.read_text().splitlines() if log.exists() else [])
        os.close(into)

    speaker = threading.Thread(target=speak_and_hang)
    speaker.start()
    host_log.copy(f"file://{log}", "a heading", str(end))
    speaker.join()
    assert [line[len("2026-01-01 00:00:00 ") :] for line in seen] == [
        "a heading",
        "stacks of a hung step",
    ]


def test_processes_that_read_other_files_are_told_apart(monkeypatch):
    calls = []

    def gather(digests):  # the second process has another value of the second
        calls.append(digests)
        return np.stack([digests, digests + np.array([[0], [1]], np.uint8)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "host_names", lambda: ["host-0", "host-1"])
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    with pytest.raises(ValueError, match=r"data.train is not the same in process 1 \(host-1\)"):
        processes.check_same({"model.path": "a", "data.train": "b"})
    assert len(calls) == 1
