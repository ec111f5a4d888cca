"""Image files in and out."""

import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from modelcrate_bundle.errors import InputError, OutputError
from modelcrate_runtime.images import IMAGE_SUFFIXES, encode_jpeg, hold_images, image_files, read_image, read_images, write_image


@pytest.fixture
def picture() -> np.ndarray:
    """(30, 40, 3), smooth enough for JPEG, different in every channel and corner."""
    y, x = np.mgrid[0:30, 0:40]
    return np.stack([x * 6, y * 8, 255 - x * 3 - y * 4], axis=2).astype(np.uint8)


def test_png_comes_back_as_it_was(tmp_path: Path, picture: np.ndarray) -> None:
    write_image(tmp_path / "a.png", picture)
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, picture)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_suffix_is_written_and_read(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    write_image(tmp_path / f"a{suffix}", picture)
    image = read_image(tmp_path / f"a{suffix}")
    assert image.shape == picture.shape
    assert np.abs(image.astype(int) - picture).mean() < 3  # levels; the lossy formats


def test_jpeg_bytes_are_a_jpeg(picture: np.ndarray) -> None:
    data = encode_jpeg(picture)
    assert data[:3] == b"\xff\xd8\xff"
    decoded = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(decoded.astype(int) - picture).mean() < 3


def test_grey_is_replicated(tmp_path: Path, picture: np.ndarray) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), picture[:, :, 0])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(picture[:, :, :1], 3, axis=2))


def test_alpha_is_dropped(tmp_path: Path, picture: np.ndarray) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([picture, np.full((30, 40), 7, dtype=np.uint8)]))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture)


def test_sixteen_bits_are_reduced(tmp_path: Path, picture: np.ndarray) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), picture.astype(np.uint16) * 257)
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image.astype(int), picture, atol=1)


def test_exif_orientation_is_applied(tmp_path: Path, picture: np.ndarray) -> None:
    # A JPEG with an APP1 segment behind SOI: one TIFF directory, one entry: orientation 6, "rotate by 90 degrees clockwise to show".
    jpeg = encode_jpeg(picture)
    tiff = b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<I", 0)
    segment = b"Exif\0\0" + tiff
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:])
    image = read_image(path)
    assert image.shape == (40, 30, 3)
    assert np.abs(image.astype(int) - np.rot90(picture, -1)).mean() < 3


def test_names_may_hold_any_letters(tmp_path: Path, picture: np.ndarray) -> None:
    path = tmp_path / "räumlich 空間.png"
    write_image(path, picture)
    np.testing.assert_array_equal(read_image(path), picture)


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "an empty file"), (b"hello, this is text", "cannot decode"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "OpenCV")]
)
def test_what_is_no_image_is_refused_with_its_path(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=found) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_missing_image_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no.png", tmp_path):
        with pytest.raises(InputError, match="expected an image, found"):
            read_image(path)


def test_a_header_that_claims_a_hundred_gigapixels_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 400_000, 400_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    with pytest.raises(InputError, match=r"bomb\.png: expected an image"):
        read_image(path)


def test_folder_gives_its_own_images_by_name(tmp_path: Path, picture: np.ndarray) -> None:
    for name in ("b.PNG", "a.jpg", "c.webp", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "inner.png").mkdir()
    (tmp_path / "inner.png" / "d.png").write_bytes(b"x")
    assert [path.name for path in image_files(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]


def test_a_file_is_itself_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "frame").write_bytes(b"x")
    assert image_files(tmp_path / "frame") == [tmp_path / "frame"]


def test_nothing_there_and_no_images_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing there"):
        image_files(tmp_path / "no")
    with pytest.raises(InputError, match=r"expected images \(.*\.jpg.*found none in the folder"):
        image_files(tmp_path)


@pytest.mark.parametrize(("name", "found"), [("a.gif2", "'.gif2'"), ("a", "no suffix")])
def test_unknown_suffix_is_refused(tmp_path: Path, picture: np.ndarray, name: str, found: str) -> None:
    with pytest.raises(OutputError, match=found) as caught:
        write_image(tmp_path / name, picture)
    assert "out.png" in caught.value.hint
    assert not (tmp_path / name).exists()


def test_folders_are_made_and_what_stands_in_the_way_is_named(tmp_path: Path, picture: np.ndarray) -> None:
    write_image(tmp_path / "new" / "deep" / "a.png", picture)
    assert (tmp_path / "new" / "deep" / "a.png").is_file()
    (tmp_path / "file").write_bytes(b"x")
    for place in (tmp_path / "file" / "a.png", tmp_path / "dir.png"):
        (tmp_path / "dir.png").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match="expected to write there") as caught:
            write_image(place, picture)
        assert str(place) in str(caught.value)


def test_a_picture_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """A write that fails leaves the picture that was there, and no other file."""
    target = tmp_path / "a.png"
    write_image(target, np.zeros((4, 4, 3), dtype=np.uint8))
    before = target.read_bytes()
    code = f"""
import resource, signal, numpy as np
from pathlib import Path
from modelcrate_bundle.errors import OutputError
from modelcrate_runtime.images import write_image
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_image(Path({str(target)!r}), np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
except OutputError:
    print("refused")
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'sdk_bundle'}:{root / 'runtimes'}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.stdout.strip() == "refused", done.stderr
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_images_read_ahead_come_in_their_order(tmp_path: Path) -> None:
    """What cannot be read has its place among them."""
    for i in range(60):
        write_image(tmp_path / f"{i}.png", np.full((4 + i % 3, 5, 3), i, dtype=np.uint8))
    (tmp_path / "17.png").write_bytes(b"no picture")
    (tmp_path / "59.png").unlink()
    found = list(read_images([tmp_path / f"{i}.png" for i in range(60)]))
    assert [i for i, image in enumerate(found) if isinstance(image, InputError)] == [17, 59]
    assert [int(image[0, 0, 0]) for image in found if not isinstance(image, InputError)] == [i for i in range(59) if i != 17]
    assert list(read_images([])) == []


def test_reading_ahead_may_be_left(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.zeros((4, 4, 3), dtype=np.uint8))
    images = read_images([tmp_path / "a.png"] * 1000)
    next(images)
    images.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("modelcrate-images")]


def test_images_are_held_as_far_as_they_are_needed_and_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of five thousand photos does not fill the memory."""
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((10, 10, 3), i, dtype=np.uint8))
    paths = sorted(tmp_path.iterdir())
    assert [int(image[0, 0, 0]) for image in hold_images(paths, most=4)] == [0, 1, 2, 3]
    assert len(hold_images(paths, most=100)) == 6
    assert hold_images([], most=4) == []
    monkeypatch.setattr("modelcrate_runtime.images._HELD_BYTES", 2 * 300 + 1)
    assert len(hold_images(paths, most=100)) == 3
    monkeypatch.setattr("modelcrate_runtime.images._HELD_BYTES", 1)
    assert len(hold_images(paths, most=100)) == 1, "one is needed however large it is"
    (tmp_path / "5.png").write_bytes(b"no picture")
    assert len(hold_images(paths, most=4)) == 1, "what is not needed is not read"
