"""Parts on the command line: what a person and a script read of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeshard.streamer.cli.app import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in argv])
        return stop.value.code if isinstance(stop.value.code, int) else 0, *capsys.readouterr()

    return command


@pytest.fixture
def jobs(world: Any) -> Path:
    paths = {role: str(path) for role, path in world.trio().items() if role != "safe_adapter"}
    entries: list[dict[str, Any]] = [
        {"method": "safelora", "num_layers": 3, "output": str(world.root / "out/lora")},
        {"method": "scale", "factor": 0.5, "output": str(world.root / "out/scale")},
    ]
    file: Path = world.root / "jobs.yaml"
    file.write_text(json.dumps({"defaults": paths, "jobs": entries}))
    return file


def test_parts_and_finish(run: Any, jobs: Path) -> None:
    status, out, _ = run("batch", jobs, "--part", "1/2", "--dry-run")
    assert (status, "nothing was written" in out) == (0, True)
    assert not (jobs.parent / "out").exists()
    status, out, _ = run("batch", jobs, "--part", "1/2")
    assert status == 0
    assert "out/lora: part 1/2: 7 modules measured; once all parts are, finish decides" in out
    assert "out/scale: part 1/2: 7 modules, 14 tensors written" in out
    status, _, err = run("finish", jobs)
    assert status == 2
    assert err.count("expected a finished part, got none") == 2
    status, out, _ = run("batch", jobs, "--part", "2/2", "--json", "--quiet")
    lora, scale = json.loads(out)
    assert (lora["part"], lora["finished"], scale["finished"]) == ("2/2", True, True)
    assert scale["run"]["bytes_read"] > 0
    status, out, _ = run("finish", jobs, "--dry-run")
    assert (status, out.count("every part is there")) == (0, 2)
    status, out, _ = run("finish", jobs)
    assert (status, "14 of 14 modules: 14 scaled" in out) == (0, True)
    status, out, _ = run("finish", jobs, "--json", "--quiet")
    assert [each["decisions"] for each in json.loads(out)] == [{"kept": 11, "projected": 3}, {"scaled": 14}]
    assert sorted(path.name for path in (jobs.parent / "out").iterdir()) == ["lora", "scale"]


@pytest.mark.parametrize("part", ["0/4", "5/4", "x"])
def test_what_is_no_part_is_refused_in_words(run: Any, jobs: Path, part: str) -> None:
    status, out, err = run("batch", jobs, "--part", part, "--json")
    assert status == 2
    assert (
        f"--part: expected I/N, such as 2/8: the parts of N count from 1 to N, and N is at most 10000, got '{part}'"
        in err
    )
    assert json.loads(out)["error"]["kind"] == "request"
