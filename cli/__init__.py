"""Floor 6, the command: ``loadstone demo | inspect | generate | list | tune | bench``.

Notable: only argparse is imported before a command is chosen, so that ``--help`` and mistakes answer at once.
"""

from .main import main

__all__ = ["main"]
