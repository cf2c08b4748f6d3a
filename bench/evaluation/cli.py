"""Ask models a suite of prompts and grade their answers."""

from __future__ import annotations

import json as json_module
import sys
from typing import Annotated, Any

import typer

from safeshard.bench.evaluation import figures
from safeshard.bench.evaluation.run import Evaluate, evaluate
from safeshard.bench.evaluation.suite import known_suites
from safeshard.manifests.errors import Offence, RequestError, printable
from safeshard.manifests.terminal import has_colour
from safeshard.streamer.cli.command import App
from safeshard.streamer.cli.options import takes

app = App(
    invoke_without_command=True, subcommand_metavar="", context_settings={"allow_interspersed_args": True},
    help="Ask models a suite of prompts and grade what they answer.\n\n"
    f"Built-in suites: {', '.join(known_suites())}. No harmful prompts come with safeshard but the requests of its own "
    "refusals; point at your files or at data sets of the Hub.",
)  # fmt: skip


@app.callback()
@takes(Evaluate)
def command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="a folder, org/name, or inspect://PROVIDER/MODEL")
    ],
    prompts: Annotated[
        list[str] | None, typer.Option(metavar="[PART=]FILE", help="prompts of parts that leave them to you")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the figures as JSON", show_default=False)] = False,
    **options: Any,
) -> None:
    """Ask, grade, and write the figures; a rerun goes on where it stopped."""
    evaluation = evaluate(models, prompts=_given(prompts or []), **options)
    if json:
        print(json_module.dumps(evaluation.model_dump(mode="json", by_alias=True)))
    elif not options["quiet"]:
        print(figures.text(evaluation, has_colour(sys.stdout)))
        print(f"\nevery answer: {printable(options['output'])}/answers.jsonl")


def _given(words: list[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        part, equals, file = word.rpartition("=")
        if part in pairs or (equals and not part) or not file:
            raise RequestError(Offence("--prompts", word, "FILE, or PART=FILE, once a part", "another form"))
        pairs[part] = file
    return pairs
