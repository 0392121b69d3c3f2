"""Claims: one process has one, it is renewed, and that of a process that is gone is taken over."""

import os
import threading
import time

import pytest

from hermesflow.runtime.claims import Claims
from hermesflow.runtime.files import InputError


def test_one_has_it_and_gives_it_back(tmp_path):
    mine, other = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    with mine.take("a") as is_mine, other.take("a") as is_others, other.take("b") as is_others_b:
        assert (is_mine, is_others, is_others_b) == (True, False, True)
    with other.take("a") as is_others:
        assert is_others
    assert os.listdir(tmp_path / "claims") == []  # no litter


def test_it_is_given_back_if_the_work_fails(tmp_path):
    claims = Claims(tmp_path)
    with pytest.raises(ZeroDivisionError), claims.take("a"):
        1 / 0  # noqa: B018
    with claims.take("a") as is_mine:
        assert is_mine


def test_one_that_is_renewed_stays(tmp_path):
    """Longer than a claim lives by itself."""
    mine, other = Claims(tmp_path, gone_after=0.6), Claims(tmp_path, gone_after=0.6)
    with mine.take("a") as is_mine:
        assert is_mine
        for _ in range(12):
            time.sleep(0.1)
            with other.take("a") as is_others:
                assert not is_others


def test_one_of_a_process_that_is_gone_is_taken_over(tmp_path):
    """And its late return does not give the new owner's away."""
    gone, other, third = (Claims(tmp_path, gone_after=60) for _ in range(3))
    with gone.take("a"):
        long_ago = time.time() - 1000
        os.utime(tmp_path / "a", (long_ago, long_ago))
        with other.take("a") as is_others:
            assert is_others and (tmp_path / "a").read_text() == other.owner
            with third.take("a") as is_thirds:
                assert not is_thirds
    assert not (tmp_path / "a").exists()
    with gone.take("a"):
        os.utime(tmp_path / "a", (long_ago, long_ago))
        taken = other.take("a")
        assert taken.__enter__()
    assert (tmp_path / "a").read_text() == other.owner  # gone's return left it alone
    taken.__exit__(None, None, None)


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "of one that is gone"])
def test_of_many_that_try_at_once_one_has_it(tmp_path, is_old):
    """And of an old claim too: whoever moves it away."""
    for number in range(20):
        name = f"part-{number}"
        if is_old:
            (tmp_path / name).write_text("someone")
            os.utime(tmp_path / name, (1, 1))
        start, end, won = threading.Barrier(8), threading.Barrier(8), []

        def work(name=name, start=start, end=end, won=won):
            claims = Claims(tmp_path)
            start.wait()
            with claims.take(name) as is_mine:
                won.append(is_mine)
                end.wait()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won.count(True) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        Claims(tmp_path / "file")
