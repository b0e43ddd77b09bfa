"""What all tools share: the package on the path, one command line, one way to end.

Import this module first: it makes `retinanet` importable from any directory, without installing it.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def _end(kind, error, trace) -> None:
    """Say in one word that Ctrl-C came while the libraries below were imported, which takes seconds."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _end

from retinanet.config.check import check_config  # noqa: E402
from retinanet.config.load import load_config  # noqa: E402
from retinanet.errors import UserError, nearest  # noqa: E402
from retinanet.layers.norm import NORMS  # noqa: E402
from retinanet.modeling.backbone import BACKBONES  # noqa: E402
from retinanet.utils import distributed  # noqa: E402
from retinanet.utils.log import record_failure  # noqa: E402


class _Parser(argparse.ArgumentParser):
    """Reports a mistake on the command line like any other mistake of the user: in one line, status 2."""

    def error(self, message: str):
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        options = [option for action in self._actions for option in action.option_strings]
        raise UserError(f"{message}{nearest(unknown, options) if unknown else ''}; --help shows what {self.prog} takes")


def parser(description: str, examples: str, config: bool = True) -> argparse.ArgumentParser:
    """Return a parser with `--config FILE` and trailing `KEY VALUE` pairs; add the tool's own flags to it."""
    made = _Parser(
        description=description, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if config:
        made.add_argument("--config", metavar="FILE", help="a YAML file, see configs/")
        made.add_argument("opts", nargs="*", metavar="KEY VALUE", help="configuration keys to change, see docs/")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags may stand before, between and after the `KEY VALUE` pairs."""
    return made.parse_intermixed_args(argv)


def load(args: argparse.Namespace, training: bool = True):
    """Return `(cfg, warnings)` of `--config` and the `KEY VALUE` pairs, checked before any work starts.

    `training` False leaves out the rules that matter to training alone.
    """
    if not args.config:
        raise UserError("--config FILE is missing; the files in configs/ are ready to use")
    cfg = load_config(args.config, args.opts)
    return cfg, check_config(cfg, training, NORMS, BACKBONES)


def run(main) -> None:
    """Run `main` and end the process: 0 on success, 2 and one message for a mistake of the user, 1 otherwise.

    What ended a run is the last entry of its log.txt too.
    """
    try:
        distributed.reported(main)()
    except UserError as error:
        rank = distributed.rank()
        print(f"error: {error}" if rank == 0 else f"error in process {rank}: {error}", file=sys.stderr)
        record_failure(f"error: {error}")
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        record_failure(traceback.format_exc())
        if not distributed.peer_is_gone(error):
            raise
        print(f"error in process {distributed.rank()}: another process has ended, it tells why", file=sys.stderr)
        sys.exit(1)
