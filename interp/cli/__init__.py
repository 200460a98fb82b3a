"""The command `interp`: one verb per task, thin over the library.

Every command's `--help` ends with an example that runs as it stands, and every command takes `--json`. This
package imports no torch until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from interp.cli import ablate, capture, demo, doctor, experts, patch, probe, report, sae, steer, study
from interp.cli.common import USER_ERRORS, fail, stderr, stdout
from interp.version import __version__

app = typer.Typer(
    name="interp",
    help="Open up transformer language models, Mixture-of-Experts first.",
    epilog="INTERP_CACHE moves the model cache; INTERP_TRACEBACK=1 shows where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.command)
app.command("capture")(capture.command)
app.command("experts")(experts.command)
app.command("ablate")(ablate.command)
app.command("study")(study.command)
app.command("steer")(steer.command)
app.command("patch")(patch.command)
app.command("probe")(probe.command)
app.command("report")(report.command)
app.command("doctor")(doctor.command)
app.add_typer(sae.app, name="sae")


def _version(asked: bool) -> None:
    if asked:
        stdout().print(f"interp {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (`sys.argv` when no arguments are given) and exit with its code."""
    try:
        app(args=arguments)
    except USER_ERRORS as error:
        raise SystemExit(fail(error)) from None
    except KeyboardInterrupt:
        stderr().print("interp: stopped")
        raise SystemExit(130) from None
