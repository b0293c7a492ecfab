# SPDX-License-Identifier: BSD-3-Clause
"""The demo's table, drawn by rich where it is installed."""

import io

from sale_flex.demo.run import Report


def rows(report: Report) -> list[tuple[str, str, str]]:
    """Name, dense figure and SALE figure of every line of the table."""
    rise = report.sale_loss - report.dense_loss
    recalled = [
        f"{round(share * report.notes)} of {report.notes} ({share:.3f})"
        for share in (report.dense_recall, report.sale_recall)
    ]
    return [
        ("density", "1.000", f"{report.density:.3f}"),
        ("loss", f"{report.dense_loss:.4f}", f"{report.sale_loss:.4f} ({rise:+.4f})"),
        ("notes recalled", recalled[0], recalled[1]),
        ("seconds", f"{report.dense_seconds:.4g}", f"{report.sale_seconds:.4g}"),
    ]


def render(report: Report) -> str:
    """The figures and how they came about, as text."""
    title = f"{report.tokens:,} tokens, {report.device_name}, {report.dtype}"
    header = ("", "dense", f"SALE, threshold {report.config['rule']['threshold']:g}")
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [header, *rows(report)]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        cells = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines]
        text = "\n".join([title, *cells]) + "\n"
    else:
        table = Table(*header, title=title)
        for line in rows(report):
            table.add_row(*line)
        out = io.StringIO()
        Console(file=out).print(table)
        text = out.getvalue()
    text += f"SALE ran: {report.path}.\n"
    text += "Seconds are one prefill's, warm-up and compilation excluded."
    if report.device == "cpu":
        text += " A CPU runs the scan in plain torch: compare seconds on a GPU."
    return text
