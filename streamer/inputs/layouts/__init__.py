"""Where each module's weight lies in a checkpoint: experts apart or fused, quantised or not."""

from safeshard.streamer.inputs.layouts.modules import Modules
from safeshard.streamer.inputs.layouts.views import Part, Stored, View, plain

__all__ = ["Modules", "Part", "Stored", "View", "plain"]
