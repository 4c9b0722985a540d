"""The numbers of a run's log in TensorBoard too, where --tensorboard asks for it and the package is installed."""
from contextlib import contextmanager

from common.distributed import is_main
from common.errors import UserError


def summary_writer():
    """TensorBoard's class for writing. Raises UserError if the package, which nothing else needs, is absent."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard needs the package tensorboard, which cannot be imported ({error}): "
                        f"pip install tensorboard, or leave --tensorboard out") from None
    return SummaryWriter


@contextmanager
def board(run, start):
    """Write what the run logs in this block to its folder for TensorBoard, if its settings say so. What was written
    there after step `start`, from which the run goes on, no longer counts.
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
    """Write the numbers of a row of log.jsonl; {"step": 3, "probe": {"knn_token": 20.0}} has one, probe/knn_token."""
    for name, value in row.items():
        numbers = {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        for tag, number in numbers.items():
            if isinstance(number, (int, float)) and tag != "step":
                writer.add_scalar(tag, number, row["step"])
