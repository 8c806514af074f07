r"""Bring the text of an answer into one form: plain characters, one name for each LaTeX command, no layout."""

from __future__ import annotations

import re
import unicodedata

MAX_ANSWER = 2000  # characters; a longer "answer" is no answer, and only costs time to parse

_SYMBOLS = {
    **dict.fromkeys("−–—‒﹣－", "-"),
    **dict.fromkeys("×✕✖", r" \times "),
    **dict.fromkeys("·⋅∙•", r" \cdot "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("‘’", "'"),
    **{"÷": "/", "∕": "/", "⁄": "/", "√": r" \sqrt ", "π": r" \pi ", "∞": r" \infty ", "±": r" \pm ", "∓": r" \mp "},
    **{"≤": r" \le ", "⩽": r" \le ", "≥": r" \ge ", "⩾": r" \ge ", "≠": r" \ne ", "≈": r" \approx ", "≃": r" \approx "},
    **{"∪": r" \cup ", "∩": r" \cap ", "∈": r" \in ", "∅": r" \emptyset ", "∖": r" \setminus ", "ℝ": r" \mathbb{R} "},
    **{"°": r"\degree ", "º": r"\degree ", "˚": r"\degree ", "℃": r"\degree C", "℉": r"\degree F", "⟨": "(", "⟩": ")"},
    **{"α": r" \alpha ", "β": r" \beta ", "γ": r" \gamma ", "θ": r" \theta ", "λ": r" \lambda ", "φ": r" \phi "},
    **{"ω": r" \omega ", "μ": r" \mu ", "µ": r" \mu ", "σ": r" \sigma ", "τ": r" \tau ", "Δ": r" \Delta "},
}

_RENAMED = {
    **dict.fromkeys(["dfrac", "tfrac", "cfrac"], r"\frac"),
    **dict.fromkeys(["leq", "leqslant", "leqq"], r"\le"),
    **dict.fromkeys(["geq", "geqslant", "geqq"], r"\ge"),
    **dict.fromkeys(["neq"], r"\ne"),
    **dict.fromkeys(["lt"], "<"),
    **dict.fromkeys(["gt"], ">"),
    **dict.fromkeys(["varnothing", "O"], r"\emptyset"),
    **dict.fromkeys(["sim", "approxeq", "simeq"], r"\approx"),
    **dict.fromkeys(["lbrace"], r"\{"),
    **dict.fromkeys(["rbrace"], r"\}"),
    **dict.fromkeys(["langle", "lparen"], "("),
    **dict.fromkeys(["rangle", "rparen"], ")"),
    **dict.fromkeys(["lbrack"], "["),
    **dict.fromkeys(["rbrack"], "]"),
    **dict.fromkeys(["lvert", "rvert", "vert"], "|"),
    **dict.fromkeys(["ast"], "*"),
    **dict.fromkeys(["div"], "/"),
    **dict.fromkeys(["colon"], ":"),
    **dict.fromkeys(["quad", "qquad", "enspace", "thinspace", "space", "newline"], " "),
    **dict.fromkeys(["left", "right", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "big", "Big", "bigg"], ""),
    **dict.fromkeys(["displaystyle", "textstyle", "limits", "nonumber", "phantom", "middle"], ""),
    **dict.fromkeys(["dollar", "textdollar"], r"\$"),
    **dict.fromkeys(["textdegree"], r"\degree"),
    **dict.fromkeys(["euro", "texteuro"], "€"),
    **dict.fromkeys(["pounds", "textsterling"], "£"),
    **dict.fromkeys(["ldots", "cdots", "dotsc"], r"\dots"),
    **dict.fromkeys(["varphi"], r"\phi"),
    **dict.fromkeys(["varepsilon"], r"\epsilon"),
}
_COMMAND = re.compile(r"\\([A-Za-z]+)(?![A-Za-z]) ?")
# A group of three digits may follow `,`, `{,}`, `,\!`, a thin space or a space, the same all through a number.
_GROUPED = re.compile(
    r"(?<![\d.,])([1-9]\d{0,2})(?=(\{,\}|,\\!\s?|\\[,; ]|~|\u2009|\u202f|\u00a0| )\d{3}(?!\d))((?:\2\d{3})+)(?![\d])"
)
_COMMA_GROUPED = re.compile(r"(?<![\w.,({\[|])([1-9]\d{0,2}(?:,\d{3})+)(?!\d|,\d|\s*,\s*\d)")
_SPACING = re.compile(r"(?<!\\)\\[,;:! \n]|~|[\u2000-\u200a\u202f\u00a0]")
_DEGREE = re.compile(r"(?:\{\})?\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
_TIMES_TEN = re.compile(r"(?<=\d)\s?[xX]\s?(?=10\s?\^)")
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]")
_CURRENCY = re.compile(r"(?<!\\)\$(?=\s?-?\.?\d)")
_TEXT = re.compile(r"\\(?:text|textrm|mathrm|textbf|mathbf|textit|mbox|textnormal)\s*\{([^{}]*)\}")
_COLOR = re.compile(r"\\(?:text)?color\s*\{\s*[A-Za-z0-9!]{1,30}\s*\}|\\color\s+(?:red|blue|green|black)\b")
_NEGATIVE = re.compile(r"^(?:\\text\s*\{\s*)?(?:negative|minus)\s*(\})?\s*(?=[\d.\\$])", re.IGNORECASE)
# Three or more groups leave no doubt: 1.234.567, 1_234_567, 1'234'567, and 12,34,567 as it is written in India.
_MANY_GROUPS = re.compile(
    r"(?<![\w.,])(?:[1-9]\d{0,2}(?:(?:\.\d{3}){2,}|(?:_\d{3}){2,})|[1-9]\d?(?:,\d\d)+,\d{3})(?![\w.,'])"
)
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)")
_SPACES = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # a space between digits tells two numbers apart


