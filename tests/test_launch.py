"""The scripts of `train/launch`, with clouds and queues played by others."""

import http.server
import os
import re
import shlex
import socket
import subprocess
import sys
import threading

import pytest
import yaml
from tiny_base import REPOSITORY

from genlora_jax.plan.chips import parse_topology
from genlora_jax.settings import parse
from genlora_jax.training.recipe import Recipe

LAUNCH = REPOSITORY / "train" / "launch"


def program(folder, name, text):
    """Puts a shell script where it is found before the real program."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("#!/usr/bin/env bash\n" + text)
    file.chmod(0o755)


def run_script(name, *arguments, cwd, **environment):
    path = f"{cwd / 'programs'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", LAUNCH / name, *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


# JAX finds the processes by what the clouds tell them.

JOIN = """
import os, jax
if "TPU_WORKER_ID" not in os.environ:
    # Set by JAX where no TPU is plugged in, and by GKE: it would not ask for the host's metadata.
    del os.environ["TPU_SKIP_MDS_QUERY"]
from genlora_jax.training import processes
processes.join()
print(processes.gather_values([jax.process_index(), jax.process_count()]).tolist())
"""


class Metadata(http.server.BaseHTTPRequestHandler):
    """A host's metadata server."""

    def do_GET(self):
        answer = self.server.answers.get(self.path.rpartition("/")[2], "")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("cloud", ["gke", "tpu_vm"])
def test_processes_find_one_another_by_what_google_tells_them(cloud):
    started, servers = [], []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for index in range(2):
        server = http.server.ThreadingHTTPServer(("localhost", 0), Metadata)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_FORCE_TPU_INIT": "1",  # as if there were chips
            "TPU_LIBRARY_PATH": __file__,  # as if their library were there
            "JAX_COORDINATOR_PORT": port,
            "GCE_METADATA_IP": f"localhost:{server.server_port}",
        }
        server.answers = {"tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nZONE: 'us-west4-a'\n"}
        if cloud == "gke":
            hosts = "localhost,localhost"
            environment |= {"TPU_WORKER_ID": str(index), "TPU_WORKER_HOSTNAMES": hosts}
        else:
            triples = "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.1"
            server.answers |= {
                "agent-worker-number": str(index),
                "worker-network-endpoints": triples,
            }
        command = [sys.executable, "-c", JOIN]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **environment}, **pipes))
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "[[0.0, 2.0], [1.0, 2.0]]" in out
    for server in servers:
        server.shutdown()


# GKE.


