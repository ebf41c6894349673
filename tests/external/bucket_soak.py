"""Runs in buckets that begin to fail, and of several processes: with `make soak`."""

import re
import socket
import time

import pytest
from servers import Faults, faulty_proxy
from soak import workshop
from storage_soak import STEPS, STORES, compare, completed, launch


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    directory = tmp_path_factory.mktemp("buckets")
    workshop(directory)
    return directory


@pytest.mark.parametrize("fault", ["refused", "unavailable"])
@pytest.mark.parametrize("kind", STORES)
def test_a_run_whose_bucket_begins_to_fail_ends_and_says_what_is_saved(
    here, kind, fault, monkeypatch
):
    with STORES[kind]() as store, faulty_proxy(store) as proxy:
        store.reach(monkeypatch)
        url = f"{store.url}/fails"
        # No evaluations: what fails is a checkpoint, which Orbax and TensorStore write.
        settings = ("--train.steps", "4000", "--train.eval_every", "4000")
        life = launch(here, url, *settings, **store.environment(proxy.endpoint))
        while not completed(url):
            assert life.poll() is None, life.stderr.read()
            time.sleep(0.1)
        began = time.monotonic()
        proxy.faults = {
            "refused": Faults(refused={"PUT", "POST", "DELETE"}),
            "unavailable": Faults(unavailable=1.0),
        }[fault]
        _, said = life.communicate(timeout=300)
        print(f"{kind} {fault}: ended after {time.monotonic() - began:.0f} s", flush=True)
        assert life.returncode == 1
        assert time.monotonic() - began < {"refused": 30, "unavailable": 240}[fault]
        last = [line for line in said.splitlines() if line][-1]
        assert last.startswith("error: ")
        assert len(last) < 480
        assert url in last
        saved = re.search(r"step (\d+) is saved: go on with --train.resume true$", last)
        assert int(saved[1]) in completed(url), said


def launch_both(here, output, **environment):
    """Starts two processes of a run, with a device each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    given = {"JAX_NUM_CPU_DEVICES": "1", "JAX_COORDINATOR_ADDRESS": address}
    given |= {"JAX_NUM_PROCESSES": "2"} | environment
    settings = ("--train.distributed", "true", "--train.resume", "auto", "--mesh.fsdp", "2")
    settings += ("--train.heartbeat", "20")
    return [launch(here, output, *settings, JAX_PROCESS_ID=str(i), **given) for i in range(2)]


def finish(both):
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("kind", STORES)
def test_two_processes_in_a_bucket_are_two_on_this_machine(here, kind, killed, monkeypatch):
    alone = here / "both-alone"
    if not alone.exists():
        finish(launch_both(here, alone))
    with STORES[kind]() as store:
        store.reach(monkeypatch)
        url = f"{store.url}/both"
        both = launch_both(here, url, **store.environment())
        while not completed(url):
            assert all(process.poll() is None for process in both), both[0].stderr.read()
            time.sleep(0.05)
        assert max(completed(url)) < STEPS
        both[killed].kill()
        both[killed].wait()
        both[1 - killed].wait(120)  # it hears no more of the other, and ends
        assert both[1 - killed].returncode != 0
        again = launch_both(here, url, **store.environment())
        finish(again)
        compare(here, url, alone)
