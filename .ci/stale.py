"""Exit code 1 if dvc.lock does not belong to dvc.yaml, params.yaml, code and committed results.

`dvc repro --dry` exits 0 even when stages would run, so `dvc status --json` is read instead. A checkout without DVC's
cache lacks the outputs that live there: a missing file says nothing, a changed one does. Nor does a folder that such a
file is missing from, since the stage that writes the rest of it speaks for it.
"""

import json
import subprocess
import sys

ABSENT = {"deleted", "not in cache"}


def stale(status: dict[str, list]) -> list[str]:
    """One line for each stage in the output of `dvc status --json` whose entry in dvc.lock is out of date."""
    lines, absent = [], _absent(status)
    for stage, changes in status.items():
        reasons = []
        for change in changes:
            if isinstance(change, str):  # "changed command", "changed checksum"
                reasons.append(change)
                continue
            for kind, files in change.items():
                for file, state in files.items():
                    if isinstance(state, dict):  # a parameter file: section -> state
                        reasons += [f"{kind}: {file}, {section} {how}" for section, how in state.items()]
                    elif state not in ABSENT and not any(path.startswith(f"{file}/") for path in absent):
                        reasons.append(f"{kind}: {file} {state}")
        if reasons:
            lines.append(f"{stage}: {'; '.join(reasons)}")
    return lines


def _absent(status: dict[str, list]) -> list[str]:
    """The outputs that this checkout lacks."""
    changes = [change for changed in status.values() for change in changed if isinstance(change, dict)]
    outs = [item for change in changes for item in change.get("changed outs", {}).items()]
    return [file for file, state in outs if state in ABSENT]


def main() -> int:
    status = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True)
    if status.returncode:
        print(status.stderr, file=sys.stderr)
        return 1
    lines = stale(json.loads(status.stdout))
    for line in lines:
        print(line)
    if lines:
        print("dvc.lock is stale; run `dvc repro` and commit dvc.lock with the results")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
