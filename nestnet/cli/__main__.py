"""The entry point: runs a command, and turns errors into one message on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

from nestnet.model.errors import Conflict, Invalid, NestnetError


def main() -> NoReturn:
    """Run the command line of this process, and end it."""
    from nestnet.cli.app import app

    try:
        app(prog_name="nestnet")
    except NestnetError as error:
        complain(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read us has seen enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except PermissionError as error:
        if os.geteuid() == 0:
            raise
        print(f"nestnet: {error}; this command changes the machine: run it as root", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"nestnet: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def complain(error: NestnetError) -> None:
    """Say on stderr what is wrong. Problems of a file were rendered with their lines: they stand as they are."""
    if isinstance(error, Invalid):
        from nestnet.cli.files import Rendered

        if isinstance(error, Rendered):
            print(error.text, file=sys.stderr)
            return
        for problem in error.problems:
            print(f"nestnet: {problem.pointer or '/'}: {problem.code}: {problem.message}", file=sys.stderr)
        return
    print(f"nestnet: {error}", file=sys.stderr)
    if isinstance(error, Conflict) and error.dependants:
        for dependant in error.dependants:
            if dependant not in str(error):
                print(f"  {dependant}", file=sys.stderr)


if __name__ == "__main__":
    main()
