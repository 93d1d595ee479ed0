"""One program given to the TPU compiler, in a process of its own: `python -m radit_jax.planning.compiler < request.json`.

Within seconds the compiler has laid the program out (fused, partitioned, scheduled, every buffer placed) and refuses it if it does not fit;
then it generates code for a minute or more. All that a plan says is in what it writes when the layout is done, so that a search may stop
there. A process can be stopped, and takes the compiler's own messages with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from radit_jax.errors import InputError
from radit_jax.planning import topology

OPTIMIZED = "*after_optimizations.txt"  # the module, as it is laid out
BUFFERS = "*after_optimizations-buffer-assignment.txt"
FITTING = "*after_buffer_assignment.txt"  # written only when the buffers fit
LOOK_S = 0.2  # between two looks for it
REFUSED = 3  # exit code


def compile_for(request: dict[str, Any], *, full: bool) -> dict[str, Any]:
    """What the process says of the program (`_about`), with the texts `module` and `buffers`, whether it `fits`, and `seconds`.

    `request` has the program's name, config, topology and settings. With `full`, code is generated too.
    InputError for what cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        command = [sys.executable, "-m", __name__]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            try:
                process.stdin.write(json.dumps({**request, "folder": folder}))
                process.stdin.close()
                about = json.loads(process.stdout.readline() or "null")
                began = time.monotonic()
                while about and process.poll() is None and (full or not _text(folder, FITTING)):
                    time.sleep(LOOK_S)
                if about and process.poll() is None:
                    time.sleep(5 * LOOK_S)  # the file is there when its writing begins
                seconds = time.monotonic() - began
            finally:
                process.kill()
        if about and "error" in about:
            raise InputError(about["error"])
        if about is None or process.returncode not in (0, -9) or not _text(folder, OPTIMIZED):
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.strip()]
            raise InputError(f"{request['name']} on {request['topology']}: the compiler refuses it ({said[-1] if said else 'silently'})")
        found = {"module": _text(folder, OPTIMIZED), "buffers": _text(folder, BUFFERS), "fits": bool(_text(folder, FITTING))}
    return {**about, **found, "full": full, "seconds": round(seconds, 1)}


def _text(folder: str, pattern: str) -> str:
    """The largest file of this pattern (a program may be compiled in parts); "" where there is none yet."""
    return max((path.read_text() for path in Path(folder).glob(pattern)), key=len, default="")


# -- the process ------------------------------------------------------------------------------------------------------------------------


def main() -> int:
    topology.prepare_environment()
    import jax

    from radit_jax.planning import programs

    request = json.load(sys.stdin)
    c, where = ConfigDict(request["config"]), topology.parse(request["topology"])
    try:
        mesh = topology.mesh(where, c.mesh.data, c.mesh.model)
        program = programs.build(request["name"], c, mesh, programs.Settings(**request["settings"]))
        traced = program.trace()
    except InputError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 0
    print(json.dumps(_about(program, traced, mesh)), flush=True)
    with jax.set_mesh(program.mesh):
        lowered = traced.lower()
    try:
        lowered.compile(compiler_options={"xla_dump_to": request["folder"], "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        if "out of memory" not in str(error):
            print(str(error).splitlines()[0], file=sys.stderr)
            return REFUSED
    return 0


def _about(program: Any, traced: Any, mesh: Any) -> dict[str, Any]:
    """What is known before it is compiled."""
    from radit_jax.planning import flops

    operations = flops.of(traced.jaxpr, program.endless)
    copies = mesh.size // program.mesh.size  # of a program that each host runs by itself
    return {
        "note": program.note,
        "data": program.mesh.shape["data"],
        "model": program.mesh.shape["model"],
        "endless": program.endless,
        "counted": copies * operations.counted,
        "passed": copies * operations.passed,
        "amount": program.amount,
        "unit": program.unit,
        "calls": program.calls,
        "asked": program.asked,
    }


if __name__ == "__main__":
    sys.exit(main())
