"""The start of every script: it reads the settings, handles stop signals, and shows a user's errors as one line."""
import io
import multiprocessing
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

from common import distributed, options
from common.distributed import print0
from common.errors import STOPPED, UserError
from common.signals import exit_on_stop_signals
from common.workers import explain_troubles


def run_script(main, parser, *presets_and_recipes, parse=options.parse):
    """Run a script's `main` with the settings of the command line."""
    check_clone()
    with errors_in_one_line(parser.prog):
        args = parse(parser, *presets_and_recipes)
        if "RANK" not in os.environ:  # under torchrun, one rank must not stop without the others
            exit_on_stop_signals()
        announce(parser, args)
        result = main(args)
        if isinstance(result, dict) and "seconds" in result:
            print0(f"{result['seconds'] / 60:.1f} minutes of training; weights: {result['checkpoint']}")


@contextmanager
def errors_in_one_line(prog):
    """Show errors that the user can correct as one line, without traceback; end workers and process group in any case.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # instead of failing at a character that the terminal lacks
    try:
        try:
            with explain_troubles():
                yield
        finally:
            print(end="", flush=True)  # a closed pipe raises here rather than when Python exits
    except BrokenPipeError:  # the reader has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python would fail again when it flushes at exit
        distributed.abort()
    except KeyboardInterrupt:
        distributed.abort(f"{prog}: interrupted; the same command goes on")
    except (UserError, OSError, MemoryError, FloatingPointError) as error:
        text = str(error).strip()
        if "DataLoader worker process" in text:  # a worker's whole traceback: its last line is the message
            text = text.splitlines()[-1].split(": ", 1)[-1]
        distributed.abort(f"{prog}: error: {' '.join(text.split())}")
    except Exception:
        if distributed.world_size() == 1:
            raise
        distributed.abort(traceback.format_exc())
    except SystemExit as stop:
        if stop.code == STOPPED and distributed.world_size() > 1:
            distributed.leave(STOPPED)  # during an evaluation, the other ranks may wait for this one
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler would raise when a worker ends
        for worker in multiprocessing.active_children():  # they survive the SIGTERM that Python sends at exit
            worker.kill()
        distributed.stop_process_group()


def announce(parser, args):
    """Print the preset and the settings that differ from the defaults, which for all but tables are the paper's values.
    """
    usual, is_table = options.defaults(parser), "given" in args
    network = {} if is_table else options.NETWORKS.get(vars(args).get("preset"), {})
    settings = {name: network.get(name) if value is None else value for name, value in vars(args).items()}
    changed = {name: value for name, value in settings.items() if value != usual.get(name, value)}
    if changed.pop("preset", None):
        rest = "each stage prints its own settings" if is_table else "else the paper's values"
        print0(" ".join([f"# preset {args.preset}:", *options.to_argv(changed), f"({rest})"]))


def check_clone():
    """Exit if the script that was started and the imported `common` belong to different clones of the repository."""
    script = Path(getattr(sys.modules["__main__"], "__file__", "") or ".").resolve()
    clone = next((folder for folder in script.parents if (folder / "common" / "vit.py").is_file()), options.ROOT)
    if clone != options.ROOT:
        raise SystemExit(f"{script} belongs to {clone}, but Python imports `common` from {options.ROOT}.\n"
                         f"Run `pip install -e {clone}`, or set PYTHONPATH={clone}, and start again.")