def clean(text: str) -> str:
    r"""Return an answer with plain characters, one spelling of each command, and no delimiters or layout.

    Args:
        text: an answer of at most `MAX_ANSWER` characters.

    Example:
        >>> clean(r"$\dfrac{1}{2}\,$")
        '\\frac {1}{2}'
        >>> clean("3½")
        '3 \\frac{1}{2}'
    """
    text = _NEGATIVE.sub(_minus, _COLOR.sub("", _bare(text)).strip())
    text = _GROUPED.sub(_joined_groups, _MANY_GROUPS.sub(lambda m: re.sub(r"\D", "", m.group()), text))
    text = "".join(map(_plain_character, text))
    text = _currency(_DELIMITERS.sub(" ", text))
    text = _DEGREE.sub(r"\\degree ", text)
    text = _COMMAND.sub(lambda m: (_RENAMED[m.group(1)] + " ") if m.group(1) in _RENAMED else m.group(), text)
    text = _TIMES_TEN.sub(r" \\times ", _SPACING.sub(" ", text))
    for old, new in (("**", "^"), ("<=", r"\le "), (">=", r"\ge "), ("!=", r"\ne "), ("==", "=")):
        text = text.replace(old, new)
    return _bare(text)


def _minus(match: re.Match[str]) -> str:
    """Write `negative` as a sign; a `\\text{` that goes on behind it stays open."""
    return "-" if match.group(1) or "{" not in match.group() else r"-\text{"


def _joined_groups(match: re.Match[str]) -> str:
    """Join groups of three digits; `1 234/567` is a mixed number and stays."""
    if match.group(2) == " " and match.string.startswith("/", match.end()):
        return match.group()
    return match.group(1) + re.sub(r"\D", "", match.group(3))


def _plain_character(character: str) -> str:
    if character < "\x80":
        return character
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    kind = unicodedata.decomposition(character)
    plain = unicodedata.normalize("NFKC", character)
    if kind.startswith("<fraction>"):
        top, _, bottom = plain.partition("⁄")
        return rf" \frac{{{top}}}{{{bottom}}}" if bottom else plain
    if kind.startswith("<super>"):
        return f"^{{{plain}}}".replace("−", "-")
    if kind.startswith("<sub>"):
        return f"_{{{plain}}}".replace("−", "-")
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.decimal(character))
    return plain


def _currency(text: str) -> str:
    r"""Remove `$...$`, and write a dollar sign that stands alone before a number as `\$`."""
    signs = len(re.findall(r"(?<!\\)\$", text))
    if signs % 2:
        text = _CURRENCY.sub(r"\\$", text, count=1)
    return re.sub(r"(?<!\\)\$", " ", text)


def _bare(text: str) -> str:
    """Remove markup, quotes and punctuation around an answer."""
    before = None
    while before != text:
        before = text
        text = text.strip().strip('*`"').strip()
        text = re.sub(r"(?<!\\)[.,;:?](?<!\.\.)$", "", text)
        if text.endswith("!") and re.search(r"[A-Za-z]{2}!$", text):
            text = text[:-1]
    return text


def without_comma_groups(text: str) -> str:
    """Return a cleaned answer with the commas of `1,234,567` taken out, where these are no list in brackets.

    Example:
        >>> without_comma_groups("1,234 eggs")
        '1234 eggs'
        >>> without_comma_groups("(1,234)")
        '(1,234)'
    """
    if re.search(r"[(\[{]", text) and _COMMA_GROUPED.search(re.sub(r"\\frac\{\d+\}\{\d+\}", "", text)) is None:
        return text
    return _COMMA_GROUPED.sub(lambda m: m.group().replace(",", ""), text)


def normalise(answer: str) -> str:
    r"""Return an answer without what changes its look and not its sense: spaces, `$`, `\left`, `\text`, `\dfrac`.

    A space between two digits stays: `2 3` is not 23.

    Example:
        >>> normalise(r" \left( 3, \dfrac{\pi}{2} \right) ")
        '(3,\\frac{\\pi}{2})'
    """
    if len(answer) > MAX_ANSWER:
        return answer
    answer = answer.strip().removesuffix(".")
    answer = _GROUPED.sub(_joined_groups, answer)
    for old, new in (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac")):
        answer = answer.replace(old, new)
    answer = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", answer)
    answer = re.sub(r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\$", " ", answer).strip()
    answer = _TEXT.sub(r"\1", answer)
    answer = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", answer)
    return re.sub(r"\s+", " ", _SPACES.sub("", answer)).strip()
