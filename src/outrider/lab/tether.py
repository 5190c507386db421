"""`python -m outrider.lab.tether PARENT_PID COMMAND...`: become COMMAND, and die when the parent does.

Linux sends SIGKILL to a process that asked for it (PR_SET_PDEATHSIG) when its parent ends, even by kill -9. The wish
outlives exec. Started by `processes.py`; a fork hook would do the same, but is unsafe beside threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent_pid: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before we asked
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
