"""A second Python process that runs saved plans: `python -m vivace.testing.fresh` serves one JSON line per request.

It is started once, since importing the libraries takes longer than every check together.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
from typing import Any


class Worker:
    """The other process. `ask` sends one request and waits for its answer."""

    def __init__(self) -> None:
        import torch

        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vivace.testing.fresh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        atexit.register(self.close)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer, with `error` when the run failed there.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            worker.cache_clear()
            raise RuntimeError("the fresh process ended without an answer")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait(timeout=30)


@functools.cache
def worker() -> Worker:
    """The one worker of this process."""
    return Worker()


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    from vivace.plans.plan import Plan
    from vivace.techniques.base import registry
    from vivace.testing.fingerprints import digest
    from vivace.testing.subjects import Subject

    sys.path[:] = request["path"]
    cls = getattr(importlib.import_module(request["module"]), request["name"])
    if cls.card.name not in registry:
        registry.add(cls)
    run = Subject(request["family"], request["call"]).run(*Plan.load(request["plan"]).techniques)
    return {"latents": digest(run.latents), "counts": run.receipt.counts}


def main() -> None:
    """Serve requests until the input ends. Answers have their own stream: libraries print to the standard one."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                answer = _serve(json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
