"""The report: outputs as one HTML page that needs nothing else, for reading, printing and passing on."""

from safeshard.manifests.report.page import page

__all__ = ["page"]
