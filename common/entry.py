"""Where every script starts: settings, signals, and errors that the user can mend as one line."""
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
from common.machine import explain_troubles
from common.signals import hang_up, stop_signals


def run_script(main, parser, *presets_and_recipes, parse=options.parse):
    """Run a script's `main` with the settings of the command line."""
    check_clone()
    with errors_in_one_line(parser.prog):
        args = parse(parser, *presets_and_recipes)
        if "RANK" not in os.environ:  # a rank could not obey without the others
            exit_on_stop_signals()
        announce(parser, args)
        result = main(args)
        if isinstance(result, dict) and "seconds" in result:
            print0(f"{result['seconds'] / 60:.1f} minutes of training; weights: {result['checkpoint']}")


def exit_on_stop_signals():
    """Exit with STOPPED at any of them: the same command continues. A training has handlers of its own."""
    def stop(number, frame):
        if number == signal.SIGHUP:
            hang_up()
        os.write(2, f"stopped by {signal.Signals(number).name}: the same command goes on\n".encode())
        sys.exit(STOPPED)
    for number in stop_signals():
        signal.signal(number, stop)


@contextmanager
def errors_in_one_line(prog):
    """End what the user can mend in one line instead of a traceback; end loading processes and the process group."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal's encoding does not have
    try:
        try:
            with explain_troubles():
                yield
        finally:
            print(end="", flush=True)
    except BrokenPipeError:  # as of `| head`, which wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python fails once more as it flushes
        distributed.abort()
    except KeyboardInterrupt:
        distributed.abort(f"{prog}: interrupted; the same command goes on")
    except (UserError, OSError, MemoryError, FloatingPointError) as error:
        text = str(error).strip()
        if "DataLoader worker process" in text:  # the traceback of a loading process: its last line is the message
            text = text.splitlines()[-1].split(": ", 1)[-1]
        distributed.abort(f"{prog}: error: {' '.join(text.split())}")
    except Exception:
        if distributed.world_size() == 1:
            raise
        distributed.abort(traceback.format_exc())
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for loading in multiprocessing.active_children():  # they outlive the SIGTERM by which Python would end them
            loading.kill()
        distributed.stop_process_group()


def announce(parser, args):
    """Print the preset and what differs from the defaults: of a stage these are the paper's values, while a table has
    only few settings of its own.
    """
    usual = options.defaults(parser)
    changed = {name: value for name, value in vars(args).items() if value != usual.get(name, value)}
    if not changed.pop("preset", None):
        return
    if "given" in args:  # a table
        network, rest = {}, "each stage prints its own settings"
    else:
        network = {name: value for name, value in options.NETWORKS.get(args.preset, {}).items()
                   if name in usual and (name in changed or getattr(args, name) is None)}
        rest = "else the paper's values"
    words = options.to_argv({**network, **changed})
    print0(" ".join([f"# preset {args.preset}:", *words, f"({rest})"]))


def check_clone():
    """Exit if the `common` that Python found belongs to another clone than the script that was started."""
    script = Path(getattr(sys.modules["__main__"], "__file__", "") or ".").resolve()
    clone = next((folder for folder in script.parents if (folder / "common" / "vit.py").is_file()), options.ROOT)
    if clone != options.ROOT:
        raise SystemExit(f"{script} belongs to {clone}, but Python imports `common` from {options.ROOT}.\n"
                         f"Run `pip install -e {clone}`, or set PYTHONPATH={clone}, and start again.")
