"""Reading and writing image files, and the arrays of networks whose results are no pictures, with errors that say what was found."""

from __future__ import annotations

import io
import os
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import cv2
import numpy as np

from modelcrate_bundle.errors import InputError, OutputError
from modelcrate_runtime.cores import usable_cores

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
JPEG_QUALITY: Final = 95
_READERS: Final = 4
"""Threads that read ahead, at most: a network needs the cores more."""
_AHEAD: Final = 4
"""Images that each of them may be ahead."""
_HELD_BYTES: Final = 2**30
"""Pixels of `hold_images`: some 1100 pictures of COCO, or 30 of twelve megapixels."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image file as 8-bit colour: grey is replicated, alpha dropped, 16 bits reduced, EXIF orientation applied.

    Args:
        path: a file in any format that OpenCV reads.

    Returns:
        (H, W, 3) BGR uint8.

    Raises:
        InputError: not there, or not an image.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(f"{path}: expected an image, found: {error.strerror}", hint="check the path") from error
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except cv2.error as error:
        raise InputError(f"{path}: expected an image, found one that OpenCV refuses: {error.err}") from error
    if image is None:
        raise InputError(
            f"{path}: expected an image, found {'an empty file' if not data.size else 'something that OpenCV cannot decode'}", hint="convert it to JPEG or PNG"
        )
    return image  # type: ignore[return-value]


def read_images(paths: Sequence[Path]) -> Iterator[NDArray[np.uint8] | InputError]:
    """Read image files in the order that they have, a few of them ahead in threads.

    Args:
        paths: as for `read_image`.

    Yields:
        What `read_image` returns for each, or what it raises.
    """
    threads = min(usable_cores(), _READERS)
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="modelcrate-images")
    pending: deque[Future[NDArray[np.uint8] | InputError]] = deque()
    try:
        for path in paths:
            pending.append(pool.submit(_read_or_error, path))
            if len(pending) > _AHEAD * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def hold_images(paths: Sequence[Path], *, most: int) -> list[NDArray[np.uint8]]:
    """The first images of a list, decoded, as many as are needed and as fit into a gibibyte; at least one where there is one.

    Args:
        paths: as for `read_image`.
        most: how many are needed.

    Raises:
        InputError: one of them cannot be read.
    """
    held: list[NDArray[np.uint8]] = []
    size = 0
    for path in paths[:most]:
        held.append(read_image(path))
        size += held[-1].nbytes
        if size >= _HELD_BYTES:
            break
    return held


def _read_or_error(path: Path) -> NDArray[np.uint8] | InputError:
    try:
        return read_image(path)
    except InputError as error:
        return error


def image_files(path: Path) -> list[Path]:
    """The file itself, or the images directly in a folder, by name.

    Raises:
        InputError: nothing there, or a folder without images.
    """
    if path.is_dir():
        # macOS leaves ._name.jpg beside name.jpg, which is no image.
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file())
        if not files:
            raise InputError(f"{path}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none in the folder")
        return files
    if not path.is_file():
        raise InputError(f"{path}: expected an image or a folder of images, found nothing there", hint="check the path")
    return [path]


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) BGR uint8 as JPEG bytes."""
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise OutputError("JPEG: OpenCV could not encode the picture")
    return data.tobytes()


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write a picture in the format of the path's suffix.

    Raises:
        OutputError: an unknown suffix, or the file cannot be written.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise OutputError(
            f"{path}: expected one of {', '.join(sorted(IMAGE_SUFFIXES))}, found {path.suffix or 'no suffix'!r}", hint="name the picture like out.png"
        )
    if path.suffix.lower() in {".jpg", ".jpeg"}:
        data = encode_jpeg(image)
    else:
        done, encoded = cv2.imencode(path.suffix, image)
        if not done:
            raise OutputError(f"{path}: OpenCV could not encode the picture")
        data = encoded.tobytes()
    write_bytes(path, data)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write named arrays as a compressed `.npz`.

    Raises:
        OutputError: the file cannot be written.
    """
    content = io.BytesIO()
    # As numpy.savez_compressed, which takes names as keywords, beside some of its own.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
    write_bytes(path, content.getvalue())


def write_bytes(path: Path, data: bytes, *, option: str = "--save") -> None:
    """Write the whole file or none.

    Args:
        path: its folder is made where there is none.
        data: all of it.
        option: what the place was given with.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)  # whole or not at all
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: expected to write there, found: {error.strerror}", hint=f"choose another place with {option}") from error
