"""Markdown, and the page with its pictures that is made of it."""

import base64
import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import markdown
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def write_page(folder: Path, name: str, title: str, subtitle: str, content: str, pictures: Iterable[str]) -> Path:
    """Writes ``content``, Markdown, to NAME.md in ``folder``, and to NAME.html with the ``pictures`` inside.

    Returns the path of the latter.
    ``subtitle`` stands on top of every page. ``pictures`` are paths in ``folder``, as ``content`` names them.
    """
    (folder / f"{name}.md").write_text(content, encoding="utf-8")
    body = markdown.markdown(content, extensions=["tables"])
    for path in pictures:
        picture = base64.b64encode((folder / path).read_bytes()).decode()
        body = body.replace(f'src="{path}" />', f'src="data:image/png;base64,{picture}" />')
    css_string = json.dumps(subtitle, ensure_ascii=False).replace("<", r"\3c ")
    page = TEMPLATES.get_template("page.html").render(title=title, subtitle=subtitle, css_string=css_string, body=body)
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder / f"{name}.html"


def fill(template: str, **values: Any) -> str:
    """The Markdown of the ``template``, without surplus empty lines."""
    return re.sub(r"\n{3,}", "\n\n", TEMPLATES.get_template(template).render(values).strip()) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right. The cells are Markdown; a | in them is escaped here."""
    header, *rows = ([cell.replace("|", r"\|") for cell in cells] for cells in (header, *rows))
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table_of(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table. ``rows`` are cells by column; missing ones are empty, and a column of these is left out."""
    frame = pd.DataFrame(rows).fillna("")
    frame = frame.loc[:, (frame != "").any()]
    return table(list(frame), frame.to_numpy().tolist())


def as_markdown(text: str) -> str:
    """``text`` as one line of Markdown that shows it literally; ``table`` escapes the | in its cells."""
    text = re.sub(r"[\\`*\[\]#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))
    text = re.sub(r"^(\d*)([-+.)])", r"\1\\\2", text)  # would begin a list
    return escape(text, quote=False).replace("~", "&#126;")


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["as_markdown"] = as_markdown
TEMPLATES.tests["nan"] = math.isnan
