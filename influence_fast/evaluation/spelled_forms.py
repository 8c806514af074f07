r"""Units in front of the number or as marks, turned brackets and distances from 0, in the forms that are read."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = r"\d{1,15}(?:\.\d{1,15})?"
_CURRENCY = re.compile(
    rf"(?P<name>USD|EUR|GBP|JPY|INR|Rs)\.?\s{{0,2}}(?P<amount>\d{{1,3}}(?:,\d{{3}}){{1,4}}(?:\.\d{{1,15}})?|{_NUMBER})",
    re.ASCII,
)
# Behind a space: a letter that touches the number may be a variable.
_OHMS = re.compile(rf"({_NUMBER})(?:\s|\\[,;: ]|~){{1,3}}(k|M)?(?:\\Omega|Ω)", re.ASCII)
_PREFIXES = {"k": "kilo", "M": "mega"}
_PRIME, _SECOND = r"\s?(?:'|′|\^\{?\\prime\}?)\s?", r"\s?(?:''|\"|″|′′|\^\{\\prime\\prime\})"
_FEET = re.compile(rf"(\d{{1,6}}){_PRIME}({_NUMBER}){_SECOND}", re.ASCII)
_DEGREES = re.compile(
    rf"(\d{{1,6}})\s?(?:\^\{{?\\circ\}}?|°|\\degree)\s?({_NUMBER})(?:'|′|\^\{{?\\prime\}}?)(?!')"
    rf"(?:\s?({_NUMBER}){_SECOND})?",
    re.ASCII,
)
# An open end as a bracket turned away, in an interval of ends without brackets.
_OPEN = re.compile(r"([\[\]])([^\[\](),;]{1,200},[^\[\](),;]{1,200})([\[\]])")
_BAR = r"(?:\\left|\\right)?(?:\||\\[lr]?vert\b)"
_DISTANCE = re.compile(
    rf"{_BAR}\s?[a-zA-Z]\s?{_BAR}\s?(>|<|≥|≤|\\geq?(?:slant)?\b|\\leq?(?:slant)?\b|\\[gl]t\b)\s?({_NUMBER})", re.ASCII
)


def spelled(answer: str) -> str:
    r"""Return an answer that is of such a form and nothing more in the usual one, any other as it is.

    Example:
        >>> spelled("USD 5"), spelled("5'6''"), spelled(r"30^\circ 30'")
        ('5 USD', '5 feet 6 inches', '61/2 degrees')
    """
    if found := _OHMS.fullmatch(answer.strip().strip("$")):
        return f"{found[1]} {_PREFIXES.get(found[2], '')}ohms"
    text = answer.strip().strip("$").replace(r"\,", " ").replace(r"\text{Rs.}", "Rs").strip()
    if found := _CURRENCY.fullmatch(text):
        return f"{found['amount']} {found['name']}"
    if (found := _FEET.fullmatch(text)) and Fraction(found[2]) < 12:
        return f"{found[1]} feet {found[2]} inches"
    if found := _DEGREES.fullmatch(text):
        minutes, seconds = Fraction(found[2]), Fraction(found[3] or 0)
        if minutes < 60 and seconds < 60:
            return f"{Fraction(found[1]) + minutes / 60 + seconds / 3600} degrees"
    return _interval(text) or answer


def _interval(text: str) -> str | None:
    """Return `]a,b[` and `|x| > c` for a number c above 0 as intervals with round brackets; None for anything else."""
    if (found := _OPEN.fullmatch(text)) and (found[1], found[3]) != ("[", "]"):
        return f"{'[' if found[1] == '[' else '('}{found[2]}{']' if found[3] == ']' else ')'}"
    if (found := _DISTANCE.fullmatch(text)) and Fraction(found[2]) > 0:
        sign, end = found[1], found[2]
        closed = sign in "≥≤" or "e" in sign
        if sign in "<≤" or sign.startswith(r"\l"):
            return f"[-{end},{end}]" if closed else f"-{end}<x<{end}"
        low, high = ("]", "[") if closed else (")", "(")
        return rf"(-\infty,-{end}{low}\cup{high}{end},\infty)"
    return None
