"""Prune a transformer and repair it by distillation.

    python -m vivace.training.pruning probe --model tiny --out importance.json
    python -m vivace.training.pruning repair --model tiny --keep 0.6 --minutes 3 --out pruned.safetensors

`probe` measures what each block, head and group of channels is worth, and can be interrupted. `repair` probes too
where no table is given, takes out what matters least per FLOP until `--keep` of the FLOPs are left, and distils the
rest from the whole model on latents of `vivace.world` clips. Run either again with the same `--out` to go on after an
interruption. The file is for the technique `pruned_model`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from vivace.core.errors import ConfigError
from vivace.models import pruned_file
from vivace.models.pruned_costs import counted
from vivace.models.pruning import KINDS, Anatomy, Kept, anatomy, carved, choose
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import Budget, Processes, machine, write_json
from vivace.training.loop import command
from vivace.training.pruning_data import LEVELS, NoisyBatch, gather, held_out_batches
from vivace.training.pruning_probe import Probe, channel_groups, drop_blocks, read, scores_and_costs
from vivace.training.pruning_repair import Repairer, RepairLoss, clips_of, fit, measure
from vivace.training.subject import load_model


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m vivace.training.pruning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = out.add_subparsers(dest="command", required=True)
    for name in ("probe", "repair"):
        sub = commands.add_parser(name)
        sub.add_argument("--model", default="tiny", help="'tiny' or a diffusers folder")
        sub.add_argument("--out", type=Path, required=True, help="the file to write")
        sub.add_argument("--device", help="cpu or cuda; a GPU when there is one")
        sub.add_argument(
            "--kinds", nargs="+", choices=KINDS, default=["block", "channels"], help="what may go"
        )
        sub.add_argument("--groups", type=int, default=8, help="groups of channels in each feed-forward")
        sub.add_argument("--eval-clips", type=int, help="held-out clips (16 on a GPU, 2 on a processor)")
        sub.add_argument(
            "--size", type=int, nargs=3, default=(29, 128, 128), metavar=("FRAMES", "HEIGHT", "WIDTH")
        )
    repair = commands.choices["repair"]
    repair.add_argument("--keep", type=float, default=0.65, help="share of the FLOPs to keep")
    repair.add_argument(
        "--measure", choices=("error", "flow"), default="error", help="importance by which error"
    )
    repair.add_argument("--importance", type=Path, help="table of `probe`; probed now when left out")
    repair.add_argument(
        "--depth", type=int, help="blocks to keep, probed anew after each that goes; widths do the rest"
    )
    repair.add_argument(
        "--blocks", nargs="+", type=int, help="numbers of the blocks to keep, in place of choosing"
    )
    repair.add_argument(
        "--width", type=float, default=1.0, help="with --blocks: share of feed-forward channels to keep"
    )
    repair.add_argument("--uneven", action="store_true", help="let blocks have different widths")
    repair.add_argument("--minutes", type=float, default=3.0, help="training time; the rest comes on top")
    repair.add_argument("--steps", type=int, help="train this many updates instead (repeatable)")
    repair.add_argument("--batch", type=int, help="rows of an update (64 on a GPU, 2 on a processor)")
    repair.add_argument("--clips", type=int, help="clips made beforehand (8192 on a GPU, 8 on a processor)")
    repair.add_argument(
        "--pool-seconds", type=float, default=40.0, help="make fewer clips when it takes longer"
    )
    repair.add_argument("--muon-lr", type=float, default=1e-3, help="0 trains everything with AdamW")
    repair.add_argument("--adam-lr", type=float, default=4e-4)
    repair.add_argument("--drop", type=float, default=0.25, help="share of rows without text")
    repair.add_argument("--hidden", type=float, default=RepairLoss.hidden, help="weight of hidden states")
    repair.add_argument(
        "--guided", type=float, default=RepairLoss.guided, help="weight of the guided prediction"
    )
    repair.add_argument("--truth", type=float, default=RepairLoss.truth, help="weight of the true target")
    repair.add_argument("--store", choices=pruned_file.STORES, default="bf16")
    repair.add_argument(
        "--compile", action="store_true", help="compile the blocks (worth it above two minutes)"
    )
    repair.add_argument("--seed", type=int, default=0)
    repair.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints")
    return out


class Run:
    """What both commands start from: the model on its device, and held-out calls."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device here; leave --device out, or say cpu.")
        joined = Processes.join()
        if options.device == "cpu":
            joined = Processes(joined.rank, joined.world, torch.device("cpu"))
        self.processes, self.gpu = joined, joined.device.type == "cuda"
        self.pipeline, self.adapter = load_model(options.model)
        for part in (self.pipeline.transformer, self.pipeline.text_encoder, self.pipeline.vae):
            part.to(joined.device)
        frames, height, width = options.size
        self.shape = ClipShape(frames=frames, height=height, width=width)
        self.whole: Anatomy = anatomy(self.adapter, self.pipeline.transformer)
        self.clips = options.eval_clips or (16 if self.gpu else 2)
        self.batches: list[NoisyBatch] = held_out_batches(
            self.pipeline, self.processes, self.shape, self.clips
        )

    def importance(self, path: Path) -> dict[str, Any]:
        """Probe into a file, or go on there."""
        o = self.options
        settings = {"size": list(o.size), "clips": self.clips, "levels": list(LEVELS), "groups": o.groups}
        probe = Probe(self.whole, self.batches, self.processes, path, settings)
        return probe.run(kinds_of(o), o.groups, say=self.processes.say)