def test_the_jobset_is_of_one_slice_and_its_command_of_a_recipe():
    # As the command in its first lines fills it in.
    text = (LAUNCH / "jobset.yaml").read_text()
    command = re.search(r"sed '.*?' \\\n#\s*\S+", text)[0].replace("\n#", "\n")
    filled = subprocess.check_output(["bash", "-c", command], cwd=REPOSITORY, text=True)
    filled = yaml.safe_load(filled)
    assert not re.search(r"[A-Z]{4,}", yaml.safe_dump(filled["spec"]["replicatedJobs"]))
    (hosts,) = filled["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    topology = parse_topology(f"v5e:{shape}")
    assert job["parallelism"] == job["completions"] == topology.count / chips
    genlora, finetune, *settings = container["command"]
    assert (genlora, finetune) == ("genlora", "finetune")
    file = REPOSITORY / settings[0].removeprefix("--config=")
    recipe = parse(Recipe, [f"--config={file}", *settings[1:]])
    assert recipe.train.distributed
    assert recipe.train.resume == "auto"
    assert topology.name in file.read_text().splitlines()[0]
    # What a preempted run ends with is what starts the set again without being counted.
    (by_code, _) = job["podFailurePolicy"]["rules"]
    assert by_code["onExitCodes"]["values"] == [128 + 15]
    assert by_code["onExitCodes"]["containerName"] == container["name"]


# SLURM.


@pytest.mark.parametrize(
    ("status", "state", "restarts", "back"),
    [
        (143, "RUNNING", 0, True),  # told to end: by a preemption, or before the time limit
        (143, "COMPLETING", 0, False),  # by scancel
        (137, "RUNNING", 3, True),  # killed
        (137, "RUNNING", 20, False),
        (1, "RUNNING", 0, False),  # a mistake of the user's
        (0, "RUNNING", 0, False),
    ],
)
def test_a_job_of_slurm_puts_itself_back_if_it_was_ended(tmp_path, status, state, restarts, back):
    programs = tmp_path / "programs"
    program(programs, "srun", f'echo "srun $* gpus=$JAX_LOCAL_DEVICE_IDS"; exit {status}')
    program(programs, "scontrol", f'echo "scontrol $*"; echo "   JobState={state} Reason=None"')
    where = {
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_NTASKS_PER_NODE": "1",
    }
    arguments = ("recipe.yaml", "--train.output", "a b")
    done = run_script("slurm.sh", *arguments, cwd=tmp_path, SLURM_GPUS_ON_NODE="8", **where)
    assert done.returncode == status
    assert ("scontrol requeue 7" in done.stdout) == back
    assert "--config recipe.yaml --train.distributed true --train.resume auto" in done.stdout
    assert "gpus=0,1,2,3,4,5,6,7" in done.stdout  # or JAX would take one


def test_a_task_for_each_gpu_takes_that_of_its_number(tmp_path):
    program(tmp_path / "programs", "srun", 'echo "gpus=${JAX_LOCAL_DEVICE_IDS-unset}"')
    where = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}
    done = run_script("slurm.sh", "recipe.yaml", cwd=tmp_path, **where)
    assert "gpus=unset" in done.stdout


# Queued resources.

GCLOUD = r"""
printf '%s\0' "$@" >> calls; printf '\n\0' >> calls
case "$*" in
  *" list "*) head -n 1 states; sed -i 1d states ;;
  *systemd-run*)
    echo run >> runs
    [ "$(wc -l < runs)" = 2 ] && [ -z "${FAILS:-}" ] || exit 255 ;; # the connection is lost
esac
"""


def calls_of_gcloud(tmp_path, states, *arguments, **environment):
    """What the script calls gcloud with, where a slice goes through some states; and its end."""
    program(tmp_path / "programs", "gcloud", GCLOUD)
    program(tmp_path / "programs", "git", "")
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    where = {"NAME": "pod", "ZONE": "us-west4-a", "TYPE": "v5litepod-16", "WAIT": "0"}
    where |= {"VERSION": "v2-alpha-tpuv5-lite", "SPOT": "1"} | environment
    done = run_script("tpu_pod.sh", *arguments, cwd=tmp_path, **where)
    calls = (tmp_path / "calls").read_text().split("\n\0")[:-1]
    return [call.split("\0")[:-1] for call in calls], done


PREEMPTED = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "", "PROVISIONING", "ACTIVE"]


def test_a_slice_that_is_preempted_is_asked_for_again(tmp_path):
    arguments = ("--config", "recipe.yaml", "--train.output", "gs://bucket/a b")
    calls, done = calls_of_gcloud(tmp_path, PREEMPTED, *arguments)
    assert done.returncode == 0, done.stderr
    created = ["list", "create", "list", "list", "scp", "ssh", "ssh"]
    assert [call[3] for call in calls] == [*created, "list", "delete", *created]
    # What the hosts run: the arguments are words again there.
    text = calls[-1][calls[-1].index("--command") + 1]
    assert shlex.split(text)[-4:] == [*arguments]
    assert "--train.distributed true --train.resume auto" in text


def test_a_run_that_cannot_be_is_not_tried_for_ever(tmp_path):
    _, done = calls_of_gcloud(tmp_path, ["ACTIVE"] * 9, "--config", "recipe.yaml", FAILS="1")
    assert done.returncode == 1
    assert "gave up after 5 attempts" in done.stderr
