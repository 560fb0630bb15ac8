"""`python -m pipeline summary NET...`: a net layer by layer, or with --compare several side by side.

docs/summary.md says how to read it, and lists the keys of `--format json`.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline import nets
from pipeline.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pipeline.analysis.anatomy import Anatomy, Layer, Outside, Share
    from pipeline.analysis.side_by_side import Compared

FORMATS = ("table", "json", "html")
SCHEMA = 1
"""Of the JSON; grows when a key goes or changes its meaning, not when one is added."""
PIPED_WIDTH = 1000
"""Columns for a pipe, which has no width: more than any table needs, so that nothing in it is folded."""
TOP = 8
"""Parts of a net that a share is shown of; the others are added up."""
QUANTITIES = {"activation_bytes": "where the memory goes", "parameters": "where the parameters go"}
OUTSIDE = "parameters outside layers"
UNUSED = "parameters not used"


def run(
    names: list[str], *, px: int | None, in_chans: int, num_classes: int, format: str, compare: bool, batch: int
) -> None:
    """Prints the summary.

    Args:
        names: Nets, as `nets.build` takes them.
        px: Side of the pictures; None for each net's own.
        in_chans: Channels of the pictures.
        num_classes: Width of the logits.
        format: One of `FORMATS`. HTML is one page that needs nothing else.
        compare: The nets side by side, timed on this machine, in place of each by its layers.
        batch: Pictures a batch, when timing.

    Raises:
        UserError: There is no such net or format, or a net does not take such pictures.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: no such format{nearest(format, FORMATS)}")
    for option, value in (("px", px), ("in-chans", in_chans), ("num-classes", num_classes), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: give 1 or more")
    for name in names:
        nets.check(name)
    measured = [_measure(name, px=px, in_chans=in_chans, num_classes=num_classes) for name in names]
    if compare:
        from pipeline.analysis import side_by_side

        _print_compared(side_by_side.compare(measured, batch=batch), format=format, batch=batch)
    elif format == "json":
        print(json.dumps({"schema": SCHEMA, "nets": [document(anatomy) for anatomy in measured]}, indent=2))
    elif format == "html":
        from pipeline.analysis import summary_page

        print(summary_page.nets_page(measured))
    else:
        for index, anatomy in enumerate(measured):
            print("\n" if index else "", end="")
            _print_anatomy(anatomy)


def _measure(name: str, *, px: int | None, in_chans: int, num_classes: int) -> "Anatomy":
    from pipeline.analysis import anatomy

    try:
        return anatomy.measure(name, px=px, in_chans=in_chans, num_classes=num_classes)
    except UserError as error:  # which tells what to set in params.yaml; here it is an option
        what = str(error).partition(";")[0]
        raise UserError(f"{what}; give another --px") from None


def document(anatomy: "Anatomy") -> dict[str, Any]:
    """A net as JSON; docs/summary.md has the keys."""
    shares = {
        quantity: {by: [asdict(share) for share in anatomy.shares(quantity, by=by)] for by in ("block", "kind")}
        for quantity in ("activation_bytes", "parameters", "macs")
    }
    return {
        "net": anatomy.net,
        "px": anatomy.px,
        "in_chans": anatomy.in_chans,
        "num_classes": anatomy.num_classes,
        "parameters": anatomy.parameters,
        "macs": anatomy.macs,
        "activation_bytes": anatomy.activation_bytes,
        "peak_bytes": anatomy.peak_bytes,
        "layers": [{**asdict(layer), "agrees": layer.agrees} for layer in anatomy.layers],
        "outside": [asdict(part) for part in anatomy.outside],
        "shares": shares,
    }


def headings() -> list[str]:
    """Of the table of layers; the first two are text."""
    return [
        *("layer", "kind", "kernel", "stride", "pad", "by formula", "output", "parameters", "MACs", "memory"),
        "sees px",
    ]


def cells(layer: "Layer") -> list[str]:
    """A layer's, one for each of `headings`."""
    window = layer.window
    extras = ""
    if window:
        extras += f" d{sides(window.dilation)}" if set(window.dilation) != {1} else ""
        extras += f" g{window.groups}" if window.groups > 1 else ""
    return [
        layer.name or "(net)",
        f"({layer.kind})" if layer.is_function else layer.kind,
        sides(window.kernel) + extras if window else "",
        sides(window.stride) if window else "",
        (window.padding if isinstance(window.padding, str) else sides(window.padding)) if window else "",
        "" if layer.formula is None else "x".join(map(str, layer.formula)) + (" ≠" if layer.agrees is False else ""),
        "x".join(map(str, layer.output)),
        f"{layer.parameters:,}" if layer.parameters else "",
        short(layer.macs) if layer.macs else "",
        f"{short(layer.activation_bytes)}B" if layer.activation_bytes else "",
        _sees(layer),
    ]


def last_rows(anatomy: "Anatomy") -> list[list[str]]:
    """Below the layers: parameters that are in none, and the totals."""
    rows = []
    for label, used in ((OUTSIDE, True), (UNUSED, False)):
        number = sum(part.parameters for part in anatomy.outside if part.used is used)
        if number:
            rows.append([label, "", "", "", "", "", "", f"{number:,}", "", "", ""])
    memory = f"{short(anatomy.activation_bytes)}B"
    rows.append(["total", "", "", "", "", "", "", f"{anatomy.parameters:,}", short(anatomy.macs), memory, ""])
    return rows


def notes(anatomy: "Anatomy") -> list[str]:
    """What the table's marks mean, of those that it has."""
    found = []
    for label, used in ((OUTSIDE, True), (UNUSED, False)):
        parts = [part for part in anatomy.outside if part.used is used]
        if parts:
            found.append(f"{label}: {_listed(parts, whole_names=used)}")
    if any(layer.agrees is False for layer in anatomy.layers):
        found.append("≠: not the size that the formula gives; the layer pads by itself, as TensorFlow's do")
    if any(layer.is_function for layer in anatomy.layers):
        found.append("(in brackets): operations that run between layers, in the part of the net that is named")
    if any(layer.sees_whole_picture for layer in anatomy.layers):
        found.append(
            "all: sees the whole picture; 75 + all: 75 px through windows, and all of it through a gate or attention"
        )
    found.append(f"at the peak, inference holds {short(anatomy.peak_bytes)}B of activations for one picture")
    return found


def sides(sizes: Sequence[int | float]) -> str:
    """`3` for 3 x 3, `1x7` for 1 x 7."""
    parts = [f"{size:g}" for size in sizes]
    return parts[0] if len(set(parts)) == 1 else "x".join(parts)


def short(value: float) -> str:
    """Four figures and thousands: 118.0M, 15.47G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}" if value / size >= 1000 else f"{value / size:#.4g}{unit}"
    return f"{value:g}"


def amount(part: "Share", *, of: str) -> str:
    """A share's value: parameters in full, bytes in short."""
    return f"{short(part.value)}B" if of == "activation_bytes" else f"{part.value:,}"


def top(shares: list["Share"]) -> list["Share"]:
    """The first `TOP`, and the others as one."""
    if len(shares) <= TOP + 1:
        return shares
    rest = shares[TOP:]
    value, share = sum(part.value for part in rest), sum(part.share for part in rest)
    return [*shares[:TOP], type(rest[0])(f"{len(rest)} others", value, share)]


def _sees(layer: "Layer") -> str:
    window = sides([round(side) for side in layer.receptive_field]) if layer.receptive_field else ""
    return " + ".join(part for part in (window, "all" if layer.sees_whole_picture else "") if part)


def _listed(parts: list["Outside"], *, whole_names: bool) -> str:
    """By name, or by the part of the net that they are in; of names that end alike, together."""
    sums: dict[str, int] = {}
    for part in parts:
        path = part.name.split(".")
        key = path[0] if not whole_names else path[0] if len(path) == 1 else f"*.{path[-1]}"
        sums[key] = sums.get(key, 0) + part.parameters
    return ", ".join(f"{name} {number:,}" for name, number in sums.items())


def _print_anatomy(anatomy: "Anatomy") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    console.print(Text(f"{anatomy.net} at {anatomy.in_chans} x {anatomy.px} x {anatomy.px}, {_classes(anatomy)}\n"))
    rows = [[cells(layer) for layer in anatomy.layers], last_rows(anatomy)]
    _print_fitting(console, headings(), rows, left=2, stack=_stack)
    console.print(Text("\n" + "\n".join(notes(anatomy))))
    for quantity, title in QUANTITIES.items():
        for grouping in ("block", "kind"):
            table = _table([f"{title}, by {grouping}", "", "share", ""], left=1)
            for part in top(anatomy.shares(quantity, by=grouping)):
                bar = "█" * round(20 * part.share)
                table.add_row(*map(Text, (part.name or "(net)", amount(part, of=quantity), f"{part.share:.1%}", bar)))
            console.print()
            console.print(table)


def _stack(row: list[str]) -> list[str]:
    """The cells of one row in four of two lines."""
    name, kind, kernel, stride, pad, formula, output, parameters, macs, memory, sees = row
    window = ", ".join(part for part in (kernel, stride, pad) if part)
    pairs = ((name, f"  {kind} {window}"), (formula, output), (parameters, macs), (memory, sees))
    return [f"{first}\n{second}".rstrip() for first, second in pairs]


def _stack_compared(row: list[str]) -> list[str]:
    net, px, parameters, macs, memory, peak, speed, spread, top1, top5, weights = row
    pairs = ((net, f"  {px}, {weights}"), (parameters, macs), (memory, peak), (speed, spread), (top1, top5))
    return [f"{first}\n{second}" for first, second in pairs]


def _classes(anatomy: "Anatomy") -> str:
    return f"{anatomy.num_classes:,} class{'es' if anatomy.num_classes != 1 else ''}"


def _print_fitting(
    console: "Console",
    columns: list[str],
    sections: list[list[list[str]]],
    *,
    left: int,
    stack: Callable[[list[str]], list[str]],
) -> None:
    """A table with a line a row; where the terminal is too narrow for it, each row stacked in two lines."""
    from rich.measure import Measurement
    from rich.text import Text

    table = _table(columns, left=left)
    stacked = _table(stack(columns), left=1)
    for rows in sections:
        for row in rows:
            table.add_row(*map(Text, row))
            stacked.add_row(*map(Text, stack(row)))
        table.add_section()
        stacked.add_section()
    width = Measurement.get(console, console.options.update(max_width=PIPED_WIDTH), table).maximum
    console.print(table if width <= console.width else stacked)


def _table(columns: Sequence[str], *, left: int) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, heading in enumerate(columns):
        is_text = index < left or heading == ""
        table.add_column(heading, overflow="fold", justify="left" if is_text else "right", no_wrap=not is_text)
    return table


def compared_headings() -> list[str]:
    """Of the table of --compare; the first is text."""
    return [
        *("net", "px", "parameters", "MACs", "memory", "peak", "pictures/s", "range"),
        *("top-1 error %", "top-5 error %", "weights"),
    ]


def compared_cells(row: "Compared") -> list[str]:
    """A net's, one for each of `compared_headings`."""
    return [
        row.net,
        str(row.px),
        f"{row.parameters:,}",
        short(row.macs),
        f"{short(row.activation_bytes)}B",
        f"{short(row.peak_bytes)}B",
        f"{row.pictures_per_second:.1f}",
        f"{row.slowest:.1f} to {row.fastest:.1f}",
        "-" if row.top1_error is None else f"{row.top1_error:.2f}",
        "-" if row.top5_error is None else f"{row.top5_error:.2f}",
        row.weights or "-",
    ]


def compared_notes(*, batch: int) -> list[str]:
    """What the figures of --compare are."""
    from pipeline.analysis.side_by_side import ROUNDS

    return [
        f"pictures/s: measured here, on 1 thread of the CPU, float32, batches of {batch}: the median of {ROUNDS} "
        "after a warm-up, and the slowest to the fastest; the nets take turns",
        "errors: on ImageNet's validation split, as published with torchvision's weights for its net of that name; "
        "not measured here",
    ]


def _print_compared(rows: list["Compared"], *, format: str, batch: int) -> None:
    if format == "json":
        from pipeline.analysis.side_by_side import ROUNDS

        settings = {"threads": 1, "batch": batch, "rounds": ROUNDS}
        print(json.dumps({"schema": SCHEMA, "timing": settings, "compared": list(map(asdict, rows))}, indent=2))
        return
    if format == "html":
        from pipeline.analysis import summary_page

        print(summary_page.compared_page(rows, batch=batch))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    _print_fitting(console, compared_headings(), [list(map(compared_cells, rows))], left=1, stack=_stack_compared)
    console.print(Text("\n" + "\n".join(compared_notes(batch=batch))))
