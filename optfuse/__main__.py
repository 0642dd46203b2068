"""`python -m optfuse` is `optfuse`."""

from optfuse.cli import main

if __name__ == "__main__":
    main()
