"""`python -m vivace.tiny.train COMMAND`: the whole life of the embedded weights, one command a stage."""

from __future__ import annotations

import argparse
import importlib
import sys

from vivace.core.errors import VivaceError

COMMANDS = {
    "probe": ("vivace.tiny.train.probe", "time a few settings, to choose from"),
    "vae": ("vivace.tiny.train.vae", "train the VAE, fold its latents, measure it"),
    "text-to-video": ("vivace.tiny.train.text_to_video", "train transformer and text encoder"),
    "verifier": ("vivace.world.train_verifier", "train the classifier that checks generated clips"),
    "evaluate": ("vivace.tiny.train.evaluate", "attribute accuracy on held-out prompts, and contact sheets"),
    "export": ("vivace.tiny.train.export", "pack weights, or write them into the package"),
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m vivace.tiny.train", description=__doc__)
    parser.add_argument(
        "command", choices=COMMANDS, help="; ".join(f"{k}: {v[1]}" for k, v in COMMANDS.items())
    )
    chosen = parser.parse_args(arguments[:1]).command
    module = importlib.import_module(COMMANDS[chosen][0])
    try:
        if not hasattr(module, "add_arguments"):  # a stage with a command line of its own
            return module.main(arguments[1:]) or 0
        options = argparse.ArgumentParser(prog=f"{parser.prog} {chosen}", description=module.__doc__)
        module.add_arguments(options)
        module.main(options.parse_args(arguments[1:]))
    except VivaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
