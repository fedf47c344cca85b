"""One HTML file with everything in it: text, tables and pictures; nothing is fetched when it is opened."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oracle_server.errors import FailedPrecondition

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A picture (PNG bytes) under a title, with what it says in words and a table where there is one."""

    name: str
    title: str
    text: str
    png: bytes | None = None
    table: Table | None = None

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png or b'').decode()}"


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page. Words of a pack are somebody else's: everything is escaped."""
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise FailedPrecondition("a report needs jinja2: pip install 'step-oracle[profiler]'") from error
    template = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(template).render(title=title, facts=facts, sections=sections)
