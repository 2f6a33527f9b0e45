"""What systemd does to start a service that has sockets: hands them over as sd_listen_fds(3) says, and becomes it.

    python activate.py NUMBER,NUMBER PROGRAM ARGUMENT ...

It is run as a file, before the process is the daemon's: nothing of ours is imported here.
"""

import fcntl
import os
import sys

_FIRST = 3  # SD_LISTEN_FDS_START


def main() -> None:
    """The numbers are those of the sockets' descriptors, as they were inherited."""
    inherited = [int(number) for number in sys.argv[1].split(",")]
    aside = [fcntl.fcntl(number, fcntl.F_DUPFD, _FIRST + 2 * len(inherited)) for number in inherited]
    for number in inherited:
        os.close(number)
    for place, number in enumerate(aside, _FIRST):
        os.dup2(number, place)
        os.close(number)
    os.environ["LISTEN_FDS"] = str(len(inherited))
    os.environ["LISTEN_PID"] = str(os.getpid())
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
