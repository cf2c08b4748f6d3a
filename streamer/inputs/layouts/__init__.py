"""Where each module's weight lies in a checkpoint: experts apart or fused, quantised or not."""

from safeshard.streamer.inputs.layouts.families import FAMILIES, GATE_UP, ROLES, Family, model_type
from safeshard.streamer.inputs.layouts.modules import Modules, routes
from safeshard.streamer.inputs.layouts.views import WHOLE, Part, Stored, View, plain

__all__ = [
    "FAMILIES", "GATE_UP", "ROLES", "WHOLE", "Family", "Modules", "Part", "Stored", "View", "model_type", "plain",
    "routes",
]  # fmt: skip
