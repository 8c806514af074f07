r"""Read the possible meanings of an answer: a number with a unit, a list, set, interval, matrix, equation or words.

An answer may have more than one reading (`3 and 1/2` is a list or a mixed number); the first is the likeliest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from influence_fast.evaluation.answer_text import MAX_ANSWER, clean, without_comma_groups
from influence_fast.evaluation.answer_tokens import Token, Unparsed, split, tokens_of
from influence_fast.evaluation.expression_values import exact
from influence_fast.evaluation.expressions import parse
from influence_fast.evaluation.plain_forms import plain_words, special_form, words_or_unread
from influence_fast.evaluation.quantities import compound, node_of, prose, quantities
from influence_fast.evaluation.regions import ORDER, inequality, infinite, intersection, union, without_points
from influence_fast.evaluation.values import Equation, Items, Matrix, Ratio, Region, Scalar, Span, Unread, Value, Words

_HEDGES = re.compile(
    r"^(?:(?:approximately|approx\.?|about|around|roughly|nearly|almost|circa|exactly|simply|just|only|equals?|is|"
    r"equal to|therefore|thus|so|hence|a total of|the answer is|the final answer is)(?![a-zA-Z])[\s:,]*"
    r"|\\approx(?![a-zA-Z])\s*|~\s*|=\s*|\\therefore\s*)+",
    re.IGNORECASE,
)
_LETTERED = re.compile(r"\([A-J]\)\s+(?=\S)")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|\s]*\})?(.*)\\end\{\1\}", re.DOTALL)
_RELATIONS = frozenset(["=", r"\ne", r"\in", r"\approx", *ORDER])
_SEPARATORS = frozenset([",", ";", "and", "or", "&"])


def readings(answer: str) -> list[Value]:
    """Return the possible meanings of a bare answer, the likeliest first; `Unread` alone where it is no known form.

    Example:
        >>> readings("3 and 1/2")[1]
        Scalar(node=('num', Fraction(7, 2), 0), units=(), label=frozenset())
    """
    if len(answer) > MAX_ANSWER:
        return [Unread(answer)]
    text = clean(answer)
    if len(text) > 3 * MAX_ANSWER:  # every character may become a command
        return [Unread(answer)]
    merged = without_comma_groups(text)
    found = _read(merged)
    option = _LETTERED.match(merged)
    if option:  # (B) 12
        found += _read(merged[option.end() :])
    if merged != text and not _only_words(found):
        listed = [value for value in _read(text) if isinstance(value, Items) and value.kind == "list"]
        found += [Items("numbers", value.items) for value in listed]
    return found


def _only_words(values: Sequence[Value]) -> bool:
    """Return whether all readings are words or unread."""
    return all(isinstance(value, Words | Unread) for value in values)


def _read(text: str) -> list[Value]:
    text = _HEDGES.sub("", text).strip()
    special = special_form(text)
    if special is not None:
        return special
    try:
        matrix = _matrix(text)
        if matrix is not None:
            return [matrix]
        tokens = tokens_of(text)
        return _several(tokens, text)
    except Unparsed:
        return [words_or_unread(text)]


def _several(tokens: Sequence[Token], text: str) -> list[Value]:
    """Read unions, then lists, then one value."""
    if not tokens:
        return [Words("")]
    unions = split(tokens, frozenset([r"\cup"]))
    if len(unions) > 1:
        return [union([_single(part) for part, _ in unions])]
    parts = split(tokens, _SEPARATORS)
    kept = [(part, separator) for part, separator in parts if part]
    if len(kept) == 1:
        return _single_readings(kept[0][0], text)
    if not kept:
        return [Unread(text)]
    found = _listed(kept, text)
    extra: list[Value] = []
    if len(kept) == 2 and kept[1][1] == "and":  # 3 and 1/2
        joined = [*kept[0][0], *(Token(t.kind, t.text, True) for t in kept[1][0])]
        try:
            node = parse(joined)
        except Unparsed:
            pass
        else:
            extra = [Scalar(node)] if node[0] == "num" else []
    total = compound([token for part, _ in kept for token in part])
    return [found, *extra, *([total] if total else [])]


def _listed(parts: Sequence[tuple[list[Token], str]], text: str) -> Value:
    values = [_single(part) for part, _ in parts]
    if all(isinstance(value, Region) for value in values) and not any(part[0].text in "([" for part, _ in parts):
        if any(separator == "or" for _, separator in parts):
            return union(values)
        met = intersection([value for value in values if isinstance(value, Region)])
        return met if met is not None else Unread(text)
    if any(isinstance(value, Unread) for value in values):
        return Unread(text)
    if all(isinstance(value, Words) for value in values) and any(separator == "" for _, separator in parts[1:]):
        return Words(plain_words(text))
    shared = _shared_variable(values)
    if shared is not None:
        values = shared
    return Items("list", tuple(_flat(values)))


def _flat(values: Sequence[Value]) -> list[Value]:
    found: list[Value] = []
    for value in values:
        found += list(value.items) if isinstance(value, Items) and value.kind == "list" else [value]
    return found


def _shared_variable(values: Sequence[Value]) -> list[Value] | None:
    """Return the values without `x =` where all are of one variable (`x = 3, 7` or `x_1 = 3, x_2 = 7`), else None."""
    names = [value.left[1].partition("_")[0] if _assigns(value) else None for value in values]  # type: ignore[union-attr,index]
    if names[0] is None or any(name not in (None, names[0]) for name in names):
        return None
    if any(name is None for name in names[1:]) and any(name is not None for name in names[1:]):
        return None
    return [value.right if isinstance(value, Equation) else value for value in values]


def _assigns(value: Value) -> bool:
    return isinstance(value, Equation) and value.left is not None and value.left[0] == "var"


def _single(tokens: Sequence[Token]) -> Value:
    return _single_readings(tokens, " ".join(token.text for token in tokens))[0]


def _single_readings(tokens: Sequence[Token], text: str) -> list[Value]:
    if not tokens:
        return [Unread(text)]
    relations = split(tokens, _RELATIONS)
    if len(relations) > 1:
        return [_relation(relations, text)]
    removed = split(tokens, frozenset([r"\setminus", "\\"]))
    if len(removed) == 2:
        return [without_points(_single(removed[0][0]), _single(removed[1][0]), text)]
    terms = split(tokens, frozenset([":"]))
    if len(terms) > 1:
        try:
            return [Ratio(tuple(parse(part) for part, _ in terms))]
        except Unparsed:
            return [words_or_unread(text)]
    group = _group(tokens)
    if group is not None:
        return group
    found = quantities(tokens)
    return found or [prose(tokens) or words_or_unread(text)]


def _matrix(text: str) -> Matrix | None:
    match = _MATRIX.fullmatch(text.strip())
    if match is None or match.group(1) in ("vmatrix", "Vmatrix", "Bmatrix") or r"\begin" in match.group(2):
        return None
    rows = re.split(r"\\\\|\\cr\b", match.group(2))
    found = []
    for row in rows:
        if row.strip():
            cells = [_read(cell) for cell in row.split("&")]
            found.append(tuple(cell[0] for cell in cells))
    if not found or len({len(row) for row in found}) > 1:
        return None
    return Matrix(tuple(found))


def _relation(parts: Sequence[tuple[list[Token], str]], text: str) -> Value:
    signs = [sign for _, sign in parts[1:]]
    if r"\in" in signs:
        inner = parts[-1][0]
        value = _several(inner, " ".join(token.text for token in inner))[0] if inner else Unread(text)
        if signs == [r"\in"]:
            reals = special_form("".join(token.text for token in inner))
            if reals:
                return reals[0]
            return next((found for found in _group(inner) or [] if isinstance(found, Region)), value)
        return Unread(text)
    if all(sign in ("=", r"\approx") for sign in signs):
        return _equation([part for part, _ in parts], text)
    if signs == [r"\ne"]:
        left, right = (node_of(part) for part, _ in parts)
        if left and right and left[0] == "var":
            return Region((Span(None, False, right, False), Span(right, False, None, False)))
        return Unread(text)
    return inequality([part for part, _ in parts], signs) or Unread(text)


def _equation(sides: Sequence[Sequence[Token]], text: str) -> Value:
    if not sides[-1]:
        return Unread(text)
    right = _single(sides[-1])
    left = node_of(_call_name(sides[0]))
    if isinstance(right, Unread):
        return Unread(text)
    if left is None and isinstance(_single(sides[0]) if sides[0] else Words(""), Scalar):
        return right  # 12 inches = 1 foot
    if left is not None and exact(left) is not None and isinstance(right, Scalar) and exact(right.node) is None:
        if right.node[0] == "var":
            return Equation(right.node, Scalar(left))  # 5 = x
        return Equation(left, right)
    if left is not None and exact(left) is not None:
        return right
    return Equation(left, right)


def _call_name(tokens: Sequence[Token]) -> Sequence[Token]:
    """Return the name of a function alone: `f(x) = 2x` defines f, as `f = 2x` does; other tokens unchanged."""
    texts = [token.text for token in tokens]
    if len(texts) == 4 and texts[1] == "(" and texts[3] == ")" and texts[0].isalpha() and len(texts[0]) == 1:
        return tokens[:1]
    return tokens


def _group(tokens: Sequence[Token]) -> list[Value] | None:
    """Read `(a, b)`, `[a, b)`, `{a, b}` and the like, whose bracket closes at the end."""
    first, last = tokens[0].text, tokens[-1].text
    pairs = {"(": (")", "]"), "[": ("]", ")"), r"\{": (r"\}",), "{": ("}",)}
    if first not in pairs or last not in pairs[first]:
        return None
    depth = 0
    for token in tokens[:-1]:
        depth += (token.text in pairs) - (token.text in (")", "]", "}", r"\}"))
        if depth == 0:
            return None
    inner = tokens[1:-1]
    if not inner:
        return [Items("set", ())] if first == r"\{" else None
    parts = [part for part, _ in split(inner, frozenset([",", ";"]))]
    if any(not part for part in parts):
        return None
    if len(parts) == 1:
        return _one_in_brackets(first, last, inner)
    values = _flat([_single(part) for part in parts])
    if any(isinstance(value, Unread) for value in values):
        return [Unread()]
    if first in (r"\{", "{"):
        return [Items("set", tuple(values))]
    found: list[Value] = []
    if len(values) == 2 and all(isinstance(value, Scalar) and not value.units for value in values):
        low, high = (value.node for value in values if isinstance(value, Scalar))
        ends = (None, False) if infinite(low) else (low, first == "[")
        tail = (None, False) if infinite(high) else (high, last == "]")
        found.append(Region((Span(*ends, *tail),)))
    if first == "(" and last == ")":
        found.insert(0, Items("tuple", tuple(values)))
    elif first == "[" and last == "]" and len(values) != 2:
        rows = [value.items for value in values if isinstance(value, Items)]
        if len(rows) == len(values) and len({len(row) for row in rows}) == 1:
            return [Matrix(tuple(rows))]
        found.append(Items("tuple", tuple(values)))
    elif first == "[" and last == "]" and all(isinstance(value, Items | Region) for value in values):
        return _rows(values)
    return found or None


def _rows(values: Sequence[Value]) -> list[Value]:
    """Read `[[1, 2], [3, 4]]` as a matrix, though its rows of two look like intervals."""
    rows: list[tuple[Value, ...]] = []
    for value in values:
        if isinstance(value, Items):
            rows.append(value.items)
        elif isinstance(value, Region) and value.spans[0].low is not None and value.spans[0].high is not None:
            rows.append((Scalar(value.spans[0].low), Scalar(value.spans[0].high)))
    return [Matrix(tuple(rows))] if len(rows) == len(values) and len({len(r) for r in rows}) == 1 else [Unread()]


def _one_in_brackets(first: str, last: str, inner: Sequence[Token]) -> list[Value] | None:
    if first == r"\{":
        value = _single(inner)
        return [Unread()] if isinstance(value, Unread) else [Items("set", tuple(_flat([value])))]
    if (first, last) not in (("(", ")"), ("{", "}")):
        return None
    return _single_readings(inner, " ".join(token.text for token in inner))
