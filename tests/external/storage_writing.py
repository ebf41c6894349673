"""What is written to buckets of a real server is whole or absent: `make storage`."""

import contextlib
import json
import os
import threading
import time

import fsspec
import pytest
from servers import BUCKET, Faults, faulty_proxy, gcs_server, s3_server

from genlora_jax.atomic_files import WRITTEN, new_directory, refuse_existing, write_whole
from genlora_jax.storage import listed, storage_path
from genlora_jax.training import claims
from genlora_jax.training.checkpoint import Checkpoints
from genlora_jax.training.claims import CLAIM, held


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request):
    with (
        {"s3": s3_server, "gs": gcs_server}[request.param]() as store,
        faulty_proxy(store) as proxy,
    ):
        yield store, proxy


@pytest.fixture
def store(server, monkeypatch):
    server[0].reach(monkeypatch, server[1].endpoint)
    server[1].faults = Faults()
    return server[0]


@pytest.fixture
def proxy(server):
    return server[1]


def write(url, text, *names):
    with new_directory(url, overwrite=True) as directory:
        (directory / "adapter.json").write_text(text)
        (directory / "sub").mkdir()
        for name in ("model.bin", *names):
            (directory / "sub" / name).write_text(text * 1000)


def content(url):
    """What is at a URL: nothing while the file is missing by which readers know it."""
    names = listed(url)
    if "adapter.json" not in names:
        return None
    texts = {name: (storage_path(url) / name).read_text() for name in names if name != WRITTEN}
    text = texts.pop("adapter.json")
    assert set(texts.values()) == {text * 1000}, "old and new side by side"
    return text, sorted(texts)


def test_a_directory_is_old_or_absent_or_new_wherever_its_writer_dies(store, proxy):
    url, parent = f"{store.url}/kills/out", f"{store.url}/kills"
    old, new = ("old", ["sub/model.bin", "sub/of-old"]), ("new", ["sub/model.bin", "sub/of-new"])
    seen = []
    every = "KILLS" in os.environ  # request, or some
    some = 19 if store.url.startswith("s3") else 41
    for requests in range(0, 200, 1 if every else some):
        write(url, "old", "of-old")
        assert content(url) == old
        assert listed(parent) == [f"out/{name}" for name in listed(url)], "something lies about"
        proxy.faults = Faults(passed=requests)
        with contextlib.suppress(PermissionError):
            write(url, "new", "of-new")
        died = proxy.faults.passed < 0
        proxy.faults = Faults()
        seen.append(content(url))
        assert seen[-1] in (old, None, new)
        refuse_existing(url, overwrite=True)  # as the next writer does before its work
        assert content(url) in (old, new)
        if not died:
            break
    assert not died
    assert all(state in seen for state in ((old, None, new) if every else (old, new)))


def test_other_peoples_files_are_not_overwritten(store):
    url = f"{store.url}/others"
    write_whole(storage_path(url) / "notes.txt", "mine")
    with pytest.raises(FileExistsError, match="others exists"):
        refuse_existing(url, overwrite=False)
    with pytest.raises(FileExistsError, match=r"genlora wrote .*notes\.txt"):
        refuse_existing(url, overwrite=True)
    with pytest.raises(FileExistsError, match="which is read"):
        refuse_existing(f"{url}/merged", overwrite=False, inputs=(url,))
    assert listed(url) == ["notes.txt"]


def test_a_place_is_held_by_one_run(store, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.2)
    monkeypatch.setattr(claims, "PATIENCE", 2.0)
    url = f"{store.url}/held"
    with held(url) as check:
        check()
        with pytest.raises(BlockingIOError), held(url):
            pass
        # Of a process that cannot be seen from here it counts whether the claim changes.
        monkeypatch.setattr(claims, "_process", lambda _: None)
        with pytest.raises(BlockingIOError), held(url):
            pass
        monkeypatch.setattr(claims, "BEAT", 60.0)
        time.sleep(1)  # or a beat under way would write the claim again
        claims._remove(f"{url}/{CLAIM}")
        with held(url) as theirs:
            theirs()
            with pytest.raises(OSError, match="another run has taken it over"):
                check()
    assert listed(url) == []


