"""Data sets from every source, and one line for whatever is wrong with them."""

from __future__ import annotations

import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import tiny, write_image_folder, write_medmnist

from ffcl_fast.train import folder
from ffcl_fast.train.data import hold_out, prepare
from ffcl_fast.train.errors import UserError


@pytest.fixture
def random(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fails(config, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(config)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_digits_are_the_default_and_say_so(tmp_path):
    data = prepare(tiny(tmp_path, data=None))
    assert data.name == "digits" and "digits" in data.notes[0] and len(data.notes) == 1
    assert prepare(tiny(tmp_path)).notes == ()
    assert [len(data.train), len(data.val), len(data.test)] == [1293, 144, 360]
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape[1:] == (1, 8, 8)
    assert prepare(tiny(tmp_path, image_size=16)).test.images.shape == (360, 1, 16, 16)


def test_digits_splits_do_not_depend_on_the_seed(tmp_path):
    one, two = prepare(tiny(tmp_path, seed=1)), prepare(tiny(tmp_path, seed=2))
    assert torch.equal(one.test.images, two.test.images) and torch.equal(one.val.labels, two.val.labels)


# ---------------------------------------------------------------------------------------------------------- MedMNIST


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_medmnist_uses_a_local_copy(tmp_path, random, monkeypatch, how):
    path = write_medmnist(tmp_path / "pneumoniamnist.npz", random)
    monkeypatch.setenv("FFCL_DATA", str(tmp_path) if how == "environment" else "/nowhere")
    data = prepare(tiny(tmp_path, data="pneumoniamnist", data_dir=str(tmp_path) if how == "flag" else None))
    with np.load(path) as arrays:
        assert torch.equal(data.test.images[:, 0], torch.from_numpy(arrays["test_images"]))
    assert data.classes == ("normal", "pneumonia") and len(data.val) == 104


def test_medmnist_with_a_tiny_validation_split_holds_out_part_of_train(tmp_path, random):
    few = {"val_images": np.zeros((16, 28, 28), np.uint8), "val_labels": np.zeros((16, 1), np.uint8)}
    write_medmnist(tmp_path / "pneumoniamnist.npz", random, **few)
    data = prepare(tiny(tmp_path, data="pneumoniamnist", data_dir=str(tmp_path)))
    assert len(data.val) == 12 and len(data.train) == 108
    assert any("held out" in note for note in data.notes)


@pytest.mark.parametrize(
    ("replaced", "named"),
    [
        ({"val_labels": None}, "val_labels"),
        ({"test_images": np.zeros((40, 28, 28), np.float32)}, "test_images"),
        ({"train_labels": np.zeros((3, 1), np.uint8)}, "train_labels"),
        ({"train_labels": np.full((120, 1), 7, np.uint8)}, "outside"),
        ({"test_labels": np.zeros((40, 1), np.uint8)}, "no image of class 'pneumonia' in test"),
        ({"train_labels": np.array([[object()]] * 120)}, "pneumoniamnist.npz"),  # would need unpickling
    ],
)
def test_a_wrong_medmnist_file_is_named(tmp_path, random, replaced, named):
    write_medmnist(tmp_path / "pneumoniamnist.npz", random, **replaced)
    fails(tiny(tmp_path, data="pneumoniamnist", data_dir=str(tmp_path)), named)


def test_a_truncated_medmnist_file_is_named(tmp_path, random):
    path = write_medmnist(tmp_path / "pneumoniamnist.npz", random)
    path.write_bytes(path.read_bytes()[:-500])
    fails(tiny(tmp_path, data="pneumoniamnist", data_dir=str(tmp_path)), str(path))


def test_unsupported_and_unknown_names(tmp_path, monkeypatch):
    fails(tiny(tmp_path, data="pneumoniamnist_65"), "pneumoniamnist_65")
    fails(tiny(tmp_path, data="chestmnist"), "multi-label")
    fails(tiny(tmp_path, data="organmnist3d"), "3-D")
    fails(tiny(tmp_path, data="nothing-like-it"), "nothing-like-it")
    fails(tiny(tmp_path, data="pneumoniamnist", data_dir=str(tmp_path / "none")), "data_dir", "none")


def test_a_failed_download_says_where_it_looked(tmp_path, monkeypatch):
    import medmnist

    def offline(self):
        raise RuntimeError("Automatic download failed!")

    monkeypatch.setattr(medmnist.dataset.MedMNIST, "download", offline)
    fails(tiny(tmp_path, data="bloodmnist", data_dir=str(tmp_path)), "bloodmnist.npz", str(tmp_path), "--data-dir")


# ------------------------------------------------------------------------------------------------------ image folders


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_folder_is_decoded_in_order(tmp_path, random, workers):
    root = write_image_folder(tmp_path / "xrays", random)
    data = prepare(tiny(tmp_path, data=str(root), image_size=16, workers=workers))
    assert data.classes == ("NORMAL", "PNEUMONIA")
    assert data.test.images.shape == (36, 1, 16, 16) and data.test.labels.tolist() == [0] * 18 + [1] * 18
    bright = data.test.images[:, 0, :6].float().mean((1, 2)) > 100  # PNEUMONIA is brighter in its upper half
    assert torch.equal(bright.long(), data.test.labels)


def test_validation_is_held_out_by_patient_and_stratified(tmp_path, random, monkeypatch):
    root = write_image_folder(tmp_path / "xrays", random, patients=20, val=True)  # val/ has 12 images: too few
    decoded = {}

    def remember(split, files, *rest):
        decoded[split] = files
        return real(split, files, *rest)

    real = folder._decode
    monkeypatch.setattr(folder, "_decode", remember)
    data = prepare(tiny(tmp_path, data=str(root), image_size=8))
    groups = {split: {(label, folder.patient(path)) for path, label in files} for split, files in decoded.items()}
    assert not groups["train"] & groups["val"]
    assert {path.parts[-3] for path, _ in decoded["val"]} == {"train"}
    assert data.val.labels.float().mean() == 0.5 and len(data.train) + len(data.val) == 120
    assert any("by patient" in note and "12" in note for note in data.notes)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("person123_bacteria_45.jpeg", "person123"),
        ("person1_virus_6.jpeg", "person1"),
        ("IM-0115-0001.jpeg", "IM-0115"),
        ("IM-0115-0001-0002.jpeg", "IM-0115"),
        ("NORMAL2-IM-1440-0001-0002.jpeg", "NORMAL2-IM-1440"),
        ("scan_17.png", "scan_17"),
    ],
)
def test_the_patient_in_a_file_name(name, group):
    assert folder.patient(Path(name)) == group


