"""Runs on object stores, killed at any moment while requests fail: `make storage`.

`KILLS=50 pytest -s tests/external/storage_soak.py -k kill` is the long form. What comes out must be
what a run on this machine makes that was left alone.
"""

import os
import time

import numpy as np
import pytest
from finetune_process import start_finetune
from servers import Faults, faulty_proxy, s3_server
from soak import RESUME, files, killed, workshop

from genlora_jax.storage import file_system, listed, storage_path
from genlora_jax.training.checkpoint_reading import SUMS, read_metadata
from genlora_jax.training.checkpoint_storage import open_checkpointer
from genlora_jax.training.metrics import read_records

KILLS = int(os.environ.get("KILLS", "2"))
STEPS = 12 + 12 * KILLS
DONE = "commit_success.txt"  # Orbax's marker


def launch(here, output, *arguments, **environment):
    settings = ["--train.output", str(output), "--train.steps", str(STEPS)]
    settings += ["--train.save_every", "4", "--train.eval_every", "6", *arguments]
    return start_finetune(here / "recipe.yaml", *settings, cache=here / "compiled", **environment)


def completed(output):
    """Steps of the complete checkpoints in a bucket."""
    names = [name.split("/") for name in listed(output) if name.startswith("checkpoints/")]
    return [int(name[1]) for name in names if name[2:] == [DONE]]


def download(url, directory):
    for name in listed(url):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(file_system(url).cat_file(f"{url}/{name}"))
    return directory


def losses(output):
    return [(r["step"], r["loss"]) for r in read_records(output, STEPS) if "loss" in r]


def last_state(output):
    """Checksums of all arrays of the last checkpoint, and its place in the data."""
    with open_checkpointer(storage_path(output) / "checkpoints") as checkpointer:
        saved = read_metadata(checkpointer, STEPS)
        return saved[SUMS], saved["data"]


def compare(tmp_path, url):
    """A run in a bucket is the one left alone on this machine, and nothing lies about."""
    alone = tmp_path / "alone"
    if not alone.exists():
        process = launch(tmp_path, alone)
        assert process.wait() == 0, process.stderr.read()
    ours = download(url, tmp_path / "downloaded")
    np.testing.assert_array_equal(losses(ours), losses(alone))
    for name in ("adapter", "adapter-best"):
        assert files(ours / name) == files(alone / name)
    assert last_state(url) == last_state(alone)
    kept = {f.name for f in (alone / "checkpoints").iterdir()}
    assert {f.name for f in (ours / "checkpoints").iterdir()} == kept
    assert not [name for name in listed(url) if name.startswith(".")]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    directory = tmp_path_factory.mktemp("storage")
    workshop(directory)
    return directory


def test_no_kill_and_no_fault_changes_a_run_on_s3(here, monkeypatch):
    faults = Faults(slow=0.05, unavailable=0.03, cut=0.04)
    with s3_server() as store, faulty_proxy(store, faults) as proxy:
        store.reach(monkeypatch)
        url, newest, arguments, kills = f"{store.url}/runs/1", 0, [], 0
        while True:
            began = time.monotonic()
            life = launch(here, url, *arguments, **store.environment(proxy.endpoint))
            moments = (1.0, 6.0) if kills % 3 == 2 else (5.0, 20.0)
            if kills < KILLS and killed(life, *moments):
                kills += 1
            elif life.wait():
                message = life.stderr.read()
                assert not arguments, message
                assert RESUME in message, message
                arguments = RESUME.split()
                continue
            else:
                break
            complete, count = completed(url), len(listed(url))
            assert max(complete, default=0) >= newest, f"kill {kills}: step {newest} is gone"
            newest, arguments = max(complete, default=0), []
            print(
                f"kill {kills} after {time.monotonic() - began:.0f} s: newest checkpoint {newest}, "
                f"{count} objects; {proxy.injected}",
                flush=True,
            )
        compare(here, url)
