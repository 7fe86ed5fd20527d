"""Whether a video file is whole, by its container's own account: mp4, avi, Matroska and webm. Nothing is decoded."""

import os
from typing import BinaryIO

from future_l1_plugin.errors import DataError

#: What to do about a file that is empty, cut off or damaged.
REPLACE = "Download or write the file again, or drop its records."


def check_file(path: str | os.PathLike) -> None:
    """Find what decoders report badly, late or never: no file, no bytes, a file shorter than its container says.

    Nothing is decoded, so this is cheap enough for every file of a large set. Raises DataError.
    """
    if not os.path.exists(path):
        raise DataError(f"{path}: no such video. Check the path and the video root.")
    if not os.path.isfile(path):
        raise DataError(f"{path}: not a file. A video file was expected.")
    size = os.path.getsize(path)
    if size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes). {REPLACE}")
    # A cut mp4 with its index in front opens, and fails only at the frames that are gone; a cut webm just is shorter.
    with open(path, "rb") as file:
        needed = _declared_size(file, size)
    if needed > size:
        raise DataError(f"{path}: the file is cut off: {size} bytes are there, it needs at least {needed}. {REPLACE}")


def _declared_size(file: BinaryIO, size: int) -> int:
    """Bytes that the file must have by its own account; 0 where its format (or a live recording) gives none."""
    head = file.read(64)
    if head[:4] == b"RIFF":  # avi
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"\x1a\x45\xdf\xa3":  # Matroska, webm: a header element, then the Segment that holds the rest
        header, width = _ebml_size(head, 4)
        position = 4 + width + header
        file.seek(position)
        head = file.read(12)
        segment, width = _ebml_size(head, 4)
        return position + 4 + width + segment if head[:4] == b"\x18\x53\x80\x67" else 0
    # mp4: a row of boxes, each with its length and kind. Rubbish after the last is harmless, so only kinds that matter
    # are held to their length.
    position = needed = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if position == 0 and kind not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"):
            return 0  # another container: its decoder will tell
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0 is "to the end of the file", the rest is no box
            return needed
        position += length
        if kind in (b"moov", b"mdat", b"moof"):
            needed = position
    return needed


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """A Matroska size field (RFC 8794, section 4): (value, bytes it takes); an unknown size is 0."""
    if at >= len(data) or data[at] == 0:
        return 0, 1
    width = 9 - data[at].bit_length()
    bits = 7 * width
    value = int.from_bytes(data[at : at + width], "big") & ((1 << bits) - 1)
    return (0 if value == (1 << bits) - 1 else value), width
