"""An unusable --out or --resume gives one sentence that says what to do."""

import json
import os

import jax
import pytest
from launch import config_file, folder_lock, initial_model, run_folder
from launch.settings import SettingError, Settings

from rlhf_jax.feedback import store
from rlhf_jax.feedback.judgements import Completion, Item, Judgement, Prompt


def refused(function, *arguments, **options):
    with pytest.raises(SettingError) as error:
        function(*arguments, **options)
    return str(error.value)


def test_address_is_not_a_folder():
    advice = "is not a local folder; mount the bucket and give the folder where it is mounted"
    assert refused(run_folder.free_folder, "gs://bucket/run", kind="sft") == f"--out gs://bucket/run {advice}"
    assert refused(config_file.read, "s3://bucket/run") == f"--resume s3://bucket/run {advice}"
    assert refused(initial_model.load, "gs://bucket/model") == f"--model gs://bucket/model {advice}"


def test_what_is_not_the_folder_of_a_run_or_of_a_model_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert (
        refused(config_file.read, f"{tmp_path}/file") == f"--resume {tmp_path}/file is a file; give the folder of a run"
    )
    text = refused(initial_model.check, f"{tmp_path}/file")
    assert text == f"--model {tmp_path}/file is a file; give the folder of a model or of a run"
    for name, values in (
        ("run", {"command": "sft", "version": config_file.VERSION}),
        ("run/model", {"model_type": "gpt2"}),
        ("judged", {"command": "evaluate", "policies": []}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    run, judged = tmp_path / "run", tmp_path / "judged"
    text = f"--resume {run}/model is the folder of a model, not of a run; did you mean --resume {run}?"
    assert refused(config_file.read, f"{run}/model") == text
    assert (
        refused(config_file.read, str(judged)) == f"--resume {judged} is a run of evaluate.py, which cannot be resumed"
    )
    text = f"cannot use --model {judged}: it is a run of evaluate.py, which has no model"
    assert refused(initial_model.check, str(judged)) == text
    text = "--model tinyy does not exist; give a folder or, for random weights, one of tiny, gpt2, pythia-1b, "
    assert refused(initial_model.check, "tinyy") == text + "llama-3-8b, llama-3-70b"
    assert refused(initial_model.check, "a/b/c", flag="--policy") == "--policy a/b/c does not exist; give a folder"


def test_folder_that_cannot_be_created(tmp_path, monkeypatch):
    def mkdir(self, **options):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(type(tmp_path), "mkdir", mkdir)
    text = "cannot write to --out /proc/foo: no folder can be created there; give another folder"
    assert refused(run_folder.create_folder, type(tmp_path)("/proc/foo"), {}) == text


def test_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run", "file/a/run"):
        expected = f"--out {tmp_path / name}: {tmp_path / 'file'} is a file; give a new or empty folder"
        assert refused(run_folder.free_folder, str(tmp_path / name), kind="sft") == expected


def test_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    expected = f"--out {tmp_path / 'a/b'}: this process may not write in {tmp_path}; give another folder"
    assert refused(run_folder.free_folder, str(tmp_path / "a/b"), kind="sft") == expected


def test_a_run_can_be_resumed_unless_the_records_of_its_store_changed(tmp_path):
    pair = Item(prompt=Prompt(({"role": "user", "content": "a"},)), completions=(Completion("b"), Completion("c")))
    path, digests = tmp_path / "a.sqlite", []

    def digest():
        digests.append(run_folder.data_digest(str(path)))

    with store.Store(path) as opened:
        opened.add_labeler("Ada")
        [key] = opened.add([pair], set_name="a")
        opened.record("Ada", key, Judgement(strength=1), key="1")
        digest()
        opened.assign("Ada", set_name="a")
    digest()
    with store.Store(path) as opened:
        digest()
        opened.record("Ada", key, Judgement(strength=8), key="2")
        digest()
    assert digests[0] == digests[1] == digests[2] != digests[3] and None not in digests


@pytest.fixture
def without_programs():
    """JAX without a folder of compiled programs, which is restored at the end."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_beside_the_run_unless_a_folder_is_given(tmp_path, without_programs):
    run_folder.reuse_programs(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")  # type: ignore[attr-defined]
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700
    (tmp_path / "other").mkdir()
    run_folder.reuse_programs(tmp_path / "other/run")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")  # type: ignore[attr-defined]


@pytest.mark.parametrize("reuse", [True, False])
def test_a_flag_makes_each_run_compile_its_programs(tmp_path, reuse, without_programs):
    run_folder.create(tmp_path / "run", Settings(reuse_programs=reuse))
    folder_lock.release_all()
    assert (tmp_path / "programs").exists() == reuse


@pytest.mark.parametrize("unsafe", ["writable", "link", "file", "missing parent"])
def test_programs_that_others_may_have_written_are_not_run(tmp_path, unsafe, without_programs):
    folder = tmp_path / "programs"
    match unsafe:
        case "writable":
            folder.mkdir()
            folder.chmod(0o777)
        case "link":
            (tmp_path / "elsewhere").mkdir()
            folder.symlink_to(tmp_path / "elsewhere")
        case "file":
            folder.write_text("")
        case "missing parent":
            tmp_path = tmp_path / "none"
    run_folder.reuse_programs(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]
