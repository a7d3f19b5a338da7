"""Values -> tables. `tables.py` is the contract, `compiler.py` the function, `diff.py` what changes."""
