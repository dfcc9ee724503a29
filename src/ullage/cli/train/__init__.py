"""ullage train: what a technique has to know of a model."""

import typer

from ullage.cli.train.dms import dms
from ullage.cli.train.larimar import larimar

train = typer.Typer(
    help="Learn what a technique has to know of a model, into a file that it then takes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
train.command()(dms)
train.command()(larimar)
