"""`make bench`: every budget of the design as a ratio of two things measured in this one run.

Prints a table and writes build/bench.json: a list of {name, value, unit, bound, holds}. `bound` is null for figures
that are only told. One row alone: `make bench ONLY=name`. Exits 1 when a bound does not hold.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent


def _modules(only: str) -> list[Path]:
    found = sorted(FOLDER.glob("bench_*.py"))
    if not only:
        return found
    named = [path for path in found if only in path.read_text()]
    if not named:
        sys.exit(f"no benchmark is called {only}; there are: {', '.join(path.stem for path in found)}")
    return named


def main() -> None:
    """Runs the benchmarks one after another."""
    sys.path.insert(0, str(ROOT / "tests"))
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = []
    for path in _modules(only):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            sys.exit(f"{path} cannot be loaded")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        started = time.perf_counter()
        print(f"{path.stem} ...", file=sys.stderr, flush=True)
        rows += [row for row in module.measure("full") if not only or row["name"] == only or row["bound"] is None]
        print(f"{path.stem} took {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    width = max(len(row["name"]) for row in rows)
    print(f"{'name':{width}}  {'value':>12} {'unit':14} {'bound':>8}  holds")
    for row in rows:
        bound = "" if row["bound"] is None else f"{row['bound']:g}"
        holds = "yes" if row["holds"] else "NO"
        print(f"{row['name']:{width}}  {row['value']:12.3f} {row['unit']:14} {bound:>8}  {holds}")
    out = ROOT / "build" / "bench.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if all(row["holds"] for row in rows) else 1)


if __name__ == "__main__":
    main()
