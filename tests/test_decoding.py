"""Decoding in rows that take the next prompt when their text has ended."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import random_llama

from genlora_jax.generation import decoding
from genlora_jax.generation.decoding import decode
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.sharding import named, param_specs

LENGTHS = (3, 90, 1, 12, 40, 7, 33, 64, 5, 18, 65, 2)


def prompts_of(*lengths):
    return [np.random.default_rng(n).integers(3, 61, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def expected():
    """What transformers' way gives: every prompt alone, from the logits of whole passes."""
    model, params = random_llama(max_position_embeddings=256)
    width = 128
    logits = jax.jit(lambda ids: model.apply({"params": params}, ids))

    def continued(prompt):
        ids = list(prompt)
        for _ in range(30):
            row = np.array([ids + [0] * (width - len(ids))], np.int32)
            ids.append(int(logits(row)[0, len(ids) - 1].argmax()))
        return ids[len(prompt) :]

    return [continued(prompt) for prompt in prompts_of(*LENGTHS)]


@pytest.mark.parametrize(("rows", "scan"), [(2, True), (3, False), (32, True)])
def test_answers_in_few_rows_are_those_of_whole_passes_in_the_prompts_order(rows, scan, expected):
    model, params = random_llama(scan=scan, max_position_embeddings=256)
    stop = [4, 11, 17]
    ends = [next((i for i, t in enumerate(ids) if t in stop), len(ids)) for ids in expected]
    assert len(set(ends)) > 4  # rows end at different times
    found = decode(model, params, prompts_of(*LENGTHS), max_new_tokens=30, stop=stop, rows=rows)
    assert found == [ids[:end] for ids, end in zip(expected, ends, strict=True)]


@pytest.fixture
def steps(monkeypatch):
    """How many tokens each call of `_advance` added to a row."""
    advance, steps = decoding._advance, []

    def counted(*args, **options):
        state, cache = advance(*args, **options)
        steps.append(int((state.length - args[3].length).max()))
        return state, cache

    monkeypatch.setattr(decoding, "_advance", counted)
    return steps


def test_a_row_that_ends_takes_the_next_prompt_at_once(steps):
    model, params = random_llama()
    prompts = prompts_of(*range(2, 26))
    found = decode(model, params, prompts, max_new_tokens=40, stop=[4, 11, 17, 30], rows=4)
    lengths = [len(ids) + 1 for ids in found]  # with the end
    batches = [max(lengths[i : i + 4]) for i in range(0, len(lengths), 4)]
    assert sum(steps) <= 0.75 * sum(batches)
    assert sum(steps) >= sum(lengths) / 4


def test_all_prompts_are_continued_at_once_unless_rows_are_given(steps):
    model, params = random_llama()
    prompts = prompts_of(*range(2, 19))  # 17, which no group of two rows divides
    assert [len(ids) for ids in decode(model, params, prompts, max_new_tokens=5)] == [5] * 17
    assert sum(steps) == 5


@pytest.mark.parametrize(("scan", "data"), [(True, 2), (False, 1)])
def test_on_a_mesh_a_cache_is_sharded_in_one_way(scan, data, monkeypatch):
    model, params = random_llama(scan=scan, num_hidden_layers=1, vocab_size=64)
    mesh = make_mesh(MeshConfig(data=data, tensor=2))
    model = model.clone(mesh=mesh)
    params = jax.device_put(params, named(mesh, param_specs(params)))
    read, advance, found = decoding._read, decoding._advance, []

    def watched(*args, **options):
        found.extend((leaf.sharding, leaf.ndim) for leaf in jax.tree.leaves(args[3]))
        return read(*args, **options)

    monkeypatch.setattr(decoding, "_read", watched)
    before = read._cache_size(), advance._cache_size()
    # The cache is cut once, when all prompts have been read.
    decode(model, params, prompts_of(120, 3, 40, 5, 6), max_new_tokens=9, rows=4)
    where = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), "tensor"))
    assert len(found) > 4
    assert all(sharding.is_equivalent_to(where, ndim) for sharding, ndim in found)
    assert (read._cache_size() - before[0], advance._cache_size() - before[1]) == (1, 2)


def test_samples_do_not_depend_on_the_number_of_rows():
    model, params = random_llama()
    options = {"max_new_tokens": 12, "temperature": 1.0, "key": jax.random.key(3)}
    prompts = prompts_of(3, 9, 5, 3)
    alone, together = (decode(model, params, prompts, rows=n, **options) for n in (1, 4))
    assert alone == together
    assert alone[0] != alone[3]  # the same prompt twice
