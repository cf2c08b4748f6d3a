"""The formats of quantised weights, a small file each behind one protocol. A new one is a file and a rule."""

from safeshard.streamer.inputs.codecs.declared import FORMATS, MAX_EXPERTS, Encoding, Refused, encoding, region, schemes

__all__ = ["FORMATS", "MAX_EXPERTS", "Encoding", "Refused", "encoding", "region", "schemes"]
