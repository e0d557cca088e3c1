"""`vivace plan`: list, show, check and compare plans. No weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vivace.cli.shared import options

if TYPE_CHECKING:
    from rich.table import Table

    from vivace.plans.plan import Plan

app = typer.Typer(help="List, show, check and compare plans.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A preset or a YAML file.", show_default=False)]


@app.command("list")
def list_() -> None:
    """The presets that come with Vivace."""
    from rich.markup import escape

    from vivace.cli.shared.screen import screen, table
    from vivace.plans.plan import Plan, preset_names

    rows = table("plan", "what it is for", "techniques")
    # The exact run first, then from gentle to bold.
    for plan in sorted(map(Plan.load, preset_names()), key=lambda p: (len(p.ordered()), p.name)):
        names = ", ".join(t.card.name for t in plan.ordered()) or "[quiet]none[/]"
        rows.add_row(f"[name]{escape(plan.name)}[/]", escape(plan.summary), names)
    screen().print(rows)


@app.command("show")
def show(
    name: Name,
    as_file: Annotated[
        bool, typer.Option("--yaml", help="Print it as a plan file, to start your own.")
    ] = False,
) -> None:
    """What a plan does, in the order in which it is applied."""
    from rich.markup import escape

    from vivace.cli.shared.screen import screen
    from vivace.plans.plan import Plan

    plan = Plan.load(name)
    if as_file:
        typer.echo(_yaml(plan), nl=False)
        return
    out = screen()
    out.print(f"\n[bold]{escape(plan.name)}[/]  {escape(plan.summary)}")
    if plan.ordered():
        out.print(_stages(plan))
    else:
        out.print("\n[quiet]no techniques: the model runs as it is[/]")


@app.command("check")
def check(name: Name, model: options.Model = "tiny") -> None:
    """Whether a plan can run on a model: every problem at once, before anything is loaded.

    Exit code 2 when it cannot.
    """
    from rich.markup import escape

    from vivace.cli.shared.screen import mark, screen
    from vivace.models.loading import describe
    from vivace.plans.plan import Plan

    plan = Plan.load(name)
    description = describe(model)
    problems = plan.problems(description)
    errors = [p for p in problems if p.severity == "error"]
    out = screen()
    for problem in sorted(problems, key=lambda p: p.severity):
        out.print(
            mark("bad" if problem.severity == "error" else "fair"), escape(str(problem)), soft_wrap=True
        )
    what = f"{escape(plan.name)} on {escape(description.name)}"
    if errors:
        out.print(f"\n{what}: cannot run, {len(errors)} problem{'s' if len(errors) > 1 else ''}.")
        raise typer.Exit(2)
    out.print(mark("good"), f"{what}: can run, {plan.steps(description)} steps.")


@app.command("diff")
def diff(old: Name, new: Name) -> None:
    """What changes from one plan to another."""
    from rich.text import Text

    from vivace.cli.shared.screen import screen
    from vivace.plans.plan import Plan

    first, second = Plan.load(old), Plan.load(new)
    out = screen()
    styles = {"+": "good", "-": "bad", "~": "fair"}
    lines = first.diff(second)
    for line in lines:
        out.print(Text(line, style=styles[line[0]]), soft_wrap=True)
    if not lines:
        out.print(Text(f"{first.name} and {second.name} do the same.", style="quiet"))


def _stages(plan: Plan) -> Table:
    from rich.markup import escape

    from vivace.cli.shared.screen import table

    rows = table("stage", "technique", "settings", "idea")
    for technique in plan.ordered():
        card = technique.card
        values = technique.to_dict().items()
        settings = "\n".join(f"{k} {v}" for k, v in values if not k.startswith("_") and v is not None)
        if technique.card.name in plan.optional:
            settings += "\noptional: left out where the model lacks what it needs"
        if other := plan.unless.get(technique.card.name):
            settings += f"\nunless {other} is there"
        if other := plan.beside.get(technique.card.name):
            settings += f"\nleft out where {other} is"
        source = f"\n[quiet]arXiv {escape(card.cite.arxiv)}[/]" if card.cite.arxiv else ""
        stage = card.stage.value.partition(" ")[2]
        rows.add_row(stage, f"[name]{card.name}[/]", escape(settings), escape(card.summary) + source)
    return rows


def _yaml(plan: Plan) -> str:
    import yaml

    return yaml.safe_dump(plan.to_dict(), sort_keys=False)
