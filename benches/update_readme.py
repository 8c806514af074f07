"""Writes the README's figures and docs/results.md from the result files, so that no number in them is typed.

python -m benches.update_readme
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from benches.gpu_session import TABLES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches" / "results"
PROOF_METHODS = {
    "ekfac-cosine",
    "cosine",
    "dot",
    "less",
    "fisher",
    "fisher-cosine",
    "ekfac",
    "datainf",
    "trak",
    "loss",
    "exact-ekfac-cosine",
    "checkpoints",
    "ekfac-cosine, the data's labels",
    "ekfac-cosine, 64 drawn examples",
    "ekfac, the data's labels",
    "fisher-cosine, the data's labels",
    "datainf, the data's labels",
    "fitted sketch to 4096, the data's labels",
    "dim 16",
    "int8",
    "fitted sketch to 1024",
    "fitted sketch to 4096",
    "cosine, sketch to 1024",
    "cosine, sketch to 4096",
    "fisher-cosine, sketch to 1024",
    "proxy of half the width",
}
SKETCHED = {"fitted": "fitted sketch to 4096", "at random": "cosine, sketch to 4096"}
FASTER = "the faster of the two"
FEWEST_RANKED = 8  # a rank correlation of fewer examples says nothing
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def measured(result: dict[str, Any]) -> str:
    """Where a result comes from, in a few words."""
    machine, versions = result["machine"], result["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{where}, torch {versions['torch']}, commit {result['commit']}, {result['measured'][:10]}"


def gradients(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Per-example projected gradients ({result['projection']}) of {result['examples']} real worked solutions, "
        f"{result['model']}, time over plain peft forward+backward of the same examples "
        "(median of rounds, range in brackets):",
        "",
        "| against | ratio |",
        "|---|---|",
    ]
    lines += [
        f"| {name} | **{r['median']:.2f}** ({r['min']:.2f}-{r['max']:.2f}) |" for name, r in result["ratio"].items()
    ]
    return [*lines, "", f"`python -m benches.bench_gradients`: {measured(result)}", ""]


def inner_products(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Inner products of {result['rows']:,} stored int8 rows of {result['width']:,} numbers, speed over what one "
        "would write in PyTorch:",
        "",
        "| case | against | times as fast |",
        "|---|---|---|",
    ]
    names = {"many": "512 queries", "many ranks": "512 queries, ranks and group means", "few": "2 queries"}
    for case, name in names.items():
        for other, found in result[case].items():
            r = found["ratio"]
            if not other.startswith("ours"):
                lines.append(f"| {name} | {other} | **{r['median']:.2f}** ({r['min']:.2f}-{r['max']:.2f}) |")
    return [*lines, "", f"`python -m benches.bench_inner_products`: {measured(result)}", ""]


def paper_mini(result: dict[str, Any]) -> list[str]:
    seeds = len(result["seeds"])
    settings = {(row["strategy"], row["fraction"]): row for row in result["settings"]}
    full = settings["full", 0.0]
    fractions = sorted({fraction for _, fraction in settings if fraction})
    names = sorted(
        {name for name, _ in settings} - {"full"}, key=lambda n: (-settings[n, fractions[-1]]["accuracy"], n)
    )
    lines = [
        f"Accuracy after dropping part of a pool with corrupted traces, mean over {seeds} seeds (each a world of its "
        f"own: model, data, scores, fine-tunings) and {result['questions']} questions, 95 % interval over both. All "
        f"data: {_accuracy(full)}; before fine-tuning: {sum(result['base']) / seeds:.3f}.",
        "",
        "| strategy | "
        + " | ".join(f"{100 * f:.0f} % dropped" for f in fractions)
        + " | corrupted traces found, AUC |",
        "|---|" + "---|" * (len(fractions) + 1),
    ]
    for name in names:
        auc = result["auc"].get(name)
        found = "" if auc is None else f"{sum(auc) / seeds:.3f} ({min(auc):.3f}-{max(auc):.3f})"
        lines.append(f"| {name} | " + " | ".join(_accuracy(settings[name, f]) for f in fractions) + f" | {found} |")
    return [*lines, "", f"`make paper-mini`, [whole table](paper-mini.md): {measured(result)}", ""]


def _accuracy(row: dict[str, Any]) -> str:
    return f"**{row['accuracy']:.3f}** ({row['low']:.3f}-{row['high']:.3f})"


def proof(results: dict[str, dict[str, Any]]) -> list[str]:
    first = next(iter(results.values()))
    lines = [
        "Do the scores tell what retraining does? Linear datamodeling score (rank correlation of summed influence and "
        f"outcome over {first['lds']['subsets']} retrained halves of the pool, {first['lds']['seeds']} seeds; 95 % "
        f"interval over both), by method; `{first['default']}` is the default.",
        "",
        "| method | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    scores = {world: _queries_lds(result) for world, result in results.items()}
    for name in sorted(scores[next(iter(scores))], key=lambda n: -scores[next(iter(scores))][n]["value"]):
        if all(name in rows for rows in scores.values()) and name in PROOF_METHODS | set(_external(first)):
            spans = (
                f"**{r[name]['value']:.3f}** ({r[name]['low']:.3f}-{r[name]['high']:.3f})" for r in scores.values()
            )
            lines.append(f"| {name} | " + " | ".join(spans) + " |")
    where = "; ".join(f"{world}: {measured(result)}" for world, result in results.items())
    return [*lines, "", f"`python -m benches.proof`: {where}", ""]


def peers(result: dict[str, Any]) -> list[str]:
    lines = [
        "Other tools on the same work, model, adapter, tokens and precision; each warm, in its own environment:",
        "",
    ]
    for world, found in result["worlds"].items():
        lines += [
            f"| {world} | pool x queries | tokens/s | time over plain LoRA forward+backward | bytes an example "
            "| rank agreement with exact scores |",
            "|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            if "failed" in row:
                continue
            over, agrees, size = row["over_plain"], row["agreement"], row["bytes_per_example"]
            kind = " (to the exact dot)" if row["convention"] == "preconditioned" else ""
            cells = [
                f"{row['peer']} `{row['method']}`: {row['what']}",
                f"{row['examples']} x {row['queries']}",
                f"{row['tokens_per_second']:,.0f}",
                "" if over is None else f"{over['median']:.2f}",
                "" if size is None else f"{size:,.0f}",
                "" if agrees is None or row["examples"] < FEWEST_RANKED else f"{agrees['per_query']:.3f}{kind}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        times = (
            f"**{t['median']:.2f}** ({t['min']:.2f}-{t['max']:.2f}) times as fast as {name.replace(' ', ' `')}`"
            for name, t in found["targets"]["end_to_end"].items()
        )
        shares = [o["share"] for o in found["profiles"].get("ours cosine", []) if "dot_product" in o["operator"]]
        attention = f" Attention, in which all tools are alike, is {sum(shares):.0%} of our time." if shares else ""
        lines += ["", f"Ours, end to end, against the row of the same kind: {'; '.join(times)}.{attention}", ""]
    return [*lines, f"`python -m benches.peers.compare`, {result['rounds']} round(s): {measured(result)}", ""]


def peers_scoring(result: dict[str, Any]) -> list[str]:
    lines = [
        f"The scoring step alone, over {result['rows']:,} kept rows of {result['width']:,} numbers in each tool's own "
        "format: all scores (median of rounds, range in brackets):",
        "",
        "| queries | rows kept as | seconds | times as fast: ours, int8 rows | ours, bf16 rows "
        "| lowest rank agreement with float64 |",
        "|---|---|---|---|---|---|",
    ]
    for queries, found in result["cases"].items():
        for name, row in found["rows"].items():
            times = [row["over"][kind] for kind in ("ours_int8", "ours_bf16")]
            own = name.startswith("ours")
            spans = ["" if own else f"**{r['median']:.1f}** ({r['min']:.1f}-{r['max']:.1f})" for r in times]
            seconds = f"{median(row['scores_seconds']):.3f}"
            agreement = f"{row['agreement']:.5f}"
            what = f"{'ours' if own else name}: {row['what']}"
            lines.append(f"| {' | '.join([queries, what, seconds, *spans, agreement])} |")
    return [*lines, "", f"`python -m benches.peers.scoring`, {result['rounds']} rounds: {measured(result)}", ""]


def launches(result: dict[str, Any]) -> list[str]:
    lines = [
        "Operations that one batch makes the host launch, and bytes that those of a layer move (PyTorch's matrix",
        "products and attention left out), at the shape of Qwen2.5-0.5B; counted, not timed:",
        "",
        "| way | a layer | beyond the layers | 24 layers | KB a token and layer |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["operations"].items():
        whole = 24 * row["layer"] + row["rest"]
        lines.append(f"| {name} | {row['layer']} | {row['rest']} | {whole:,} | {row['bytes'] / 1e3:.0f} |")
    return [*lines, "", f"`python -m benches.launches`: {measured(result)}", ""]


CARD_PARTS = {
    "steps": "Whole steps: per-example projected gradients of a packed batch over a plain LoRA forward and backward "
    "of the same tokens, random weights, a few layers of the larger models, bf16",
    "long": "One long trace through a whole model",
    "kernels": "Kernels against a plain copy (of more than 64 16-bit columns the engine takes PyTorch's product)",
    "crossing": "Rows to the host, a model of 0.5B's shape",
    "streaming": "Scores without rows, one pack",
    "products": "Inner products of rows on the card",
}


# Measured with tiles that were taken back: (commit, kernel, shape).
SUPERSEDED = {("99f9caab2e85", "segment_outer", f"T=16384 E=16 16x{d} exact") for d in (3584, 18_944)}


def card(sessions: list[dict[str, Any]]) -> list[str]:
    """Each part of `gpu_session` from the last session that measured it whole; each kernel and shape likewise."""
    lines = []
    for part, about in CARD_PARTS.items():
        having = [session for session in sessions if session.get(part)]
        if not having:
            continue
        if part == "kernels":
            rows = {}
            for session in having:
                measured_here = {(row["kernel"], row["shape"]): row for row in session[part]["rows"]}
                rows |= {key: row for key, row in measured_here.items() if (session["commit"], *key) not in SUPERSEDED}
            found = {**having[-1][part], "rows": [_of_the_card(rows[key]) for key in sorted(rows)]}
        else:
            most = max(_rows(session[part]) for session in having)
            having = [session for session in having if _rows(session[part]) == most][-1:]
            found = having[-1][part]
        lines += [f"{about}:", "", *TABLES[part](found), "", "; ".join(measured(one) for one in having), ""]
    return [*lines, "All by `python -m benches.gpu_session`.", ""]


def _rows(part: Any) -> int:
    return len(part) if isinstance(part, list) else 1


def _of_the_card(row: dict[str, Any]) -> dict[str, Any]:
    """A kernel's row without PyTorch's time where that is the host's: a launch an example, or more."""
    if row["kernel"] != "segment_outer":
        return row
    return {**row, "seconds": {way: found for way, found in row["seconds"].items() if way != "pytorch"}}


