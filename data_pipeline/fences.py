"""Untrusted text between ``<name>`` and ``</name>`` of a prompt: it must not look as if it closed or opened the fence.

A model reads what looks like a fence as one, so look-alikes count too: other brackets, letters of other scripts, invisible
characters in between. The list of these is not complete, and nothing of ours depends on it: replies are parsed without the
prompt. It makes the cheap attacks fail.
"""

import re
import unicodedata
from collections.abc import Collection
from functools import lru_cache

_OPEN = "<＜﹤‹〈⟨❬❮❰《⧼≺˂ᐸ"
_CLOSE = ">＞﹥›〉⟩❭❯❱》⧽≻˃ᐳ"
_SLASH = "/／⁄∕⧸╱"
_LOOKS_LIKE = {
    **dict.fromkeys(_OPEN, "<"),
    **dict.fromkeys(_CLOSE, ">"),
    **dict.fromkeys(_SLASH, "/"),
}
# Letters of other scripts, and rare Latin ones, by what they look like.
_LETTERS = {
    "a": "аα", "b": "Ьʙ", "c": "сϲ", "d": "ԁ", "e": "еεҽ", "g": "ɡ", "h": "һ", "i": "іıι", "j": "ј", "k": "кκ", "l": "ӏ",
    "m": "м", "n": "ոпη", "o": "оοօ", "p": "рρ", "q": "ԛ", "r": "гʀ", "s": "ѕſ", "t": "тτ", "u": "սυ", "v": "ν", "w": "ԝ",
    "x": "хχ", "y": "уγ", "_": "‿⁔",
}  # fmt: skip
_LOOKS_LIKE |= {other: letter for letter, others in _LETTERS.items() for other in others}
_BRACKET = re.compile(f"[{re.escape(_OPEN)}]")
# How far to look behind a bracket; who hides a fence behind more invisible characters than this hides it well.
_REACH = 256


def disarm(text: str, names: Collection[str]) -> str:
    """Replace the opening bracket of everything that looks like ``<name>``, ``</name>`` or ``<name/>`` by ``‹``.

    Nothing else is changed. Takes time linear in the text.
    """
    if not names:
        return text
    fence = re.compile(rf"</?(?:{'|'.join(map(re.escape, names))})/?>")
    longest = max(map(len, names)) + 4
    return _BRACKET.sub(
        lambda found: "‹" if fence.match(_skeleton(text, found.start(), longest)) else found[0], text
    )


def _skeleton(text: str, start: int, length: int) -> str:
    """The next ``length`` characters as they look, without white space and what cannot be seen; ends with a bracket."""
    seen = "<"
    for character in text[start + 1 : start + _REACH]:
        seen += _look(character)
        if len(seen) >= length or seen[-1] == ">" or "<" in seen[1:]:
            break
    return seen


@lru_cache(maxsize=10_000)
def _look(character: str) -> str:
    folded = unicodedata.normalize("NFKD", _LOOKS_LIKE.get(character, character)).casefold()
    return "".join(
        _LOOKS_LIKE.get(part, part)
        for part in folded
        if not part.isspace() and unicodedata.category(part) not in ("Cf", "Cc", "Mn", "Me")
    )