def kinds_of(options: argparse.Namespace) -> set[str]:
    """What is probed: blocks always, when a depth is asked for."""
    return {*options.kinds, *(["block"] if getattr(options, "depth", None) else [])}


def choice(run: Run, importance: Path) -> Kept:
    """What to keep: as asked for, or chosen by importance."""
    o, whole = run.options, run.whole
    if o.blocks is None:
        table = read(importance) if o.importance else run.importance(importance)
        if table["base"] != pruned_file.base_hash(whole.expert.module):
            raise ConfigError(f"{importance} was measured on another model; probe this one.")
        scores, costs = scores_and_costs(table, kinds_of(o), o.measure)
        start = None
        if o.depth is not None:
            start = drop_blocks(whole, run.batches, run.processes, o.depth, run.processes.say)
        return choose(whole, scores, costs, table["flops"], o.keep, even=not o.uneven, start=start)
    if not all(0 <= b < len(whole.blocks) for b in o.blocks):
        raise ConfigError(f"the blocks are numbered 0 to {len(whole.blocks) - 1}; give some of them.")
    kept = Kept(tuple(b for i, b in enumerate(whole.blocks) if i in o.blocks))
    if o.width == 1.0:
        return kept
    groups = channel_groups(whole, run.batches, run.processes, o.groups)
    stay = max(1, round(o.width * o.groups))
    return Kept(
        kept.blocks,
        {},
        {
            path: tuple(sorted(i for group in groups[path][-stay:] for i in group))
            for path, part in whole.feed_forwards.items()
            if part.block in kept.blocks
        },
    )