def card_steps(sessions: list[dict[str, Any]]) -> str:
    """The headline of the whole steps; empty where none was measured."""
    for session in reversed(sessions):
        rows = [row for row in session.get("steps", []) if "ratio_to_plain" in row]
        if rows:
            ratios = ", ".join(
                f"{row['model'].removeprefix('Qwen2.5-')} **{row['ratio_to_plain']:.2f}** "
                f"({row['model_flop_utilisation']:.0%} of the matmul peak)"
                for row in rows
            )
            card = session["machine"]["gpu"].removeprefix("NVIDIA ")
            layers = ", ".join(str(row["layers"]) for row in rows)
            return (
                f"| the same on an {card}, bf16, a pack of {rows[0]['tokens']:,} tokens, {layers} layers of models of "
                f"these widths | {ratios} |"
            )
    return ""


def _external(result: dict[str, Any]) -> list[str]:
    ours = {row["method"] for row in result["cost"]["rows"]}
    return [row["method"] for row in result["lds"]["rows"] if row["method"] not in ours]


def headlines(
    found: dict[str, dict[str, Any]], proofs: dict[str, dict[str, Any]], sessions: list[dict[str, Any]]
) -> list[str]:
    """The README's few figures, each with what it is compared with."""
    lines = ["| what | figure |", "|---|---|"]
    if (mini := found.get("paper-mini-cpu")) is not None:
        rows = {(row["strategy"], row["fraction"]): row for row in mini["settings"]}
        half = max(fraction for _, fraction in rows)
        dropped = f"{100 * half:.0f} % of a pool with corrupted traces, {len(mini['seeds'])} seeds"
        lines.append(
            f"| accuracy after dropping {dropped} | "
            f"`combined` {_accuracy(rows['combined', half])}; at random {_plain(rows['random', half])}, by embedding "
            f"{_plain(rows['embedding', half])}, nothing dropped {_plain(rows['full', 0.0])} |"
        )
    if proofs:
        cells = []
        for world, result in proofs.items():
            rows = _queries_lds(result)
            ours = rows[result["default"]]
            best: dict[str, str] = {}  # of each other tool
            for name in sorted(set(_external(result)) & rows.keys(), key=lambda name: -rows[name]["value"]):
                best.setdefault(name.split("-")[0], f"{name} {rows[name]['value']:.3f}")
            others = ", ".join(best.values())
            spread = f"**{ours['value']:.3f}** ({ours['low']:.3f}-{ours['high']:.3f})"
            if (data := rows.get(f"{result['default']}, the data's labels")) is not None:
                spread += f", by the data's labels {data['value']:.3f}"
            cells.append(f"{world}: `{result['default']}` {spread}" + (f"; at best {others}" if others else ""))
        lines.append(f"| rank correlation of scores with what retraining does (LDS) | {'<br>'.join(cells)} |")
        cells = []
        for world, result in proofs.items():
            rows = _queries_lds(result)
            if all(name in rows for name in SKETCHED.values()):
                kinds = [f"{kind} {rows[name]['value']:.3f}" for kind, name in SKETCHED.items()]
                cells.append(f"{world}: {', '.join(kinds)}")
        if cells:
            lines.append(f"| the same with rows sketched to 4,096 numbers, 8 kB | {'<br>'.join(cells)} |")
    if (gradients := found.get("gradients-cpu")) is not None:
        lines.append(f"| time of per-example gradients over a plain LoRA step | {_span(gradients['ratio'][FASTER])} |")
    if line := card_steps(sessions):
        lines.append(line)
    if (peers := found.get("peers-cpu")) is not None:
        times = peers["worlds"]["math500"]["targets"]["end_to_end"].items()
        lines.append(
            "| times as fast as other tools, gradients and scores of 500 real traces | "
            + ", ".join(f"{name} {_span(ratio)}" for name, ratio in times)
            + " |"
        )
    if (scoring := found.get("peers-scoring-cpu")) is not None:
        rows = [(name, row) for case in scoring["cases"].values() for name, row in case["rows"].items()]
        ratios = [row["over"]["ours_int8"]["median"] for name, row in rows if not name.startswith("ours")]
        lines.append(
            f"| times as fast, scores of {scoring['rows']:,} kept rows | {min(ratios):.1f} to {max(ratios):.1f} |"
        )
    return [*lines, ""]


