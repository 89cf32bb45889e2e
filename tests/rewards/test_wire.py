"""Frames: whole whatever their size, and never waited for longer than allowed."""

import os
import threading
from collections.abc import Iterator

import pytest

from megarl.rewards.wire import Channel, PipeClosed


class Late(Exception):
    pass


def give_up() -> None:
    raise Late


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    to_right, to_left = os.pipe(), os.pipe()
    left, right = Channel(to_left[0], to_right[1]), Channel(to_right[0], to_left[1])
    yield left, right
    left.close()
    right.close()


def test_frames_arrive_whole_and_in_order(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    frames = [b"", b"a", bytes(range(256)) * 20_000, b"last"]  # the third is far larger than a pipe holds
    sender = threading.Thread(target=lambda: [left.send(frame, give_up) for frame in frames])
    sender.start()
    assert [right.receive(give_up) for _ in frames] == frames
    sender.join()


def test_a_reader_and_a_writer_that_nobody_serves_give_up(ends: tuple[Channel, Channel]) -> None:
    left, _ = ends
    with pytest.raises(Late):
        left.receive(give_up)
    with pytest.raises(Late):
        left.send(bytes(1 << 20), give_up)


def test_a_closed_end_is_told_from_a_late_one(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    right.send(b"the last words", give_up)
    right.close()
    assert left.receive(give_up) == b"the last words"
    with pytest.raises(PipeClosed):
        left.receive(give_up)
    with pytest.raises(PipeClosed):
        left.send(b"x", give_up)


def test_a_frame_cut_short_is_no_frame(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    os.write(right._write_fd, b"\x09\0\0\0\0\0\0\0half")
    right.close()
    with pytest.raises(PipeClosed):
        left.receive(give_up)


def test_descriptors_are_not_passed_to_children(ends: tuple[Channel, Channel]) -> None:
    assert not any(os.get_inheritable(fd) for end in ends for fd in (end._read_fd, end._write_fd))
