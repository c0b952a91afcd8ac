"""``python -m screformer`` is the command ``screformer``; launchers of several processes start it so."""

from .cli import main

if __name__ == "__main__":
    main()
