"""The scripts of `train/launch` under the tools that know their languages: `make launch`.

Needs gcloud, whose own parser reads the commands; nothing is asked of a cloud.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from test_launch import LAUNCH, PREEMPTED, calls_of_gcloud


@pytest.fixture
def jobset():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def lost(ours, theirs, place=""):
    """What of a document its model does not know, or reads otherwise."""
    if isinstance(ours, dict):
        return [
            name
            for key, value in ours.items()
            for name in (
                lost(value, theirs[key], f"{place}.{key}") if key in theirs else [f"{place}.{key}"]
            )
        ]
    if isinstance(ours, list):
        pairs = zip(ours, theirs, strict=True)
        return [name for pair in pairs for name in lost(*pair, f"{place}[]")]
    return [] if ours == theirs else [place]


def read_back(document):
    return json.loads(JobsetV1alpha2JobSet.from_dict(document).to_json())


def test_the_jobset_has_the_fields_of_its_api(jobset):
    assert lost(jobset, read_back(jobset)) == []
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    assert lost(jobset, read_back(jobset)) == [".spec.failurePolicy.maxRestart"]


def test_its_job_has_the_fields_of_kubernetes(jobset):
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "hosts"}}
    job["spec"] = hosts["template"]["spec"]
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job, version, strict=True)
    job["spec"]["template"]["spec"]["gracePeriod"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="gracePeriod"):
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_shellcheck_has_nothing_to_say(name):
    program = Path(kubernetes_validate.__file__).parents[1] / "bin" / "shellcheck"
    command = [program, LAUNCH / name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_gcloud_knows_every_command(tmp_path):
    calls, _ = calls_of_gcloud(tmp_path, PREEMPTED, "--config", "recipe.yaml")
    distinct = {call[3]: call for call in calls}
    assert distinct.keys() == {"list", "create", "delete", "scp", "ssh"}
    bogus = [*distinct["create"], "--node-idea=x"]
    for call in (*distinct.values(), bogus):
        environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "nobody")}
        done = subprocess.run(
            [shutil.which("gcloud"), *call, "--project=none"],
            env=environment | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
            capture_output=True,
            text=True,
        )
        # 2: it does not understand. 1: it does, and nobody is logged in.
        assert done.returncode == (2 if call is bogus else 1), done.stderr
        assert ("active account" in done.stderr) == (call is not bogus), done.stderr
