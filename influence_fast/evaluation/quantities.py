r"""Read an expression with a currency before it, or with a unit or other words behind it."""

from __future__ import annotations

from collections.abc import Sequence

from influence_fast.evaluation.answer_tokens import Token, Unparsed
from influence_fast.evaluation.expression_values import contains, exact, signs_expanded
from influence_fast.evaluation.expressions import CONSTANTS, FUNCTIONS, Node, number, parse
from influence_fast.evaluation.plain_forms import SCALES
from influence_fast.evaluation.units import CURRENCIES, UNITS, Unit, is_unit, parse_units
from influence_fast.evaluation.values import Items, Scalar, Value

_COMPARATIVES = frozenset(
    str.split(
        "not no never neither nor less more least most fewer greater than over under above below between "
        "until except half twice thrice double"
    )
)
_LABEL_STOPS = frozenset(
    str.split(
        "of the a an per each total in more left every day week is are was for in all and to with remaining "
        "altogether long tall wide high old away later ago apart away deep"
    )
)


def node_of(tokens: Sequence[Token]) -> Node | None:
    try:
        return parse(tokens)
    except Unparsed:
        return None


def quantities(tokens: Sequence[Token]) -> list[Value]:
    """Read an expression, with a currency before it or a unit or words behind it."""
    found: list[Value] = []
    if tokens[0].text in CURRENCIES or (tokens[0].text == "-" and len(tokens) > 1 and tokens[1].text in CURRENCIES):
        return _money(tokens)
    quantity = _with_unit(tokens)
    has_function = any(token.text.lstrip("\\") in FUNCTIONS - {"sqrt"} for token in tokens)
    if quantity is not None and not has_function:
        found.append(quantity)
    node = node_of(tokens)
    if node is not None:
        degrees = quantity is not None and any(token.text in (r"\degree", r"\%", "%") for token in tokens)
        if not found or not degrees:
            expanded = [Scalar(value) for value in signs_expanded(node)]
            found.append(expanded[0] if len(expanded) == 1 else Items("list", tuple(expanded)))
    total = compound(tokens)
    return [total] if total else found


def _money(tokens: Sequence[Token]) -> list[Value]:
    negative = tokens[0].text == "-"
    sign = tokens[1 if negative else 0]
    rest = list(tokens[2 if negative else 1 :])
    if not rest:
        return []
    inner = _with_unit(rest)
    node = inner.node if inner is not None else node_of(rest)
    if node is None:
        return []
    units = list(UNITS[sign.text])
    # $5 per hour
    if inner is not None and inner.units and inner.units[0].dimensions != units[0].dimensions:
        return []
    return [Scalar(("neg", node) if negative else node, tuple(units), inner.label if inner else frozenset())]


def _with_unit(tokens: Sequence[Token]) -> Scalar | None:
    """Read an expression and what stands behind it, at the first place where both make sense."""
    tried, depth = 0, 0
    for at, token in enumerate(tokens):
        inside = depth
        depth += (token.text in ("(", "[", "{", r"\{")) - (token.text in (")", "]", "}", r"\}"))
        if at == 0 or inside or not _may_follow(token):
            continue
        tried += 1
        if tried > 6:
            return None
        node = node_of(tokens[:at])
        if node is None:
            continue
        rest = [t for t in tokens[at:] if t.text not in ("(", ")", "{", "}") or "^" in [x.text for x in tokens[at:]]]
        if token.text == "(" and rest:  # 5 (approximately)
            rest[0] = Token(rest[0].kind, rest[0].text, True)
        scalar = _behind(node, rest)
        if scalar is not None:
            return scalar
    return None


def _may_follow(token: Token) -> bool:
    return token.kind in ("run", "word") or token.text in (
        r"\degree",
        r"\%",
        "%",
        "€",
        "£",
        "¥",
        "¢",
        r"\$",
        "°C",
        "°F",
        "(",
    )


