r"""A sweep's results as LaTeX tables, one float each: `\usepackage{booktabs}`, then `\input{results.tex}`."""

from __future__ import annotations

import re

from pipeline.sweep.cells import starts_block, table_cells
from pipeline.sweep.notes import LEGEND, caption
from pipeline.sweep.summary import SweepSummary, SweepTable

# What pdflatex sets without further packages; it knows the letters of Western Europe by itself.
_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "*": "$^{*}$",
    "±": r"$\pm$", "−": "$-$", "–": "--", "…": r"\ldots{}", "×": r"$\times$", "≤": r"$\leq$", "≥": r"$\geq$",
    "Δ": r"$\Delta$", "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "δ": r"$\delta$", "’": "'", "“": "``",
    "”": "''", '"': "''", "@": "@",
}  # fmt: skip
_ROW_END = r" \\"


def latex(summary: SweepSummary) -> str:
    """Return every table as a float with caption and label."""
    head = f"% Sweep {summary.plan_name}: needs \\usepackage{{booktabs}}. Figures are percent."
    return "\n\n".join([_comment(head), *(_table(summary, table) for table in summary.tables)]) + "\n"


def escaped(text: str) -> str:
    """Return text as pdflatex takes it; a character that it does not know becomes a question mark."""
    return "".join(_sign(character) for character in " ".join(text.split()))


def _table(summary: SweepSummary, table: SweepTable) -> str:
    lines = []
    for index, (_, cells) in enumerate(table_cells(table)):
        if index and starts_block(table, index):
            lines.append(r"    \midrule")
        lines.append(f"    {' & '.join(map(escaped, cells))}{_ROW_END}")
    told = "".join(f" {line[0].upper()}{line[1:]}." for line in caption(summary, table))
    text = f"Sweep {summary.plan_name}: {table.title}. {summary.protocol}{told} {LEGEND}"
    label = re.sub(r"[^A-Za-z0-9:.-]", "-", f"tab:{summary.plan_name}-{table.metric}-{table.epoch}")
    return "\n".join(
        [
            r"\begin{table}[tbp]",
            r"  \centering",
            r"  \begin{tabular}{@{}lrrrrrr@{}}",
            r"    \toprule",
            rf"    arm & $n$ & mean $\pm$ SD & $\Delta$ & 95\,\% interval & $p$ & detects{_ROW_END}",
            r"    \midrule",
            *lines,
            r"    \bottomrule",
            r"  \end{tabular}",
            rf"  \caption{{{escaped(text)}}}",
            rf"  \label{{{label}}}",
            r"\end{table}",
        ]
    )


def _sign(character: str) -> str:
    known = _SIGNS.get(character)
    if known is not None:
        return known
    western = character.isalpha() and "À" <= character <= "ÿ"
    return character if western or (character.isascii() and character.isprintable()) else "?"


def _comment(text: str) -> str:
    return "".join(character if character.isascii() and character.isprintable() else "?" for character in text)