def test_hold_out_needs_two_groups_of_each_class():
    labels = np.array([0, 0, 0, 1, 1, 1])
    train, val = hold_out(labels, ["a", "a", "b", "c", "d", "d"], seed=0)
    assert sorted([*train, *val]) == list(range(6)) and set(labels[val]) == {0, 1}
    with pytest.raises(UserError, match="one patient"):
        hold_out(labels, ["a", "b", "c", "d", "d", "d"], seed=0)


def test_a_large_enough_validation_folder_is_used(tmp_path, random, monkeypatch):
    monkeypatch.setattr(folder, "SMALLEST_VALIDATION", 10)
    root = write_image_folder(tmp_path / "xrays", random, val=True)
    data = prepare(tiny(tmp_path, data=str(root), image_size=8))
    assert len(data.val) == 12 and len(data.train) == 144


def test_images_beyond_the_memory_limit_are_the_same_from_a_file(tmp_path, random, monkeypatch):
    root = write_image_folder(tmp_path / "xrays", random)
    config = tiny(tmp_path, data=str(root), image_size=8)
    in_memory = prepare(config)
    monkeypatch.setattr(folder, "MEMORY_LIMIT", 0)
    assert torch.equal(prepare(config).train.images, in_memory.train.images)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "bomb"])
def test_a_corrupt_image_is_named(tmp_path, random, monkeypatch, damage):
    root = write_image_folder(tmp_path / "xrays", random)
    victim = root / "train" / "NORMAL" / "IM-0003-0001.jpeg"
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:300])
    elif damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(victim)
    else:
        victim.write_bytes(b"not an image\n" if damage == "text" else b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fails(tiny(tmp_path, data=str(root), image_size=8), f"image {victim}")


def test_deep_images_use_their_own_range(tmp_path):
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) + 9000
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    decoded = folder._Decoder([(tmp_path / "deep.png", 0)], 64)[0]
    np.testing.assert_array_equal(decoded, np.round((ramp - 9000.0) * (255 / 4095)))
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    assert "not finite" in folder._Decoder([(tmp_path / "nan.tiff", 0)], 8)[0]


def test_formats_that_run_other_programs_are_not_opened(tmp_path, random):
    root = write_image_folder(tmp_path / "xrays", random)
    victim = root / "train" / "NORMAL" / "IM-0003-0001.jpeg"
    victim.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    fails(tiny(tmp_path, data=str(root), image_size=8), f"image {victim}")


