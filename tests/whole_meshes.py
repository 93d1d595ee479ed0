"""Runs the whole pipeline on one device, on eight as three meshes, and on four processes, and shows how far the results are apart.

    python tests/whole_meshes.py

Tiny models, every stage, real processes. Prints a line a run; exit 0 only if the passages that were found, the answers and the rows are the
same, and losses and arrays differ by rounding (BOUND).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import processes
import torture

BOUND = 1e-4  # relative; for values near 0, of NEAR_ZERO
NEAR_ZERO = 1e-3
RUNS = {"8×1": (8, 1, 1), "4×2": (4, 2, 1), "2×4": (2, 4, 1), "4 processes": (4, 1, 4)}  # data, model, processes
# A batch that eight devices divide, and a learning rate at which the tiny LM is not chaotic.
FIELDS = {"lm_ft.rows": 8, "lsr_ft.batch": 8, "lm_ft.row_length": 1024, "lm_ft.optimizer.peak_lr": 1e-4}


def run(folder: Path, name: str, data: int, model: int, count: int) -> dict[str, Any]:
    """{stage/file: content} of a run; arrays as arrays."""
    workdir = folder / name.replace(" ", "_")
    flags = [f"--config.{field}={value}" for field, value in {**FIELDS, "mesh.data": data, "mesh.model": model}.items()]
    arguments = torture.command(folder / "models", workdir, "train", *flags)
    for code, _, errors in processes.finish(processes.start(arguments, count, devices=data * model // count), timeout=900):
        if code:
            sys.exit(errors[-2000:])
    read = torture.results(workdir)
    content = {path: np.load(workdir / path) if path.endswith(".npy") else value for path, value in read.items()}
    return {f"{Path(path).parent.name.rsplit('-', 1)[0]}/{Path(path).name}": value for path, value in content.items()}


def apart(found: Any, expected: Any) -> float:
    """The largest relative difference of two results of one kind; infinite where what must be equal is not."""
    if isinstance(expected, np.ndarray):
        if expected.dtype.kind != "f":
            return 0.0 if np.array_equal(found, expected) else np.inf
        return float(np.max(np.abs(found - expected) / (np.abs(expected) + NEAR_ZERO), initial=0.0))
    if isinstance(expected, list) and expected and "answer" in expected[0]:
        return 0.0 if [row["answer"] for row in found] == [row["answer"] for row in expected] else np.inf
    if isinstance(expected, list):
        pairs = [(one["loss"], other["loss"]) for one, other in zip(found, expected, strict=True) if "loss" in other]
        return max(abs(one - other) / abs(other) for one, other in pairs)
    return 0.0 if found == expected else np.inf


def main() -> None:
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="meshes") as name:
        folder = Path(name)
        torture.export_models(folder / "models")
        expected = run(folder, "1×1", 1, 1, 1)
        for name, shape in RUNS.items():
            found = run(folder, name, *shape)
            # Each process writes shards of its own: these are compared through what is found with them.
            files = [file for file in expected if shape[2] == 1 or not file.startswith("vectors/")]
            by_file = {file: apart(found[file], expected[file]) for file in files}
            file, most = max(by_file.items(), key=lambda item: item[1])
            print(f"{name}: {len(files)} files, furthest apart {most:.1e} ({file})", flush=True)
            worst = max(worst, most)
    sys.exit(int(worst > BOUND))


if __name__ == "__main__":
    main()
