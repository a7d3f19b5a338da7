"""Tables that run: in Python to be read, in Linux to be fast."""
