"""``python -m swath.cli``."""

from swath.cli import main

if __name__ == "__main__":
    main()
