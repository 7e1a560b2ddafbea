"""Blocks of the report as Markdown, which a forge renders, and as one HTML file that needs nothing beside itself."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from jetlab.report.blocks import Block, Figure, Heading, Paragraph, Table

VERDICT_CLASSES = {"agrees": "yes", "disagrees": "no", "cannot tell": "open", "not tested here": "none"}


def _md_cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown with links to figures/ and notebooks/ beside the file."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case Figure(name, caption):
                parts.append(f"![{caption}](figures/{name}.svg)\n\n*{caption}*")
            case Table(header, rows):
                lines = [header, ("---",) * len(header), *rows]
                parts.append("\n".join("| " + " | ".join(map(_md_cell, line)) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)


def _cell(text: str) -> str:
    word = text.strip("*")
    if text.startswith("**") and word in VERDICT_CLASSES:
        return f'<td><span class="verdict {VERDICT_CLASSES[word]}">{word}</span></td>'
    numeric = re.fullmatch(r"[-+–]?[\d .,]*( ± [\d.,]+)?( ?%)?", text) is not None
    return f'<td class="number">{_inline(text)}</td>' if numeric else f"<td>{_inline(text)}</td>"


def _svg(path: Path, name: str, caption: str) -> str:
    """The drawing without its file header, its ids made the figure's own: one page holds many drawings."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)


STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6575; --paper: #fbfaf7; --line: #dcd9d0; --card: #ffffff;
  --accent: #b3541e; --yes: #1f7a4d; --no: #b3261e; --open: #8a6d00; --none: #6a7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e1; --soft: #a7adb8; --paper: #15181d; --line: #343a44;
  --card: #1d2128; --accent: #f0a070; --yes: #6fcf97; --no: #ff8a80; --open: #e6c34a; --none: #9aa3b0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.2rem); line-height: 1.2; text-wrap: balance; }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); line-height: 1.25; }
p { max-width: 46rem; } h1 + p { font-size: 1.1rem; }
a { color: var(--accent); } code { font-size: .9em; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .35rem .9rem; font-size: .9rem; }
figure { margin: 1.5rem 0; } figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
.drawing { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .6rem; overflow-x: auto; }
.drawing svg { display: block; width: 100%; max-width: 46rem; min-width: 30rem; height: auto; margin: 0 auto; }
table.prose td:first-child { min-width: 10.5rem; }
table.prose td:last-child { min-width: 12rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1.2rem 0; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .88rem; line-height: 1.4; }
th, td { padding: .45rem .65rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  min-width: 5.5rem; }
th { color: var(--soft); font-weight: 600; } tr:last-child td { border-bottom: 0; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { white-space: nowrap; font-weight: 600; } .yes { color: var(--yes); } .no { color: var(--no); }
.open { color: var(--open); } .none { color: var(--none); }
@media (max-width: 33rem) { figcaption::after { content: " Swipe the picture to see its right side."; } }
@media (max-width: 40rem) {
  table.wide thead { display: none; }
  table.wide tr { display: block; padding: .6rem .2rem; border-bottom: 2px solid var(--line); }
  table.wide td { display: grid; grid-template-columns: 6.5rem 1fr; gap: .6rem; border: 0; padding: .2rem .6rem; }
  table.wide td { white-space: normal; overflow-wrap: anywhere; }
  table.wide td::before { content: attr(data-label); color: var(--soft); }
}
@media print { .drawing, .scroll { overflow: visible; } }
"""


def _table(header: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
    body = []
    for row in rows:
        cells = (
            _cell(cell).replace("<td", f'<td data-label="{html.escape(label)}"', 1)
            for label, cell in zip(header, row, strict=True)
        )
        body.append("<tr>" + "".join(cells) + "</tr>")
    classes = ["wide"] * (len(header) > 3) + ["prose"] * any(len(row[-1]) > 60 for row in rows)
    wide = f' class="{" ".join(classes)}"' if classes else ""
    return (
        f'<div class="scroll" tabindex="0"><table{wide}><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def page(blocks: Sequence[Block], figures_dir: Path) -> str:
    """The blocks as one HTML file: style and drawings inside, no script, nothing loaded; light and dark mode."""
    parts, links, title = [], [], ""
    for block in blocks:
        match block:
            case Heading(1, text):
                title = text
                parts.append(f"<h1>{_inline(text)}</h1>")
            case Heading(level, text):
                anchor = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
                links.append(f'<a href="#{anchor}">{_inline(text.split(" (")[0])}</a>')
                parts.append(f'<h{level} id="{anchor}">{_inline(text)}</h{level}>')
            case Paragraph(text):
                parts.append(f"<p>{_inline(text)}</p>")
            case Figure(name, caption):
                drawing = _svg(figures_dir / f"{name}.svg", name, caption)
                parts.append(
                    f'<figure><div class="drawing" tabindex="0">{drawing}</div>'
                    f"<figcaption>{_inline(caption)}</figcaption></figure>"
                )
            case Table(header, rows):
                parts.append(_table(header, rows))
    first = next((i for i, part in enumerate(parts) if part.startswith("<h2")), len(parts))
    parts.insert(first, f'<nav aria-label="Sections">{"".join(links)}</nav>')
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )
