"""What lets pixels into memory."""

import threading

from service.gates import PixelBudget
from tests.service.conftest import wait_until


def test_planes_wait_for_room_and_a_larger_one_is_taken_alone():
    budget, order = PixelBudget(10), []

    def decode():
        with budget.taken(50):
            order.append("decoded")

    with budget.taken(6), budget.taken(4):
        thread = threading.Thread(target=decode)
        thread.start()
        wait_until(lambda: budget._changed._waiters)
        order.append("left")
    thread.join(20)
    assert order == ["left", "decoded"]
