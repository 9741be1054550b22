"""`python -m callora`: the same as the `callora` command."""

import gc
import signal

# Calls make no cycles, so collecting finds next to nothing and stops them all. A pass looks at 9 000 objects at most, a
# hundredth of a second where they have left the caches; all of them, millions where vaults are many, hardly ever. It is
# said before anything is loaded, as passes over the modules take a tenth of that time.
gc.set_threshold(3_000, 2, 16_000)

# Ctrl-C while modules are imported ends the process there and then, when nothing has been started yet. As an exception
# it can be lost: raised in a callback of the import system it is printed and ignored.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from callora.cli.main import main  # noqa: E402 - after the lines that are about importing it

if __name__ == "__main__":
    main()
