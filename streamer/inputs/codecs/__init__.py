"""The formats of quantised weights, a small file each behind one protocol. A new one is a file and a rule."""

from safeshard.streamer.inputs.codecs.declared import FORMATS, Encoding, Refused, encoding, region

__all__ = ["FORMATS", "Encoding", "Refused", "encoding", "region"]
