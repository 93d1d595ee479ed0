"""What every launch script shares: flags, one-line errors, exit codes (0 done, 1 failed, 2 bad usage or input)."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from radit_jax import processor, resident
from radit_jax.errors import InputError, TrainingDiverged

FAILED, BAD_INPUT = 1, 2
ROOT = Path(sys.argv[0]).resolve().parents[1]  # of the checkout: launch scripts lie one folder down
DEFAULT_CONFIG = "configs/radit.py"
sys.path.insert(0, str(ROOT))  # config files say `from configs import common`


def config_flag() -> Any:
    """--config=FILE[:variant] with --config.field=value overrides, and --workdir. `.value` of what is returned is the config."""
    flags.DEFINE_string("workdir", None, "Where artifacts go; default: config.workdir. Several processes share it.")
    flags.DEFINE_bool("distributed", None, "One of the processes that the environment (TPU pod, SLURM, GKE) describes; default: if so.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where no environment tells.")
    flags.DEFINE_integer("processes", None, "How many processes there are, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Which of them this is, from 0, with --coordinator.", lower_bound=0)
    flags.DEFINE_bool("quiet", False, "Nothing on stderr but errors.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all processes.", lower_bound=1)
    # No default here: it would be read, with its overrides, before errors can be told in one line.
    return config_flags.DEFINE_config_file("config", None, "A file with get_config(variant).", lock_config=True)


def pipeline(config: Any, *, dry: bool = False) -> Any:
    """The pipeline of the flags; `dry`: one that makes nothing.

    Without --config, a workdir is opened with the config that made it, and overrides go on top.
    """
    # Slow imports after the flags, so that a wrong flag is answered at once.
    from radit_jax import logbook
    from radit_jax.inputs import stored_config
    from radit_jax.pipeline import Pipeline

    if flags.FLAGS.quiet:
        os.environ[logbook.QUIET] = "1"  # what is started from here is quiet too
    _join()
    workdir = flags.FLAGS.workdir or config.value.workdir
    if any(re.match(r"--?config(=|$)", argument) for argument in sys.argv[1:]):
        return Pipeline(config.value, workdir, dry=dry)
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    return Pipeline(stored_config(workdir, config.value, overrides), workdir, dry=dry)


def _join() -> None:
    """Joins the other processes, if there are any."""
    from radit_jax import distributed, preemption

    given = {name: flags.FLAGS[name].value for name in ("coordinator", "processes", "process")}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise InputError(f"--{missing[0]} is missing: --coordinator, --processes and --process go together")
        cluster = distributed.from_environment(os.environ)
        wanted = cluster is not None if flags.FLAGS.distributed is None else flags.FLAGS.distributed
    else:
        cluster, wanted = distributed.Cluster(given["coordinator"], given["processes"], given["process"]), True
    if wanted:
        _keep_stdout_for_answers()
        distributed.join(cluster, flags.FLAGS.join_timeout)
        if not distributed.leads():
            sys.stdout = open(os.devnull, "w")  # all have the answers, one gives them
        preemption.install()  # once more: JAX has put a handler of its own


def _keep_stdout_for_answers() -> None:
    """What native code prints (Gloo says when it is connected) goes to stderr."""
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(answers, "w", buffering=1)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(positional arguments)`; errors of a person become one line on stderr and exit 2, failures one line and exit 1."""
    processor.ask_for_large_pages()
    resident.share_arenas()  # before there are threads
    logging.set_verbosity(logging.FATAL)  # orbax and grain report every array at INFO, and every error in each of their threads
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    processor.prepare()
    given = any(re.match(r"--?config(=|$)", argument) for argument in sys.argv[1:])
    default = [f"--config={ROOT / DEFAULT_CONFIG}"] if "config" in flags.FLAGS and not given else []
    try:
        arguments = flags.FLAGS([sys.argv[0], *default, *sys.argv[1:]])[1:]
    except SystemExit:  # --help
        raise
    except Exception as error:  # flags, config files and overrides raise whatever their reader raises
        sys.exit(_fail(_usage(error), BAD_INPUT))
    app.run(lambda _: sys.exit(guarded(main, arguments)), argv=sys.argv[:1])


def guarded(main: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """The exit code of `main`."""
    from radit_jax import distributed, preemption  # after the flags, as all slow imports

    resident.give_back_after_compiling()
    try:
        preemption.install()
        return main(arguments) or 0
    except InputError as error:
        code = _fail(str(error), BAD_INPUT)
    except (TrainingDiverged, OSError, MemoryError) as error:
        where = f" (in {flags.FLAGS.workdir or 'the workdir'})" if isinstance(error, OSError) and not error.filename else ""
        code = _fail(f"{type(error).__name__}: {error}{where}", FAILED)
    except KeyboardInterrupt:
        code = _fail("stopped; the same command goes on from here", FAILED)
    except preemption.Preempted:
        print("preempted: the same command goes on from here", file=sys.stderr, flush=True)
        code = 0
    except Exception as error:
        if distributed.count() == 1:
            raise
        if "JaxRuntimeError" not in type(error).__name__:
            traceback.print_exc()
        reason = str(error).strip().partition("\n")[0][:200]
        code = _fail(f"process {distributed.index()}: {reason} (another process may be gone; the same command goes on from here)", FAILED)
    distributed.leave(code)
    return code


def alone() -> None:
    """For scripts whose work is one process's."""
    from radit_jax import distributed

    if distributed.count() > 1:
        raise InputError(f"this script runs as one process, not as {distributed.count()}")


def no_more(arguments: list[str]) -> None:
    """For scripts that take flags alone."""
    if arguments:
        raise InputError(f"unexpected argument {arguments[0]!r}: this script takes flags alone (--help lists them)")


def _usage(error: Exception) -> str:
    """One line for a wrong flag or config field; ml_collections' own messages name near misses of a field."""
    message = str(error)
    if "Traceback" in message:  # a config file that raised: its last line is the reason
        message = message.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(message.split()).strip("'\"").replace("\\n", " ").replace("\\'", "'")
    return f"config has no field {text}" if isinstance(error, (AttributeError, KeyError)) else text


def _fail(line: str, code: int) -> int:
    print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    return code
