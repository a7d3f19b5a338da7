"""The REST API of the controller, and its client.

    app.py       the routes; errors as RFC 9457 problems
    shapes.py    what goes in and out, as pydantic models: the OpenAPI document is made from them
    bodies.py    reading bodies: bounded, and JSON without duplicate keys or NaN
    asked.py     who asks, idempotency keys, ETags, rates
    streams.py   watches and events, for people and programs
    metrics.py   what /metrics says
    create.py    the routes that make networks; reading.py: a process that reads lines of long batches
    feed.py      the stream that agents follow; the doorbell that wakes it
    server.py    the `nestnet controller` process
    client.py    Client: the same from the other side; imports nothing of the rest

Look at it from a shell: `curl --unix-socket SOCKET http://nestnet/v1/ports | jq`, or /v1/openapi.json.
"""
