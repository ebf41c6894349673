"""A recipe's step compiled for TPUs that are not there: `make tpu`, with libtpu in its place."""

import pytest
from tiny_base import REPOSITORY

from genlora_jax.cli import main
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.plan import report
from genlora_jax.plan.chips import GIB, parse_topology
from genlora_jax.plan.compiled import compile_step, topology_devices
from genlora_jax.plan.estimate import MARGIN, candidates, estimate, rank_meshes
from genlora_jax.settings import parse
from genlora_jax.training.recipe import Recipe

FILE = str(REPOSITORY / "train" / "recipes" / "llama3_8b_v5e_16.yaml")


@pytest.mark.parametrize("name", ["v4:4x4x4", "v5e:4x4", "v5p:4x4x4", "v6e:8x8"])
def test_every_mesh_that_is_offered_can_be_made(name):
    recipe, topology = parse(Recipe, ["--config", FILE]), parse_topology(name)
    devices = topology_devices(topology)
    assert len(devices) == topology.count
    meshes = list(candidates(recipe, topology))
    assert len(meshes) > 3
    for mesh in meshes:
        assert make_mesh(mesh, devices).devices.shape == (mesh.data, mesh.fsdp, mesh.tensor)


def test_the_8b_recipe_compiles_for_16_chips_and_fits_as_estimated(capsys, monkeypatch):
    recipe, topology = parse(Recipe, ["--config", FILE]), parse_topology("v5e:4x4")
    chosen = rank_meshes(recipe, topology)[0]
    found = compile_step(recipe, topology, chosen.mesh)
    held = found.arguments + found.temporaries
    assert held < topology.chip.memory
    assert chosen.arguments == pytest.approx(found.arguments, rel=0.02)
    assert chosen.arguments + chosen.temporaries == pytest.approx(held, rel=MARGIN)
    assert found.collectives  # 16 chips have something to tell one another

    # The command shows it; compiled already, it need not be again.
    monkeypatch.setattr(report, "compile_step", lambda *_: found)
    main(["plan", "--config", FILE, "--topology", "v5e:4x4"])
    out = capsys.readouterr().out
    assert f"{found.temporaries / GIB:.2f} GiB" in out
    for kind in found.collectives:
        assert kind in out


def test_a_quantised_base_compiles_with_the_memory_that_was_estimated():
    shape = {
        "num_hidden_layers": 4,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "vocab_size": 32_000,
    }
    changes = {f"model.shape.{name}": size for name, size in shape.items()}
    changes |= {"model.base_dtype": "int4", "data.batch_size": 4, "data.length": 1024}
    flags = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    recipe = parse(Recipe, ["--config", FILE, *flags])
    topology, mesh = parse_topology("v5e:2x2"), MeshConfig(data=2, fsdp=2)
    found, guess = compile_step(recipe, topology, mesh), estimate(recipe, topology.chip, mesh)
    held = found.arguments + found.temporaries
    assert guess.arguments == pytest.approx(found.arguments, rel=0.02)
    assert guess.arguments + guess.temporaries == pytest.approx(held, rel=MARGIN)
