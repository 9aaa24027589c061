"""Run the tests in several processes at once, on a machine that has pytest and perhaps none of its plugins.

    python bench/parallel_tests.py FOLDER PROCESSES PYTEST-ARGUMENTS...

A test file that needs a missing package is named and left out. Each process writes a log and a JUnit file to FOLDER.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Without the options of pytest.ini that a missing plugin would make errors of.
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q"]


def missing_packages(path: Path) -> set[str]:
    """Return the packages that a file imports at its top and that are not installed."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.add(node.module)
    tops = {name.split(".")[0] for name in names}
    beside = {"conftest", "support"} | {other.stem for other in path.parent.glob("*.py")}
    return {top for top in tops - beside if importlib.util.find_spec(top) is None}


def main() -> int:
    """Run the tests; return the exit status."""
    folder, processes, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    folder.mkdir(parents=True, exist_ok=True)
    left_out = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        missing = missing_packages(path)
        if missing:
            left_out.append(f"--ignore={path}")
            print(f"{path.name}: not run, {', '.join(sorted(missing))} is not installed")
    collected = subprocess.run(
        [*PYTEST, "--collect-only", *left_out, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    tests = [line for line in collected.stdout.splitlines() if "::" in line and " " not in line.split("[")[0]]
    if collected.returncode not in (0, 5):
        print(collected.stdout[-4000:] + collected.stderr[-2000:])
        return collected.returncode
    children = []
    for index in range(min(processes, len(tests))):
        part = tests[index::processes]
        log = (folder / f"part{index}.log").open("w")
        # By a file: the names of thousands of tests are more than a command line may hold.
        listed = folder / f"part{index}.txt"
        listed.write_text("\n".join(part))
        command = [*PYTEST, "-rfEs", "-s", f"--junitxml={folder / f'part{index}.xml'}", f"@{listed}"]
        children.append((subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT), log))
    status = 0
    for child, log in children:
        code = child.wait()
        log.close()
        text = Path(log.name).read_text().splitlines()
        print(f"{Path(log.name).name}: {text[-1] if text else 'nothing'}")
        if code not in (0, 5):
            status = code
            print("\n".join(text[-60:]))
    return status


if __name__ == "__main__":
    sys.exit(main())
