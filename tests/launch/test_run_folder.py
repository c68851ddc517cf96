"""An unusable --out or --resume gives one sentence that says what to do."""

import os

import pytest
from launch import config_file, initial_model, run_folder
from launch.settings import SettingError


def refused(function, *arguments, **options):
    with pytest.raises(SettingError) as error:
        function(*arguments, **options)
    return str(error.value)


def test_address_is_not_a_folder():
    advice = "is not a local folder; mount the bucket and give the folder where it is mounted"
    assert refused(run_folder.free_folder, "gs://bucket/run", kind="sft") == f"--out gs://bucket/run {advice}"
    assert refused(config_file.read, "s3://bucket/run") == f"--resume s3://bucket/run {advice}"
    assert refused(initial_model.load, "gs://bucket/model") == f"--model gs://bucket/model {advice}"


def test_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run", "file/a/run"):
        expected = f"--out {tmp_path / name}: {tmp_path / 'file'} is a file; give a new or empty folder"
        assert refused(run_folder.free_folder, str(tmp_path / name), kind="sft") == expected


def test_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    expected = f"--out {tmp_path / 'a/b'}: this process may not write in {tmp_path}; give another folder"
    assert refused(run_folder.free_folder, str(tmp_path / "a/b"), kind="sft") == expected
