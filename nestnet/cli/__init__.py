"""The command: nouns show, verbs change. `app.py` has every command, the other modules what they do.

Nothing that takes long to import is imported at the top of a module here: `nestnet --help` answers in under 150 ms.
"""
