"""A page: one HTML file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import html

from dattri_reports.style import STYLE


def page(title: str, body: str) -> str:
    """Return a whole page.

    Args:
        title: Of the window, as text.
        body: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Return a value as text that is safe inside HTML, attributes included."""
    return html.escape(str(value), quote=True)