def _behind(node: Node, rest: Sequence[Token]) -> Scalar | None:
    scale = SCALES.get(rest[0].text.lower()) if rest else None
    if scale is not None:
        node, rest = ("mul", node, number(scale)), rest[1:]
        if not rest:
            return Scalar(node)
    units: list[Unit] = []
    read = 0
    if _unit_may_start(node, rest[0]):
        units, read = parse_units(rest)
    words = rest[read:]
    if any(token.kind not in ("run", "word") and token.text not in ("-", ".", ",", "'") for token in words):
        return None
    if not units and not _is_label(node, words):
        return None
    label = frozenset(
        _stem(token.text)
        for token in words
        if token.kind in ("run", "word") and token.text.lower() not in _LABEL_STOPS and len(token.text) > 1
    )
    if units and words and not all(token.kind == "word" or len(token.text) > 2 for token in words[:1]):
        return None
    if units and label and units[0].dimensions and units[0].dimensions[0][0] == "unit":
        return None
    return Scalar(node, tuple(units), frozenset() if units else label)


def _unit_may_start(node: Node, token: Token) -> bool:
    """Return whether a unit may begin at `token`: one or two letters behind a variable are a product instead."""
    if token.kind == "run" and len(token.text) < 3 and contains(node, "var"):
        return False
    return (
        is_unit(token)
        or token.text.lower() in ("square", "cubic", "sq", "cu")
        or (len(token.text) > 2 and token.text.lower() in UNITS)
    )


def _is_label(node: Node, words: Sequence[Token]) -> bool:
    first = next((token for token in words if token.kind in ("run", "word")), None)
    if first is None or contains(node, "var"):
        return False
    if any(len(token.text) == 1 and token.text not in "aAIs'-.," for token in words):
        return False  # 5 less than x
    run = first.text
    return first.kind == "word" or (len(run) > 2 and run not in CONSTANTS and run not in FUNCTIONS and first.spaced)


def _stem(word: str) -> str:
    word = word.lower()
    if word.endswith("ies"):
        return word.removesuffix("ies") + "y"
    return word.removesuffix("s").removesuffix("e")


def compound(tokens: Sequence[Token]) -> Scalar | None:
    """Read `5 feet 6 inches`, `2 hours and 30 minutes`: quantities of one dimension, added up in its base unit."""
    at, found = 0, 0
    total: Node | None = None
    dimensions = None
    while at < len(tokens):
        end = at + 1
        while end < len(tokens) and tokens[end].kind not in ("run", "word") and tokens[end].text != r"\$":
            end += 1
        node = node_of(tokens[at:end])
        if node is None or exact(node) is None or end == len(tokens) or not is_unit(tokens[end]):
            return None
        unit = UNITS[tokens[end].text][0]
        if dimensions not in (None, unit.dimensions) or unit.offset:
            return None
        dimensions = unit.dimensions
        term = ("mul", node, ("num", unit.factor, 0))
        total = term if total is None else ("add", total, term)
        found, at = found + 1, end + 1
    if found < 2 or total is None or dimensions is None:
        return None
    return Scalar(total, (Unit(dimensions),))


def prose(tokens: Sequence[Token]) -> Value | None:
    """Read a phrase with one number in it, `there are 5 apples left`, as that number."""
    words = [token.text.lower() for token in tokens if token.kind in ("run", "word")]
    numbers = [at for at, token in enumerate(tokens) if token.kind == "number"]
    if len(numbers) != 1 or len(words) < 2 or _COMPARATIVES & set(words):
        return None
    at = numbers[0]
    start = at - 1 if at and tokens[at - 1].text in (*CURRENCIES, "-") else at
    if any(token.kind not in ("run", "word") and token.text not in ("'", "-", ",") for token in tokens[:start]):
        return None
    if start == 0 or not all(len(word) > 1 or word in ("a", "i", "s") for word in words[:1]):
        return None
    values = quantities(tokens[start:])
    return values[0] if values and isinstance(values[0], Scalar) else None
