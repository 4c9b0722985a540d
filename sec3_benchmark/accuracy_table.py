"""A table of rows with one accuracy each: Tables 1 and 3, and the appendix's studies."""
import statistics
from dataclasses import replace

from common import report, tables
from common.rows import overruled


def accuracy_table(item, rows, demo, args):
    """Run the chosen rows, write <item>.json and <item>.md with measured and published top-1, and return the rows."""
    results, unavailable = tables.run_rows(rows, args, demo, script=item)
    if args.dry_run:
        return []
    summaries = [summary(with_changes(row, args), results.get(row.key, []), unavailable.get(row.key)) for row in rows]
    about = "\n".join(f"- {row['name']}: {row['note']}" for row in summaries if row["note"] and row["measured"])
    report.write_table(item, args, COLUMNS, summaries, notes=[about, tables.NOTES[args.preset]])
    return summaries


def with_changes(row, args):
    """Return the row, with those of its settings that the command line overrides appended to its name."""
    words = overruled(row, args)
    return replace(row, name=f"{row.name} [{words}]") if words else row


def summary(row, results, problem=None):
    """Summarise a row for the table's json file.

    results: for each seed, the results of the row's command lines. problem: why the row was not run.
    """
    final = [stages[-1] for stages in results]
    hours = [stages[0]["seconds"] / 3600 for stages in results if len(stages) > 1]
    if results:
        status = "run"
    else:
        status = problem or ("not chosen" if row.lines else "nothing to run")
    return {"name": row.name, "published": row.published, "note": row.note, **row.extra, "status": status,
            "measured": [result["top1"] for result in final], "best_epoch": [result["best_top1"] for result in final],
            "pretrain_hours": hours, "seeds": len(final), "run": [result["run"] for result in final]}


def duration(hours):
    """Format the mean of a list of hours in seconds, minutes or hours; "" for an empty list."""
    if not hours:
        return ""
    seconds = 3600 * statistics.mean(hours)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


COLUMNS = {
    "pre-training and recipe": lambda row: row["name"],
    "published": lambda row: row["published"] or "-",
    "measured": lambda row: report.mean_std(row["measured"]),
    "seeds": lambda row: row["seeds"] or "",
    "pre-training": lambda row: duration(row["pretrain_hours"]),
}
