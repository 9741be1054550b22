"""`python -m callora`: the same as the `callora` command."""

import signal

# Ctrl-C while modules are imported ends the process there and then, when nothing has been started yet. As an exception
# it can be lost: raised in a callback of the import system it is printed and ignored.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from callora.cli import main  # noqa: E402 - after the line that is about importing it

if __name__ == "__main__":
    main()
