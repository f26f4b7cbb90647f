"""``python -m resbackbone``, which torchrun can start as well."""

from resbackbone.cli import main

if __name__ == "__main__":
    main()