def test_missing_folders_and_classes_are_named(tmp_path, random):
    root = write_image_folder(tmp_path / "xrays", random)
    os.rename(root / "test" / "NORMAL", tmp_path / "kept")
    fails(tiny(tmp_path, data=str(root)), "'NORMAL'", "missing in test/")
    (root / "test" / "NORMAL").mkdir()
    fails(tiny(tmp_path, data=str(root)), "no image of class 'NORMAL'")
    os.rename(root / "test", tmp_path / "test")
    fails(tiny(tmp_path, data=str(root)), "no folder test/")
    (tmp_path / "bare").mkdir()
    fails(tiny(tmp_path, data=str(tmp_path / "bare")), "no folder train/")


def test_one_class_is_not_enough(tmp_path, random):
    root = write_image_folder(tmp_path / "xrays", random)
    for split in ("train", "test"):
        os.rename(root / split / "NORMAL", tmp_path / split)
    fails(tiny(tmp_path, data=str(root)), "2 or more")


@pytest.mark.parametrize("what", ["file", "class folder", "split"])
def test_links_that_lead_out_of_the_folder_are_refused(tmp_path, random, what):
    root = write_image_folder(tmp_path / "xrays", random)
    victim = {"file": "train/NORMAL/IM-0003-0001.jpeg", "class folder": "test/NORMAL", "split": "train"}[what]
    os.rename(root / victim, tmp_path / "elsewhere.jpeg")
    (root / victim).symlink_to(tmp_path / "elsewhere.jpeg")
    fails(tiny(tmp_path, data=str(root), image_size=8), "symbolic link", str(root))


def test_special_files_are_refused(tmp_path, random):
    root = write_image_folder(tmp_path / "xrays", random)
    os.mkfifo(root / "train" / "NORMAL" / "pipe.png")
    fails(tiny(tmp_path, data=str(root)), "pipe.png", "regular file")


def test_a_tar_is_unpacked_once_into_the_cache(tmp_path, random, monkeypatch):
    root = write_image_folder(tmp_path / "xrays", random)
    with tarfile.open(tmp_path / "xrays.tar", "w") as packed:
        packed.add(root, "xrays")
        packed.add(__file__, "xrays/train/NORMAL/notes.py")  # left out: no image
    config = tiny(tmp_path, data=str(tmp_path / "xrays.tar"), image_size=8)
    once = prepare(config)
    assert len(once.test) == 36
    assert not list((tmp_path / "cache").rglob("*.py"))
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)  # a second run must not need it
    assert torch.equal(prepare(config).test.images, once.test.images)


@pytest.mark.parametrize("evil", ["../../escaped.jpeg", "/tmp/ffcl_escaped.jpeg"])
def test_a_tar_cannot_write_outside_the_cache(tmp_path, random, evil):
    root = write_image_folder(tmp_path / "xrays", random)
    with tarfile.open(tmp_path / "evil.tar", "w") as packed:
        packed.add(root, "xrays")
        member = packed.gettarinfo(root / "train" / "NORMAL" / "IM-0003-0001.jpeg")
        member.name = evil
        with open(root / "train" / "NORMAL" / "IM-0003-0001.jpeg", "rb") as file:
            packed.addfile(member, file)
    try:
        prepare(tiny(tmp_path, data=str(tmp_path / "evil.tar"), image_size=8))
    except UserError as error:
        assert "evil.tar" in str(error)
    assert not (tmp_path / "escaped.jpeg").exists() and not os.path.exists("/tmp/ffcl_escaped.jpeg")


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "x.tar").write_text("no")
    fails(tiny(tmp_path, data=str(tmp_path / "x.tar")), "x.tar")


# ----------------------------------------------------------------------------------------------------------- real data


def test_the_shared_chest_xrays(tmp_path, data_dir):
    data = prepare(tiny(tmp_path, data="pneumoniamnist", data_dir=str(data_dir)))
    assert [len(data.train), len(data.val), len(data.test)] == [4708, 524, 624]
    data = prepare(tiny(tmp_path, data=str(data_dir / "chest_xray_224.tar"), image_size=16, workers=2))
    assert len(data.train) + len(data.val) == 5216 and len(data.test) == 624
    assert 400 < len(data.val) < 650
    assert abs(data.val.labels.float().mean() - data.train.labels.float().mean()) < 0.03
