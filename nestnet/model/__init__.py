"""What networks are and what a packet means in them: values and pure functions, no effects.

Start reading at `values.py` (the nouns), then `meaning.py` (what happens to a packet).
"""
