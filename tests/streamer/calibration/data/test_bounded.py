"""A stranger's template in a process with limits: it ends in time, in memory, and with nothing left over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from safeshard.manifests.errors import RequestError
from safeshard.streamer.calibration.data.bounded import Bounded, LimitError, WorkError
from safeshard.streamer.calibration.data.prompts import load_prompts
from safeshard.streamer.calibration.data.render import TEMPLATE_TEXT
from tests.streamer.calibration.data.test_prompts import CHAT, make_tokenizer, write

jinja2 = pytest.importorskip("jinja2.sandbox")
MEMORY = 64 << 20
TOO_LONG = {
    "power": "{{ 10 ** (10 ** 8) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "source": "{{ 1 }}" * 1_000_000,
}
TOO_MUCH = {
    "product": "{{ 'a' * 10 ** 9 }}",
    "list": "{{ ([0] * 10 ** 9) | length }}",
    "centre": "{{ 'a' | center(10 ** 9) }}",
    "justified": "{{ 'a'.ljust(10 ** 9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) | length }}",
    "join": "{{ (['a' * 100000] * 100000) | join | length }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
}


def rendered(template: str) -> str:
    return str(jinja2.ImmutableSandboxedEnvironment().from_string(template).render())


@pytest.mark.parametrize("kind", TOO_LONG)
def test_what_takes_long_is_ended(kind: str) -> None:
    ask = Bounded(rendered, seconds=1, memory=1 << 30)
    before = os.times()
    with pytest.raises(LimitError, match="more than 1 s of processor time"):
        ask(TOO_LONG[kind])
    used = os.times().children_user + os.times().children_system - before.children_user - before.children_system
    assert used < 3
    with pytest.raises(LimitError):  # it is not begun again
        ask("a")


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_what_takes_much_is_refused(kind: str) -> None:
    ask = Bounded(rendered, memory=MEMORY)
    with pytest.raises(LimitError, match="more than 64 MiB of memory"):
        ask(TOO_MUCH[kind])
    ask.close()


def test_answers_and_errors_come_back_from_one_process() -> None:
    def work(asked: str) -> str:
        return str({"pid": os.getpid()}[asked])

    ask = Bounded(work)
    pid = int(ask("pid"))
    assert pid != os.getpid()
    with pytest.raises(WorkError, match="other"):
        ask("other")
    assert int(ask("pid")) == pid
    os.kill(pid, signal.SIGINT)  # a terminal sends it to the whole group
    assert int(ask("pid")) == pid
    ask.close()
    assert not multiprocessing.active_children()


GROWING = """
import time
from safeshard.streamer.calibration.data.bounded import Bounded

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return ""

ask = Bounded(work, seconds=2)
for _ in range(300):  # 3 s of processor time and more, of which 1 s for the first hundred
    ask(0.01)
ask.close()
"""


def test_what_it_may_take_grows_with_what_it_is_asked() -> None:
    """In a process of its own: the limits of one that has run other tests may be lower."""
    subprocess.run([sys.executable, "-c", GROWING], check=True)


def hostile(tmp_path: Path, template: str) -> Callable[[], object]:
    folder = make_tokenizer(tmp_path / "model", template + CHAT)
    data = write(tmp_path, '{"instruction": "ask", "output": "no"}\n')
    return lambda: load_prompts(data, folder, samples=1)


def test_a_template_that_takes_too_much_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="more than 512 MiB of memory") as refused:
        hostile(tmp_path, TOO_MUCH["centre"])()
    (offence,) = refused.value.offences
    assert offence.what == "chat template"
    assert "input_ids" in offence.remedy


def test_a_template_that_writes_far_more_than_it_was_given_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"it makes 66\d{3} characters"):
        hostile(tmp_path, f"{{{{ 'a ' * {TEMPLATE_TEXT // 2 + 500} }}}}")()
