"""Renders a chat template in a process of its own, which `template_limits` limits in time and memory.

Run as a script (`python -I template_worker.py`): it reads one JSON object from standard input and imports nothing of
this package. What it prints is the number of characters of each conversation; errors of the template are not its
business, since they come up again where the template is used.
"""

import json
import sys


def main() -> None:
    """Render `template` for each of `conversations`, and print the lengths of the texts as a JSON list."""
    work = json.loads(sys.stdin.buffer.read())
    _limit(work["memory"], work["seconds"])
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The tag `generation`, by which transformers marks what an assistant says: its body as it is."""

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
        except MemoryError:
            raise
        except Exception:
            lengths.append(0)
        if lengths[-1] > work["characters"]:
            break
    print(json.dumps(lengths))


def _limit(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # no such limits on this system: the caller's own limit of time is left
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def _raise(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    main()
