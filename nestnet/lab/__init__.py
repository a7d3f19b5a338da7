"""Labs: machines and workloads as namespaces on this computer, with the real controller and agents.

    nn-LAB             what the machines have between them: a plain bridge `wire`, or a router (wire.py)
    nn-LAB.m1          machine m1: `eth0` on the wire, unless `nic` says otherwise; its agent runs inside
    nn-LAB.port.17     the workload of a port on m1: `eth0`

Names of labs and machines are DNS labels, so they hold no dot, and the namespaces of one lab are never taken for
another's. Everything else is in two folders: /run/nestnet/LAB (state, logs, the controller's socket and store)
and /sys/fs/bpf/nestnet/LAB (pins). `state.py` says what is where, `up.py` makes it, `down.py` takes it away.
"""
