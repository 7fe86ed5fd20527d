"""Frames, TwiFF records, SFT batches and the embedded micro world."""

from future_l1_plugin.data.frame_cache import FrameCache
from future_l1_plugin.data.frame_choice import frame_pool, uniform_indices
from future_l1_plugin.data.frames import VideoFrames, read_frames
from future_l1_plugin.data.record_files import load_records
from future_l1_plugin.data.records import TwiffRecord
from future_l1_plugin.data.world import World, make_world

__all__ = [
    "FrameCache",
    "TwiffRecord",
    "VideoFrames",
    "World",
    "frame_pool",
    "load_records",
    "make_world",
    "read_frames",
    "uniform_indices",
]
