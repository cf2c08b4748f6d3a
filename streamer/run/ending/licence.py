"""The licence of an output, as the model cards of its inputs state it."""

from __future__ import annotations

import re

from safeshard.manifests.errors import SafeshardError
from safeshard.streamer.plan.doubts.bases import known_id
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.sources import Source

CARD = "README.md"
MAX_HEAD = 1 << 16  # bytes of a card in which its front matter must end
_FIELD = re.compile(r"^(license|license_name|license_link):[ \t]*(\S[^\r\n]*?)[ \t]*\r?$", re.MULTILINE)


def licence(plan: JobPlan) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of the aligned model; of the fine-tuned one where that says nothing.

    A link to a file of the aligned repository is made whole.
    """
    for source in (plan.aligned.source, plan.finetuned.source):
        if fields := _stated(source):
            link, repo = fields.get("license_link"), known_id(source)
            if link and "://" not in link and repo is not None:
                fields["license_link"] = f"https://huggingface.co/{repo}/blob/{source.revision or 'main'}/{link}"
            return fields
    return {}


def _stated(source: Source) -> dict[str, str]:
    size = source.sizes().get(CARD, 0)
    try:
        text = source.read(CARD, 0, min(size, MAX_HEAD)).decode(errors="replace") if size else ""
    except SafeshardError:  # the output is complete without it
        return {}
    parts = text.replace("\r\n", "\n").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    fields = {name: value.strip("\"'") for name, value in _FIELD.findall(parts[1])}
    return fields if "license" in fields else {}
