"""Places afar that outputs are written to: prefixes of buckets, and repositories of the Hub."""

from safeshard.streamer.sources.stores.base import ConflictError, Store, Stored
from safeshard.streamer.sources.stores.bucket import BucketStore
from safeshard.streamer.sources.stores.hub import HubStore

__all__ = ["BucketStore", "ConflictError", "HubStore", "Store", "Stored", "open_store"]


def open_store(url: str) -> BucketStore | HubStore:
    """The store behind an output's URL, as options give it; nothing is asked of it yet.

    Raises:
        RequestError: a package is missing; names the extra that brings it.
    """
    return HubStore(url.removeprefix("hf://")) if url.startswith("hf://") else BucketStore(url)
