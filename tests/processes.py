"""Fresh interpreters, for what can only be seen from the start or the end of a process."""

import os
import subprocess
import sys
import textwrap


def run_script(script, **environment):
    """What a script prints in a fresh interpreter; its failure is the test's."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, "the script failed; its output is above"
    return result.stdout


def environment_of(engine):
    """The environment variables that choose the engine in another process."""
    isa = {} if engine.isa is None else {"FASTATTN_ISA": engine.isa}
    return {"FASTATTN_BACKEND": engine.backend, **isa}
