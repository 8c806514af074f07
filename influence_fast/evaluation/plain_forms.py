r"""Read answers that are known by their look or words: times, numerals in a base, yes and no, number words."""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction

from influence_fast.evaluation.answer_tokens import Unparsed, tokens_of
from influence_fast.evaluation.expressions import number, parse
from influence_fast.evaluation.values import Clock, Items, Numeral, Ratio, Region, Scalar, Span, Unread, Value, Words

_SCIENTIFIC = re.compile(r"([+-]?\d{1,40}(?:\.\d{1,40})?)[eE]([+-]?\d{1,4})")
_TIME = re.compile(
    r"(?:at\s+)?(\d{1,2})(?:\s?:\s?(\d\d))?(?::\d\d)?\s*(a\.?\s?m\.?|p\.?\s?m\.?|o'?clock)?(?:\s+o'?clock)?",
    re.IGNORECASE,
)
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASE_WORDS |= {"binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16, "hex": 16, "twelve": 12, "sixteen": 16}
_NUMERAL = re.compile(
    r"([0-9A-Z]+)\s*(?:_\s*\{?\s*(?:base\s*)?(\d+|[a-z]+)\s*\}?|\(?\s*(?:in\s+)?base[\s-]+(\d+|[a-z]+)\s*\)?)"
)
_MONTHS = str.split("jan feb mar apr may jun jul aug sep oct nov dec")
_MONTH = r"(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
_MONTH += r"|nov(?:ember)?|dec(?:ember)?)\.?"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_DATES = (
    (re.compile(rf"{_MONTH} ?{_DAY}(?:,? ?(\d{{4}}))?", re.IGNORECASE), "mdy"),
    (re.compile(rf"{_DAY} ?(?:of )?{_MONTH}(?:,? ?(\d{{4}}))?", re.IGNORECASE), "dmy"),
    (re.compile(r"(\d{4})-(\d{2})-(\d{2})"), "ymd"),
)
_SLASHED = re.compile(r"(\d{1,2})/(\d{1,2})/((?:19|20)\d\d)")
_ARTICLES = frozenset(["a", "an", "the"])
_SMALL = str.split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
_TENS = {w: 10 * i for i, w in enumerate(["thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 3)}
_NUMBER_WORDS = {word: value for value, word in enumerate(_SMALL)} | _TENS
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_EMPTY_SET = frozenset(
    ["no solution", "no solutions", "empty set", "no real solutions", "no real solution", "there are no solutions"]
)
_ALL_REALS = frozenset(["all real numbers", "all reals", "real numbers", "any real number"])
_NOT_EXISTING = frozenset(["dne", "does not exist", "limit does not exist"])


def special_form(text: str) -> list[Value] | None:
    """Read forms that are known by their words or look before any parsing; None for any other."""
    plain = plain_words(text)
    if plain in _EMPTY_SET or text.strip() in (r"\emptyset", r"\{\}", r"\{ \}"):
        return [Items("set", ())]
    if plain in _ALL_REALS or re.fullmatch(r"(?:[a-z]\s*\\in\s*)?\\mathbb\s*\{?\s*R\s*\}?", text.strip()):
        return [Region((Span(None, False, None, False),))]
    if plain in _NOT_EXISTING:
        return [Words("does not exist")]
    first = re.match(r"(yes|no|true|false)\b(?:\s*[,.;:!\-]|$)", plain_words(text, keep=",.;:!-"))
    if first:
        return [Words(first.group(1))]
    clock = _clock(text)
    if clock is not None:
        return clock
    date = _date(text)
    if date is not None:
        return [date]
    numeral = _numeral(text)
    if numeral is not None:
        return [numeral]
    value = _number_in_words(plain)
    if value is not None:
        return [Scalar(number(value))]
    return _scientific(text) or _worded_ratio(text)


def _scientific(text: str) -> list[Value] | None:
    """Read `5e-3` as 0.005, and as 5e - 3, which it is less likely; None for another form."""
    match = _SCIENTIFIC.fullmatch(text)
    if match is None:
        return None
    power = ("pow", number(10), number(int(match.group(2))))
    found: list[Value] = [Scalar(("mul", ("num", Fraction(match.group(1)), 0), power))]
    with contextlib.suppress(Unparsed):
        found.append(Scalar(parse(tokens_of(text))))
    return found


def _worded_ratio(text: str) -> list[Value] | None:
    match = re.fullmatch(r"(\d{1,20}) to (\d{1,20})", text)
    return [Ratio((number(int(match.group(1))), number(int(match.group(2)))))] if match else None


def plain_words(text: str, keep: str = "") -> str:
    r"""Return words in lower case without `\text`, punctuation (but `keep`) and a leading article."""
    text = re.sub(r"\\[a-zA-Z]+\s*\{?|[{}$]", " ", text)
    pieces = re.sub(rf"[^\w\s{re.escape(keep)}]", " ", text).split()
    if len(pieces) > 1 and pieces[0].lower() in _ARTICLES:
        pieces = pieces[1:]
    joined = " ".join(pieces)
    return joined if len(joined) == 1 else joined.casefold()


def words_or_unread(text: str) -> Value:
    stripped = re.sub(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname)(?![a-zA-Z])", " ", text)
    if re.search(r"[\\^_=<>+*/|]", stripped) or not re.search(r"[^\W\d_]", stripped):
        return Unread(text)
    return Words(plain_words(text))


def _clock(text: str) -> list[Value] | None:
    plain = re.sub(r"\\(?:text|mathrm|mbox)(?![a-zA-Z])|[{}]", " ", text)
    plain = " ".join(plain.split())
    if plain.casefold() in ("noon", "midnight", "12 noon", "12 midnight"):
        return [Clock(720 if "noon" in plain.casefold() else 0, True)]
    match = _TIME.fullmatch(plain)
    if match is None or (match.group(2) is None and match.group(3) is None):
        return None
    hour, minute, half = int(match.group(1)), int(match.group(2) or 0), (match.group(3) or "")[:1].lower()
    if hour > 24 or minute > 59 or (half in ("a", "p") and not 1 <= hour <= 12):
        return None
    if half in ("a", "p"):
        return [Clock((hour % 12 + 12 * (half == "p")) * 60 + minute, True)]
    found: list[Value] = [Clock(hour * 60 + minute, hour > 12 or hour == 0)]
    if match.group(2) and minute and not half:
        found.append(Ratio((number(hour), number(minute))))
    return found


def _date(text: str) -> Words | None:
    """Read `March 5, 2020`, `5 March` and `2020-03-05` as one form; `5/3/2020` is a date whose order is not known."""
    plain = " ".join(re.sub(r"\\(?:text|mathrm|mbox)(?![a-zA-Z])|[{}]", " ", text).split())
    slashed = _SLASHED.fullmatch(plain)
    if slashed:
        return Words("date " + "/".join(str(int(part)) for part in slashed.groups()))
    for pattern, order in _DATES:
        match = pattern.fullmatch(plain)
        if match is None:
            continue
        part = dict(zip(order, match.groups(), strict=True))
        month = _MONTHS.index(part["m"][:3].lower()) + 1 if part["m"].isalpha() else int(part["m"])
        if not (1 <= month <= 12 and 1 <= int(part["d"]) <= 31):
            return None
        return Words(f"date {part['y'] or ''}-{month}-{int(part['d'])}")
    return None


def _numeral(text: str) -> Numeral | None:
    plain = re.sub(r"\\(?:text|mathrm|mbox)(?![a-zA-Z])\s*\{([^{}]*)\}", r"\1", text).strip().strip("()").strip()
    match = _NUMERAL.fullmatch(plain)
    if match is None:
        return None
    name = match.group(2) or match.group(3)
    base = int(name) if name.isdigit() and len(name) < 3 else _BASE_WORDS.get(name, 0)
    digits = match.group(1).lstrip("0") or "0"
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    return Numeral(digits, base)


def _number_in_words(plain: str) -> int | None:
    total, current, known = 0, 0, False
    for word in plain.split():
        if word in _NUMBER_WORDS:
            current, known = current + _NUMBER_WORDS[word], True
        elif word == "hundred" and known:
            current *= 100
        elif word in SCALES and known:
            total, current = total + current * SCALES[word], 0
        elif word != "and" or not known:
            return None
    return total + current if known else None
