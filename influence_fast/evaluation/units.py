r"""Units of measure and currencies in answers: 5 cm equals 0.05 m and not 5 m, and answers a question for 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from influence_fast.evaluation.answer_tokens import Token

Dimensions = tuple[tuple[str, int], ...]  # ("length", 2), ("time", -1); sorted by name


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: `factor` times the base unit of its dimensions, whose zero lies at `offset` of the base's."""

    dimensions: Dimensions
    factor: Fraction = Fraction(1)
    offset: Fraction = Fraction(0)


PERCENT = Unit((("percent", 1),))
DEGREE = Unit((("degree", 1),))
RADIAN = Unit((("radian", 1),))
DOZEN = Unit((("dozen", 1),))
# The dimension of "square units", which stands for any unit.
COUNTED = "unit"


_PREFIXES = {
    **{"k": (3, "kilo"), "c": (-2, "centi"), "m": (-3, "milli"), "d": (-1, "deci"), "n": (-9, "nano")},
    **{"M": (6, "mega"), "G": (9, "giga"), "T": (12, "tera")},
}


# Symbols and words of units that take prefixes: dimension, factor of the base unit, prefixes in use.
_PREFIXED = (
    ("m", "meter meters metre metres", "length", Fraction(1), "kcmdn"),
    ("g", "gram grams", "mass", Fraction(1), "km"),
    ("L l", "liter liters litre litres", "volume", Fraction(1, 1000), "cmd"),
    ("s", "", "time", Fraction(1), "mn"),
    ("W", "watt watts", "power", Fraction(1), "kmMG"),
    ("J", "joule joules", "energy", Fraction(1), "kM"),
    ("N", "newton newtons", "force", Fraction(1), "k"),
    ("V", "volt volts", "voltage", Fraction(1), "km"),
    ("", "ohm ohms", "resistance", Fraction(1), "kM"),
    ("Pa", "pascal pascals", "pressure", Fraction(1), "kM"),
    ("Hz", "hertz", "frequency", Fraction(1), "kMG"),
    ("mol", "mole moles", "amount", Fraction(1), "m"),
    ("B", "byte bytes", "bytes", Fraction(1), "kMGT"),
    ("eV", "", "electronvolt", Fraction(1), "kMG"),
)
# Names of the others: dimension and factor of the base unit. `pounds` are a mass or a currency.
_OTHERS: tuple[tuple[str, str, str | int | Fraction], ...] = (
    ("sec secs second seconds", "time", 1),
    ("min mins minute minutes", "time", 60),
    ("h hr hrs hour hours", "time", 3600),
    ("day days", "time", 86400),
    ("week weeks", "time", 7 * 86400),
    ("month months", "months", 1),
    ("year years yr yrs", "months", 12),
    ("decade decades", "months", 120),
    ("century centuries", "months", 1200),
    ("inch inches in", "length", "0.0254"),
    ("foot feet ft", "length", "0.3048"),
    ("yard yards yd", "length", "0.9144"),
    ("mile miles mi", "length", "1609.344"),
    ("ounce ounces oz", "mass", "28.349523125"),
    ("pound pounds lb lbs", "mass", "453.59237"),
    ("pound pounds quid £ GBP", "GBP", 1),
    ("ton tons tonne tonnes", "mass", 1_000_000),
    ("gallon gallons gal", "volume", "0.003785411784"),
    ("quart quarts", "volume", "0.000946352946"),
    ("pint pints", "volume", "0.000473176473"),
    ("cup cups", "volume", "0.0002365882365"),
    (r"$ \$ dollar dollars USD buck bucks", "USD", 1),
    ("cent cents ¢ penny pennies", "USD", Fraction(1, 100)),
    ("€ euro euros EUR", "EUR", 1),
    ("¥ yen JPY", "JPY", 1),
    ("₹ rupee rupees INR Rs", "INR", 1),
    ("peso pesos", "peso", 1),
    (r"\degree degree degrees deg", "degree", 1),
    ("radian radians rad", "radian", 1),
    (r"\% % percent pct percentage", "percent", 1),
    ("dozen dozens", "dozen", 1),
    ("unit units", COUNTED, 1),
)
_SPEED = (("length", 1), ("time", -1))
_COMPOSED = (
    ("acre acres", Unit((("length", 2),), Fraction("4046.8564224"))),
    ("hectare hectares ha", Unit((("length", 2),), Fraction(10_000))),
    ("mph", Unit(_SPEED, Fraction("1609.344") / 3600)),
    ("kph kmh", Unit(_SPEED, Fraction(1000, 3600))),
    ("K kelvin kelvins", Unit((("temperature", 1),))),
    ("°C celsius Celsius", Unit((("temperature", 1),), Fraction(1), Fraction("273.15"))),
    # 68 °F is 20 °C exactly: the zero of Fahrenheit lies at 459.67 * 5/9 K.
    ("°F fahrenheit Fahrenheit", Unit((("temperature", 1),), Fraction(5, 9), Fraction(45967, 180))),
)


