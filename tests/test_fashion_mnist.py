"""Section 3: the committed images, and what happens when a file is missing or damaged."""

import gzip
import hashlib
import multiprocessing
import shutil

import pytest
import torch

import helpers

FILES = list(helpers.FASHION_SHA256)
SMALL = "t10k-labels-idx1-ubyte"  # the smallest file: the tests that unpack use it
ORIGINAL = helpers.DATA


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty clone whose data folder holds one packed file."""
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    monkeypatch.setattr(helpers, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    shutil.copy(ORIGINAL / f"{SMALL}.gz", tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(("split", "n"), [("train", 60_000), ("test", 10_000)])
def test_the_images(split, n):
    images, labels = helpers.load_fashion_mnist(split)
    assert images.shape == (n, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.shape == (n,)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [n // 10] * 10
    assert (images.float().mean() / 255).item() == pytest.approx(0.286, abs=0.002)
    corners = helpers.to_model_range(images[:1000])
    assert helpers.residual_noise(corners) == 0


@pytest.mark.parametrize("name", FILES)
def test_the_committed_files_are_the_published_ones(name):
    content = gzip.decompress((ORIGINAL / f"{name}.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == helpers.FASHION_SHA256[name]


def test_unpacked_once(data):
    helpers._unpack(SMALL)
    raw = data / "FashionMNIST" / "raw" / SMALL
    assert raw.read_bytes() == gzip.decompress((data / f"{SMALL}.gz").read_bytes())
    before = raw.stat()
    (data / f"{SMALL}.gz").unlink()
    helpers._unpack(SMALL)
    assert raw.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in raw.parent.iterdir()] == [SMALL]


def test_a_damaged_unpacked_file_is_replaced(data):
    raw = data / "FashionMNIST" / "raw" / SMALL
    raw.parent.mkdir(parents=True)
    raw.write_bytes(b"half")
    helpers._unpack(SMALL)
    assert len(raw.read_bytes()) == 10_008


def test_a_full_disk_leaves_no_half_file(data, monkeypatch):
    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(helpers.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        helpers._unpack(SMALL)
    assert list((data / "FashionMNIST" / "raw").iterdir()) == []


def test_a_missing_file_is_named_with_the_remedy(data):
    (data / f"{SMALL}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{SMALL}\.gz is missing; .*git checkout -- data"):
        helpers._unpack(SMALL)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz is missing"):
        helpers.load_fashion_mnist("test")


def truncate(content):
    return content[: len(content) // 2]


def flip(position):
    def damage(content):
        at = int(position * len(content))
        return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]

    return damage


DAMAGES = {
    "empty": lambda content: b"",
    "not gzip": lambda content: b"<html>404</html>",
    "truncated": truncate,
    "one byte short": lambda content: content[:-1],
    "start altered": flip(0.01),
    "middle altered": flip(0.5),
    "checksum altered": flip(0.9995),
    "other content": lambda content: gzip.compress(b"other images"),
    "one pixel altered": lambda content: gzip.compress(flip(0.5)(gzip.decompress(content))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_remedy(damage, data):
    packed = data / f"{SMALL}.gz"
    packed.write_bytes(DAMAGES[damage](packed.read_bytes()))
    with pytest.raises(ValueError, match=rf"{SMALL}\.gz .*; restore it with `git checkout -- data"):
        helpers._unpack(SMALL)
    assert not (data / "FashionMNIST").exists()


def unpack_together(root, barrier):
    """In another process: unpack at the same moment as the others."""
    helpers.ROOT, helpers.DATA = root, root / "data"
    barrier.wait()
    for _ in range(5):
        helpers._unpack(SMALL)


def test_processes_may_unpack_at_once(data):
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=unpack_together, args=(data.parent, barrier)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    raw = data / "FashionMNIST" / "raw"
    assert [path.name for path in raw.iterdir()] == [SMALL]
