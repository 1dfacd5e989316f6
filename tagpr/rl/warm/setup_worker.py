"""What Ray's raylet starts a worker with: has it forked from the fork server, or starts it as Ray's own file of this name does.

Arguments: Ray's file for workers, its arguments, and ``--language``, ``--serialized-runtime-env-context``. This process ends with
the worker, and with its status. (Ray looks for the file's name.)
"""

import json
import multiprocessing.resource_tracker
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from tagpr.rl.warm.process import WarmProcess, reach_server, run_script

CONTEXT = "--serialized-runtime-env-context="
LANGUAGE = "--language="


def environment_of(context: dict) -> dict[str, str] | None:
    """The variables that a runtime environment sets; None where it is more than that."""
    unusual = (
        context.get("command_prefix")
        or context.get("override_worker_entrypoint")
        or context.get("py_executable") not in (None, sys.executable)
    )
    variables: dict[str, str] = context.get("env_vars") or {}
    # Ray puts other variables in place of $NAME.
    return None if unusual or any("$" in value for value in variables.values()) else variables


def start_anew() -> None:
    """As Ray does it."""
    found = find_spec("ray")
    assert found is not None
    assert found.origin is not None
    file = Path(found.origin).parent / "_private" / "workers" / "setup_worker.py"
    os.execv(sys.executable, [sys.executable, str(file), *sys.argv[1:]])


def main() -> None:
    """See the head of this file."""
    path, *arguments = sys.argv[1:]
    given = {
        name: argument.removeprefix(name)
        for argument in arguments
        for name in (CONTEXT, LANGUAGE)
        if argument.startswith(name)
    }
    environment = environment_of(json.loads(given.get(CONTEXT, "{}")))
    if environment is None or given.get(LANGUAGE, "PYTHON") != "PYTHON":
        start_anew()
        return
    before = dict(os.environ)
    os.environ.update(environment)
    if not reach_server():
        os.environ.clear()
        os.environ.update(before)
        start_anew()
        return
    # Nothing of this process needs one.
    nothing = os.open(os.devnull, os.O_WRONLY)
    multiprocessing.resource_tracker.getfd = lambda: nothing
    # The worker need not read this file.
    del globals()["__file__"]
    passed = [argument for argument in arguments if not argument.startswith((CONTEXT, LANGUAGE))]
    worker = WarmProcess(target=run_script, args=(path, passed))
    try:
        worker.start()
    except (OSError, EOFError):
        start_anew()
    worker.join()
    sys.exit(worker.exitcode)


if __name__ == "__main__":
    # This folder, which a script gets and a worker would inherit.
    del sys.path[0]
    main()
