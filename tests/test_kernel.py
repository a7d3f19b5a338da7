"""reference = kernel: the same tables, the same frames, byte for byte, through BPF_PROG_TEST_RUN (see twins.py).

In between the world changes, and what the kernel then holds must be what a machine new to it would have been given:
incremental = from scratch. Time passes: everything in the kernel's maps is made older. To look for longer, or again:

    NESTNET_EXAMPLES=20000 pytest tests/test_kernel.py [--hypothesis-seed=SEED]
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Step, chatter, conversations, dialogues, rounds
from twins import Operation, Teller, devices, play, recording

from nestnet.datapath.kernel import Kernel
from nestnet.model.values import CONNECTION_SHARE, World

pytestmark = pytest.mark.root
EXAMPLES = int(os.environ.get("NESTNET_EXAMPLES", "150"))
NAME = f"nnt-kernel-{os.getpid()}"

equality = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Bed:
    """The kernels of all machines, and who tells what they must do."""

    def __init__(self, kernels: dict[int, Kernel], teller: Teller) -> None:
        self.kernels, self.teller = kernels, teller

    def play(self, operations: Iterator[Operation]) -> int:
        return sum(play(operation, self.kernels) for operation in operations)

    def begin(self, world: World, share: int = CONNECTION_SHARE) -> None:
        self.teller.share = share
        self.play(iter([self.teller.forget()]))
        self.play(self.teller.become(world))

    def send(self, port: int, frame: bytes) -> int:
        """A frame all the way, as the reference says. Returns how many flows were composed."""
        return self.play(self.teller.through(port, frame, 0))


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with devices(NAME) as found, recording(NAME) as kernels:
        yield Bed(kernels, Teller(found))


@equality
@given(steps=conversations(), share=st.sampled_from([CONNECTION_SHARE, 2, 1]))
def test_the_kernel_does_the_same(steps: list[Step], share: int, bed: Bed) -> None:
    # Who has little share gets it back by the sweep alone.
    bed.teller.share = share
    bed.play(bed.teller.tell(steps, sweep=share != CONNECTION_SHARE or len(steps) % 2 == 0))


@equality
@given(steps=rounds(), seed=st.integers(0, 1 << 32))
def test_the_kernel_does_the_same_wherever_frames_get_far(steps: list[Step], seed: int, bed: Bed) -> None:
    """And nothing else with what broken or hostile workloads and machines make of them."""
    bed.teller.share = CONNECTION_SHARE
    bed.play(bed.teller.tell(steps, random.Random(seed)))


@equality
@given(steps=dialogues(), share=st.sampled_from([CONNECTION_SHARE, 2, 1]))
def test_the_kernel_does_the_same_to_those_who_answer(steps: list[Step], share: int, bed: Bed) -> None:
    bed.teller.share = share
    bed.play(bed.teller.tell(steps, sweep=share != CONNECTION_SHARE or len(steps) % 2 == 0))


@settings(equality, max_examples=max(1, EXAMPLES // 5))
@given(steps=chatter())
def test_the_kernel_answers_the_same(steps: list[Step], bed: Bed) -> None:
    bed.play(bed.teller.tell(steps))
