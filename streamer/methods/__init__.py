"""The methods by name. A new one is a file beside this and a row here."""

from safeshard.streamer.methods.base import Job
from safeshard.streamer.methods.lssf import Lssf
from safeshard.streamer.methods.resta import Resta
from safeshard.streamer.methods.ridge import Ridge
from safeshard.streamer.methods.safedelta import SafeDelta
from safeshard.streamer.methods.safelora import SafeLora
from safeshard.streamer.methods.safemerge import SafeMerge
from safeshard.streamer.methods.scale import Scale

METHODS: dict[str, type[Job]] = {job.method: job for job in (SafeMerge, SafeLora, SafeDelta, Ridge, Resta, Lssf, Scale)}
