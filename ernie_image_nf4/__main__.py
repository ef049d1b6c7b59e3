"""``python -m ernie_image_nf4``."""

from .cli import main

if __name__ == "__main__":
    main()
