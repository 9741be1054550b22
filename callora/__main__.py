"""`python -m callora`: the same as the `callora` command."""

from callora.cli import main

if __name__ == "__main__":
    main()