def _power(dimension: str) -> Dimensions:
    return (("length", 3),) if dimension == "volume" else ((dimension, 1),)


def _table() -> dict[str, tuple[Unit, ...]]:
    found: dict[str, tuple[Unit, ...]] = {}

    def add(names: str, unit: Unit, prefix: str = "") -> None:
        for name in names.split():
            found[prefix + name] = (*found.get(prefix + name, ()), unit)

    for symbols, words, dimension, factor, prefixes in _PREFIXED:
        add(f"{symbols} {words}", Unit(_power(dimension), factor))
        for prefix in prefixes:
            exponent, word = _PREFIXES[prefix]
            scaled = Unit(_power(dimension), factor * Fraction(10) ** exponent)
            add(symbols, scaled, prefix)
            add(words, scaled, word)
    for names, dimension, value in _OTHERS:
        add(names, Unit(_power(dimension), Fraction(value)))
    for names, unit in _COMPOSED:
        add(names, unit)
    return found


UNITS = _table()
CURRENCIES = frozenset([r"\$", "€", "£", "¥", "₹"])
# In mathematics these are variables at least as often as units; they count only apart from the number.
_LETTERS = frozenset(str.split("m g L l s W J N V h B K ms ns mi ha lb in mV kV kN kW mW kJ"))


def is_unit(token: Token) -> bool:
    """Return whether a token names a unit; one letter that touches the number before it is a variable."""
    if token.kind == "run" and token.text in _LETTERS and not token.spaced:
        return False
    return token.text in UNITS


def parse_units(tokens: Sequence[Token]) -> tuple[list[Unit], int]:
    r"""Read units such as `cm^2`, `m/s`, `miles per hour` or `square feet` from the start of `tokens`.

    Returns:
        What they may mean (`pounds` are a mass or a currency), and the number of tokens read; none and 0 where the
        tokens begin with no unit.
    """
    parts: list[tuple[tuple[Unit, ...], int]] = []
    at, sign = 0, 1
    while at < len(tokens):
        power, start = 1, at
        word = tokens[at].text.lower()
        if word in ("square", "sq", "cubic", "cu") and at + 1 < len(tokens):
            power = 2 if word.startswith("s") else 3
            at += 1
            if tokens[at].text == ".":
                at += 1
        name, width = _name(tokens, at)
        if not name or not (is_unit(tokens[at]) or name.startswith("°") or parts):
            at = start
            break
        at += width
        exponent, width = _exponent(tokens, at)
        at += width
        parts.append((UNITS[name], sign * power * exponent))
        following = tokens[at].text if at < len(tokens) else ""
        if following in ("/", "per") and at + 1 < len(tokens) and _name(tokens, at + 1)[0]:
            sign, at = -1, at + 1
        elif following in ("*", r"\cdot") and at + 1 < len(tokens) and _name(tokens, at + 1)[0]:
            at += 1
        elif sign == 1 and following == "an" and at + 1 < len(tokens) and _name(tokens, at + 1)[0]:
            sign, at = -1, at + 1
        else:
            break
    if not parts:
        return [], 0
    units = [Unit(())]
    for choices, exponent in parts:
        units = [_times(unit, other, exponent) for unit in units for other in choices][:8]
    return units, at


def _name(tokens: Sequence[Token], at: int) -> tuple[str, int]:
    if at >= len(tokens):
        return "", 0
    text = tokens[at].text
    if text in (r"\degree", "degrees", "degree") and at + 1 < len(tokens):
        scale = {"C": "°C", "F": "°F", "Celsius": "°C", "Fahrenheit": "°F", "celsius": "°C", "fahrenheit": "°F"}
        if tokens[at + 1].text in scale:
            return scale[tokens[at + 1].text], 2
    if text in UNITS:
        return text, 1
    return (text.lower(), 1) if len(text) > 2 and text.lower() in UNITS else ("", 0)


def _exponent(tokens: Sequence[Token], at: int) -> tuple[int, int]:
    texts = [token.text for token in tokens[at : at + 5]]
    if texts[:1] != ["^"]:
        return 1, 0
    if len(texts) > 1 and texts[1] in ("2", "3"):
        return int(texts[1]), 2
    if texts[1:2] == ["{"] and texts[3:4] == ["}"] and texts[2] in ("2", "3"):
        return int(texts[2]), 4
    if texts[1:3] == ["{", "-"] and texts[3] in ("1", "2", "3") and texts[4:5] == ["}"]:
        return -int(texts[3]), 5
    return 1, 0


def _times(unit: Unit, other: Unit, exponent: int) -> Unit:
    powers = dict(unit.dimensions)
    for name, power in other.dimensions:
        powers[name] = powers.get(name, 0) + power * exponent
    dimensions = tuple(sorted((name, power) for name, power in powers.items() if power))
    alone = not unit.dimensions and exponent == 1
    return Unit(dimensions, unit.factor * other.factor**exponent, other.offset if alone else Fraction(0))
