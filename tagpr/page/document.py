"""The frame that all our pages share: one self-contained HTML document, shut off from everything else by its policy."""

import base64
import hashlib
import html
from collections.abc import Mapping
from importlib import resources
from string import Template


def document(
    title: str, body: str, *, style: str, script: str = "", data: Mapping[str, object] | None = None
) -> str:
    """A whole page. Its content security policy lets no network and no script pass but ``script``, which it names by its hash.

    Args:
        title: plain text, escaped here.
        body: HTML; whoever made it has escaped what is not ours.
        style: the style sheet.
        script: JavaScript of the page's own.
        data: name -> value of the body's ``data-`` attributes, which the script reads.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        body = f"{body}\n<script>{script}</script>"
    attributes = "".join(
        f' data-{name}="{html.escape(str(value), quote=True)}"' for name, value in (data or {}).items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}\n</style>\n</head>\n"
        f"<body{attributes}>\n{body}\n</body>\n</html>\n"
    )


def read_part(package: str | None, name: str) -> str:
    """A template, style sheet or script that lies beside the code of ``package`` (``__package__``)."""
    return resources.files(package or "").joinpath(name).read_text(encoding="utf-8")


def filled(package: str | None, name: str, **values: object) -> str:
    """The template ``name`` of ``package`` with its ``$placeholders`` filled in; the values are HTML.

    Raises:
        KeyError: a placeholder has no value.
    """
    return Template(read_part(package, name)).substitute(values)
