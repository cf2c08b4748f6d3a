"""`safeshard` and `python` as commands that start at once: forks of a process that has imported what they need.

A shell block of the documents starts thirty processes, each of which would import torch and transformers for seconds;
so would each test of a run that is killed. Here one process imports them once and forks for each command, one after
another, which then gets the caller's arguments, streams, folder and environment, and runs the same entry point. The
command ends as its fork does, by the same signal too. What a library reads from the environment as it is imported it
has read before.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CLIENT = """\
#!{python} -SE
import json, os, socket, sys
tell = os.environ.pop("FORKED_TELL", None)
with socket.socket(socket.AF_UNIX) as server:
    server.connect({place!r})
    asked = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(asked)
    pid = server.recv(8)
    if tell:
        os.write(int(tell), pid)
        os.close(int(tell))
    status = int.from_bytes(server.recv(8), "little", signed=True)
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)
"""


class Started(subprocess.Popen[Any]):
    """A command of `commands` under way; signals reach the fork that runs it."""

    def __init__(self, words: Sequence[str], **more: Any) -> None:
        told, tell = os.pipe()
        with os.fdopen(told, "rb") as hears:
            environment = {**(more.pop("env", None) or os.environ), "FORKED_TELL": str(tell)}
            super().__init__(words, env=environment, pass_fds=[tell], **more)
            os.close(tell)
            self.fork = int.from_bytes(hears.read(), "little")

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.fork, sig)


@contextlib.contextmanager
def commands(folder: Path) -> Iterator[Path]:
    """A folder for PATH with `safeshard` and `python`, as long as this lasts."""
    place, clients = folder / "socket", folder / "bin"
    clients.mkdir(parents=True)
    for name in ("safeshard", "python"):
        client = clients / name
        client.write_text(CLIENT.format(python=sys.executable, place=str(place), name=name))
        client.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, place], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    try:
        yield clients
    finally:
        server.terminate()
        server.wait()


def serve(place: str) -> None:
    """Fork for each connection, one after another."""
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import safeshard.bench.demo
    import safeshard.bench.evaluation.cli
    import safeshard.bench.tune.cli
    import safeshard.streamer.run.runner  # noqa: F401

    torch.set_num_threads(1)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        print("ready", flush=True)
        while True:
            caller, _ = listening.accept()
            with caller:
                size, streams, _, _ = socket.recv_fds(caller, 8, 3)
                text = b""
                while len(text) < int.from_bytes(size, "little"):
                    text += caller.recv(1 << 16)
                child = os.fork()
                if not child:
                    listening.close()
                    caller.close()
                    _become(*json.loads(text), streams)
                for stream in streams:
                    os.close(stream)
                with contextlib.suppress(ConnectionError):  # whoever asked is gone
                    caller.sendall(child.to_bytes(8, "little"))
                _, status = os.waitpid(child, 0)
                with contextlib.suppress(ConnectionError):
                    caller.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))


def _become(name: str, arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """In the child: the command itself; does not return."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if name == "python" and arguments[:2] == ["-m", "safeshard"]:
        name, arguments = "safeshard", arguments[2:]
    sys.argv = [name, *arguments] if name == "safeshard" else arguments[:1] + arguments[2:]
    status = 1
    try:
        if name == "safeshard":
            from safeshard.streamer.cli.app import entry

            entry()
        assert arguments[0] == "-c" or arguments == ["-"], "python -c, -m safeshard, or - for a block of the documents"
        program = arguments[1] if arguments[0] == "-c" else sys.stdin.read()
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
