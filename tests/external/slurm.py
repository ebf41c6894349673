"""A SLURM of one machine: `make slurm`. Its job is preempted, loses a task, and is cancelled.

Needs root, and Debian's packages slurm-wlm and munge.
"""

import json
import os
import re
import secrets
import socket
import subprocess
import time

import pytest
from finetune_process import start_finetune
from tiny_base import REPOSITORY

STEPS = 60
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={here}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmctldPort=46817
SlurmdPort=46818
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
# What SLURM tells a step once more, a minute after a timeout, would meet the new one, which has the
# same number: the two minutes before a job starts again are cut here.
MessageTimeout=100
SchedulerParameters=batch_sched_delay=1,bf_interval=1,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=spot Nodes={host} Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=60 State=UP PriorityTier=9 PreemptMode=OFF
"""


def said(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_until(true, seconds, what):
    until = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until, what()
        time.sleep(0.3)
    return found


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """The daemons, which end with the tests."""
    here = tmp_path_factory.mktemp("slurm")
    (here / "state").mkdir()
    (here / "spool").mkdir()
    configuration = CONFIGURATION.format(here=here, host=socket.gethostname())
    (here / "slurm.conf").write_text(configuration)
    key = here / "munge.key"
    key.touch(0o400)
    key.write_bytes(secrets.token_bytes(1024))
    files = [f"--{name}-file={here}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = (
        ["munged", "--force", "--foreground", f"--socket={here}/munge.socket", *files],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    )
    os.environ["SLURM_CONF"] = str(here / "slurm.conf")
    started = []
    try:
        for command in commands:
            started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            time.sleep(1)
        idle = "sinfo", "--noheader", "--format", "%T"
        wait_until(lambda: "idle" in said(*idle), 30, lambda: (here / "slurmd.log").read_text())
        yield here
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def submit(here, output, *arguments):
    """Puts the script into the queue, with two tasks on the one node; returns the job."""
    recipe = "train/recipes/quickstart.yaml"
    given = ("--parsable", "--nodes=1", "--ntasks-per-node=2", f"--output={here}/job.txt")
    settings = ("--train.output", str(output), "--train.save_every", "10", "--data.batch_size", "4")
    settings += ("--train.steps", str(STEPS), "--train.heartbeat", "20", *arguments)
    where = {"PYTHONPATH": str(REPOSITORY), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        ["sbatch", *given, "train/launch/slurm.sh", recipe, *settings],
        cwd=REPOSITORY,
        env={**os.environ, **where},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def state_of(job):
    return re.search(r"JobState=(\w+)", said("scontrol", "show", "job", job))[1]


def losses(output):
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def reaches(output, step, job, here):
    def there():
        assert state_of(job) != "FAILED", (here / "job.txt").read_text()
        return max(losses(output), default=0) >= step

    wait_until(there, 180, lambda: state_of(job) + (here / "job.txt").read_text())


def starts_again(job, here):
    """Waits until the job has put itself back; SLURM's two minutes before it starts are cut."""
    text = (here / "job.txt").read_text
    wait_until(lambda: state_of(job) == "PENDING", 90, lambda: state_of(job) + text())
    said("scontrol", "update", f"JobId={job}", "StartTime=now+5")


def test_two_tasks_train_together_and_go_on_whatever_ends_them(cluster, tmp_path):
    output = tmp_path / "run"
    job = submit(cluster, output)
    reaches(output, 12, job, cluster)
    # Preempted: another job takes the node.
    subprocess.run(["srun", "--partition=urgent", "--exclusive", "true"], check=True)
    starts_again(job, cluster)
    text = (cluster / "job.txt").read_text()
    stopped = int(re.search(r"stopped at step (\d+), saved", text)[1])
    reaches(output, stopped + 12, job, cluster)
    assert f"resumed at step {stopped}" in (cluster / "job.txt").read_text()
    # A task is killed, and says nothing.
    victim = f"--train.output {output}"
    tasks = [int(pid) for pid in said("pgrep", "-f", f"^[^ ]*python.*{victim}").split()]
    os.kill(tasks[-1], 9)
    starts_again(job, cluster)
    done = "COMPLETED", "FAILED"
    wait_until(lambda: state_of(job) in done, 180, lambda: (cluster / "job.txt").read_text())
    assert state_of(job) == "COMPLETED", (cluster / "job.txt").read_text()
    assert (output / "adapter" / "adapter.safetensors").is_file()
    assert {path.name for path in (output / "logs").iterdir()} == {
        "process-0.log",
        "process-1.log",
    }

    alone = tmp_path / "alone"
    settings = ("--train.output", alone, "--train.steps", str(STEPS), "--data.batch_size", "4")
    recipe = REPOSITORY / "train" / "recipes" / "quickstart.yaml"
    process = start_finetune(recipe, *settings, cache=tmp_path, JAX_NUM_CPU_DEVICES="1")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert losses(output) == pytest.approx(losses(alone), rel=1e-3)


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(cluster, tmp_path):
    job = submit(cluster, tmp_path / "run")
    reaches(tmp_path / "run", 5, job, cluster)
    said("scancel", job)
    text = (cluster / "job.txt").read_text
    wait_until(lambda: state_of(job) == "CANCELLED", 90, lambda: state_of(job) + text())
    time.sleep(3)
    assert state_of(job) == "CANCELLED"
    assert "stopped at step" in text()


def test_a_job_with_a_mistake_does_not_come_back(cluster, tmp_path):
    job = submit(cluster, tmp_path / "run", "--data.train", str(tmp_path / "no.jsonl"))
    text = (cluster / "job.txt").read_text
    ended = "COMPLETED", "FAILED"
    wait_until(lambda: state_of(job) in ended, 120, lambda: state_of(job) + text())
    time.sleep(3)
    assert state_of(job) == "FAILED"
    assert "no.jsonl" in text()
