"""The formats of quantised weights, a small file each behind one protocol. A new one is a file and a rule."""

from safeshard.streamer.inputs.codecs.base import Codec, Encoded, Stored, reencode
from safeshard.streamer.inputs.codecs.declared import FORMATS, Encoding, Refused, encoding, region

__all__ = ["FORMATS", "Codec", "Encoded", "Encoding", "Refused", "Stored", "encoding", "reencode", "region"]
