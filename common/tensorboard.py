"""Writing the numbers of a run's log for TensorBoard too, if --tensorboard asks for it."""
from contextlib import contextmanager

from common.distributed import is_main
from common.errors import UserError


def summary_writer():
    """Import and return torch's SummaryWriter. Raises UserError if the package tensorboard is not installed.

    Nothing else needs this package, so it is not among the requirements.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard needs the package tensorboard, which cannot be imported ({error}): "
                        f"pip install tensorboard, or leave --tensorboard out") from None
    return SummaryWriter


@contextmanager
def board(run, start):
    """Write what the run logs in this block to its folder for TensorBoard too, if its settings say so.

    start: the step from which the run continues. TensorBoard drops what it has of later steps.
    """
    if not (is_main() and run.settings.get("tensorboard")):
        yield
        return
    run.board = summary_writer()(str(run.folder), purge_step=start + 1)
    try:
        yield
    finally:
        run.board.close()
        run.board = None


def add_row(writer, row):
    """Write the numbers of a row of log.jsonl. {"step": 3, "probe": {"rank_token": 9.0}} has one: probe/rank_token."""
    for name, value in row.items():
        numbers = {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        for tag, number in numbers.items():
            if isinstance(number, (int, float)) and tag != "step":
                writer.add_scalar(tag, number, row["step"])
