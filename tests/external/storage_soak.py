"""Runs on object stores, killed at any moment while requests fail: `make storage`.

`KILLS=50 pytest -s tests/external/storage_soak.py -k kill` is the long form. What comes out must be
what a run on this machine makes that was left alone.
"""

import os
import shutil
import time

import numpy as np
import pytest
from finetune_process import start_finetune
from servers import Faults, faulty_proxy, gcs_server, s3_server
from soak import files, live, rng, workshop

from genlora_jax.cli import main
from genlora_jax.storage import listed, storage_path
from genlora_jax.training.checkpoint_reading import SUMS, read_metadata
from genlora_jax.training.checkpoint_storage import MARKER, open_checkpointer
from genlora_jax.training.metrics import read_records

KILLS = int(os.environ.get("KILLS", "1"))
SEED = int(os.environ.get("SEED", "0"))
STEPS = 4 + 4 * KILLS
STORES = {"s3": s3_server, "gs": gcs_server}


def launch(here, output, *arguments, **environment):
    settings = ["--train.output", str(output), "--train.steps", str(STEPS)]
    settings += ["--train.save_every", "4", "--train.eval_every", "8", *arguments]
    return start_finetune(here / "recipe.yaml", *settings, cache=here / "compiled", **environment)


def completed(output):
    """Steps of the complete checkpoints in a bucket."""
    names = [name.split("/") for name in listed(output) if name.startswith("checkpoints/")]
    return [int(name[1]) for name in names if name[2:] == [MARKER]]


def download(url, directory):
    shutil.rmtree(directory, ignore_errors=True)
    for name in listed(url):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes((storage_path(url) / name).read_bytes())
    return directory


def losses(output):
    return [(r["step"], r["loss"]) for r in read_records(output, STEPS) if "loss" in r]


def last_state(output):
    """Checksums of all arrays of the last checkpoint, and its place in the data."""
    with open_checkpointer(storage_path(output) / "checkpoints") as checkpointer:
        saved = read_metadata(checkpointer, STEPS)
        return saved[SUMS], saved["data"]


def compare(here, url, alone):
    """A run in a bucket is the one left alone on this machine, and nothing lies about."""
    ours = download(url, here / "downloaded")
    np.testing.assert_array_equal(losses(ours), losses(alone))
    for name in ("adapter", "adapter-best"):
        assert files(ours / name) == files(alone / name)
    assert last_state(url) == last_state(alone)
    # Only files of TensorBoard are more: one for each start, as on a disk.
    for part in (".", "checkpoints"):
        kept = {f.name for f in (alone / part).iterdir()}
        assert {f.name for f in (ours / part).iterdir()} == kept
    assert not [name for name in listed(url) if name.startswith(".")]


def compare_exports(here, url):
    """What is made of a run in a bucket, and written to one, is what this machine makes of it."""
    exports = {"merge": ["--base", str(here / "base")], "export-peft": []}
    places = {str(here / "exports"): str(here / "alone"), f"{url}-exports": url}
    for place, run in places.items():
        if os.path.exists(place):  # of the other server's test
            continue
        for command, arguments in exports.items():
            paths = ["--adapter", run, "--out", f"{place}/{command}"]
            main([command, *arguments, *paths, "--overwrite"])
    ours = download(f"{url}-exports", here / "downloaded")
    assert files(ours) == files(here / "exports")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    directory = tmp_path_factory.mktemp("storage")
    workshop(directory)
    return directory


def killed_at_request(process, proxy, requests):
    """Kills a process once it has sent so many requests; False if it has ended well before."""
    until = len(proxy.requests) + requests
    while len(proxy.requests) < until:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    process.kill()
    process.wait()
    return True


@pytest.mark.parametrize("kind", STORES)
def test_no_kill_and_no_fault_changes_a_run(here, kind, monkeypatch):
    # Each costs a client a second or so of patience.
    few = 1 if "KILLS" in os.environ else 0.4
    faults = Faults(slow=0.05 * few, unavailable=0.03 * few, cut=0.04 * few, delay=0.1)
    kills = {"s3": KILLS, "gs": KILLS - 1}[kind]  # one less: in CI, faults alone
    with STORES[kind]() as store, faulty_proxy(store, faults, seed=SEED) as proxy:
        store.reach(monkeypatch)
        url = f"{store.url}/runs/1"

        def begin(*arguments):
            return launch(here, url, *arguments, **store.environment(proxy.endpoint))

        def kill(life, _):
            return killed_at_request(life, proxy, rng.randint(1, min(500, 25 * STEPS)))

        def note():
            counts = f"{len(listed(url))} objects, {len(proxy.requests)} requests"
            return f", {counts}; {proxy.injected}"

        live(begin, kill, kills, lambda: completed(url), note)
        alone = here / "alone"
        if not alone.exists():
            process = launch(here, alone)
            assert process.wait() == 0, process.stderr.read()
        compare(here, url, alone)
        if kind == "s3" or KILLS > 1:  # files at GCS are written in storage_writing, too
            compare_exports(here, url)
