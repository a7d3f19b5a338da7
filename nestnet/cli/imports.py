"""`nestnet import`: what others describe, as a network file on stdout."""

from __future__ import annotations

import sys

from nestnet.cli import files


def topology(file: str, machines: int) -> None:
    """Print the network file of a graph, and on stderr what was left out. Raises Rendered."""
    from nestnet.file.topology import MAX_BYTES, Refused, network, read, render

    try:
        imported = network(read(files.content(file, MAX_BYTES + 1), files.name(file)), machines)
    except Refused as error:
        raise files.Rendered(error, str(error)) from None
    for note in imported.notes:
        print(f"nestnet: {note}", file=sys.stderr)
    sys.stdout.write(render(imported))