def _plain(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.3f}"


def _span(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:.2f}** ({ratio['min']:.2f}-{ratio['max']:.2f})"


def _queries_lds(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """method -> its LDS over all queries."""
    return {row["method"]: row for row in result["lds"]["rows"] if (row["group"], row["of"]) == ("all", "queries")}


def whole_tables(
    found: dict[str, dict[str, Any]], proofs: dict[str, dict[str, Any]], sessions: list[dict[str, Any]]
) -> list[str]:
    """docs/results.md: every table, with the command and machine that made it."""
    lines = [
        "# Results",
        "",
        "Every figure here is written by `python -m benches.update_readme` from the files in `benches/results/`.",
        "",
    ]
    sections: list[tuple[str, list[str]]] = []
    for name, title, render in (
        ("paper-mini-cpu", "The paper's experiment in small", paper_mini),
        ("gradients-cpu", "Gradients", gradients),
        ("peers-cpu", "Other tools", peers),
        ("peers-scoring-cpu", "Other tools, the scoring step", peers_scoring),
        ("inner-products-cpu", "Inner products", inner_products),
        ("launches", "Host launches", launches),
    ):
        if name in found:
            sections.append((title, render(found[name])))
    if proofs:
        sections.insert(1, ("Scores against retraining", proof(proofs)))
    if sessions:
        sections.insert(3, ("On a card", card(sessions)))
    for title, table in sections:
        lines += [f"## {title}", "", *table]
    lines += ["## Suites", ""]
    for picture, about in (
        ("roofline", "Roofline: each stage beside the measured ceilings"),
        ("ratios", "Times as fast as each baseline"),
        ("scaling", "Scaling with N, Q, T, d, r and p"),
    ):
        lines.append(f"![{about}]({picture}.svg)")
    return [*lines, "", "`make bench` made these; commit, versions and machine are under each plot.", ""]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    proofs = {name.removeprefix("proof-"): result for name, result in found.items() if name.startswith("proof-")}
    sessions = sorted(
        (result for name, result in found.items() if name.startswith("gpu-")), key=lambda r: r["measured"]
    )
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(before + BEGIN + "\n" + "\n".join(headlines(found, proofs, sessions)) + END + after)
    (ROOT / "docs" / "results.md").write_text("\n".join(whole_tables(found, proofs, sessions)))


if __name__ == "__main__":
    main()
