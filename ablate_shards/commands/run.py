"""``run``: takes a model through all the stages of a recipe."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ablate_shards.commands.options import PATH, SOURCE, as_json_flag, debug_flag, print_json
from ablate_shards.data import RECIPES
from ablate_shards.errors import GateError, RecipeError, UsageError
from ablate_shards.terminal.runs import print_course, print_stages

if TYPE_CHECKING:
    from ablate_shards.surgery.run.stages import Stage

__all__ = ["run"]


@click.command()
@click.argument("recipe", type=PATH)
@click.option("--source", type=SOURCE, help="Checkpoint to start from, instead of the recipe's.")
@click.option("--out", type=PATH, help="Folder for the result.  [default: the recipe's, or its name]")
@click.option("--work", type=PATH, help="Folder for everything between.  [default: OUT with .work added]")
@click.option("--dry-run", is_flag=True, help="Print the stages, and what would be reused, and do nothing.")
@click.option(
    "--gate/--no-gate",
    default=None,
    help="End the run after an edit that broke the model.  [default: the recipe's, or gate]",
)
@click.option("--push", "publish", is_flag=True, help="Publish the result where [publish] says.")
@as_json_flag
@debug_flag
def run(
    recipe: Path,
    *,
    source: Any,
    out: Path | None,
    work: Path | None,
    dry_run: bool,
    gate: bool | None,
    publish: bool,
    as_json: bool,
) -> None:
    """Take a model through the stages of RECIPE: capture, directions, ablate, finetune, merge, evaluate.

    RECIPE is a TOML file, or the name of one that is shipped, such as tw_civic. Each stage is a
    command of its own, and is printed; one whose inputs have not changed is skipped, one that was
    interrupted goes on.
    """
    from ablate_shards.surgery.checkpoint.stores import cached, open_source
    from ablate_shards.surgery.plan.recipe import read_recipe
    from ablate_shards.surgery.run.contamination import check_contamination
    from ablate_shards.surgery.run.gate import check_gate, read_limits
    from ablate_shards.surgery.run.stages import as_flags, bytes_in, plan_stages, run_stages, status_of

    path = _find(recipe)
    tables = read_recipe(path)
    places = tables.tables.get("source", {})
    source = source or places.get("source")
    out = out or Path(places.get("out", path.stem))
    if source is None:
        raise RecipeError(f"{path}: [source] names no source; add it there, or give --source")
    gates = tables.tables.get("gate", {})
    limits = read_limits(gates, path)
    gated = gates.get("gate", True) if gate is None else gate
    repo = tables.tables.get("publish", {}).get("repo")
    if publish and repo is None:
        raise RecipeError(f"{path}: --push needs repo in [publish], the repository to publish in")
    check_contamination(tables, path)
    work = work or (Path(places["work"]) if "work" in places else out.with_name(f"{out.name}.work"))
    checkpoint = open_source(source)
    if checkpoint.remote is not None and not dry_run:
        checkpoint = cached(checkpoint)
    root = Path(checkpoint.root) if checkpoint.remote is None else Path(str(source))
    stages = plan_stages(tables, path, root, out, work)
    if dry_run:
        found = status_of(stages, work)
        if as_json:
            print_json(
                [
                    {"stage": stage.name, "command": stage.command, "status": status, "bytes": bytes_in(stage.output)}
                    for stage, status in zip(stages, found, strict=True)
                ]
            )
        else:
            print_stages(stages, found)
        return

    program: Any = click.get_current_context().find_root().command

    def call(arguments: Sequence[str]) -> None:
        words = [*arguments, "--quiet"] if as_json else list(arguments)
        if any(option.name == "world_size" for option in program.commands[words[0]].params):
            words += ["--world-size", "1"]  # a stage needs all of the one before, whatever launched this
        program.main(words, prog_name="ablate-shards", standalone_mode=False)

    def tell(number: int, stage: "Stage", status: str) -> None:
        if as_json:
            return
        click.secho(f"\n[{number}/{len(stages)}] {stage.name}", bold=True, nl=False)
        click.echo(f": done before, {stage.output} is reused" if status == "done" else "")
        if status != "done":
            click.secho(f"$ ablate-shards {shlex.join(stage.command)}", fg="cyan")

    def check(stage: "Stage") -> None:
        if gated:
            check_gate(stage, limits)

    if gated and not as_json and not any(stage.gated for stage in stages):
        click.secho("the recipe has no [evaluate], so nothing tells whether an edit breaks the model", fg="yellow")
    evaluations = {stage.subject: stage.output for stage in stages if stage.kind == "evaluate"}
    try:
        run_stages(stages, work, call, tell, check)
    except GateError:
        # What ended the run is easier seen in its table.
        if not as_json:
            print_course({subject: path for subject, path in evaluations.items() if path.is_file()}, limits)
        raise
    if as_json:
        print_json({"out": str(out), "evaluations": list(map(str, evaluations.values()))})
    else:
        if evaluations:
            print_course(evaluations, limits)
        # An adapter has no page of its own; the checkpoint that was made of it to measure it has.
        if (seen := next((stage.output for stage in reversed(stages) if stage.makes_checkpoint), None)) is not None:
            click.echo(
                f"see it with: ablate-shards report {shlex.quote(str(seen))} --work {shlex.quote(str(work))} --open"
            )
    if publish:
        settings = {key: value for key, value in tables.tables["publish"].items() if key != "repo"}
        made = next(stage for stage in stages if stage.output == out)
        flags = as_flags({"source": made.model, "adapter": made.adapter, **settings})
        call(["push", str(out), str(repo), *flags])


def _find(recipe: Path) -> Path:
    """Returns the recipe's file: a path, or the name of a shipped one."""
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    if not recipe.is_file() and str(recipe) in shipped:
        return shipped[str(recipe)]
    if not recipe.is_file():
        raise UsageError(f"{recipe}: no such recipe; name a TOML file, or a shipped one: {', '.join(shipped)}")
    return recipe
