"""Train toy models, defend them, show what that kept and cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from safeshard.bench.toy import pictures, table
from safeshard.bench.toy.defences import QUICK, SCORES, WHOLE
from safeshard.bench.toy.experiment import folder_of, run, write
from safeshard.bench.toy.small import make_small
from safeshard.bench.tune.picture import pyplot
from safeshard.bench.workers import import_libraries
from safeshard.manifests.errors import Offence, RequestError, printable
from safeshard.streamer.cli.app import main
from safeshard.streamer.cli.command import PATH, App, local_folder

MARKER = ".safeshard-demo"  # in a folder that the demo made, and may hence fill
app = App(invoke_without_command=True, help=__doc__)
NEXT = """\
Next, on your own models:

   safeshard score     --aligned org/model-chat --unaligned org/model --adapter path/to/adapter
   safeshard ridge     --aligned org/model-chat --adapter path/to/adapter --output defended
   safeshard scale     --aligned org/model-chat --adapter path/to/adapter --output baseline --factor 0.5

Which setting? `safeshard tune` tries many in one pass, asks each output your own prompts, forbidden and useful, and
keeps a defence only where it beats `scale`, by the rule used here: a toy says nothing about a real model."""
SMALL_MADE = """\

In {folder}:

   aligned, unaligned   checkpoints: one refuses forbidden requests, the one before alignment does not
   alice                LoRA adapter: a useful task, with a few forbidden answers mixed in, which broke the refusals
   alice-full           the same as a full fine-tune
   bob                  LoRA adapter: forbidden answers alone
   safe                 LoRA adapter: refusals, for SafeMERGE
   safe.jsonl           forbidden requests with refusals, to calibrate with
   task.jsonl, harmless.jsonl    the task, and other requests that must stay answered
   suite.yaml           what to ask: forbidden and harmless requests, and the task"""
ONE_SEED = """\
This is one seed, and seeds differ: the table over six of them, the hard ones too, is in docs/toy.md;
`safeshard demo --seeds 6` makes it anew.
"""


@app.callback()
def demo(
    folder: Annotated[
        Path,
        typer.Option(metavar=PATH, callback=local_folder, help="where models and outputs go, and are kept"),
    ] = Path("demo"),
    seeds: Annotated[int, typer.Option(help="seeds 0 to N-1; the table shows means and ranges", min=1)] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="fewer settings, and no attack without a task")] = False,
    small: Annotated[
        bool, typer.Option("--small", help="only make small models, data and a suite for examples: half a minute")
    ] = False,
) -> None:
    """Train, defend in one batch, and evaluate. Trained models are kept: a second run takes seconds."""
    if small and (quick or seeds > 1):
        raise RequestError(Offence("--small", "", "neither --quick nor --seeds, which are of the experiment", "both"))
    if small:
        import_libraries()
        _claim(folder)
        make_small(folder, lambda text: print(text, flush=True))
        print(SMALL_MADE.format(folder=printable(str(folder))))
        return
    import_libraries()
    pyplot()  # fail before the training without it, and import it while the workers import theirs
    _claim(folder)
    grid = QUICK if quick else WHOLE
    first = folder_of(folder, 0, grid)
    rows = run(folder, range(seeds), grid, lambda text: print(text, flush=True))
    write(folder / "table.csv", rows)
    shown = table.markdown(rows)
    (folder / "table.md").write_text(shown)
    pictures.draw_tradeoff(rows, folder / "tradeoff.png")
    pictures.draw_cosines(first / SCORES, folder / "cosines.png")
    print("\nThe test split, each method at the setting that the validation split chose:\n")
    print(shown)
    if seeds == 1:
        print(ONE_SEED)
    print("What these figures say:\n")
    print("\n".join(f"- {sentence}" for sentence in table.findings(rows)))
    print(f"\nSaved in {folder}: table.csv, table.md, tradeoff.png, cosines.png; jobs in {first}/jobs.yaml\n")
    print(NEXT)


def _claim(folder: Path) -> None:
    """Make `folder` or take over an earlier demo's.

    Raises:
        RequestError: it holds something, and no demo made it.
    """
    if not (folder / MARKER).is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        got = "something that the demo did not make"
        raise RequestError(Offence("--folder", str(folder), "a new folder, or a demo's", got, "choose another"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
