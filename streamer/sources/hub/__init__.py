"""The Hugging Face Hub: repositories by ranges, whole shards in its cache, and snapshots offline."""

from safeshard.streamer.sources.hub.opening import open_hub
from safeshard.streamer.sources.hub.place import HUB_NAME, pinned
from safeshard.streamer.sources.hub.shard_cache import ShardCache, hub_cache

__all__ = ["HUB_NAME", "ShardCache", "hub_cache", "open_hub", "pinned"]
