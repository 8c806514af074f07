r"""Read the mathematics of an answer, LaTeX or plain, into a tree, and evaluate the rational ones exactly.

The grammar is that of results, not of LaTeX: numbers, variables, the four operations, powers, roots, fractions, mixed
numbers, factorials, binomials and the usual functions. Whatever it does not know raises `Unparsed`; nothing is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from influence_fast.evaluation.answer_tokens import DEPTH, OPENING, Token, Unparsed

Node = tuple[Any, ...]  # ("num", value, decimals), ("var", name), ("const", name), or (operation, operand, ...)

HEIGHT = 150  # levels of a tree

FUNCTIONS = frozenset(
    str.split("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt abs"),
)
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
CONSTANTS = {"pi": "pi", "infty": "inf", "infinity": "inf", "inf": "inf", "oo": "inf", "Infinity": "inf"}
_GREEK = frozenset(
    str.split(
        "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega "
        "Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"
    )
)
# Short words that are no products of variables.
WORDS = frozenset(
    str.split("no yes on in is at to of or and odd one two six ten an as if so by red dne nor not the per")
)


def parse(tokens: Sequence[Token]) -> Node:
    """Parse all of `tokens` as one expression. Raises Unparsed where any is left over or unknown.

    Example:
        >>> from influence_fast.evaluation.answer_tokens import tokens_of
        >>> parse(tokens_of("3 1/2"))
        ('num', Fraction(7, 2), 0)
    """
    if not tokens:
        raise Unparsed("nothing")
    parser = _Parser(_letters(tokens))
    node = parser.sum()
    if parser.at < len(parser.tokens):
        raise Unparsed(parser.tokens[parser.at].text)
    if _height(node) > HEIGHT:
        raise Unparsed("too long")
    return node


def _height(node: Node) -> int:
    """Count the levels of a tree; 1 + 1 + ... has as many as terms, and every walk over it recurses."""
    height, level = 0, [node]
    while level:
        height += 1
        level = [child for parent in level for child in parent[1:] if isinstance(child, tuple)]
    return height


def _letters(tokens: Sequence[Token]) -> list[Token]:
    """Split runs of letters into variables, unless they name a function or constant, or are a word."""
    found = []
    for token in tokens:
        run = token.text
        if token.kind == "word" and len(run) > 1 and _ALIASES.get(run, run) not in FUNCTIONS:
            raise Unparsed(run)
        if token.kind not in ("run", "word") or len(run) == 1:
            found.append(token)
        elif _ALIASES.get(run, run) in FUNCTIONS or run in CONSTANTS or run in _GREEK:
            found.append(Token("command", f"\\{run}", token.spaced))
        elif len(run) > 3 or run.lower() in WORDS or (run.isupper() and len(run) > 2):
            raise Unparsed(run)
        else:
            found += [Token("run", letter, token.spaced and i == 0) for i, letter in enumerate(run)]
    return found


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].text if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].kind if self.at + ahead < len(self.tokens) else ""

    def take(self, *texts: str) -> bool:
        if self.at < len(self.tokens) and self.peek() in texts:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise Unparsed(f"{self.peek()!r} in place of {text!r}")

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEPTH:
            raise Unparsed("too deep")
        node = self._signed()
        while (sign := self.peek()) in ("+", "-", r"\pm", r"\mp") and sign:
            self.at += 1
            term = self.product()
            node = ("add", node, term if sign == "+" else (_SIGNS[sign], term))
        self.depth -= 1
        return node

    def _signed(self) -> Node:
        if self.take("+"):
            return self.product()
        for sign, name in _SIGNS.items():
            if self.take(sign):
                return (name, self.product())
        return self.product()

    def product(self) -> Node:
        node = self.power()
        while True:
            if self.take("*", r"\cdot", r"\times"):
                node = ("mul", node, self._operand())
            elif self.take("/"):
                node = ("div", node, self._operand())
            elif self._starts_factor():
                node = ("mul", node, self.power())
            else:
                return node

    def _operand(self) -> Node:
        return ("neg", self.power()) if self.take("-") else self.power()

    def _starts_factor(self) -> bool:
        kind, text = self.kind(), self.peek()
        if kind in ("run", "word") or text in ("(", "{", "["):
            return True
        if text == "|":
            return self.bars == 0
        name = text[1:]
        return kind == "command" and (
            name in FUNCTIONS or name in CONSTANTS or name in _GREEK or name in ("frac", "binom", "lfloor", "lceil")
        )

    def power(self) -> Node:
        node = self._postfixed(self.atom())
        if self.take("^"):
            node = self._postfixed(("pow", node, self._exponent()))
        return node

    def _postfixed(self, node: Node) -> Node:
        while True:
            if self.take("!"):
                node = ("fact2", node) if self.take("!") else ("fact", node)
            elif self.take(r"\degree"):
                node = ("mul", node, ("div", ("const", "pi"), number(180)))
            elif self.take(r"\%", "%"):
                node = ("div", node, number(100))
            else:
                return node

    def _exponent(self) -> Node:
        self.depth += 1
        if self.depth > DEPTH:
            raise Unparsed("too deep")
        node: Node = ("neg", self._exponent()) if self.take("-") else self.power()
        self.depth -= 1
        return node

    def atom(self) -> Node:
        kind, text = self.kind(), self.peek()
        if kind == "number":
            return self._number()
        if text in OPENING and text != r"\{":
            self.at += 1
            node = self.sum()
            self.expect(OPENING[text])
            return node
        if text == "|":
            self.at += 1
            self.bars += 1
            node = self.sum()
            self.expect("|")
            self.bars -= 1
            return ("call", "abs", node)
        if kind in ("run", "word"):
            self.at += 1
            if text in ("e", "i") and self.peek() != "_":
                return ("const", text)
            return ("var", text + self._subscript())
        if kind == "command":
            return self._command(text[1:])
        raise Unparsed(text)

    def _number(self) -> Node:
        text = self.peek()
        self.at += 1
        if "." in text and self.peek() in (r"\overline", r"\bar"):
            self.at += 1
            self.expect("{")
            period = self.peek()
            if not period.isdigit():
                raise Unparsed(period)
            self.at += 1
            self.expect("}")
            return _repeating(text, period)
        if "." not in text:
            part = self._mixed_fraction()
            if part is not None:
                return ("num", int(text) + part, 0)
        whole, _, decimals = text.partition(".")
        return ("num", Fraction(f"{whole or 0}.{decimals or 0}"), len(decimals))

    def _mixed_fraction(self) -> Fraction | None:
        r"""Read the fraction of a mixed number, `1/2` after a space or `\frac{1}{2}`; None where it is none below 1."""
        start = self.at
        fraction: tuple[str, str] | None = None
        if self.kind() == "number" and self.peek(1) == "/" and self.kind(2) == "number" and self.tokens[start].spaced:
            fraction = self.peek(), self.peek(2)
            self.at += 3
        elif self.peek() == r"\frac":
            self.at += 1
            top, bottom = self._digits_argument(), self._digits_argument()
            fraction = (top, bottom) if top and bottom else None
        if fraction and fraction[0].isdigit() and fraction[1].isdigit() and 0 < int(fraction[0]) < int(fraction[1]):
            return Fraction(int(fraction[0]), int(fraction[1]))
        self.at = start
        return None

    def _digits_argument(self) -> str:
        if self.peek() == "{" and self.kind(1) == "number" and self.peek(2) == "}":
            self.at += 3
            return self.peek(-2)
        if self.kind() == "number":
            return self._first_digit()
        return ""

    def _first_digit(self) -> str:
        token = self.tokens[self.at]
        if len(token.text) == 1:
            self.at += 1
        else:
            self.tokens = [*self.tokens]
            rest = token.text[1:]
            if not rest[0].isdigit():
                raise Unparsed(token.text)
            self.tokens[self.at] = Token("number", rest)
        return token.text[0]

    def _subscript(self) -> str:
        if not self.take("_"):
            return ""
        if self.take("{"):
            start = self.at
            while self.peek() not in ("}", ""):
                self.at += 1
            name = "".join(token.text for token in self.tokens[start : self.at])
            self.expect("}")
        else:
            name = self.peek()
            self.at += 1
        if not re.fullmatch(r"\\?\w+", name):
            raise Unparsed(name)
        return f"_{name}"

    def _command(self, name: str) -> Node:
        self.at += 1
        if name in CONSTANTS:
            return ("const", CONSTANTS[name])
        if name in _GREEK:
            return ("var", name + self._subscript())
        if name in ("frac", "binom"):
            return ({"frac": "div", "binom": "binom"}[name], self._argument(), self._argument())
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self.expect({"lfloor": r"\rfloor", "lceil": r"\rceil"}[name])
            return ("call", {"lfloor": "floor", "lceil": "ceil"}[name], node)
        name = _ALIASES.get(name, name)
        if name == "sqrt":
            return self._root()
        if name in FUNCTIONS:
            return self._function(name)
        raise Unparsed(f"\\{name}")

    def _argument(self) -> Node:
        self.depth += 1
        if self.depth > DEPTH:
            raise Unparsed("too deep")
        node = ("num", Fraction(int(self._first_digit())), 0) if self.kind() == "number" else self.atom()
        self.depth -= 1
        return node

    def _root(self) -> Node:
        degree: Node = number(2)
        if self.take("["):
            degree = self.sum()
            self.expect("]")
        self.depth += 1
        if self.depth > DEPTH:
            raise Unparsed("too deep")
        node = self.atom()
        self.depth -= 1
        return ("pow", node, ("div", number(1), degree))

    def _function(self, name: str) -> Node:
        base = None
        if name == "log" and self.take("_"):
            base = self._argument() if self.kind() != "number" else self._number()
        exponent = self._exponent() if self.take("^") else None
        self.depth += 1
        if self.depth > DEPTH:
            raise Unparsed("too deep")
        if self.peek() in ("(", "{", "["):
            inner = self.atom()
        else:
            inner = self._postfixed(self.power())
            while self._starts_factor() and self.peek()[1:] not in FUNCTIONS and self.peek() not in ("(", "["):
                inner = ("mul", inner, self.power())
        self.depth -= 1
        node: Node = ("call", name, inner)
        if base is not None:
            node = ("div", ("call", "ln", inner), ("call", "ln", base))
        elif name == "lg":
            node = ("div", ("call", "ln", inner), ("call", "ln", number(10)))
        if exponent == ("neg", number(1)) and name in ("sin", "cos", "tan"):
            return ("call", f"arc{name}", inner)
        return node if exponent is None else ("pow", node, exponent)


_SIGNS = {"-": "neg", r"\pm": "pm", r"\mp": "mp"}


def number(value: int) -> Node:
    """Return the node of an integer."""
    return ("num", Fraction(value), 0)


def _repeating(text: str, period: str) -> Node:
    whole, _, decimals = text.partition(".")
    fixed = Fraction(f"{whole}.{decimals or 0}")
    return ("num", fixed + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals)), 0)
