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


@pytest.mark.parametrize("kinds", [KINDS[:2], KINDS[2:]], ids=["killed", "without an answer"])
@pytest.mark.parametrize(("name", "struck"), COMMANDS)
def test_struck_at_any_request(afar: Callable[[str], Afar], name: str, struck: str, kinds: tuple[str, str]) -> None:
    """Whoever gets no answer goes on by itself; whoever is killed is run again, here or on another machine."""
    case = afar(name)
    for at, kind, dice in case.spread(struck, kinds, 1):
        about = strike(case, struck, kind, at)
        if dice.random() < 0.2:
            case.verify(about)
        if dice.random() < 0.5:
            case.move()
        case.go_on(struck, about)


@pytest.mark.parametrize(("kind", "moves"), [("killed before", True), ("killed after", False)])
@pytest.mark.parametrize(("name", "struck"), [("bucket", "write"), ("parts", "part"), ("parts", "finish")])
def test_killed_at_the_very_end(afar: Callable[[str], Afar], name: str, struck: str, kind: str, moves: bool) -> None:
    """All has come but for the last request, or its answer: what is left to do is to clear up, here and there."""
    case = afar(name)
    about = strike(case, struck, kind, len(case.calls[struck]) - 1)
    if moves:
        case.move()
    case.go_on(struck, about)
    if struck == "write" and moves:  # else it would do it all again
        assert not case.wrote, case.wrote


@pytest.mark.parametrize(("name", "struck"), [("replaced", "write"), ("parts", "part"), ("push", "push")])
def test_killed_again_and_again(afar: Callable[[str], Afar], name: str, struck: str) -> None:
    case = afar(name)
    for _, _, dice in case.spread(struck, ("again",), 1):
        case.reset(struck)
        about = []
        for _ in range(3):
            about.append(dice.randrange(len(case.calls[struck])))
            ended = case.run(struck, Strike(dice.choice(KINDS[:2]), about[-1], case.home / "pid"))
            case.check_nothing_half_done(about)
            if not ended["status"]:
                break
            if dice.random() < 0.3:
                case.move()
        case.go_on(struck, about)


def strike(case: Afar, struck: str, kind: str, at: int) -> Any:
    """Run a command that is struck at one request; returns what to say of it should what follows fail."""
    case.reset(struck)
    strike = Strike(kind, at, case.home / "pid")
    ended = case.run(struck, strike)
    about = (struck, kind, at, strike.asked[at : at + 1])
    hit = at < len(strike.asked)  # how many there are depends on the threads
    assert ended["status"] == (-signal.SIGKILL if strike.kills and hit else 0), (about, ended["messages"])
    case.check_nothing_half_done(about)
    if not strike.kills:
        begun = any(each.startswith("POST") for each in strike.asked[at : at + 1])  # whose name nobody has heard
        assert case.place.left() <= begun, about
    return about
