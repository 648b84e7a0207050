"""What this machine has, and what to do about what is missing: a table.

    anymal doctor
    anymal doctor json=true       # the same for programs: a list of rows
    python launch/doctor.py       # works in a checkout that is not installed, too

Each row says what, its state, what was found, and if there is something to do, what. The state is

    ok        it is there
    note      a run works without it, or with less
    missing   a run needs it

The exit code is 0 if nothing is missing (no GPU is a note), and 1 otherwise. Of tokens and logins it says only whether
there are any.
"""

import sys
from pathlib import Path


def start() -> None:
    """Run the program, for the command line."""
    from anymal.doctor.examine import main

    sys.exit(main(__doc__))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # where anymal is, if it is not installed
    start()
