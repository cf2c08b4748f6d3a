"""Writers to a bucket and the Hub that are killed, or get no answer, at any request: a rerun ends with the same bytes.

The place outlives them. Each command is struck at a request; what it leaves shows nothing finished that is not, and the
same command, on this machine or another, ends with the bytes of an undisturbed run.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from afar_commands import Afar, jobs_file, words
from afar_places import KINDS, OUT, Bucket, Hub, Strike
from bucket_outputs import layered
from harness import Server, contents
from stand_in_bucket import StandinBucket
from stand_in_hub import StandinHub

TOKEN = "hf_verysecrettoken"
COMMANDS = [
    ("bucket", "write"),
    ("replaced", "write"),
    ("parts", "part"),
    ("parts", "other part"),
    ("parts", "finish"),
    ("push", "push"),
    ("push beside", "push"),
]


@pytest.fixture(scope="module")
def bucket() -> Iterator[StandinBucket]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        made = StandinBucket()
        yield made
        made.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[StandinHub]:
    made = StandinHub()
    made.writes.token = TOKEN
    yield made
    made.close()


@pytest.fixture(scope="module")
def machine(faults_root: Path, bucket: StandinBucket, hub: StandinHub) -> Iterator[Server]:
    """A server that finds both, whose work folder lies on `disk`."""
    home = faults_root / "afar"
    home.mkdir()
    environment = bucket.env | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "xdg"), "NO_PROXY": "127.0.0.1,localhost",
    }  # fmt: skip
    server = Server(home, **environment)
    yield server
    server.close()


@pytest.fixture(scope="module")
def afar(
    faults_root: Path, bucket: StandinBucket, hub: StandinHub, machine: Server, make_world: Any
) -> Iterator[Callable[[str], Afar]]:
    """Name -> its commands, each made and measured once. In the end all inputs are as they were."""
    made: dict[str, Afar] = {}
    world = make_world(faults_root / "afar/in")
    world.sizes = {"hidden": 16, "kv": 8, "inner": 24}
    full = layered(world)
    base = world.llama(3, seed=1)
    lora = {role: full[role] for role in ("aligned", "unaligned")} | {"adapter": world.adapter("adapter", base)}

    def get(name: str) -> Afar:
        if name not in made:
            home = faults_root / "afar" / name.replace(" ", "-")
            disk = home / "disk"
            disk.mkdir(parents=True)
            bucket.restore({})
            empty_hub()
            places = {"push": Hub(hub), "push beside": Hub(hub)}
            commands, outputs = _commands(name, full, lora, home)
            case = made[name] = Afar(machine, places.get(name, Bucket(bucket)), home, commands, outputs)
            if name == "replaced":
                earlier = case.say([*commands["write"], "--gamma=0.5"])
                assert earlier["status"] == 0, earlier["messages"]
                commands["write"].append("--overwrite")
            case.measure()
        return made[name]

    inputs, empty_hub = contents(world.root), Hub(hub).keep()
    yield get
    assert contents(world.root) == inputs


def _commands(
    name: str, full: dict[str, Any], lora: dict[str, Any], home: Path
) -> tuple[dict[str, list[str]], dict[str, str]]:
    url = f"s3://models/{OUT}x"
    if name == "push":
        return {"push": words("resta", full | {"push": "me/x"})}, {"me/x": "hf://me/x"}
    if name == "push beside":
        options = lora | {"num_layers": 3, "output": home / "disk/x", "push": "me/y"}
        return {"push": words("safelora", options)}, {"me/y": "hf://me/y"}
    if name == "parts":
        jobs = [
            full | {"method": "resta", "output": url},
            lora | {"method": "safelora", "num_layers": 3, "output": f"s3://models/{OUT}ranked"},
        ]
        batch = ["batch", str(jobs_file(home / "jobs.yaml", *jobs)), "--quiet"]
        finish = ["finish", *batch[1:]]
        commands = {"part": [*batch, "--part=1/2"], "other part": [*batch, "--part=2/2"], "finish": finish}
        return commands, {"x": url, "ranked": f"s3://models/{OUT}ranked"}
    return {"write": words("resta", full | {"output": url})}, {"x": url}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "struck"), COMMANDS)
def test_struck_at_any_request(afar: Callable[[str], Afar], name: str, struck: str, kind: str) -> None:
    case = afar(name)
    for at, dice in case.spread(struck, 2, kind):
        case.reset(struck)
        strike = Strike(kind, at, case.home / "pid")
        ended = case.run(struck, strike)
        about = (name, struck, kind, at, strike.asked[at : at + 1])
        if strike.kills:
            assert ended["status"] in (-signal.SIGKILL, 0), (about, ended["messages"])
        else:
            assert ended["status"] == 0, (about, ended["messages"])
        assert (ended["status"] == 0) != (strike.kills and at < len(strike.asked)), about
        case.check_nothing_half_done(about)
        if dice.random() < 0.2:
            case.verify(about)
        if dice.random() < 0.5:
            case.move()
        case.go_on(struck, about)


@pytest.mark.parametrize(("name", "struck"), COMMANDS)
def test_killed_again_and_again(afar: Callable[[str], Afar], name: str, struck: str) -> None:
    """Here, and on another machine."""
    case = afar(name)
    for _, dice in case.spread(struck, 1, "again"):
        case.reset(struck)
        about = []
        for _ in range(3):
            at = dice.randrange(len(case.calls[struck]))
            about.append(at)
            ended = case.run(struck, Strike(dice.choice(KINDS[:2]), at, case.home / "pid"))
            case.check_nothing_half_done(about)
            if not ended["status"]:
                break
            if dice.random() < 0.3:
                case.move()
        case.go_on(struck, about)
