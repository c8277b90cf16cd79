"""Settings: priority of their sources, and one line that names whatever is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from ffcl_fast.train.config import FIELDS, PRESETS, Config, base_type, load_config, read_yaml
from ffcl_fast.train.errors import UserError


def test_flags_over_file_over_preset_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("preset: paper\nbatch_size: 7\nlr: 1e-3\nstages: [local, downstream]\n")
    config = load_config({"batch_size": "5"}, file)
    assert config.batch_size == 5  # flag
    assert config.lr == 1e-3 and config.stages == ("local", "downstream")  # file; 1e-3 is text in YAML 1.1
    assert config.epochs_global == PRESETS["paper"]["epochs_global"]  # preset
    assert config.patience == Config.patience  # default


def test_a_written_config_reads_back_the_same(tmp_path):
    config = Config(data="digits", stages="global,downstream", seed=3, lr=0.01)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.as_dict()))
    assert load_config({}, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0),
        ("lr", "fast"),
        ("lr", float("nan")),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("batch_size", None),
        ("image_size", 3),
        ("image_size", [64]),
        ("seed", -1),
        ("margin", 1.5),
        ("augment", "flip"),
        ("stages", "global,local"),
        ("stages", "local,local"),
        ("stages", ""),
        ("stages", 3),
        ("preset", "huge"),
        ("data", 5),
        ("name", "a/b"),
        ("name", ".."),
        ("name", "x" * 256),
        ("name", "\u00e9" * 128),
    ],
)
def test_an_impossible_value_is_named_in_one_line(name, value):
    with pytest.raises(UserError) as caught:
        load_config({name: value})
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_rate: 1", "learning_rate"),
        ("- lr", "list"),
        ("lr: [", "not YAML"),
        ("seed: 1\nlr: 1\nseed: 1", "key 'seed' is given twice.* line 3"),
        ('a: {b: 1, "b": 2}', "key 'b' is given twice"),
        ("lr: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path, text, named):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=named) as caught:
        load_config({}, file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_keys_merged_from_elsewhere_are_not_given_twice(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}


def test_the_longest_name_a_folder_can_have_is_taken():
    assert load_config({"name": "x" * 255}).name == "x" * 255


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_config({}, tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="b.yaml"):
        load_config({}, tmp_path / "b.yaml")


def test_every_setting_has_a_help_text_and_a_default_that_passes_its_own_check():
    assert all(field.metadata["help"] for field in FIELDS.values())
    assert {base_type(name)[0] for name in FIELDS} <= {str, int, float, tuple}
    for preset, values in PRESETS.items():
        assert dataclasses.asdict(load_config({"preset": preset})).items() >= values.items()
