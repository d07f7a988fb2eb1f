"""Parts of a page: text, tables, pictures, and the page around them.

Everything that is not `Html` is escaped, so that a token such as <|end_text|> is shown and not obeyed.
"""

from __future__ import annotations

import base64
import html
import math
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rdlm.config import InputError


class Html(str):
    """Text that is markup already."""


STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--soft:#5f5f5f;--paper:#fff;--line:#d9d9d9;--box:#f4f4f2;--link:#00578a;
--c0:#0072B2;--c1:#D55E00;--c2:#009E73;--c3:#A8538A;--c4:#B37A00;--c5:#555}
@media(prefers-color-scheme:dark){:root{--ink:#e9e9e6;--soft:#a8a8a3;--paper:#151617;--line:#3a3c3e;--box:#202224;
--link:#7cc4f2;--c0:#56B4E9;--c1:#FF8A4C;--c2:#2CC79B;--c3:#E29AC4;--c4:#E6B422;--c5:#bbb}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Liberation Sans","DejaVu Sans",sans-serif;overflow-wrap:break-word}
main{max-width:46rem;margin:0 auto;padding:1rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.2;margin:.6rem 0 .2rem}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--line)}
h3{font-size:1.02rem;margin:1.6rem 0 .3rem}
p{margin:.5rem 0}a{color:var(--link)}
.soft,figcaption{color:var(--soft);font-size:.88rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem .9rem;margin:.6rem 0}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.5rem;margin:1rem 0}
dl.facts div{background:var(--box);border-radius:.5rem;padding:.45rem .7rem}
dl.facts dt{color:var(--soft);font-size:.8rem}dl.facts dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
figure{margin:1rem 0}figcaption{margin-top:.2rem}
img{display:block;width:100%;height:auto;background:#fff;border:1px solid var(--line);border-radius:.5rem}
svg.chart{display:block;width:100%;max-width:34rem;height:auto}
svg.chart text{fill:var(--soft);font-size:10.5px}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem}
table{border-collapse:collapse;font-size:.86rem;min-width:100%}
th,td{padding:.28rem .6rem;text-align:left;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:last-child td{border-bottom:0}th{background:var(--box);font-weight:600}
.num{text-align:right;font-variant-numeric:tabular-nums}
code{font:.88em ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;background:var(--box);border-radius:.3rem;
padding:.05em .3em;overflow-wrap:anywhere}
.missing{background:var(--box);border-left:4px solid var(--c4);border-radius:.3rem;padding:.5rem .8rem}
summary{cursor:pointer;color:var(--link);margin:.6rem 0}
.key{display:inline-block;margin-right:1rem}.key i{display:inline-block;width:1.1em;height:.28em;border-radius:.14em;
vertical-align:middle;margin-right:.35em}
"""
_NUMBER = re.compile(r"[+-]?[\d.,]+(e[+-]?\d+)?( %)?")


def text(value: Any) -> str:
    """`value` as markup: numbers readably, None as nothing, `Html` as it is, everything else escaped."""
    if isinstance(value, Html):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    return html.escape(str(value))


def number(value: float) -> str:
    """Four digits, powers of ten only where they help: 0.0123, 12.34, 1,234,567, 2.5e-07, 3.1e+12."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def tag(name: str, *parts: Any, **attributes: Any) -> Html:
    """An element of `parts`; `class_` stands for class, and `aria_label` for aria-label."""
    named = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(x))}"' for key, x in attributes.items())
    return Html(f"<{name}{named}>{''.join(map(text, parts))}</{name}>")


def table(heads: Sequence[Any], rows: Iterable[Sequence[Any]], caption: Any = None) -> Html:
    """A table in a box of its own that scrolls sideways; columns that hold numbers only are aligned to the right."""
    body = [[text(x) for x in row] for row in rows]
    columns = [[row[i] for row in body if row[i]] for i in range(len(heads))]
    right = [bool(column) and all(map(_NUMBER.fullmatch, column)) for column in columns]

    def cells(kind: str, row: Sequence[str]) -> list[Html]:
        return [
            tag(kind, Html(x), **({"class_": "num"} if r else {}), **({"scope": "col"} if kind == "th" else {}))
            for x, r in zip(row, right, strict=True)
        ]

    head = tag("thead", tag("tr", *cells("th", [text(x) for x in heads])))
    made = tag("table", head, tag("tbody", *(tag("tr", *cells("td", row)) for row in body)))
    box = tag("div", made, class_="scroll", tabindex=0)  # reached by the keyboard, to be scrolled with it
    return tag("figure", box, *([tag("figcaption", caption)] if caption else []))


def picture(path: Path, alt: str) -> Html:
    """A PNG file, embedded.

    Raises:
      InputError: it cannot be read, or is no PNG.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise InputError(f"{path}: is no PNG; delete it and make it again")
    wide, high = struct.unpack(">II", data[16:24])
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    said = html.escape(alt)
    return Html(f'<figure><img src="{address}" alt="{said}" width="{wide}" height="{high}"></figure>')


def missing(what: str, command: str) -> Html:
    """A line instead of what is not there, with the command that makes it."""
    return tag("p", f"{what} The command: ", tag("code", command), class_="missing")


def facts(known: dict[str, Any]) -> Html:
    """Names and values in boxes."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", x)) for name, x in known.items()), class_="facts")


def details(summary: str, *parts: Any) -> Html:
    """Parts that open at a click."""
    return tag("details", tag("summary", summary), *parts)


def document(title: str, sections: Sequence[tuple[str, str, Html]]) -> str:
    """The page: its title, links to its sections, and the sections (id, heading, content)."""
    links = tag("nav", *(tag("a", heading, href=f"#{name}") for name, heading, _ in sections))
    body = [tag("section", tag("h2", heading), content, id=name) for name, heading, content in sections]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{tag('title', title)}<style>{STYLE}</style></head>\n"
        f"<body>{tag('main', tag('h1', title), links, *body)}</body></html>\n"
    )
