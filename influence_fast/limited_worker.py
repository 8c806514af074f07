"""Run untrusted texts (templates, regular expressions) in a process that `isolation.limited` limits.

Run as a script (`python -I limited_worker.py`): it reads one pickled dict from standard input, of the process that
started it, and imports nothing of this package. `work["task"]` names a function below, whose result is printed as JSON.
"""

import json
import pickle
import sys
from typing import Any


def main() -> None:
    """Limit this process, run the task, and print its result as JSON."""
    work = pickle.loads(sys.stdin.buffer.read())
    _limit(work["memory"], work["seconds"])
    print(json.dumps({"chat": chat, "prompts": prompts, "patterns": patterns, "tokens": tokens}[work["task"]](work)))


def _limit(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:
        # Without these limits on a system the caller's own time limit remains.
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def chat(work: dict[str, Any]) -> list[int]:
    """Render a chat template for each of `conversations`, and return the lengths of the texts (0 where it raises).

    Errors of the template are not reported here, since they come up again where it is used.
    """
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """A tag `generation`, by which transformers marks what an assistant says; its body is rendered unchanged."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own name for it)

        def parse(self, parser):  # type: ignore[no-untyped-def]
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: "26 Jul 2024"}
    lengths = []
    for conversation in work["conversations"]:
        try:
            template = environment.from_string(work["template"])
            text = template.render(messages=conversation, add_generation_prompt=True, tools=None, **work["special"])
            lengths.append(len(text))
            if len(text) > work["characters"]:
                break
        except MemoryError:
            raise
        except Exception:
            lengths.append(0)
    return lengths


def _raise(message: str) -> None:
    raise ValueError(message)


def prompts(work: dict[str, Any]) -> dict[str, Any]:
    """Render a task's prompt for each of `values`.

    Returns {"texts", "error"}, where an error is [place or None, message].
    """
    import jinja2
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=False
    )
    texts: list[str] = []
    place: int | None = None
    try:
        template = environment.from_string(work["template"])
        for values in work["values"]:
            place = len(texts)
            text = template.render(**values).strip()
            if len(text) > work["characters"]:
                raise ValueError(f"it makes a text of {len(text):,} characters")
            texts.append(text)
    except MemoryError:
        raise
    except RecursionError:
        return {"texts": texts, "error": [place, "it is nested too deeply, or calls itself"]}
    except Exception as error:
        return {"texts": texts, "error": [place, str(error)[:300] or type(error).__name__]}
    return {"texts": texts, "error": None}


def patterns(work: dict[str, Any]) -> list[Any]:
    """Match every pattern with every name; return [None, ""], or [place, why] of the first invalid pattern.

    The place of a pattern is printed to stderr before it is matched, so that one that does not end is known.
    """
    import re

    for number, pattern in enumerate(work["patterns"]):
        print(number, file=sys.stderr, flush=True)
        try:
            compiled = re.compile(pattern)
            for name in work["names"]:
                compiled.fullmatch(name)
                compiled.match(name)
        except MemoryError:
            raise
        except Exception as error:
            return [number, str(error)[:200] or type(error).__name__]
    return [None, ""]


def tokens(work: dict[str, Any]) -> str:
    """Run a tokenizer's normalizer, pre-tokenizer and decoder on `texts`; return "" or the library's own panic."""
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    empty: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    empty |= {"post_processor": None, "model": model}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(empty | work["parts"]))
        for text in work["texts"]:
            tokenizer.encode(text)
            if tokenizer.decoder is not None:
                tokenizer.decoder.decode([text])
    except MemoryError:
        raise
    except Exception:
        # A file that cannot be loaded is reported when it is loaded.
        return ""
    except BaseException as error:
        # A panic of the library is no Exception.
        return str(error)[:200] or type(error).__name__
    return ""


if __name__ == "__main__":
    main()
