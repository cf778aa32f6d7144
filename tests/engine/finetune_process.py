"""A process that forks fine-tunes and has them killed; `test_finetune_resume` starts it.

    MODEL DATA FOLDER SEED N_KILLS

One fork trains FOLDER/undisturbed. The others go on, one after another, with FOLDER/killed; each is killed (SIGKILL)
at a random moment of a random step, but the last, which is let finish. Prints, as JSON, the signals that ended the
forks, and at which step those began that lived to say so.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

PRELOADED = (
    "peft",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_clip",
    "transformers.models.llama.modeling_llama",
)
"""What every fork would otherwise import for itself."""

from mmextract.engine import (  # noqa: E402  (only now is it found)
    finetune,
    finetune_rows,
    rows,
    samples,
)
from tests.engine import finetune_cases  # noqa: E402

STEPS = 12


def train(model: Path, data: Path, out: Path, kill_at: tuple[int, float] | None) -> int:
    """Train; `kill_at` is the step, and the seconds behind it, at which the process dies.

    Returns where it began, STEPS if the run before was killed when it had written everything.
    """
    begun: list[int] = []

    def advance(n_steps: int) -> None:
        begun.append(n_steps)
        if kill_at is not None and sum(begun) >= kill_at[0]:
            threading.Timer(kill_at[1], os.kill, (os.getpid(), signal.SIGKILL)).start()

    marking = rows.RandomMarking(spec=finetune_cases.LOOK, identities=finetune_cases.people(), rate=0.5)
    examples = finetune_rows.make_examples(samples.read_samples(data), marking)
    spec = finetune_cases.spec(model, steps=STEPS, checkpoint_steps=1, dropout=0.3)
    finetune.run_finetune(spec, examples, out, on_progress=advance)
    return begun[0] if begun else STEPS


def fork(model: Path, data: Path, out: Path, kill_at: tuple[int, float] | None) -> tuple[int, int | None]:
    """Train in a fork; return the signal that ended it, 0 for none, and where it began if it lived to say."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, str(train(model, data, out, kill_at)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code <= 0, f"a fine-tune failed with {code}"
    return -code, int(said) if said else None


def main(model: Path, data: Path, folder: Path, seed: int, n_kills: int) -> None:
    """Do what the command line says."""
    for name in PRELOADED:
        importlib.import_module(name)
    rng = random.Random(seed)
    out = folder / "killed"
    left = [fork(model, data, folder / "undisturbed", None)]
    left += [fork(model, data, out, (rng.randint(1, 9), rng.uniform(0, 0.03))) for _ in range(n_kills)]
    left.append(fork(model, data, out, None))
    print(json.dumps(left))


if __name__ == "__main__":
    model, data, folder = map(Path, sys.argv[1:4])
    main(model, data, folder, *map(int, sys.argv[4:6]))
