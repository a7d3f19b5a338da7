"""Makes one machine so: links, attachments, the feed, and the loop that turns them into the kernel's tables.

The only code that touches a machine. Start reading at `agent.py`.
"""
