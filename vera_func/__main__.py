"""`python -m vera_func`: the command `vera-func`."""

import sys

from .cli.main import main


if __name__ == "__main__":
    sys.exit(main())
