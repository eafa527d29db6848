"""Every measurement next to other libraries, one after the other: ``python -m benchmarks`` (``--quick`` to try it)."""

from __future__ import annotations

import argparse
import time

from benchmarks import growth
from benchmarks.peers import accuracy, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes, printed and not kept")
    arguments = ["--quick"] if parser.parse_args().quick else []
    for name, part in (("growth", growth), ("accuracy", accuracy), ("peers", run)):
        started = time.monotonic()
        part.main(arguments)
        print(f"{name}: {(time.monotonic() - started) / 60:.0f} minutes", flush=True)


if __name__ == "__main__":
    main()
