import json
import math
import multiprocessing
import threading

import pytest

from hf_sparse24.kernels.autotune import Choice, Choices

COSTS = {(0, 1): 5.0, (1, 1): 2.0, (1, 4): 3.0, (2, 1): math.inf}


class Measured:
    """Counts what was measured."""

    def __init__(self, costs=COSTS):
        self.costs, self.calls = costs, []

    def candidates(self):
        return list(self.costs)

    def __call__(self, algorithm, split_k):
        self.calls.append((algorithm, split_k))
        return self.costs[algorithm, split_k]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "algorithms.json"


def find(path, key="H200|4096x4096|16", measured=None):
    measured = measured or Measured()
    return Choices(path).find(key, measured.candidates, measured), measured


def test_the_fastest_is_chosen_and_measured_once_on_a_machine(path):
    first, measured = find(path)
    assert first == Choice(1, 1, 2.0)
    assert measured.calls == list(COSTS)
    again, measured = find(path)
    assert again == first
    assert not measured.calls
    assert Choices(path).known("H200|4096x4096|16") == first
    assert Choices(path).known("another") is None


def test_another_key_is_measured_and_the_first_is_kept(path):
    find(path)
    find(path, "H200|4096x4096|32", Measured({(7, 1): 1.0}))
    choices = json.loads(path.read_text())["choices"]
    assert {key: choice["algorithm"] for key, choice in choices.items()} == {
        "H200|4096x4096|16": 1,
        "H200|4096x4096|32": 7,
    }


def test_a_library_that_refuses_everything(path):
    with pytest.raises(RuntimeError, match="No algorithm of the library runs H200"):
        find(path, measured=Measured({(0, 1): math.inf}))
    with pytest.raises(RuntimeError, match="No algorithm of the library runs H200"):
        find(path, measured=Measured({}))
    assert not path.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        '{"format": 2, "choices": {}}',
        '{"choices": {}}',
        '{"format": 1, "choices": {"key": {"algorithm": "fast", "split_k": 1, "microseconds": 1}}}',
        '{"format": 1, "choices": {"key": {"algorithm": 1, "split_k": 1, "microseconds": NaN}}}',
        '{"format": 1, "choices": {"key": 3}}',
        '{"format": 1',
    ],
)
def test_a_corrupt_or_foreign_file_is_ignored_with_a_warning(path, content, caplog):
    path.parent.mkdir()
    path.write_text(content)
    choice, measured = find(path)
    assert choice.algorithm == 1
    assert measured.calls
    assert "is not a file of tuned kernels" in caplog.text
    assert find(path)[0] == choice


def test_one_bad_entry_does_not_cost_the_others(path, caplog):
    good, bad = (
        {"algorithm": 4, "split_k": 2, "microseconds": 7},
        {"algorithm": 4, "split_k": 2, "microseconds": 10**400},
    )
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 1, "choices": {"good": good, "bad": bad}}))
    assert find(path, "good")[0] == Choice(4, 2, 7.0)
    assert find(path, "bad")[0] == Choice(1, 1, 2.0)
    assert "some are ignored" in caplog.text
    assert find(path, "good")[0] == Choice(4, 2, 7.0)


def test_a_file_that_is_not_text(path):
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)))
    assert find(path)[0].algorithm == 1


def test_a_cache_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    choice, _ = find(tmp_path / "file" / "algorithms.json")
    assert choice.algorithm == 1
    assert "cannot be written" in caplog.text


def test_threads_measure_once(path):
    choices, measured = Choices(path), Measured()
    threads = [threading.Thread(target=choices.find, args=("key", measured.candidates, measured)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured.calls == list(COSTS)


def add_ten(path, number):
    for index in range(10):
        find(path, f"{number} {index}")


def test_processes_lose_nothing_of_each_other(path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add_ten, args=(path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(json.loads(path.read_text())["choices"]) == 30
    assert [file.name for file in path.parent.iterdir() if "tmp" in file.name] == []
