"""The frame of our pages: what it lets through, and that nothing breaks out of it."""

import base64
import hashlib
import re

import pytest

from tagpr.page.document import document, filled


def policy(page: str) -> str:
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert found
    return found.group(1)


def test_without_a_script_nothing_but_the_style_is_let_through() -> None:
    page = document("t", "<main></main>", style="p {}")
    assert policy(page) == "default-src 'none'; style-src 'unsafe-inline'"
    assert "<script" not in page


def test_only_the_page_s_own_script_is_let_through() -> None:
    script = 'show("ü");'
    page = document("t", "<main></main>", style="", script=script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy(page).endswith(f"script-src 'sha256-{digest}'")
    assert f"<script>{script}</script>" in page


def test_title_and_data_cannot_break_out() -> None:
    page = document("</title><b>", "", style="", data={"sample": '"><b>'})
    assert "<b>" not in page
    assert '<body data-sample="&quot;&gt;&lt;b&gt;">' in page


def test_a_placeholder_without_a_value_is_an_error() -> None:
    with pytest.raises(KeyError):
        filled("tagpr.rl", "report.html", title="t")
