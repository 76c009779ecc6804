"""Section 3: the committed images, and what happens when a file is missing or damaged."""

import gzip
import hashlib
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


def test_a_read_only_clone_loads_and_stays_as_it_is(data):
    """Nothing is written into the clone, whoever may write there."""
    shutil.copy(ORIGINAL / "t10k-images-idx3-ubyte.gz", data)
    data.chmod(0o555)
    images, labels = helpers.load_fashion_mnist("test")
    assert (len(images), len(labels)) == (10_000, 10_000)
    assert sorted(path.name for path in data.iterdir()) == [
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ]


def test_no_unpacked_file_is_left_behind(data, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(helpers.tempfile, "tempdir", str(scratch))
    shutil.copy(ORIGINAL / "t10k-images-idx3-ubyte.gz", data)
    helpers.load_fashion_mnist("test")
    assert list(scratch.iterdir()) == []


def test_a_missing_file_is_named_with_the_remedy(data):
    (data / f"{SMALL}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{SMALL}\.gz is missing; .*git checkout -- data"):
        helpers._unpack(SMALL)
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte\.gz is missing"):
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


# Ranges


def test_ranges_are_inverse():
    """Black is -1, white 1, and the way back ends in [0, 1], clipped."""
    levels = torch.arange(256)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        x = helpers.to_model_range(levels.to(dtype))
        assert (x.min(), x.max(), x.dtype) == (-1, 1, torch.float32)
        torch.testing.assert_close(helpers.to_image_range(x), levels / 255)
    assert helpers.to_image_range(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: helpers.to_model_range(torch.rand(3)), r"got torch.float32; .*need 2 \* x - 1"),
        (lambda: helpers.to_model_range(torch.tensor([True])), "got torch.bool"),
        (lambda: helpers.to_model_range(torch.tensor([256])), "integers, and 0 .. 255"),
        (lambda: helpers.to_model_range(torch.tensor([-1])), "integers, and 0 .. 255"),
        (lambda: helpers.to_image_range(torch.tensor([7]).byte()), "must be floats .* got torch.u"),
    ],
)
def test_a_wrong_range_is_refused(call, message):
    """Floats in [0, 1] gave black images, silently."""
    with pytest.raises(ValueError, match=message):
        call()
