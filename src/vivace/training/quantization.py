"""Train a transformer to live with 4-bit layers:

    python -m vivace.training.quantization --model tiny --weights int4 --activations int4 --group 64 \\
        --rotate hadamard --low-rank 16 --minutes 8 --out w4a4.safetensors

The student rounds weights and activations as `quantized_linear` does with the same settings, and learns the exact
transformer's predictions on noised latents of `vivace.world` clips, with captions and without. Beside every rounded
layer stands an auxiliary branch in full precision that starts as the rounding error and is annealed away rank by rank
(QVGen, arXiv 2505.11497); a low-rank branch that the settings ask for stays and is trained too. `--mode full` trains
the weights, `--mode lora` low-rank deltas that are added before rounding (LLM-QAT with LoRA, e.g. EfficientDM,
arXiv 2310.03270). What is written holds codes and scales, a few megabytes: `quantized_linear(trained=FILE, ...)`.

`--minutes` is the time spent on training, whatever the machine; `--steps` makes a run repeatable. Run it again with the
same `--out` to go on after an interruption: optimizer, averages, random state and clips come from the checkpoint beside
the file. `torchrun` starts it on several GPUs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vivace.calibration.artifact import model_hash
from vivace.core.errors import ConfigError
from vivace.kernels.quant_linear.spec import ACTIVATIONS, GROUPS, WEIGHTS, Recipe
from vivace.models.loading import load
from vivace.models.quantized import TrainedLinears
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import Budget, Processes, load_checkpoint, machine, write_json
from vivace.tiny.train.latents import LatentSet, encode_clips, make_encoder, pool_mask, tokenize
from vivace.tiny.train.seeds import held_out
from vivace.tiny.whole_clip import config_of
from vivace.training.loop import command
from vivace.training.quantization_layers import RankSchedule
from vivace.training.quantization_loss import DistillationLoss, Evaluator, HeldOut, Pairs
from vivace.training.quantization_trainer import Choices, QuantizationTrainer, deployed, fit, input_maxima
from vivace.training.subject import load_model
from vivace.world import caption, sample_scenes

STREAM = 400
"""First stream of training scenes."""
DEFAULTS = {"batch": (24, 2), "clips": (4096, 32), "portion": (64, 4), "eval_clips": (16, 2)}
"""On a GPU and on a processor."""


def held_out_clips(
    pipeline: Any, processes: Processes, shape: ClipShape, count: int, portion: int
) -> LatentSet:
    """Clips of the validation split, encoded."""
    encode, parts = make_encoder(pipeline.vae, processes), []
    scenes = sample_scenes(held_out("dev", count))
    for start in range(0, count, portion):
        video, mask = shape.draw(scenes[start : start + portion], processes.device)
        parts.append((encode(video), pool_mask(mask, config_of(pipeline.vae).scale_factor_spatial)))
    texts = [caption(s.attributes, s.seed) for s in scenes]
    ids = tokenize(pipeline.tokenizer, texts).to(torch.int16).view(count, 1, -1)
    latents, masks = (torch.cat(p) for p in zip(*parts, strict=True))
    return LatentSet(latents, masks, ids.to(processes.device))


def first_calls(
    trainer_parts: tuple[Any, torch.Tensor, float], data: LatentSet, guidance: float
) -> list[Pairs]:
    """A few training clips at the sampler's times, to see the range of activations."""
    pipeline, empty, shift = trainer_parts
    few = LatentSet(data.latents[:8], data.mask[:8], data.ids[:8])
    return HeldOut(pipeline, few, empty, shift=shift, guidance=guidance).calls


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m vivace.training.quantization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--model", default="tiny", help="'tiny' or a diffusers folder of a Wan pipeline")
    out.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    recipe = out.add_argument_group("settings of quantized_linear")
    recipe.add_argument("--weights", choices=WEIGHTS, default="int4")
    recipe.add_argument("--activations", choices=ACTIVATIONS, default="int4")
    recipe.add_argument("--group", type=int, choices=GROUPS, default=0)
    recipe.add_argument("--rotate", choices=("none", "hadamard"), default="none")
    recipe.add_argument("--low-rank", type=int, default=0)
    recipe.add_argument("--smooth", type=float, default=0.0, help="maxima are measured on the clips")
    recipe.add_argument("--roles", choices=("all", "ffn", "attention"), default="all")
    recipe.add_argument("--skip-blocks", type=int, default=0)
    training = out.add_argument_group("training")
    training.add_argument("--mode", choices=("full", "lora"), default="full")
    training.add_argument("--lora-rank", type=int, default=32)
    training.add_argument(
        "--auxiliary", type=int, default=32, help="ranks of the auxiliary branch; 0 for none"
    )
    training.add_argument("--anneal", type=float, nargs=2, default=(0.05, 0.65), metavar=("START", "STOP"))
    training.add_argument("--minutes", type=float, default=8.0, help="training time; the rest comes on top")
    training.add_argument("--steps", type=int, help="train this many updates instead (repeatable)")
    training.add_argument("--rate", type=float, help="2e-4; 1e-3 in LoRA mode")
    training.add_argument("--branch-rate", type=float, default=2e-4, help="of branches and biases")
    training.add_argument("--decay", type=float, default=0.998, help="of averaged weights")
    training.add_argument("--guided", type=float, default=0.1, help="weight of the guided prediction")
    training.add_argument("--hidden", type=float, default=0.0, help="weight of the blocks' outputs")
    training.add_argument("--object-weight", type=float, default=1.0)
    training.add_argument("--uniform", type=float, default=0.6, help="share of times spread as the sampler's")
    training.add_argument("--batch", type=int, help="clips of an update (24 on a GPU, 2 on a processor)")
    training.add_argument("--compile", action="store_true", help="compile the blocks")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints")
    data = out.add_argument_group("clips")
    data.add_argument("--clips", type=int, help="to encode (4096 on a GPU, 32 on a processor)")
    data.add_argument("--encode-minutes", type=float, default=0.75, help="stop encoding after this time")
    data.add_argument("--portion", type=int, help="encoded at a time (64 on a GPU, 4 on a processor)")
    data.add_argument(
        "--size", type=int, nargs=3, default=(29, 128, 128), metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    data.add_argument("--eval-clips", type=int, help="held-out clips (16 on a GPU, 2 on a processor)")
    data.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return out


def choices_of(options: argparse.Namespace) -> Choices:
    """What the command line asks for.

    Raises:
        ConfigError: settings that do not exist together.
    """
    try:
        recipe = Recipe(
            weights=options.weights,
            activations=options.activations,
            group=options.group,
            rotate=options.rotate == "hadamard",
            low_rank=options.low_rank,
        )
        start, stop = options.anneal
        schedule = RankSchedule(rank=options.auxiliary, start=start, stop=stop)
    except ValueError as error:
        raise ConfigError(f"{error}; change these settings.") from None
    lora = options.lora_rank if options.mode == "lora" else 0
    return Choices(
        recipe=recipe,
        smooth=options.smooth,
        roles=options.roles,
        skip_blocks=options.skip_blocks,
        lora=lora,
        schedule=schedule,
        rate=options.rate or (1e-3 if lora else 2e-4),
        branch_rate=options.branch_rate,
        decay=options.decay,
    )


def taken_up(path: Path, settings: str, processes: Processes) -> dict[str, Any] | None:
    """The checkpoint of an earlier run of the same command; None when there is none.

    Raises:
        ConfigError: it is of other settings.
        WeightsError: it is damaged.
    """
    state = load_checkpoint(path, processes)
    if state is not None and state.get("settings") != settings:
        raise ConfigError(
            f"{path} is of a run with other settings; delete it, or give another --out, to start afresh."
        )
    return state


def processes_of(device: str) -> Processes:
    """The processes on the device that was asked for.

    Raises:
        ConfigError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here; leave --device out, or give --device cpu.")
    return Processes.join() if device != "cpu" else Processes(0, 1, torch.device("cpu"))


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train, measure on held-out clips, write the layers and a record; returns the record."""
    words = parser()
    options = words.parse_args(given)
    if (options.minutes if options.steps is None else options.steps) <= 0:
        words.error("nothing to train: give --minutes or --steps above 0.")
    choices = choices_of(options)
    processes = processes_of(options.device)
    device = processes.device
    gpu = device.type == "cuda"
    for name, (large, small) in DEFAULTS.items():
        setattr(options, name, getattr(options, name) or (large if gpu else small))
    pipeline, _ = load_model(options.model)
    identity = model_hash(pipeline)
    pipeline.to(device)
    loss = DistillationLoss(
        guided=options.guided,
        hidden=options.hidden,
        object_weight=options.object_weight,
        uniform=options.uniform,
    )
    frames, height, width = options.size
    settings = json.dumps(
        [asdict(choices), asdict(loss), identity, options.batch, options.seed, options.size, processes.world],
        sort_keys=True,
    )
    checkpoint = options.out.with_suffix(".ckpt")
    state = taken_up(checkpoint, settings, processes)
    shape = ClipShape(frames=frames, height=height, width=width)
    started = time.perf_counter()
    data = encode_clips(
        pipeline.vae,
        pipeline.tokenizer,
        processes,
        shape,
        count=state["clips"] if state else -(-options.clips // processes.world),
        stream=STREAM + processes.rank,
        portion=options.portion,
        seconds=float("inf") if state else 60.0 * options.encode_minutes,
    )
    processes.say(f"{len(data)} clips encoded in {time.perf_counter() - started:.0f} s")
    empty = tokenize(pipeline.tokenizer, [""])[0].to(device)
    shift = float(pipeline.scheduler.config.flow_shift)
    maxima = None
    if choices.smooth:
        calls = first_calls((pipeline, empty, shift), data, loss.guidance)
        maxima = input_maxima(pipeline.transformer, calls, choices)
    held_set = held_out_clips(pipeline, processes, shape, options.eval_clips, options.portion)
    held = HeldOut(pipeline, held_set, empty, shift=shift, guidance=loss.guidance)
    # The type that such models run in here; its own rounding is part of what is deployed.
    dtype = torch.bfloat16 if gpu else torch.float32
    exact = copy.deepcopy(pipeline.transformer) if not gpu else load(options.model, dtype=dtype).transformer
    exact = exact.to(device)
    evaluate = Evaluator(held, exact, dtype)
    errors = {"post_training": evaluate(deployed(exact, choices, None, maxima))}
    processes.say(_told("post-training quantisation", errors["post_training"]))
    trainer = QuantizationTrainer(
        processes,
        pipeline,
        choices,
        loss=loss,
        maxima=maxima,
        seed=options.seed,
        compile=options.compile,
    )
    kept = {"clips": len(data), "settings": settings}
    fitted = fit(
        trainer,
        data,
        Budget(options.minutes, options.steps),
        checkpoint,
        batch=options.batch,
        kept=kept,
        state=state,
        save_every=options.save_every,
    )
    if not processes.leads:
        return {}
    last = trainer.trained_linears(identity, {})
    errors["last"] = evaluate(deployed(exact, choices, last, None))
    trainer.average.store()
    averaged = trainer.trained_linears(identity, {})
    errors["averaged"] = evaluate(deployed(exact, choices, averaged, None))
    chosen = min(("averaged", "last"), key=lambda name: errors[name]["guided"])
    best: TrainedLinears = averaged if chosen == "averaged" else last
    told = {
        "base": options.model,
        "mode": options.mode,
        "steps": fitted["steps"],
        "seconds": fitted["seconds"],
        "losses": [row[2] for row in fitted["curve"]][-1:],
        "weights": chosen,
        "errors": {"post_training": errors["post_training"], "trained": errors[chosen]},
    }
    replace(best, told=told).save(options.out)
    record = {
        "machine": machine() | {"processes": processes.world},
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"},
        "model_hash": identity,
        "clips": len(data) * processes.world,
        "held_out": {"clips": options.eval_clips, "times": len(held.calls), "dtype": str(dtype)},
        "errors": errors,
        "weights": chosen,
        "bytes": options.out.stat().st_size,
        **fitted,
    }
    write_json(options.out.with_suffix(".json"), record)
    for name in ("last", "averaged"):
        processes.say(_told(f"trained, {name} weights", errors[name]))
    processes.say(f"wrote {options.out} ({chosen} weights, {record['bytes'] / 1e6:.1f} MB)")
    return record


def _told(what: str, errors: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {value:.4f}" for name, value in errors.items())
    return f"{what}: error {parts}"


if __name__ == "__main__":
    command(main)
