"""A process that takes leases; `test_lease` starts it, talks to it through pipes, and kills it.

hold PATH SECONDS      take the lease of a store, say so, and hold it until the input ends
race PATH...           try to take the lease of each store, say which were won, and hold them until the input ends
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from mmextract.engine.lease import Lease, StoreBusyError
from mmextract.engine.objects import LocalObjects


def main(command: str, *arguments: str) -> None:
    """Do what the command line says."""
    print("ready", flush=True)
    sys.stdin.readline()
    with ExitStack() as held:
        if command == "hold":
            held.enter_context(Lease(objects=LocalObjects(Path(arguments[0])), seconds=float(arguments[1])))
            print("held", flush=True)
        for place in arguments if command == "race" else ():
            try:
                held.enter_context(Lease(objects=LocalObjects(Path(place))))
                print(f"won {place}", flush=True)
            except StoreBusyError:
                print(f"lost {place}", flush=True)
        print("done", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