def test_a_dead_runs_claim_is_taken_over(store, monkeypatch):
    monkeypatch.setattr(claims, "PATIENCE", 1.0)
    url = f"{store.url}/dead"
    elsewhere = {"owner": "x", "host": "far", "pid": 1, "beat": 3, "process": "boot ns 1 2"}
    here = elsewhere | {"process": claims._process(1).rsplit(" ", 1)[0] + " 7"}  # its pid lives
    for claim, waits in ((elsewhere, True), (here, False)):
        write_whole(storage_path(url) / CLAIM, json.dumps(claim))
        began = time.monotonic()
        with held(url):
            assert (time.monotonic() - began > 1.0) == waits
    assert listed(url) == []


def test_of_many_runs_that_begin_at_once_one_holds_the_place(store, proxy):
    if store.url.startswith("gs"):  # the emulator ignores the condition; that it is asked for:
        proxy.requests.clear()
        with held(f"{store.url}/once"):
            assert any("ifGenerationMatch=0" in request for request in proxy.requests)
        return
    url, began, holders, ended = f"{store.url}/once", threading.Barrier(8), [], threading.Event()

    def run(number):
        began.wait()
        try:
            with held(url):
                holders.append(number)
                ended.wait(30)
        except BlockingIOError:
            pass

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    while sum(thread.is_alive() for thread in threads) > 1:
        time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    assert len(holders) == 1


def claim(url):
    with held(url):
        pass


def missing(protocol):
    raise ImportError("as fsspec does where the package is not installed")


def one_line(error):
    assert "\n" not in str(error.value), error.value
    return str(error.value)


def test_a_bucket_that_cannot_be_written_is_one_clear_line(store, proxy, monkeypatch, tmp_path):
    url = f"{store.url}/out"
    for check in (
        lambda place: refuse_existing(place, overwrite=False),
        lambda p: held(p).__enter__(),
    ):
        proxy.faults = Faults(refused={"PUT", "POST"})
        with pytest.raises(PermissionError, match=f"{BUCKET}.*the store refuses") as error:
            check(url)
        one_line(error)
        proxy.faults = Faults()
        with pytest.raises(FileNotFoundError, match=r"nowhere.*no such bucket") as error:
            check(url.replace(BUCKET, "nowhere"))
        one_line(error)
    with monkeypatch.context() as changed:
        changed.setattr(fsspec, "filesystem", missing)
        with pytest.raises(ValueError, match=r"pip install .genlora_jax\[(s3|gcs)\]") as error:
            check(url)
        one_line(error)
    if url.startswith("gs"):  # which would go to Google for them
        return
    with monkeypatch.context() as changed:
        changed.setenv("HOME", str(tmp_path))
        store.reach(changed)
        for name in store.environment():
            if "KEY" in name:
                changed.delenv(name)
        with pytest.raises(OSError, match="credentials") as error:
            check(url)
        one_line(error)


def test_half_of_a_checkpoint_is_gone_before_any_is_looked_for(store):
    # Of a run that was killed in its first save. Later, the listing would find no directory.
    url = f"{store.url}/half/checkpoints"
    (storage_path(url) / "4" / "state").mkdir(parents=True)
    write_whole(storage_path(url) / "4" / "state" / "_sharding", "{}")
    write_whole(storage_path(url) / "notes.txt", "mine")
    with Checkpoints(storage_path(url)) as checkpoints:
        assert checkpoints.latest() is None
    assert listed(url) == ["notes.txt"]


def test_checkpoints_that_a_disk_wrote_are_not_taken_for_unfinished_ones(store):
    url = f"{store.url}/copied/checkpoints"
    for step in ("4", "8"):
        write_whole(storage_path(url) / step / "state" / "_sharding", "{}")
    with (
        pytest.raises(ValueError, match=r"2 checkpoints without commit_success\.txt"),
        Checkpoints(storage_path(url)),
    ):
        pass
    assert len(listed(url)) == 2