def repair(options: argparse.Namespace) -> dict[str, Any]:
    """Choose, cut, distil, measure, and write weights and record; returns the record."""
    if not 0 < options.drop <= 0.5:
        raise ConfigError("--drop is a share of rows above 0 and up to 0.5.")
    started = time.perf_counter()
    run = Run(options)
    processes, whole, say = run.processes, run.whole, run.processes.say
    checkpoint = options.out.with_suffix(".ckpt")
    kept = choice(run, options.importance or options.out.with_suffix(".importance.json"))
    student: Any = carved(run.adapter, whole.expert.module, kept)
    first = run.batches[0]
    call = {
        "hidden_states": first.x[:1],
        "timestep": 1000.0 * first.s[:1],
        "encoder_hidden_states": first.text[:1],
    }
    with processes.autocast():
        small = counted(run.adapter.expert("transformer", student), call).flops
        share = small / counted(whole.expert, call).flops
    numbers = [whole.blocks.index(b) for b in kept.blocks]
    widths = sorted({len(c) for c in kept.channels.values()})
    parameters = sum(p.numel() for p in student.parameters())
    say(f"keeps blocks {numbers}, widths {widths or 'whole'}")
    say(f"{share:.3f} of the FLOPs, {parameters / 1e6:.2f} M weights")
    before = measure(student, whole.expert.module, run.batches, processes)
    say(f"before: prediction error {before['prediction']:.4f}, guided {before['guided']:.4f}")
    made = clips_of(checkpoint)
    clips = made or options.clips or (8192 if run.gpu else 8)
    at = time.perf_counter()
    limit = float("inf") if made else options.pool_seconds
    pool = gather(
        run.pipeline, processes, run.shape, count=clips, seconds=limit, portion=64 if run.gpu else 4
    )
    say(f"{len(pool)} clips in {time.perf_counter() - at:.0f} s")
    trainer = Repairer(
        processes, whole, student, kept, seed=options.seed, muon_lr=options.muon_lr, adam_lr=options.adam_lr,
        drop=options.drop, shift=float(run.pipeline.scheduler.config.flow_shift),
        loss=RepairLoss(hidden=options.hidden, guided=options.guided, truth=options.truth),
    )  # fmt: skip
    batch = options.batch or (64 if run.gpu else 2)
    if options.compile:
        trainer.compile(pool, batch, say)
    fitted = fit(
        trainer,
        pool,
        Budget(options.minutes, options.steps),
        checkpoint,
        batch=batch,
        save_every=options.save_every,
    )
    trainer.average.store()
    trainer.run_eagerly()
    if not processes.leads:
        return {}
    after = measure(student, whole.expert.module, run.batches, processes)
    recipe = {
        "flops": round(share, 4),
        "steps": fitted["steps"],
        "batch": fitted["batch"],
        "clips": fitted["clips"],
    }
    head = pruned_file.head_of(whole.expert.module, kept, recipe | {"error": after["prediction"]})
    state = student.state_dict()
    pruned_file.save(options.out, state, head, options.store)
    _, stored = pruned_file.load(options.out)
    student.load_state_dict({k: v.to(state[k].dtype) for k, v in stored.items()})
    as_stored = measure(student, whole.expert.module, run.batches, processes)
    record = {
        "machine": machine() | {"processes": processes.world},
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"},
        "kept": {"blocks": numbers, "widths": widths, "heads": {k: len(v) for k, v in kept.heads.items()}},
        "flops": round(share, 4),
        "parameters": parameters,
        "parameters_whole": sum(p.numel() for p in whole.expert.module.parameters()),
        "bytes": options.out.stat().st_size,
        "errors": {"before": before, "after": after, "as_stored": as_stored},
        "seconds_in_all": round(time.perf_counter() - started, 1),
        **fitted,
    }
    write_json(options.out.with_suffix(".json"), record)
    say(
        f"after: prediction error {after['prediction']:.4f}, guided {after['guided']:.4f}; stored as {options.store} "
        f"{as_stored['prediction']:.4f}; wrote {options.out}, {record['bytes'] / 1e6:.1f} MB, "
        f"{record['seconds_in_all']:.0f} s in all"
    )
    return record


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Run a command; returns what it wrote as JSON."""
    words = parser()
    options = words.parse_args(given)
    if options.command == "probe":
        run = Run(options)
        table = run.importance(options.out)
        ranked = sorted(
            table["units"].items(), key=lambda item: item[1]["error"] / max(item[1]["flops"], 1e-30)
        )
        for name, row in ranked[:8]:
            run.processes.say(f"{name}: error {row['error']:.4f}, flow {row['flow']:+.4f}")
        return table
    if (options.minutes if options.steps is None else options.steps) <= 0:
        words.error("nothing to train: give --minutes or --steps above 0.")
    if not 0.0 < options.keep < 1.0:
        words.error(f"--keep is a share of the FLOPs between 0 and 1, not {options.keep:g}.")
    return repair(options)


if __name__ == "__main__":
    command(main)
