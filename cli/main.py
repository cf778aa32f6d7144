"""The `mmextract` command: its group, its configuration file, and what an error looks like.

Exit codes: 0 done, 1 failed, 2 usage, 3 finished with rejected samples, 130 interrupted (and resumable).
"""

from __future__ import annotations

import os
import signal
import sys
import tomllib
from pathlib import Path
from types import FrameType
from typing import NoReturn

import rich_click as click

from mmextract.cli.doctor import doctor
from mmextract.cli.dump import dump
from mmextract.cli.dynamics import dynamics
from mmextract.cli.evaluate import evaluate
from mmextract.cli.experiment import experiment
from mmextract.cli.export import export
from mmextract.cli.finetune import finetune
from mmextract.cli.identities import identities
from mmextract.cli.info import info
from mmextract.cli.probe import probe
from mmextract.cli.report import report
from mmextract.cli.verify import verify
from mmextract.cli.watermark import watermark
from mmextract.engine.interruptible import REQUESTS

FAILED, USAGE, INTERRUPTED = 1, 2, 130

SECONDS_FOR_SERVERS = 3.0
"""How long a command that is asked to leave waits for servers yet, to end what it has begun."""

SECONDS_TO_LEAVE = 8
"""How long it may take to leave. A signal may come while this thread takes a lock, which then nobody can take any more,
and whoever waits for it waits for ever. What is written survives a kill at any moment, so it may as well be one."""


def _load_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the tables of a TOML file, one a command, the defaults of that command's options."""
    if path is None:
        return
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path} cannot be read as TOML: {error}") from error
    assert isinstance(context.command, click.Group)
    for command, table in tables.items():
        if command not in context.command.commands or not isinstance(table, dict):
            known = ", ".join(context.command.commands)
            raise click.BadParameter(f"{path}: expected one table a command ({known}), found [{command}]")
        options = {p.name for p in context.command.commands[command].params}
        unknown = sorted(name for name in table if name.replace("-", "_") not in options)
        if unknown:
            raise click.BadParameter(f"{path}: `mmextract {command}` has no option {', '.join(unknown)}")
    context.default_map = {
        command: {name.replace("-", "_"): value for name, value in table.items()}
        for command, table in tables.items()
    }


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MMEXTRACT"})
@click.version_option(package_name="mmextract")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_load_config,
    expose_value=False,
    is_eager=True,
    help="TOML file with one table a command, naming its options.",
)
def group() -> None:
    """Does a multimodal LLM remember private content that had nothing to do with its task?

    Every option can also be set as MMEXTRACT_<COMMAND>_<OPTION>, or in a file given with --config.
    """


for command in (
    *(dump, probe, report, watermark, identities),
    *(finetune, evaluate, dynamics, experiment, info, verify, export, doctor),
):
    group.add_command(command)


def _stop(signal_number: int, frame: FrameType | None) -> NoReturn:
    REQUESTS.leave_within(SECONDS_FOR_SERVERS)
    signal.signal(signal.SIGALRM, _leave)
    signal.alarm(SECONDS_TO_LEAVE)
    raise KeyboardInterrupt


def _leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    os.write(
        2, b"Interrupted, and stopped waiting for its threads. Run the same command again to continue.\n"
    )
    os._exit(INTERRUPTED)


def main() -> NoReturn:
    """Run the command line; a user's mistake is one message and an exit code, never a traceback."""
    try:
        signal.signal(signal.SIGTERM, _stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
            signal.signal(signal.SIGINT, _stop)
        result = group.main(standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        print("Interrupted. Run the same command again to continue.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(FAILED)
    except (KeyError, IndexError):
        raise  # a mistake of ours: LookupError itself is what users are told
    except (ValueError, LookupError, OSError, ImportError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    sys.exit(result if isinstance(result, int) else 0)
