"""Plans: what a step needs and what chips say to each other, before there is a machine."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from launch.settings import SettingError
from planning import abstract_steps, chips, fit, plan_settings, roofline

from rlhf_jax import lm, parallel

CASES = pathlib.Path(__file__).parents[1] / "cases"
Plan, Sizes = plan_settings.Plan, plan_settings.MeshSizes

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed: pip install '.[tpu]'"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything that needs eight devices, from one process that has them."""
    out = tmp_path_factory.mktemp("plan") / "cases.json"
    path = os.pathsep.join([str(CASES.parents[1] / "experiments"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, CASES / "plan_cases.py", out],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_collectives_are_counted_as_often_as_the_loop_goes_round(made):
    found = {(c["kind"], tuple(c["axes"])): c for c in made["collectives"]}
    gathered = found["all-gather", ("fsdp",)]
    assert (gathered["bytes"], gathered["times"], gathered["received"]) == (64 * 32 * 4, 5, 5 * 64 * 32 * 4 * 3 / 4)
    summed = found["all-reduce", ("tensor",)]
    assert (summed["bytes"], summed["times"], summed["received"]) == (16 * 32 * 4, 3, 3 * 16 * 32 * 4)
    swapped = found["all-to-all", ("fsdp",)]
    assert swapped["times"] == 1
    assert made["open_loops"] == 0


def test_a_tiny_model_from_end_to_end(made):
    fits = made["fits"]
    assert fits["status"] == 0
    assert "fits" in fits["printed"] and "no collective that the sharding should not need" in fits["printed"]
    numbers = fits["numbers"]
    assert numbers["parameters"] == lm.count(lm.LMConfig.preset("tiny"))
    assert numbers["kept"]["optimiser"] == 2 * numbers["kept"]["parameters"] + 4
    # Each product three times, none again: 6 operations a parameter and token, less the embedding, and attention's.
    assert 0.9 < numbers["flops"] / numbers["model_flops"] < 1.2
    assert any(c["kind"] == "all-gather" and c["axes"] == ["fsdp"] for c in numbers["collectives"])
    assert not any(c["kind"] == "all-to-all" for c in numbers["collectives"])


def test_what_does_not_fit_is_said_with_numbers_and_a_way_out(made):
    refused = made["refused"]
    assert refused["status"] == 1
    assert "does not fit" in refused["printed"] and "Traceback" not in refused["printed"]
    assert "--remat full" in refused["printed"]
    assert refused["numbers"]["needed"] > refused["numbers"]["capacity"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(topology="v5e"), "--topology"),
        (dict(topology="h100:8"), "--topology"),
        (dict(model="llama-4"), "--model"),
        (dict(mesh=Sizes(fsdp=3)), "does not fit 1 devices"),
        (dict(batch=0), "--batch"),
        (dict(stage="ppo", prompt=32, response=32, batch=6), "--batch 6 does not divide over 4 minibatches"),
        (dict(length=4096), "more than the 256"),
    ],
)
def test_bad_input_is_one_sentence(change, told):
    with pytest.raises(SettingError) as raised:
        fit.find(Plan(**{"model": "tiny", "topology": "cpu", "length": 64} | change))
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_parameters_optimiser_and_cache_are_exact():
    cfg = lm.LMConfig.preset("llama-3-8b")
    assert lm.count(cfg) == 8_030_261_248
    mesh = jax.sharding.AbstractMesh((1, 32, 8, 1), parallel.AXES)
    norms = (2 * cfg.n_layers + 1) * cfg.d_model
    spread = 4 * (8_030_261_248 - norms) // 256 + 4 * norms // 32  # norms have no part that tensor spreads
    kept = abstract_steps.build(Plan(stage="sft"), cfg, mesh).kept
    assert kept == {"parameters": spread, "optimiser": 2 * spread + 4}

    plan = Plan(stage="ppo", batch=512, prompt=512, response=512, frozen="bfloat16")
    kept = abstract_steps.build(plan, cfg, mesh).kept
    head = 4 * cfg.d_model // 32 + 2 * 4
    assert kept["parameters"] == 2 * spread + head
    assert kept["averaged policy"] == spread
    assert kept["frozen models"] == (2 * spread + head) // 2
    # Keys and values: 2 x 32 layers x 128 features x 2 bytes of one of 8 heads and of 16 of 512 rows.
    assert kept["KV cache"] == 2 * 32 * 128 * 2 * 16 * 1023


def test_a_configuration_of_the_hub_is_read(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    other = {"model_type": "llama", "vocab_size": 300, "hidden_act": "silu", "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(sizes | other | {"rms_norm_eps": 1e-5}))
    for path in (tmp_path, tmp_path / "config.json"):
        cfg = fit.model(Plan(model=str(path), remat="full"))
        assert (cfg.d_model, cfg.d_mlp, cfg.dtype, cfg.remat) == (64, 96, "bfloat16", "full")


def test_without_the_tpus_compiler_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'rlhf_jax\[tpu\]'"):
        chips.devices(Plan(topology="v5e:2x4"))


@needs_tpu_compiler
def test_a_plan_for_a_tpu():
    chips.prepare()
    plan = Plan(model="tiny", topology="v5e:2x2", mesh=Sizes(fsdp=2, tensor=2), length=128, batch=8)
    found = fit.find(plan)
    assert found.fits and not found.warnings and found.seconds["compute"] > 0
    refused = fit.find(Plan(model="gpt2", topology="v5e:2x2", length=1024, batch=2048))
    assert not refused.fits and (refused.needed or 0) > 16 * 2**30


@needs_tpu_compiler
def test_a_topology_that_does_not_exist():
    chips.prepare()
    with pytest.raises(SettingError, match="v5e:3x77"):
        chips.devices(Plan(topology="v5e:3x77"))


def test_an_unneeded_gather_is_told_of():
    from planning import hlo

    cfg = lm.LMConfig.preset("llama-3-8b")
    mesh = {"data": 1, "fsdp": 32, "tensor": 8, "sequence": 1}

    def told(kind, dims, axes):
        array = hlo.Array("bf16", dims, False)
        return roofline.unneeded([hlo.Collective(kind, array, 8, axes, 1, "", array.bytes)], cfg, mesh)

    assert told("all-gather", (1, 4096, 1792), ("fsdp",)) == []
    assert "tensor" in told("all-gather", (4096, 14_336), ("tensor",))[0]
    assert "all layers" in told("all-gather", (32, 4096, 14_336), ("fsdp", "tensor"))[0]
    assert "change places" in told("all-to-all", (16, 1024, 4096), ("fsdp",))[0]
