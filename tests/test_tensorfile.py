"""Safetensors files streamed, against the safetensors library."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from genlora_jax.hf.tensorfile import TensorFile, TensorWriter, transpose
from genlora_jax.threads import WINDOW, in_threads


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.standard_normal((5, 7)).astype(np.float32),
        "odd": rng.standard_normal(3).astype(jnp.bfloat16),
        "half": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "scalar": np.array(2.5),
    }


def test_reads_what_safetensors_writes(arrays, tmp_path):
    save_file(arrays, tmp_path / "file", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "file")
    assert set(file.entries) == set(arrays)
    for name, value in arrays.items():
        assert file.read(name).dtype == value.dtype
        np.testing.assert_array_equal(file.read(name), value)


@pytest.mark.parametrize("rows", [slice(1, 3), slice(0, 5), slice(4, None), slice(2, 2)])
def test_reads_some_rows(arrays, tmp_path, rows):
    save_file(arrays, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    np.testing.assert_array_equal(file.read("matrix", rows), arrays["matrix"][rows])


def test_safetensors_reads_what_is_written_in_any_order(arrays, tmp_path):
    with TensorWriter(tmp_path / "file", arrays) as writer:
        for name in reversed(arrays):
            writer.write(name, arrays[name])
    found = load_file(tmp_path / "file")
    assert set(found) == set(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_a_tensor_of_another_size_than_announced_is_refused(arrays, tmp_path):
    with (
        TensorWriter(tmp_path / "file", arrays) as writer,
        pytest.raises(ValueError, match="tensor matrix has 56 bytes, not 140"),
    ):
        writer.write("matrix", arrays["matrix"][:2])


def test_other_dtypes_are_refused_by_name(tmp_path):
    save_file({"packed": np.zeros(4, np.int8)}, tmp_path / "file")
    with pytest.raises(ValueError, match="tensor packed is of dtype I8"):
        TensorFile(tmp_path / "file").read("packed")


def test_a_file_cut_short_after_it_was_opened_raises(arrays, tmp_path):
    save_file(arrays, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-10])
    with pytest.raises(ValueError, match="ends within tensor"):
        list(map(file.read, arrays))


@pytest.mark.parametrize("shape", [(1, 1), (32, 5), (33, 70), (100, 1)])
@pytest.mark.parametrize("kind", [np.float32, jnp.bfloat16])
def test_transposes(shape, kind):
    value = np.random.default_rng(0).standard_normal(shape).astype(kind)
    turned = transpose(value)
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(turned, value.T)


def test_threads_keep_the_order_and_a_window():
    drawn, gate = [], threading.Event()

    def items():
        for i in range(20):
            drawn.append(i)
            yield i

    def work(i):
        gate.wait()
        return i * i

    results = in_threads(work, items())
    threading.Timer(0.2, gate.set).start()
    first = next(results)
    assert len(drawn) == WINDOW  # no more in flight than these
    assert [first, *results] == [i * i for i in range(20)]


def test_an_error_in_a_thread_comes_out():
    def work(i):
        if i == 3:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        list(in_threads(work, range(10)))
