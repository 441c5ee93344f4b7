import pytest
import torch

from hf_ctxseg import memory_budget
from hf_ctxseg.memory_budget import available_memory, default_budget, format_bytes, measured_need, parse_bytes


@pytest.mark.parametrize(
    ("text", "amount"),
    [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5g", 1_500_000_000), ("64KiB", 65536), (4096, 4096), ("7b", 7)],
)
def test_amounts_are_read_as_people_write_them(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "2 GiB RAM", "1e9"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="is no amount of memory: give bytes, or a number and its unit such as 2GiB"):
        parse_bytes(text)


def test_amounts_are_written_with_their_unit():
    assert [format_bytes(amount) for amount in (2 << 30, 1.5 * 2**20, 512)] == ["2.0 GiB", "1.5 MiB", "0.5 KiB"]


@pytest.mark.parametrize("inference", [True, False])
def test_the_need_is_that_of_all_tensors_alive_at_once(inference):
    def look():
        first = torch.zeros(1 << 18)  # 1 MiB
        second = first + 1
        view = second[5:]
        view += 1
        del first
        third = second * 2
        del second, view
        return third.sqrt()

    with torch.inference_mode(inference):
        assert measured_need(look) == 2 * 2**20 * 3 // 2
        assert measured_need(lambda: None) == 0


def test_the_need_does_not_depend_on_what_was_there_before():
    before = torch.zeros(1 << 18)
    assert measured_need(lambda: before.view(2, -1)[0].add_(1)) == 0
    assert measured_need(lambda: before + 1) == 2**20 * 3 // 2


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    free = available_memory()
    monkeypatch.setattr(memory_budget, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("600000000\n")
    (tmp_path / "memory.stat").write_text("anon 500000000\ninactive_file 100000000\n")
    for limit, expected in (("1000000000", 500_000_000), ("500000000", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert available_memory() == min(free, expected)
        assert default_budget(torch.device("cpu")) == available_memory() // 2
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > 500_000_000
