"""The summary as one HTML page that needs nothing else: no script, no network."""

from collections.abc import Sequence
from html import escape

from pipeline.analysis import summary
from pipeline.analysis.anatomy import Anatomy
from pipeline.analysis.side_by_side import Compared

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8883; }
th { position: sticky; top: 0; background: Canvas; }
.text { text-align: left; }
.function td { color: GrayText; }
.differs td { background: #f806; }
.last td { font-weight: 600; }
.shares { display: flex; flex-wrap: wrap; align-items: start; gap: 1rem 3rem; }
.bar { display: inline-block; height: .8em; background: #48c; min-width: 1px; }
.track { width: 12rem; text-align: left; }
"""


def nets_page(measured: list[Anatomy]) -> str:
    """Each net by its layers, below one another."""
    title = ", ".join(anatomy.net for anatomy in measured)
    return _page(title, [_net(anatomy) for anatomy in measured])


def compared_page(rows: list[Compared], *, batch: int) -> str:
    """The nets side by side."""
    body = [("", summary.compared_cells(row)) for row in rows]
    title = "Nets side by side"
    table = _table(summary.compared_headings(), body, left=1)
    return _page(title, [f"<h1>{title}</h1>", table, _notes(summary.compared_notes(batch=batch))])


def _net(anatomy: Anatomy) -> str:
    rows = [
        ("differs" if layer.agrees is False else "function" if layer.is_function else "", summary.cells(layer))
        for layer in anatomy.layers
    ]
    rows += [("last", row) for row in summary.last_rows(anatomy)]
    facts = (
        f"{anatomy.in_chans} x {anatomy.px} x {anatomy.px} px, {anatomy.num_classes:,} classes: "
        f"{anatomy.parameters:,} parameters, {summary.short(anatomy.macs)} multiply-adds, "
        f"{summary.short(anatomy.activation_bytes)}B of activations for one picture"
    )
    return "\n".join(
        [
            f"<h1>{escape(anatomy.net)}</h1>",
            f"<p>{facts}</p>",
            *(_shares(anatomy, quantity, title) for quantity, title in summary.QUANTITIES.items()),
            "<h2>Layer by layer</h2>",
            _notes(summary.notes(anatomy)),
            _table(summary.headings(), rows, left=2),
        ]
    )


def _shares(anatomy: Anatomy, quantity: str, title: str) -> str:
    tables = []
    for grouping in ("block", "kind"):
        lines = [
            f'<tr><td class="text">{escape(part.name or "(net)")}</td><td>{summary.amount(part, of=quantity)}</td>'
            f"<td>{part.share:.1%}</td>"
            f'<td class="track"><span class="bar" style="width: {100 * part.share:.2f}%"></span></td></tr>'
            for part in summary.top(anatomy.shares(quantity, by=grouping))
        ]
        head = f'<tr><th class="text">by {grouping}</th><th></th><th>share</th><th></th></tr>'
        tables.append(f"<table>{head}{''.join(lines)}</table>")
    return f'<h2>{title.capitalize()}</h2>\n<div class="shares">{"".join(tables)}</div>'


def _table(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, left: int) -> str:
    """A table of rows, each with its CSS class; the first `left` columns are text."""

    def row(cells: Sequence[str], *, tag: str, style: str) -> str:
        text = [
            f'<{tag} class="text">{escape(cell)}</{tag}>' if index < left else f"<{tag}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        ]
        return f'<tr class="{style}">{"".join(text)}</tr>' if style else f"<tr>{''.join(text)}</tr>"

    lines = [row(headings, tag="th", style=""), *(row(cells, tag="td", style=style) for style, cells in rows)]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _notes(notes: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def _page(title: str, parts: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body>\n</html>"
