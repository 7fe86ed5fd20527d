"""Writing clips: H.264 mp4 by PyAV, the same bytes for the same frames."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from future_l1_plugin.errors import DataError, EnvironmentMismatch


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float, crf: int = 18) -> None:
    """Write an H.264 mp4 (yuv420p, one encoder thread). The same frames give the same bytes on the same machine.

    The file appears under its name only when it is complete.

    Args:
        path: target; its folder must exist. An existing file is replaced.
        frames: uint8 (N, H, W, 3), RGB, N >= 1, H and W even (yuv420p halves them for colour).
        fps: frames per second, above 0.
        crf: quality of libx264, 0 (lossless before the colour step) .. 51 (worst).

    Raises:
        DataError: wrong shape, dtype, fps or crf, or the folder is missing.
        EnvironmentMismatch: PyAV is not installed.
    """
    path = Path(path)
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        found = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise DataError(f"{path}: expected frames as a uint8 array (N, H, W, 3), got {found}")
    count, height, width, _ = frames.shape
    if count == 0 or height == 0 or width == 0:
        raise DataError(f"{path}: nothing to write, frames have the shape {frames.shape}")
    if height % 2 or width % 2:
        raise DataError(
            f"{path}: yuv420p needs even sides, got {height}x{width} (height x width). Pad or crop by one pixel."
        )
    if not fps > 0:
        raise DataError(f"{path}: fps={fps}, expected a number above 0")
    if not 0 <= crf <= 51:
        raise DataError(f"{path}: crf={crf}, expected 0..51")
    if not path.parent.is_dir():
        raise DataError(f"{path}: its folder does not exist. Create {path.parent} first.")
    try:
        import av
    except ImportError as error:
        raise EnvironmentMismatch("writing videos needs PyAV. Fix: pip install av") from error

    # In the same folder, because a rename is atomic only within one file system.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with av.open(str(part), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.thread_type, stream.thread_count = "NONE", 1
            # Without mbtree: its vector code (x264 core 165) lets the state of memory shift a quantiser by a step, and
            # one clip came out in two or three versions over 150 runs. The price is about 1.5% more bytes.
            stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
