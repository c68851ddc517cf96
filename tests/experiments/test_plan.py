"""Memory, FLOPs and collectives of steps that are compiled without the hardware."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from launch.settings import SettingError
from planning import abstract_steps, chips, hlo, plan_settings, planner, roofline

from rlhf_jax import lm, parallel

CASES = pathlib.Path(__file__).parents[1] / "cases"
Plan, Sizes = plan_settings.Plan, plan_settings.MeshSizes

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed: pip install '.[tpu]'"
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Returns all results that need eight devices, from a process that has them."""
    out = tmp_path_factory.mktemp("plan") / "cases.json"
    path = os.pathsep.join([str(CASES.parents[1] / "experiments"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, CASES / "plan_cases.py", out],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(out.read_text())


def test_collectives_are_counted_per_iteration_of_a_loop(cases):
    collectives = {(c["kind"], tuple(c["axes"])): c for c in cases["collectives"]}
    gathered = collectives["all-gather", ("fsdp",)]
    assert (gathered["bytes"], gathered["times"], gathered["received"]) == (64 * 32 * 4, 5, 5 * 64 * 32 * 4 * 3 / 4)
    summed = collectives["all-reduce", ("tensor",)]
    assert (summed["bytes"], summed["times"], summed["received"]) == (16 * 32 * 4, 3, 3 * 16 * 32 * 4)
    assert collectives["all-to-all", ("fsdp",)]["times"] == 1
    assert cases["open_loops"] == 0


def test_a_tiny_model_is_planned_from_end_to_end(cases):
    fits = cases["fits"]
    assert fits["status"] == 0
    assert "fits" in fits["printed"] and "no unneeded collectives" in fits["printed"]
    numbers = fits["numbers"]
    assert numbers["parameters"] == lm.count(lm.LMConfig.preset("tiny"))
    assert numbers["kept"]["optimiser"] == 2 * numbers["kept"]["parameters"] + 4
    # Each product runs three times without rematerialisation: 6 FLOPs per parameter and token, plus attention.
    assert 0.9 < numbers["flops"] / numbers["model_flops"] < 1.2
    assert any(c["kind"] == "all-gather" and c["axes"] == ["fsdp"] for c in numbers["collectives"])
    assert not any(c["kind"] == "all-to-all" for c in numbers["collectives"])


def test_a_plan_that_does_not_fit_is_reported_with_suggestions(cases):
    too_large = cases["too_large"]
    assert too_large["status"] == 1
    assert "does not fit" in too_large["printed"] and "Traceback" not in too_large["printed"]
    assert "--remat full" in too_large["printed"]
    assert too_large["numbers"]["needed"] > too_large["numbers"]["capacity"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(topology="v5e"), "--topology"),
        (dict(topology="h100:8"), "--topology"),
        (dict(model="llama-4"), "--model"),
        (dict(mesh=Sizes(fsdp=3)), "does not fit 1 devices"),
        (dict(batch=0), "--batch"),
        (dict(stage="ppo", prompt=32, response=32, batch=6), "--batch is 6; it must be a multiple of 4 (4 minibatches"),
        (dict(length=4096), "it must be at most 256"),
    ],
)
def test_invalid_input_is_a_one_line_error(change, message):
    with pytest.raises(SettingError) as raised:
        planner.measure(Plan(**{"model": "tiny", "topology": "cpu", "length": 64} | change))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_parameters_optimiser_and_cache_are_exact():
    cfg = lm.LMConfig.preset("llama-3-8b")
    assert lm.count(cfg) == 8_030_261_248
    mesh = jax.sharding.AbstractMesh((1, 32, 8, 1), parallel.AXES)
    norms = (2 * cfg.n_layers + 1) * cfg.d_model
    sharded = 4 * (8_030_261_248 - norms) // 256 + 4 * norms // 32  # norms are sharded over fsdp but not over tensor
    kept = abstract_steps.build(Plan(stage="sft"), cfg, mesh).kept
    assert kept == {"parameters": sharded, "optimiser": 2 * sharded + 4}

    plan = Plan(stage="ppo", batch=512, prompt=512, response=512, frozen="bfloat16")
    kept = abstract_steps.build(plan, cfg, mesh).kept
    head = 4 * cfg.d_model // 32 + 2 * 4
    assert kept["parameters"] == 2 * sharded + head
    assert kept["averaged policy"] == sharded
    assert kept["frozen models"] == (2 * sharded + head) // 2
    # Keys and values have 2 x 32 layers x 128 features x 2 bytes, for one of 8 heads and 16 of 512 rows.
    assert kept["KV cache"] == 2 * 32 * 128 * 2 * 16 * 1023


def test_a_hugging_face_configuration_is_read(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    other = {"model_type": "llama", "vocab_size": 300, "hidden_act": "silu", "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(sizes | other | {"rms_norm_eps": 1e-5}))
    for path in (tmp_path, tmp_path / "config.json"):
        cfg = planner.load_config(Plan(model=str(path), remat="full"))
        assert (cfg.d_model, cfg.d_mlp, cfg.dtype, cfg.remat) == (64, 96, "bfloat16", "full")


def test_without_the_tpu_compiler_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install -e '\.\[tpu\]'"):
        chips.devices(Plan(topology="v5e:2x4"))


@needs_tpu_compiler
def test_a_plan_for_a_tpu_is_compiled():
    chips.prepare()
    plan = Plan(model="tiny", topology="v5e:2x2", mesh=Sizes(fsdp=2, tensor=2), length=128, batch=8)
    estimate = planner.measure(plan)
    assert estimate.fits and not estimate.warnings and estimate.seconds["compute"] > 0
    too_large = planner.measure(Plan(model="gpt2", topology="v5e:2x2", length=1024, batch=2048))
    assert not too_large.fits and (too_large.needed or 0) > 16 * 2**30


@needs_tpu_compiler
def test_a_topology_that_does_not_exist_is_an_error():
    chips.prepare()
    with pytest.raises(SettingError, match="v5e:3x77"):
        chips.devices(Plan(topology="v5e:3x77"))


def test_unneeded_collectives_raise_warnings():
    cfg = lm.LMConfig.preset("llama-3-8b")
    mesh = {"data": 1, "fsdp": 32, "tensor": 8, "sequence": 1}

    def warnings(kind, dims, axes):
        array = hlo.Array("bf16", dims, False)
        return roofline.unneeded([hlo.Collective(kind, array, 8, axes, 1, "", array.bytes)], cfg, mesh)

    assert warnings("all-gather", (1, 4096, 1792), ("fsdp",)) == []
    assert "tensor" in warnings("all-gather", (4096, 14_336), ("tensor",))[0]
    assert "all layers" in warnings("all-gather", (32, 4096, 14_336), ("fsdp", "tensor"))[0]
    assert "between chips" in warnings("all-to-all", (16, 1024, 4096), ("fsdp",))[0]
