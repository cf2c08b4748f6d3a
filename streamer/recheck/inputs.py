"""Whether the inputs that a manifest names are still what was read.

A manifest may be a stranger's. Of what it names by itself only local folders and Hub repositories are opened, and
files that these list; a URL is opened where the user names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import Input, InputFile, Manifest
from safeshard.manifests.verify import Finding
from safeshard.streamer.calibration.data.data_files import DATA, read_data
from safeshard.streamer.calibration.data.data_files import pinned as pinned_data
from safeshard.streamer.inputs.headers import file_header, read_file_header
from safeshard.streamer.inputs.samples import hash_file
from safeshard.streamer.sources import Source, is_url, open_source, pinned

Note = Callable[[str], None]


def input_places(manifest: Manifest, moved: Mapping[str, str]) -> dict[str, str]:
    """Role -> where an input lies now: as `moved` says, else as recorded, a Hub repository at its commit.

    Calibration data behind saved factors is left out: `calibrate` read it, not this job.

    Raises:
        RequestError: `moved` names an input that there is not, or the manifest alone names a URL.
    """
    roles = [role for role in manifest.inputs if not (role == "calibration" and "factors" in manifest.inputs)]
    offences = [
        Offence("--source", role, f"a role among {', '.join(roles)}", "another", "correct the role")
        for role in moved.keys() - set(roles)
    ]
    places = {}
    for role in roles:
        given = manifest.inputs[role]
        at_commit = pinned_data if role in DATA.values() else pinned
        places[role] = moved.get(role) or at_commit(given.source, given.revision)
        if role not in moved and is_url(given.source):
            remedy = f"add --source {role}=URL if you trust it"
            offences.append(Offence(given.source, role, "a URL that you name", "one that the manifest names", remedy))
    if offences:
        raise RequestError(offences)
    return places


def check_inputs(manifest: Manifest, places: Mapping[str, str], note: Note) -> list[Finding]:
    """Compare the inputs with what the manifest says of them: sizes, headers, contents or samples of them.

    `note` receives what could not be compared. Raises nothing for an input that is gone: that is a finding.
    """
    findings: list[Finding] = []
    for role, place in places.items():
        given = manifest.inputs[role]
        try:
            findings += _data(role, given, place) if role in DATA.values() else _folder(role, given, place, note)
        except RequestError as error:
            problem = f"{role} cannot be opened"
            findings += [Finding(o.where, o.what, problem, o.expected, o.got) for o in error.offences]
        except RunError as error:
            findings.append(Finding(place, "", f"{role} cannot be read", got=error.message))
    return findings


def _data(role: str, given: Input, place: str) -> Iterator[Finding]:
    """Data of a calibration: one file, wherever it lies."""
    try:
        found = read_data(place)
    except RequestError as error:
        yield from (Finding(place, "", f"{role}: missing", o.expected, o.got) for o in error.offences)
        return
    for file in given.files:
        if file.size != len(found.data):
            yield Finding(place, "", f"{role}: size differs", str(file.size), str(len(found.data)))
        elif file.blake3 != (digest := hash_bytes(found.data)):
            yield Finding(place, "", f"{role}: content differs", str(file.blake3), digest)


def _folder(role: str, given: Input, place: str, note: Note) -> Iterator[Finding]:
    source = open_source(place)
    if given.revision is not None and source.revision is None:
        note(f"{role}: {given.source} was read at a commit; {place} can be compared by sizes and headers alone")
    elif given.revision is not None and source.revision != given.revision:
        yield Finding(place, "", f"{role}: revision differs", given.revision, str(source.revision))
    if given.revision is None and any(file.header_sha256 and not file.sample_blake3 for file in given.files):
        note(f"{role}: recorded without a hash of its content, so that sizes and headers alone can be compared")
    sizes = source.sizes()
    for file in given.files:
        if file.name in sizes:
            yield from _file(role, source, file.name, file)
        else:
            yield Finding(f"{place}/{file.name}", "", f"{role}: missing")


def _file(role: str, source: Source, name: str, file: InputFile) -> Iterator[Finding]:
    """The first difference of one file, if there is any; what costs least is compared first."""
    for what, expected, got in _facts(source, name, file):
        if expected is not None and expected != (found := got()):
            yield Finding(f"{source.spec}/{name}", "", f"{role}: {what} differs", str(expected), str(found))
            return


def _facts(
    source: Source, name: str, file: InputFile
) -> Iterator[tuple[str, int | str | None, Callable[[], int | str]]]:
    yield "size", file.size, lambda: source.sizes()[name]
    if file.header_sha256 is not None:
        found = file_header(source, name, read_file_header(source, name))
        yield "header", file.header_sha256, lambda: found.sha256
        yield "content", file.sample_blake3, lambda: found.sample
    yield "content", file.blake3, lambda: hash_file(source, name)
