"""python -m minisimclr"""

from .cli import main

main()
