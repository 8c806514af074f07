"""Verbs of gradient stores: build, inspect, verify, merge, import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from influence_fast.cli import options
from influence_fast.cli.options import NewVerb
from influence_fast.errors import ConfigError, did_you_mean
from influence_fast.guards import check_no_pipe


def add(verb: NewVerb) -> None:
    """Add these verbs and their options."""
    sub = verb("build", _build, "build a gradient store; under torchrun and the like, on all processes together")
    options.add_model(sub, adapter=True, adapter_needed=False)
    options.add_data(sub, "--data", "training examples")
    sub.add_argument("--output", required=True, help="folder of the store, which all processes see")
    options.add_gradients(sub)
    sub.add_argument("--damping", type=options.damping, help="of a fitted sketch: as for 'score'")
    sub.add_argument("--fisher", help="labels that a sketch is fitted on: as for 'score'")
    sub.add_argument("--shard-rows", type=int, help="examples in a shard, which is what a process takes at a time")
    sub.add_argument("--max-tokens", type=int, help="tokens in one packed batch")
    sub.add_argument("--fsdp", type=int, default=1, metavar="N", help="spread each copy of the model over N processes")
    sub.add_argument("--time-limit", type=float, default=600.0, help="seconds without a batch after which one hangs")
    sub.add_argument(
        "--lease",
        type=float,
        default=60.0,
        help="seconds without a sign of life after which a shard is taken from another host's process (default: 60)",
    )
    sub.add_argument("--peak-tflops", type=float, help="of one card, for the utilisation (default: known cards)")
    sub.add_argument("--profile", action="store_true", help="write a Chrome trace of the first batches")

    sub = verb("inspect", _inspect, "say what a gradient store holds")
    sub.add_argument("store")

    sub = verb("verify", _verify, "check every byte of a gradient store against its checksums")
    sub.add_argument("store")

    sub = verb("merge", _merge, "join stores of the same work into one")
    sub.add_argument("stores", nargs="+")
    sub.add_argument("--output", required=True, help="folder of the joined store")

    sub = verb("import", _import, "make a store of gradients that another tool wrote")
    sub.add_argument("source", help="LESS .pt folder, TRAK memory map, bergson index, .npy or .safetensors")
    sub.add_argument("--output", required=True, help="folder of the store")
    sub.add_argument("--format", default="auto", help="less, trak, bergson, npy or safetensors (default: as it looks)")
    sub.add_argument("--dtype", default="fp32", help="fp32 (default), bf16 or int8")
    sub.add_argument("--ids", metavar="FILE", help="text file of the rows' ids, one a line (default: row numbers)")
    sub.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the format, may be repeated: file= (less), model_id= and kind= (trak), key= (safetensors)",
    )


def _build(args: Any) -> None:
    from influence_fast.config import ModelConfig
    from influence_fast.data import spooling
    from influence_fast.distributed import metrics, processes
    from influence_fast.distributed.builds import DistributedOptions
    from influence_fast.distributed.from_source import build_from_source
    from influence_fast.gradients.rows.precision import check_precision
    from influence_fast.influence.recipe import Recipe
    from influence_fast.influence.settings import InfluenceConfig

    options.quiet_libraries()
    gradients, influence = options.gradients_of(args), InfluenceConfig(**options.given(args, "damping", "fisher"))
    recipe = Recipe.of(gradients, influence)
    recipe.check()
    check_precision(gradients.precision, "--precision", sharded=args.fsdp != 1)
    for flag in ("damping", "fisher"):
        if getattr(args, flag) is not None and not recipe.fits_sketch:
            raise ConfigError(
                f"--{flag} is that of a fitted sketch, and none is fitted here: give a --width, or leave it out"
            )

    options.check_cut(args)

    def told(tokens: spooling.Tokens) -> None:
        options.say_left_out(args, tokens.too_long)
        if tokens.without:
            print(f"left out, without a trace for --trace {args.trace}: {len(tokens.without)} rows")

    world = processes.World.from_environment()
    store = build_from_source(
        args.output,
        ModelConfig(
            args.model,
            adapter=args.adapter,
            tokenizer=args.tokenizer,
            dtype=args.dtype,
            device=args.device,
            quantize=args.quantize,
        ),
        spooling.TokenSource(
            args.data,
            args.split,
            args.format,
            options.trace_of(args),
            args.limit,
            args.columns or {},
            args.max_length,
            args.truncate,
            args.turns,
        ),
        gradients,
        influence,
        options=DistributedOptions(
            world=world,
            time_limit=args.time_limit,
            lease=args.lease,
            peak=args.peak_tflops * 1e12 if args.peak_tflops else None,
            progress=False if args.quiet else None,
            profile=args.profile,
            shard_rows=args.shard_rows,
        ),
        fsdp=args.fsdp,
        told=told,
    )
    if world.rank == 0:
        totals = metrics.summary(metrics.folder_of(Path(args.output)))
        print(f"store: {args.output} ({len(store)} rows; {100 * totals.idle_share:.1f} % of the ranks' time idle)")


def _inspect(args: Any) -> None:
    from influence_fast.store.reader import open_store

    store = open_store(args.store)
    size = sum(path.stat().st_size for path in Path(args.store).iterdir())
    print(f"{store!r}\n{size / 2**20:.1f} MiB on disk, {len(store.set_aside)} examples set aside")
    for name in store.identity.__dataclass_fields__:
        value = getattr(store.identity, name)
        if value is not None:
            print(f"  {name:<20} {value}")
    if store.tokens_hash is not None:
        print(f"  {'tokens_hash':<20} {store.tokens_hash}")
    if store.identity.projection_sketch is not None:
        _inspect_sketch(store)
    for name, reason in store.set_aside[:20]:
        print(f"  set aside: {name}: {reason}")


def _inspect_sketch(store: Any) -> None:
    from influence_fast.gradients.rows.layout import layout_width
    from influence_fast.influence.sketch_fitting import PICKED

    sketch = store.projection.sketch
    numbers = layout_width(sketch.layout)
    share, made = f"{100 * sketch.share:.0f} % of the whitened rows", sketch.purpose
    print(f"  fitted sketch        {store.width:,} of {numbers:,} coordinates, {share}")
    picked = f" ({made[PICKED]:g})" if PICKED in made else ""
    print(f"  fitted on            {made.get('sample')}; damping {made.get('damping')}{picked}")


def _verify(args: Any) -> None:
    from influence_fast.errors import StoreError
    from influence_fast.store.reader import open_store
    from influence_fast.store.verification import verify_store

    problems = verify_store(args.store)
    if problems:
        raise StoreError("; ".join(problems))
    print(f"{args.store}: {len(open_store(args.store))} rows, every checksum holds")


def _merge(args: Any) -> None:
    from influence_fast.store.merge import merge_stores

    print(repr(merge_stores(args.stores, args.output)))


def _option(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.strip(), value


def _import(args: Any) -> None:
    from influence_fast.store.import_formats import FORMATS
    from influence_fast.store.importers import import_gradients, options_of

    known = {option for name in FORMATS for option in options_of(name)}
    given: dict[str, Any] = {}
    for name, value in args.option:
        if name not in known:
            raise ConfigError(f"--option {name}: no format has it; {did_you_mean(name, known)}")
        if name in given:
            raise ConfigError(f"--option {name} is given twice; leave one out")
        given[name] = value
    ids = None if args.ids is None else _lines_of(args.ids)
    print(repr(import_gradients(args.source, args.output, format=args.format, ids=ids, dtype=args.dtype, **given)))


def _lines_of(path: str) -> list[str]:
    check_no_pipe(path, ConfigError)
    try:
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"--ids {path}: not UTF-8 text; give a text file with one id a line") from None
